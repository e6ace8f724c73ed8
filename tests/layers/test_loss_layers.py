"""Losses as layers against torch's: every class, its class weights as leaves, its deprecated arguments, refusals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import equivalence as eq
from equivalence.errors import InputError
from equivalence.layers.losses import EXAMPLES
from equivalence.layers.registry import entries
from tests.layers.sides import FRAMEWORKS, assert_translates, normal, perturbed

pytestmark = pytest.mark.filterwarnings("ignore")  # of broadcasting, deprecated arguments, kl_div's default


def example(name: str, seed: int = 0) -> tuple[nn.Module, tuple[np.ndarray, ...]]:
    entry = entries()[name]
    assert entry.example is not None
    assert callable(entry.example.inputs)
    inputs = entry.example.inputs(np.random.default_rng(seed))
    if name == "SoftMarginLoss":  # whose floating targets torch cannot be asked a gradient of
        inputs = inputs[0], inputs[1].astype(int)
    return perturbed(eval(entry.example.torch)), inputs


@pytest.mark.parametrize("name", [*EXAMPLES, "NLLLoss2d"])
def test_every_class(name: str) -> None:
    module, inputs = example(name)
    to = FRAMEWORKS[
        len(name) % 2
    ]  # one framework a class: the function is the same, the leaves have tests of their own
    assert_translates(module, *inputs, frameworks=[to])


X, LABELS = normal(4, 3, 5), np.array([[0, 2, 2, -100, 1], [1, 1, 0, 2, 2], [2, 0, -100, 1, 1], [0, 0, 0, 0, 2]])
WEIGHT = torch.tensor([0.5, 2.0, 3.0])
PROBABILITIES = np.exp(X) / np.exp(X).sum(1, keepdims=True)
WEIGHTED = {
    "cross entropy": (nn.CrossEntropyLoss(WEIGHT, label_smoothing=0.2), X, LABELS),
    "cross entropy of probabilities": (nn.CrossEntropyLoss(WEIGHT, reduction="none"), X, PROBABILITIES),
    "negative log-likelihood": (nn.NLLLoss(WEIGHT, ignore_index=1), X, np.maximum(LABELS, 0)),
    "binary": (nn.BCELoss(WEIGHT[:, None]), PROBABILITIES, PROBABILITIES[::-1].copy()),
    "binary of logits": (
        nn.BCEWithLogitsLoss(WEIGHT[:, None], pos_weight=WEIGHT[:, None] + 1, reduction="none"),
        X,
        PROBABILITIES,
    ),
    "margins": (nn.MultiMarginLoss(weight=WEIGHT, p=2), X[..., 0], LABELS[:, 1]),
    "labels": (nn.MultiLabelSoftMarginLoss(WEIGHT), X[..., 0], PROBABILITIES[..., 1]),
}


@pytest.mark.parametrize("to", FRAMEWORKS)
@pytest.mark.parametrize("case", WEIGHTED)
def test_class_weights_are_leaves(case: str, to: str) -> None:
    module, *inputs = WEIGHTED[case]
    assert_translates(module, *inputs, frameworks=[to])
    made = eq.translate(module, to=to)
    assert set(made.subject.buffers) == {name for name, _ in module.named_buffers()}


DEPRECATED: list[tuple[dict[str, Any], str]] = [
    ({"size_average": False}, "sum"),
    ({"reduce": False}, "none"),
    ({"size_average": True}, "mean"),
]


@pytest.mark.parametrize(("arguments", "reduction"), DEPRECATED)
def test_deprecated_arguments_are_a_reduction(arguments: dict[str, Any], reduction: str) -> None:
    x, y = normal(4, 5), normal(4, 5, seed=1)
    got = eq.translate(nn.MSELoss(**arguments))(x, y)
    assert np.array_equal(got, eq.translate(nn.MSELoss(reduction=reduction))(x, y))
    assert_translates(nn.MSELoss(**arguments), x, y, frameworks=["nnx"])


@pytest.mark.parametrize("name", ["AdaptiveLogSoftmaxWithLoss", "LinearCrossEntropyLoss"])
@pytest.mark.parametrize("to", FRAMEWORKS)
def test_trained_weights(name: str, to: str) -> None:
    if name == "LinearCrossEntropyLoss":
        module = nn.LinearCrossEntropyLoss(6, 3, out_features=(5,), bias=True, weight=WEIGHT, label_smoothing=0.1)
        assert_translates(perturbed(module), normal(4, 6), LABELS, frameworks=[to])
        single = perturbed(nn.LinearCrossEntropyLoss(6, 3, ignore_index=0, reduction="none"))
        assert_translates(single, normal(6), np.array(2), frameworks=[to])
    else:
        module = nn.AdaptiveLogSoftmaxWithLoss(8, 11, [2, 5], div_value=2.0, head_bias=True)
        assert_translates(perturbed(module), normal(6, 8), np.array([0, 1, 4, 10, 5, 2]), frameworks=[to])
        assert_translates(perturbed(module), normal(8), np.array(7), frameworks=[to])


def test_sequences_one_after_another_with_fixed_lengths() -> None:
    logs = torch.from_numpy(normal(7, 3, 5)).log_softmax(-1).numpy()
    labels = np.array([1, 2, 2, 4, 1, 3])
    assert_translates(nn.CTCLoss(), logs, labels, (7, 5, 6), (2, 3, 1), frameworks=["nnx"])


def test_a_distance_that_is_a_layer() -> None:
    anchor, positive, negative = (normal(4, 5, seed=seed) for seed in range(3))
    for distance in (nn.CosineSimilarity(), nn.PairwiseDistance(1.0), nn.Bilinear(5, 5, 1)):
        module = nn.TripletMarginWithDistanceLoss(distance_function=perturbed(distance), swap=True)
        assert_translates(module, anchor, positive, negative, frameworks=["nnx"])


def test_a_distance_that_is_a_function_is_refused() -> None:
    with pytest.raises(InputError, match="distance_function"):
        eq.translate(nn.TripletMarginWithDistanceLoss(distance_function=lambda a, b: (a - b).abs().sum(-1)))


SIX = normal(4, 6)
REFUSED: dict[str, tuple[nn.Module, tuple[np.ndarray, ...]]] = {
    "shapes": (nn.BCELoss(), (PROBABILITIES, PROBABILITIES[:2])),
    "labels of another batch": (nn.CrossEntropyLoss(), (X, LABELS[:2])),
    "weights of another length": (nn.NLLLoss(WEIGHT), (normal(4, 5), np.array([0, 1, 2, 1]))),
    "features": (nn.LinearCrossEntropyLoss(5, 3), (SIX, np.array([0, 1, 2, 1]))),
    "an ignored class among probabilities": (nn.LinearCrossEntropyLoss(6, 5, ignore_index=-1), (SIX, normal(4, 5))),
    "one row for many outputs": (nn.LinearCrossEntropyLoss(6, 3, out_features=(5,)), (SIX[0], LABELS[0])),
    "many targets": (nn.AdaptiveLogSoftmaxWithLoss(6, 5, [2]), (SIX, np.ones((4, 2), int))),
    "a triplet of other axes": (nn.TripletMarginWithDistanceLoss(), (SIX, SIX[0], SIX)),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_torch_refuses_is_refused(case: str) -> None:
    module, inputs = REFUSED[case]
    with pytest.raises((ValueError, RuntimeError)):
        module(*map(torch.from_numpy, inputs))
    with pytest.raises((InputError, TypeError)):
        eq.translate(module)(*inputs)


def test_a_label_outside_the_classes_is_nan() -> None:
    """Compiled JAX cannot raise by value, as torch does."""
    assert np.isnan(eq.translate(nn.CrossEntropyLoss())(SIX, np.array([0, 1, 6, 2])))
    assert np.isnan(eq.translate(nn.AdaptiveLogSoftmaxWithLoss(6, 5, [2]))(SIX, np.array([0, 1, 5, 2])).loss)
