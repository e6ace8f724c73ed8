"""Faults planted in losses as layers and in distances: each is one that a port may have, and each must be caught."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn

import equivalence as eq
from equivalence import losses as functions
from equivalence.frameworks.subject import Subject
from equivalence.layers import distances
from tests.layers.sides import disagree, normal, perturbed

pytestmark = pytest.mark.filterwarnings("ignore:reduction:UserWarning")  # kl_div's default

X, Y = normal(4, 5), normal(4, 5, seed=1)
SAME = Y.copy()
SAME[0], SAME[1] = X[0], 0
ZERO = X.copy()
ZERO[1] = 0
LOGS = torch.from_numpy(X).log_softmax(1).numpy()
SOFT = np.exp(LOGS)
LABELS = np.array([0, 3, 4, 3])
WEIGHT = torch.tensor([0.5, 2.0, 3.0, 0.25, 1.0])
FRAMES = torch.from_numpy(normal(7, 3, 5)).log_softmax(2).numpy()
SEQUENCES = FRAMES, np.array([[1, 2, 2, 4], [3, 1, 0, 0], [2, 0, 0, 0]]), np.array([7, 5, 6]), np.array([4, 2, 1])

OTHER: dict[str, tuple[nn.Module, tuple[Any, ...], nn.Module]] = {
    "squares not halved": (nn.MSELoss(), (X, Y), nn.HuberLoss(delta=100.0)),
    "Huber's loss for the smooth one": (nn.SmoothL1Loss(beta=2.0), (X, Y), nn.HuberLoss(delta=2.0)),
    "the sum for the mean": (nn.L1Loss(), (X, Y), nn.L1Loss(reduction="sum")),
    "the batch's mean of a divergence": (nn.KLDivLoss(), (LOGS, SOFT), nn.KLDivLoss(reduction="batchmean")),
    "log-probabilities taken for probabilities": (
        nn.KLDivLoss(log_target=True),
        (LOGS, LOGS[::-1].copy()),
        nn.KLDivLoss(),
    ),
    "no label smoothing": (nn.CrossEntropyLoss(label_smoothing=0.1), (X, LABELS), nn.CrossEntropyLoss()),
    "another ignored label": (
        nn.CrossEntropyLoss(ignore_index=3),
        (X, LABELS),
        nn.CrossEntropyLoss(),
    ),
    "logits for log-probabilities": (nn.NLLLoss(WEIGHT), (X, LABELS), nn.CrossEntropyLoss(WEIGHT)),
    "Stirling's term left out": (nn.PoissonNLLLoss(full=True), (X, 3 * SOFT), nn.PoissonNLLLoss()),
    "another eps of a variance": (nn.GaussianNLLLoss(eps=0.3), (X, Y, SOFT), nn.GaussianNLLLoss()),
    "another blank": (nn.CTCLoss(), SEQUENCES, nn.CTCLoss(blank=4)),
    "no swap": (
        nn.TripletMarginWithDistanceLoss(swap=True),
        (X, Y, SOFT),
        nn.TripletMarginWithDistanceLoss(),
    ),
    "a distance of another norm": (
        nn.TripletMarginWithDistanceLoss(distance_function=nn.PairwiseDistance(1.0)),
        (X, Y, SOFT),
        nn.TripletMarginWithDistanceLoss(),
    ),
    "a cosine over another axis": (nn.CosineSimilarity(1), (X[:, :4], Y[:, :4]), nn.CosineSimilarity(0)),
    "another eps of a distance": (nn.PairwiseDistance(), (X, Y), nn.PairwiseDistance(eps=1e-8)),
}
"""What is wrong -> a module, its inputs, and a torch module that is wrong in that way."""


@pytest.mark.parametrize("name", OTHER)
def test_another_layer_is_caught(name: str) -> None:
    module, inputs, other = OTHER[name]
    assert not disagree(module, *inputs)
    assert disagree(module, *inputs, port=lambda subject: eq.translate(other).subject)


def under_the_root(x1: Any, x2: Any, *, p: float, eps: float, keepdims: bool) -> Any:
    return jnp.sqrt(jnp.sum((x1 - x2) ** 2, -1) + eps)


def naive_norm(x1: Any, x2: Any, *, p: float, eps: float, keepdims: bool) -> Any:
    return jnp.linalg.norm(x1 - x2 + eps, axis=-1)


def product_clamped(x1: Any, x2: Any, *, axis: int, eps: float) -> Any:
    sizes = jnp.linalg.norm(x1, axis=axis) * jnp.linalg.norm(x2, axis=axis)
    return jnp.sum(x1 * x2, axis) / jnp.maximum(sizes, eps)


def clamp_that_stops(x1: Any, x2: Any, *, axis: int, eps: float) -> Any:
    first, second = (x / jnp.maximum(jnp.linalg.norm(x, axis=axis, keepdims=True), eps) for x in (x1, x2))
    return jnp.sum(first * second, axis)


def clusters_swapped(x: Any, target: Any, params: Any) -> Any:
    other = {name.replace("tail.0", "tail.2"): value for name, value in params.items() if "tail.1" not in name}
    moved = {name.replace("tail.1", "tail.0"): value for name, value in params.items() if "tail.1" in name}
    return RIGHT(x, target, {name.replace("tail.2", "tail.1"): v for name, v in {**other, **moved}.items()})


def by_batch(x: Any, target: Any, *, reduction: str, **options: Any) -> Any:
    return CROSS_ENTROPY(x, target, reduction="sum", **options) / len(x)


RIGHT, CROSS_ENTROPY = functions.adaptive_log_softmax, functions.cross_entropy
ADAPTIVE = nn.AdaptiveLogSoftmaxWithLoss(5, 9, [3, 6], div_value=1.0)
PATCHED: dict[str, tuple[nn.Module, tuple[Any, ...], Any, str, Callable[..., Any]]] = {
    "a weighted mean over the batch": (
        *(nn.CrossEntropyLoss(WEIGHT), (X, LABELS)),
        *(functions, "cross_entropy", by_batch),
    ),
    "eps under the root": (*(nn.PairwiseDistance(), (X, Y)), distances, "pairwise_distance", under_the_root),
    "nan where a norm is 0": (nn.PairwiseDistance(eps=0.0), (X, SAME), distances, "pairwise_distance", naive_norm),
    "eps for the product of lengths": (
        *(nn.CosineSimilarity(eps=2.0), (X, Y)),
        *(distances, "cosine_similarity", product_clamped),
    ),
    "a clamp that stops the slope": (
        *(nn.CosineSimilarity(eps=2.5), (X, Y)),
        *(distances, "cosine_similarity", clamp_that_stops),
    ),
    "nan at a zero vector": (
        *(nn.CosineSimilarity(eps=0.1), (X, ZERO)),
        *(distances, "cosine_similarity", clamp_that_stops),
    ),
    "two clusters swapped": (
        *(ADAPTIVE, (X, np.array([0, 4, 8, 6]))),
        *(functions, "adaptive_log_softmax", clusters_swapped),
    ),
}
"""What is wrong -> a module, its inputs, and a function of ours replaced."""


@pytest.mark.parametrize("name", PATCHED)
def test_a_wrong_function_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, inputs, home, attribute, wrong = PATCHED[name]
    module = perturbed(module)
    assert not disagree(module, *inputs, moved=())
    monkeypatch.setattr(home, attribute, wrong)
    assert disagree(module, *inputs, moved=())


def with_leaf(name: str, change: Callable[[Any], Any]) -> Callable[[Subject], Subject]:
    """A port that reads another value from one of its leaves."""

    def port(subject: Subject) -> Subject:
        def apply(params: Any, buffers: Any, *call: Any) -> Any:
            p, b = ({k: change(v) if k == name else v for k, v in held.items()} for held in (params, buffers))
            return subject.apply(p, b, *call)[0], buffers

        return dataclasses.replace(subject, apply=apply)

    return port


LEAVES: dict[str, tuple[nn.Module, tuple[Any, ...], str, Callable[[Any], Any]]] = {
    "a weight of positives that is forgotten": (
        *(nn.BCEWithLogitsLoss(pos_weight=WEIGHT), (X, SOFT)),
        *("pos_weight", jnp.ones_like),
    ),
    "classes stored minor": (
        *(nn.LinearCrossEntropyLoss(5, 3, out_features=(4,)), (X, np.arange(16).reshape(4, 4) % 3)),
        *("linear.kernel", lambda kernel: kernel.reshape(5, 3, 4).swapaxes(1, 2).reshape(5, 12)),
    ),
}
"""What is wrong -> a module, its inputs, a leaf of ours and how it is read."""


@pytest.mark.parametrize("name", LEAVES)
def test_a_leaf_read_wrongly_is_caught(name: str) -> None:
    module, inputs, leaf, change = LEAVES[name]
    module = perturbed(module)
    assert not disagree(module, *inputs)
    assert disagree(module, *inputs, port=with_leaf(leaf, change))
