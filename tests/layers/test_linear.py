"""Linear layers against torch's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import equivalence as eq
from tests.layers.sides import FRAMEWORKS, assert_translates, normal, perturbed


def test_linear() -> None:
    assert_translates(perturbed(nn.Linear(5, 3)), normal(4, 5))


def test_linear_without_bias_on_many_axes() -> None:
    assert_translates(perturbed(nn.Linear(5, 3, bias=False)), normal(2, 4, 5))


def test_weights_of_other_sizes_put_in_after_construction() -> None:
    module = nn.Linear(5, 3)
    module.weight, module.bias = nn.Parameter(torch.ones(4, 2)), nn.Parameter(torch.ones(4))
    assert_translates(perturbed(module), normal(3, 2))


@pytest.mark.parametrize(
    ("made", "shape"),
    [("Linear(5, 0)", (2, 5)), ("Linear(0, 3)", (2, 0)), ("PReLU(0)", (2, 0))],
)
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_sizes_of_zero(made: str, shape: tuple[int, ...]) -> None:
    module = perturbed(eval(f"nn.{made}", {"nn": nn}))
    wanted = module(torch.zeros(shape)).detach().numpy()
    for to in FRAMEWORKS:
        np.testing.assert_array_equal(np.asarray(eq.translate(module, to=to)(np.zeros(shape, np.float32))), wanted)


def test_bilinear() -> None:
    assert_translates(perturbed(nn.Bilinear(3, 4, 5)), normal(2, 6, 3), normal(2, 6, 4))
    assert_translates(perturbed(nn.Bilinear(3, 4, 5, bias=False)), normal(3), normal(4))


def test_a_sequence_with_dropout_in_train_mode() -> None:
    model = nn.Sequential(nn.Linear(5, 7), nn.Dropout(0.25), nn.Linear(7, 3))
    assert_translates(perturbed(model), normal(4, 5), train=True)
