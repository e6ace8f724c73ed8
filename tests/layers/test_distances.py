"""CosineSimilarity and PairwiseDistance against torch's, zero vectors and equal ones included."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import equivalence as eq
from tests.layers.sides import FRAMEWORKS, assert_translates, normal

FEW = settings(max_examples=max(settings.default.max_examples // 2, 1))  # each example compiles two programs
SHAPES = [
    ((4, 5, 3), (4, 5, 3)),
    ((4, 5, 3), (1, 5, 3)),
    ((5, 3), (4, 5, 3)),
    ((0, 5, 3), (5, 3)),
    ((4, 1, 3), (4, 5, 1)),
]


@FEW
@given(st.sampled_from(SHAPES), st.integers(-3, 2), st.sampled_from([1e-8, 0.7]), st.sampled_from(FRAMEWORKS))
def test_cosine_similarity(shapes: tuple[tuple[int, ...], ...], dim: int, eps: float, to: str) -> None:
    assert_translates(nn.CosineSimilarity(dim, eps), *map(normal_of, shapes, (1, 2)), frameworks=[to])


@FEW
@given(
    st.sampled_from([*SHAPES, ((5,), (5,))]),
    st.sampled_from([0.0, 0.5, 1, 2, 3.5, np.inf, -np.inf, -1.0]),
    st.sampled_from([1e-6, 0.3]),
    st.booleans(),
    st.sampled_from(FRAMEWORKS),
)
def test_pairwise_distance(shapes: tuple[tuple[int, ...], ...], p: float, eps: float, keepdim: bool, to: str) -> None:
    assert_translates(nn.PairwiseDistance(p, eps, keepdim), *map(normal_of, shapes, (1, 2)), frameworks=[to])


def normal_of(shape: tuple[int, ...], seed: int) -> np.ndarray:
    return normal(*shape, seed=seed)


@pytest.mark.parametrize("eps", [1e-8, 0.5])
def test_zero_vectors(eps: float) -> None:
    x, y = normal(4, 5), normal(4, 5, seed=1)
    x[0] = y[0] = x[1] = y[2] = 0
    assert_translates(nn.CosineSimilarity(1, eps), x, y, moved=())


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0, np.inf])
@pytest.mark.parametrize("eps", [0.0, 0.5])
def test_equal_vectors(p: float, eps: float) -> None:
    x, y = normal(4, 5), normal(4, 5, seed=1)
    x[0] = y[0]
    x[1] = np.float32(-eps) + y[1]
    assert_translates(nn.PairwiseDistance(p, eps), x, y, moved=(), frameworks=["nnx"])


@pytest.mark.parametrize("module", [nn.CosineSimilarity(2), nn.PairwiseDistance()])
def test_what_torch_refuses_is_refused(module: nn.Module) -> None:
    x, y = normal(4, 5), normal(4, 3)
    with pytest.raises((RuntimeError, IndexError)):
        module(torch.from_numpy(x), torch.from_numpy(y))
    with pytest.raises((ValueError, TypeError)):
        eq.translate(module)(x, y)
