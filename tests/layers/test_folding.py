"""Unfold and Fold against torch's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import equivalence as eq
from equivalence.errors import InputError
from tests.layers.sides import FRAMEWORKS, assert_translates, normal

few = settings(max_examples=max(1, settings().max_examples // 5))
LEADS = st.sampled_from(((2, 3), (3,), (0, 2), (1, 1)))


def pairs(least: int, most: int) -> st.SearchStrategy[tuple[int, int]]:
    return st.tuples(st.integers(least, most), st.integers(least, most))


@few
@given(st.tuples(pairs(1, 3), pairs(1, 2), pairs(0, 3), pairs(1, 3)), pairs(1, 6), LEADS, st.sampled_from(FRAMEWORKS))
def test_any_patches_or_both_refuse(
    how: tuple[tuple[int, int], ...], size: tuple[int, int], lead: tuple[int, ...], to: str
) -> None:
    unfold, fold, x = nn.Unfold(*how), nn.Fold(size, *how), normal(*lead, *size)
    try:
        patches = unfold(torch.tensor(x))
    except RuntimeError:
        for module, given_ in ((unfold, x), (fold, np.zeros((*lead[:-1], lead[-1] * how[0][0] * how[0][1], 1)))):
            with pytest.raises(ValueError, match="does not fit"):
                eq.translate(module, to=to)(given_)
        return
    assert_translates(unfold, x, frameworks=(to,))
    assert_translates(fold, normal(*patches.shape), frameworks=(to,))


def test_whole_numbers_for_pairs() -> None:
    assert_translates(nn.Unfold(2, 2, 1, 3), normal(2, 3, 6, 5), frameworks=("nnx",))
    assert_translates(nn.Fold(5, 2, 2, 1, 3), normal(2, 12, 4), frameworks=("linen",))


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.Unfold(2), (2, 3)),
        (nn.Unfold(2), (1, 2, 3, 4, 5)),
        (nn.Unfold(2, padding=1), (2, 3, 0, 4)),
        (nn.Unfold(2, padding=-1), (2, 3, 6, 6)),
        (nn.Unfold(2, stride=0), (2, 3, 6, 6)),
        (nn.Fold((3, 4), 2), (2, 12, 5)),
        (nn.Fold((3, 4), 2), (2, 11, 6)),
        (nn.Fold((3, 4), 2), (12,)),
        (nn.Fold((3, 4), 5), (2, 25, 1)),
    ],
)
def test_both_sides_refuse(module: nn.Module, shape: tuple[int, ...]) -> None:
    with pytest.raises((RuntimeError, IndexError)):
        module(torch.zeros(shape))
    for to in FRAMEWORKS:
        with pytest.raises((ValueError, InputError)):
            eq.translate(module, to=to)(np.zeros(shape, np.float32))
