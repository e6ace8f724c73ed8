"""Planted faults in upsampling: jax.image's conventions, steps, corners and kernels. All caught."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
from torch import nn

from equivalence.layers import resizing
from tests.layers.sides import disagree, normal

HERE = "equivalence.layers.resizing"
resized, cubic = resizing.resized, resizing.cubic


def by_jax(method: str, antialias: bool = True) -> Callable[..., Any]:
    """jax.image.resize in place of ours."""

    def resize(x: Any, sizes: Any, *_: Any) -> Any:
        return jax.image.resize(x, (len(x), *sizes, x.shape[-1]), method, antialias=antialias)

    return resize


def extrapolated(size: int, count: int, step: Any, align_corners: bool) -> Any:
    """Linear without the borders held."""
    at = resizing._centres(count, step, align_corners)
    place = np.clip(np.floor(at).astype(int), 0, size - 2)
    return np.stack([place, place + 1], 1), np.stack([1 - (at - place), at - place], 1)


def wrapped(size: int, count: int, step: Any, align_corners: bool) -> Any:
    """Cubic whose places go round."""
    places, weights = cubic(size, count, step, align_corners)
    inner = places[:, 1:2] + np.arange(-1, 3)
    return inner % size, weights


DOWN, UP = normal(1, 2, 9, 8), normal(1, 2, 4, 5)
FAULTS: dict[str, tuple[nn.Module, np.ndarray, str, Any]] = {
    "antialiased": (nn.Upsample((4, 3), mode="bilinear"), DOWN, "resized", by_jax("linear")),
    "cubic antialiased": (nn.Upsample((4, 3), mode="bicubic"), DOWN, "resized", by_jax("cubic")),
    "cubic of jax, a = -0.5": (nn.Upsample((7, 9), mode="bicubic"), UP, "resized", by_jax("cubic", False)),
    "a = -0.5": (nn.Upsample((7, 9), mode="bicubic"), UP, "CUBIC", -0.5),
    "nearest from half pixels": (nn.Upsample((3, 4)), DOWN, "resized", by_jax("nearest")),
    "nearest-exact as nearest": (
        nn.Upsample((3, 4), mode="nearest-exact"),
        DOWN,
        "resized",
        lambda x, sizes, mode, align, factors: resized(x, sizes, "nearest", align, factors),
    ),
    "corners aligned": (
        nn.Upsample(scale_factor=2, mode="bilinear"),
        UP,
        "resized",
        lambda x, sizes, mode, align, factors: resized(x, sizes, mode, True, factors),
    ),
    "corners not aligned": (nn.UpsamplingBilinear2d(scale_factor=2), UP, "resized", by_jax("linear", False)),
    "steps of the sizes for those of the factors": (
        nn.Upsample(scale_factor=1.7, mode="bilinear"),
        UP,
        "resized",
        lambda x, sizes, mode, align, factors: resized(x, sizes, mode, align),
    ),
    "nearest steps of the sizes for those of the factors": (
        nn.Upsample(scale_factor=1.7),
        UP,
        "resized",
        lambda x, sizes, mode, align, factors: resized(x, sizes, mode, align),
    ),
    "steps of the factors though recomputed": (
        nn.Upsample(scale_factor=1.7, mode="bilinear", recompute_scale_factor=True),
        UP,
        "resized",
        lambda x, sizes, mode, align, factors: resized(x, sizes, mode, align, (1.7, 1.7)),
    ),
    "borders extrapolated": (nn.Upsample((7, 9), mode="bilinear"), UP, "linear", extrapolated),
    "borders that go round": (nn.Upsample((7, 9), mode="bicubic"), UP, "cubic", wrapped),
    "area as linear": (nn.Upsample((4, 3), mode="area"), DOWN, "resized", by_jax("linear", False)),
    "axes exchanged": (
        nn.Upsample(scale_factor=(1.3, 1.9), mode="bilinear"),
        UP,
        "resized",
        lambda x, sizes, mode, align, factors: resized(x, sizes, mode, align, factors[::-1]),
    ),
    "the gradient of the output's own places": (
        nn.Upsample(scale_factor=2.015),
        normal(1, 2, 50),
        "_graded",
        lambda x, forward, backward: forward(x),
    ),
    "places as in small images": (
        nn.Upsample(scale_factor=(2.015, 1.3)),
        normal(1, 1, 50, 30),
        "SMALL",
        10**9,
    ),
}


@pytest.mark.parametrize(("module", "x", "name", "fault"), FAULTS.values(), ids=FAULTS)
def test_a_fault(module: nn.Module, x: np.ndarray, name: str, fault: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{HERE}.{name}", fault)
    assert disagree(module, x)


@pytest.mark.parametrize(("module", "x", "name", "fault"), FAULTS.values(), ids=FAULTS)
def test_the_same_without_it(module: nn.Module, x: np.ndarray, name: str, fault: Any) -> None:
    assert disagree(module, x) == {}


def test_linear_by_jax_without_antialiasing_is_torch_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{HERE}.resized", by_jax("linear", antialias=False))
    for module, x in ((nn.Upsample((7, 9), mode="bilinear"), UP), (nn.Upsample((4, 3), mode="bilinear"), DOWN)):
        assert disagree(module, x) == {}
