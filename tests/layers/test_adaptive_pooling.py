"""Pooling to a given size against torch's: sizes that do not divide, ties, drawn and given windows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

import equivalence as eq
from equivalence.errors import InputError
from equivalence.layers.adaptive_pooling import parts
from tests.layers.sides import assert_translates, normal
from tests.layers.test_pooling import callable_in_torch, frameworks, shapes, tied


@given(st.integers(1, 60), st.integers(1, 60))
def test_parts_are_torch_s(size: int, count: int) -> None:
    x = torch.arange(size, dtype=torch.float64).reshape(1, 1, size)
    places, counts = parts(size, count)
    assert np.array_equal(-nn.AdaptiveMaxPool1d(count)(-x).flatten(), places[:, 0])
    assert np.array_equal(nn.AdaptiveMaxPool1d(count)(x).flatten(), places[:, 0] + counts - 1)
    assert np.array_equal(places[:, -1], places[:, 0] + counts - 1)


@settings(max_examples=10)
@given(st.data(), st.integers(1, 3), st.sampled_from(["AdaptiveAvgPool", "AdaptiveMaxPool"]), frameworks)
def test_adaptive_pool(data: st.DataObject, axes: int, kind: str, to: str) -> None:
    size = st.integers(1, 9) if axes == 1 else st.one_of(st.none(), st.integers(1, 9))
    options = {"return_indices": data.draw(st.booleans())} if kind == "AdaptiveMaxPool" else {}
    module = getattr(nn, f"{kind}{axes}d")(tuple(data.draw(size) for _ in range(axes)), **options)
    assert_translates(module, normal(*data.draw(shapes(axes))), frameworks=(to,))


def test_the_first_of_tied_values_takes_the_gradient() -> None:
    for indices in (False, True):
        module = nn.AdaptiveMaxPool2d((4, 3), return_indices=indices)
        assert_translates(module, tied(2, 3, 7, 8), moved=(), frameworks=("nnx",))


@pytest.mark.parametrize("kind", [nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d])
def test_empty_batches_and_sizes(kind: Any) -> None:
    for size, shape in ((2, (0, 3, 4, 5)), (0, (2, 3, 4, 5)), ((0, 2), (3, 4, 5))):
        x = np.zeros(shape, np.float32)
        assert eq.translate(kind(size))(x).shape == tuple(kind(size)(torch.tensor(x)).shape)


@settings(max_examples=8)
@given(st.data(), st.integers(2, 3), st.booleans(), frameworks)
def test_fractional_pool(data: st.DataObject, axes: int, train: bool, to: str) -> None:
    kernel = tuple(data.draw(st.integers(1, 3)) for _ in range(axes))
    x = normal(*data.draw(shapes(axes, 9)))
    if data.draw(st.booleans()):
        options: dict[str, Any] = {"output_size": tuple(data.draw(st.integers(1, 4)) for _ in range(axes))}
    else:
        options = {"output_ratio": tuple(data.draw(st.sampled_from([0.3, 0.5, 0.75])) for _ in range(axes))}
    options |= {"return_indices": data.draw(st.booleans())}
    if data.draw(st.booleans()):
        batch = x.shape[0] if x.ndim == axes + 2 else 1
        uniform = np.random.default_rng(axes).random((batch + 1, 3, axes), np.float32)
        options |= {"_random_samples": torch.tensor(uniform)}
    module = getattr(nn, f"FractionalMaxPool{axes}d")(kernel, **options)
    assume(callable_in_torch(module, x))
    assert_translates(module, x, frameworks=(to,), train=train, moved=["in.args.0"])


def test_fractional_windows_of_tied_values() -> None:
    samples = torch.tensor([[[0.3, 0.8], [0.9, 0.1], [0.5, 0.5]]])
    module = nn.FractionalMaxPool2d(3, output_size=(4, 3), return_indices=True, _random_samples=samples)
    assert_translates(module, tied(1, 3, 9, 8), moved=())


def test_windows_are_drawn_anew_at_each_call_in_eval_mode_too() -> None:
    module, x = nn.FractionalMaxPool2d(2, output_size=4).eval(), normal(1, 3, 17, 19)
    for to in ("nnx", "linen"):
        made = eq.translate(module, to=to)
        assert not np.array_equal(made(x), made(x))


REFUSED: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "a negative size": (nn.AdaptiveAvgPool2d(-1), (1, 2, 4, 4)),
    "no size": (nn.AdaptiveMaxPool2d(None), (1, 2, 4, 4)),
    "no size for one axis": (nn.AdaptiveAvgPool1d((None,)), (1, 2, 4)),
    "a size too many": (nn.AdaptiveAvgPool2d((2, 2, 2)), (1, 2, 4, 4)),
    "a size too few": (nn.AdaptiveMaxPool3d((2, 2)), (1, 2, 4, 4, 4)),
    "too many axes": (nn.AdaptiveAvgPool1d(2), (1, 1, 2, 4)),
    "an empty axis": (nn.AdaptiveAvgPool2d(2), (1, 2, 0, 4)),
    "no channels": (nn.AdaptiveMaxPool1d(2), (2, 0, 4)),
    "windows that do not fit": (nn.FractionalMaxPool2d(3, output_size=5), (1, 2, 7, 6)),
    "samples of other channels": (nn.FractionalMaxPool2d(2, 2, _random_samples=torch.rand(1, 3, 2)), (1, 2, 7, 6)),
    "samples of other axes": (nn.FractionalMaxPool3d(2, 2, _random_samples=torch.rand(1, 2, 2)), (1, 2, 7, 6, 5)),
    "samples of too few": (nn.FractionalMaxPool2d(2, 2, _random_samples=torch.rand(1, 2, 2)), (2, 2, 7, 6)),
    "a fractional pool of too few axes": (nn.FractionalMaxPool2d(2, 2), (7, 6)),
}


@pytest.mark.parametrize(("module", "shape"), REFUSED.values(), ids=REFUSED)
def test_what_torch_refuses_is_refused(module: nn.Module, shape: tuple[int, ...]) -> None:
    x = np.zeros(shape, np.float32)
    with pytest.raises((RuntimeError, ValueError, TypeError, IndexError)):
        module(torch.tensor(x))
    with pytest.raises(InputError):
        eq.translate(module)(x)
