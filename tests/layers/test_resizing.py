"""Upsampling against torch's: every mode, sizes and factors that round, kernels that round otherwise."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

import equivalence as eq
from equivalence.errors import InputError
from equivalence.layers.resizing import nearest_large, nearest_small
from tests.layers.sides import assert_translates, normal
from tests.layers.test_pooling import callable_in_torch, frameworks

MODES = {"nearest": 0, "nearest-exact": 0, "area": 0, "linear": 1, "bilinear": 2, "bicubic": 2, "trilinear": 3}


@settings(max_examples=8)
@given(st.data(), st.sampled_from(list(MODES)), frameworks)
def test_upsample(data: st.DataObject, mode: str, to: str) -> None:
    axes = MODES[mode] or data.draw(st.integers(1, 3))
    shape = (2, 3, *(data.draw(st.integers(1, 7)) for _ in range(axes)))
    options: dict[str, Any] = {"mode": mode}
    if data.draw(st.booleans()):
        options["size"] = tuple(data.draw(st.integers(1, 11)) for _ in range(axes))
    else:
        options["scale_factor"] = tuple(data.draw(st.integers(20, 300)) / 100 for _ in range(axes))
        options["recompute_scale_factor"] = data.draw(st.sampled_from([None, False, True]))
    if mode in ("linear", "bilinear", "bicubic", "trilinear"):
        options["align_corners"] = data.draw(st.sampled_from([None, False, True]))
    module, x = nn.Upsample(**options), normal(*shape)
    assume(callable_in_torch(module, x) and module(torch.tensor(x)).numel())
    assert_translates(module, x, frameworks=(to,))


@pytest.mark.parametrize(
    "module",
    [nn.UpsamplingNearest2d((3, 9)), nn.UpsamplingNearest2d(scale_factor=2), nn.UpsamplingBilinear2d(scale_factor=1.7)],
    ids=str,
)
def test_the_older_classes(module: nn.Module) -> None:
    assert_translates(module, normal(2, 3, 5, 7))


@settings(max_examples=300)
@given(st.data(), st.integers(1, 70), st.booleans(), st.integers(1, 3), st.sampled_from([np.float32, np.float64]))
def test_nearest_reads_the_places_of_torch_s_kernels(
    data: st.DataObject, size: int, exact: bool, axes: int, real: Any
) -> None:
    factor = data.draw(st.one_of(st.none(), st.integers(20, 3000).map(lambda n: n / 1000)))
    count = data.draw(st.integers(1, 100)) if factor is None else int(size * factor)
    assume(count > 0)
    wide = 2 if axes < 3 else 1
    x = torch.arange(size, dtype=torch.from_numpy(np.zeros(1, real)).dtype)
    x = x.reshape(1, 1, size, *[1] * (axes - 1)).repeat(1, 1, 1, *[wide] * (axes - 1)).requires_grad_()
    asked: dict[str, Any] = {"size": (count, *[wide] * (axes - 1))}
    if factor is not None:
        asked = {"scale_factor": (factor, *[1.0] * (axes - 1))}
    y = nn.functional.interpolate(x, **asked, mode="nearest-exact" if exact else "nearest")
    small = nearest_small(size, count, factor, exact)
    forward = small if axes == 2 and count + wide <= 128 else nearest_large(size, count, factor, exact, real)
    assert np.array_equal(y.detach().reshape(count, -1)[:, 0], forward)
    weights = torch.arange(1, count + 1).square()
    (y.reshape(count, -1)[:, 0] * weights).sum().backward()
    expected = np.bincount(small, weights.numpy(), size)
    assert x.grad is not None
    assert np.array_equal(x.grad.reshape(size, -1)[:, 0], expected.astype(real))


EDGES: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "an output twice as large by another factor: the gradient reads other places": (
        nn.Upsample(scale_factor=2.015),
        (1, 2, 50),
    ),
    "an output as large by another factor": (nn.Upsample(scale_factor=1.19), (1, 2, 5)),
    "the same, interpolated: a copy": (nn.Upsample(scale_factor=1.19, mode="bilinear"), (1, 2, 5, 4)),
    "the same, cubic: no copy, but its gradient is": (nn.Upsample(scale_factor=1.19, mode="bicubic"), (1, 2, 5, 4)),
    "a large image, which another kernel reads": (nn.Upsample(scale_factor=(2.015, 1.3)), (1, 1, 50, 30)),
    "a place that float32 rounds up": (nn.Upsample((82, 1)), (1, 1, 2, 3)),
    "one output, corners aligned": (nn.Upsample((1, 3), mode="bilinear", align_corners=True), (1, 2, 5, 4)),
    "one input": (nn.Upsample((4, 3), mode="bicubic"), (1, 2, 1, 1)),
}


@pytest.mark.parametrize(("module", "shape"), EDGES.values(), ids=EDGES)
def test_edges(module: nn.Module, shape: tuple[int, ...]) -> None:
    assert_translates(module, normal(*shape), frameworks=("nnx",))


@pytest.mark.parametrize("mode", ["nearest", "bilinear", "bicubic", "area"])
def test_an_empty_batch(mode: str) -> None:
    x = np.zeros((0, 3, 4, 5), np.float32)
    assert eq.translate(nn.Upsample((3, 7), mode=mode))(x).shape == (0, 3, 3, 7)


REFUSED: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "neither size nor factor": (nn.Upsample(), (1, 2, 4, 4)),
    "both": (nn.Upsample(3, 2), (1, 2, 4, 4)),
    "a factor to recompute without one": (nn.Upsample(3, recompute_scale_factor=True), (1, 2, 4, 4)),
    "nearest with corners": (nn.Upsample(3, align_corners=True), (1, 2, 4, 4)),
    "lanczos, which has to antialias": (nn.Upsample(3, mode="lanczos"), (1, 2, 4, 4)),
    "an unknown mode": (nn.Upsample(3, mode="cubic"), (1, 2, 4, 4)),
    "linear over two axes": (nn.Upsample(3, mode="linear"), (1, 2, 4, 4)),
    "bilinear without a batch": (nn.Upsample(3, mode="bilinear"), (2, 4, 4)),
    "sizes for three axes": (nn.Upsample((3, 4, 5)), (1, 2, 4, 4)),
    "one factor in a tuple": (nn.Upsample(scale_factor=(1.5,)), (1, 2, 4, 4)),
    "a size of 0": (nn.Upsample((0, 3)), (1, 2, 4, 4)),
    "a factor to nothing": (nn.Upsample(scale_factor=0.1), (1, 2, 4, 4)),
    "an empty axis": (nn.Upsample(3), (1, 2, 0, 4)),
    "no channels": (nn.Upsample(3, mode="bilinear"), (1, 0, 4, 4)),
    "too few axes": (nn.Upsample(3), (4, 4)),
    "too many": (nn.Upsample(3), (1, 1, 2, 2, 2, 2)),
}


@pytest.mark.parametrize(("module", "shape"), REFUSED.values(), ids=REFUSED)
def test_what_torch_refuses_is_refused(module: nn.Module, shape: tuple[int, ...]) -> None:
    x = np.zeros(shape, np.float32)
    with pytest.raises((RuntimeError, ValueError, NotImplementedError)):
        module(torch.tensor(x))
    with pytest.raises(InputError):
        jax.jit(eq.translate(module))(x)
