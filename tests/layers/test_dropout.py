"""Dropout against torch's, both served the same masks."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import equivalence as eq
from equivalence.errors import InputError
from tests.layers.sides import assert_translates, normal, perturbed

SHAPES = {
    nn.Dropout: ((5,), (4, 5), (0, 5)),
    nn.AlphaDropout: ((5,), (4, 5), (0, 5)),
    nn.Dropout1d: ((3, 5), (4, 3, 5), (1, 3, 1)),
    nn.Dropout2d: ((4, 3), (4, 3, 5), (4, 3, 5, 2), (4, 3, 5, 2, 1), (4, 0, 5, 2)),
    nn.Dropout3d: ((3, 5, 2, 1), (4, 3, 5, 2, 1)),
    nn.FeatureAlphaDropout: ((4, 3), (4, 3, 5), (4, 3, 5, 2)),
}


@settings(max_examples=25)
@given(
    st.sampled_from(list(SHAPES)).flatmap(lambda kind: st.tuples(st.just(kind), st.sampled_from(SHAPES[kind]))),
    st.sampled_from([0.0, 0.3, 0.8, 1.0]),
    st.booleans(),
    st.booleans(),
    st.sampled_from(["nnx", "linen"]),
)
def test_every_option(given: tuple[type, tuple[int, ...]], p: float, inplace: bool, train: bool, to: str) -> None:
    kind, shape = given
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces that it will refuse some numbers of axes
        assert_translates(kind(p, inplace), normal(*shape), frameworks=(to,), train=train)


def test_a_dropped_infinity_is_no_number() -> None:
    x = normal(8, 3)
    x[:, 0] = np.inf
    assert_translates(nn.Dropout(0.5), x, frameworks=("nnx",), train=True, moved=())


def test_whole_channels_between_layers_of_channels() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Dropout2d(0.4), nn.PReLU(3), nn.Dropout(0.2), nn.GroupNorm(1, 3))
    assert_translates(perturbed(model), normal(4, 3, 5, 2), train=True)


@pytest.mark.parametrize(
    ("module", "shape"),
    [(nn.Dropout1d(), (3,)), (nn.Dropout1d(), (2, 3, 4, 5)), (nn.FeatureAlphaDropout().train(), (3,))],
)
def test_refused_on_both_sides(module: nn.Module, shape: tuple[int, ...]) -> None:
    with pytest.raises(RuntimeError):
        module(torch.ones(shape))
    with pytest.raises(InputError):
        eq.translate(module)(torch.ones(shape))
