"""Layers that rearrange against torch's: nothing is rounded, so every number is the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn

import equivalence as eq
from equivalence.errors import InputError
from tests.layers.sides import FRAMEWORKS, assert_translates, normal

SIZES = st.lists(st.integers(0, 4), max_size=5).map(tuple)
MODULES = st.one_of(
    st.builds(nn.Flatten, st.integers(-3, 3), st.integers(-3, 3)),
    st.builds(
        nn.Unflatten,
        st.integers(-3, 3),
        st.lists(st.sampled_from((-1, 0, 1, 2, 3)), min_size=1, max_size=3).map(tuple),
    ),
    st.builds(nn.PixelShuffle, st.integers(0, 2)),
    st.builds(nn.PixelUnshuffle, st.integers(0, 2)),
    st.builds(nn.ChannelShuffle, st.integers(0, 3)),
)


@given(MODULES, SIZES, st.sampled_from(FRAMEWORKS))
@example(nn.Flatten(0), (), "nnx")
@example(nn.Unflatten(1, (2, -1)), (3, 4), "linen")
@example(nn.Unflatten(1, (0, -1)), (3, 0), "nnx")
@example(nn.PixelShuffle(2), (2, 4, 1, 3), "nnx")
@example(nn.PixelShuffle(2), (2, 3, 8, 1, 3), "linen")
@example(nn.PixelUnshuffle(2), (3, 2, 4), "linen")
@example(nn.ChannelShuffle(2), (3, 4, 1), "nnx")
@example(nn.ChannelShuffle(3), (2, 3, 4, 1, 2), "linen")
def test_any_shape_or_both_refuse(module: nn.Module, shape: tuple[int, ...], to: str) -> None:
    x = np.arange(np.prod(shape, dtype=int)).reshape(shape)
    try:
        wanted = module(torch.tensor(x))
    except (RuntimeError, IndexError):
        with pytest.raises((ValueError, InputError)):
            eq.translate(module, to=to)(x)
        return
    ours = np.asarray(eq.translate(module, to=to)(x))
    assert ours.shape == wanted.shape
    np.testing.assert_array_equal(ours, wanted.numpy())


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.Flatten(1, 2), (2, 3, 4, 5)),
        (nn.Unflatten(-1, torch.Size((2, -1))), (3, 4)),
        (nn.PixelShuffle(2), (2, 12, 3, 5)),
        (nn.PixelUnshuffle(3), (2, 3, 6)),
        (nn.ChannelShuffle(3), (2, 6, 4)),
    ],
)
def test_gradients(module: Any, shape: tuple[int, ...]) -> None:
    assert_translates(module, normal(*shape), frameworks=("nnx",))
