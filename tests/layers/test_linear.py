"""Linear layers against torch's."""

from __future__ import annotations

from torch import nn

from tests.layers.sides import assert_translates, normal, perturbed


def test_linear() -> None:
    assert_translates(perturbed(nn.Linear(5, 3)), normal(4, 5))


def test_linear_without_bias_on_many_axes() -> None:
    assert_translates(perturbed(nn.Linear(5, 3, bias=False)), normal(2, 4, 5))


def test_bilinear() -> None:
    assert_translates(perturbed(nn.Bilinear(3, 4, 5)), normal(2, 6, 3), normal(2, 6, 4))
    assert_translates(perturbed(nn.Bilinear(3, 4, 5, bias=False)), normal(3), normal(4))


def test_a_sequence_with_dropout_in_train_mode() -> None:
    model = nn.Sequential(nn.Linear(5, 7), nn.Dropout(0.25), nn.Linear(7, 3))
    assert_translates(perturbed(model), normal(4, 5), train=True)
