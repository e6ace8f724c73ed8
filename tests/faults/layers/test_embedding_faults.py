"""Planted faults in embeddings and bags: padding, frequencies, norms, empty bags, ties and offsets. All caught."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn

import equivalence as eq
from equivalence.layers import embedding as ours
from tests.layers.sides import disagree, normal
from tests.layers.test_embedding import moved_by_max_norm

HERE = "equivalence.layers.embedding"
INDICES = np.array([[1, 2, 2], [4, 1, 1]])
LOOKED_UP, RENORMALISED = ours.looked_up, ours.renormalised
FLAT, OFFSETS = np.array([1, 2, 2, 4, 1, 1, 3]), np.array([0, 3, 3, 5])


def drawn(module: nn.Module) -> nn.Module:
    """The module with the same weights in every run."""
    with torch.no_grad():
        module.weight.copy_(torch.from_numpy(normal(5, 3)))
    return module


MODULES: dict[str, tuple[nn.Module, nn.Module, tuple[Any, ...]]] = {
    "a gradient for padding": (nn.Embedding(5, 3, padding_idx=2), nn.Embedding(5, 3), (INDICES,)),
    "another row of padding": (nn.Embedding(5, 3, padding_idx=2), nn.Embedding(5, 3, padding_idx=1), (INDICES,)),
    "frequencies ignored": (nn.Embedding(5, 3, scale_grad_by_freq=True), nn.Embedding(5, 3), (INDICES,)),
    "max_norm ignored": (nn.Embedding(5, 3, max_norm=0.5), nn.Embedding(5, 3), (INDICES,)),
    "the 2-norm for the 1-norm": (
        nn.Embedding(5, 3, max_norm=0.5, norm_type=1.0),
        nn.Embedding(5, 3, max_norm=0.5),
        (INDICES,),
    ),
    "a mean for a sum": (nn.EmbeddingBag(5, 3, mode="sum"), nn.EmbeddingBag(5, 3), (INDICES,)),
    "padding in a mean": (nn.EmbeddingBag(5, 3, padding_idx=2), nn.EmbeddingBag(5, 3), (FLAT, OFFSETS)),
    "padding in a maximum": (
        nn.EmbeddingBag(5, 3, mode="max", padding_idx=2),
        nn.EmbeddingBag(5, 3, mode="max"),
        (FLAT, OFFSETS),
    ),
}


@pytest.mark.parametrize(("module", "other", "inputs"), MODULES.values(), ids=MODULES)
def test_options(module: nn.Module, other: nn.Module, inputs: tuple[Any, ...]) -> None:
    assert disagree(drawn(module), *inputs, port=lambda _: eq.translate(other).subject)


def zeros(kept: Any, embedding: Any, indices: Any, padding_idx: Any = None, often: Any = None) -> Any:
    """The padding row is read as zeros, which it is in the beginning only."""
    return jnp.where((indices == padding_idx)[..., None], 0, kept(embedding, indices, padding_idx, often))


def scaled(kept: Any, embedding: Any, indices: Any, padding_idx: Any = None, often: Any = None) -> Any:
    """The rows are divided by their frequency, not their gradients alone."""
    return kept(embedding, indices, padding_idx) / often[..., None]


def exact(kept: Any, embedding: Any, indices: Any, max_norm: float, norm_type: float = 2.0) -> Any:
    """Without 1e-7 in the norm."""
    del kept
    norms = jnp.linalg.norm(embedding, ord=norm_type, axis=-1, keepdims=True)
    return embedding * jnp.minimum(1, max_norm / norms)


def to_the_norm(kept: Any, embedding: Any, indices: Any, max_norm: float, norm_type: float = 2.0) -> Any:
    """Short rows become longer too."""
    del kept
    return embedding * (max_norm / (jnp.linalg.norm(embedding, ord=norm_type, axis=-1, keepdims=True) + 1e-7))


def to_a_limit(kept: Any, embedding: Any, indices: Any, max_norm: float, norm_type: float = 2.0) -> Any:
    """Every row is shortened, whether it is asked for or not, and its gradient is not stopped."""
    norms = jnp.linalg.norm(embedding, ord=norm_type, axis=-1, keepdims=True)
    return jnp.where(norms > max_norm, embedding * (max_norm / (norms + 1e-7)), embedding)


FUNCTIONS: dict[str, tuple[str, Callable[..., Any], dict[str, Any]]] = {
    "padding read as zeros": ("looked_up", zeros, {"padding_idx": 2}),
    "rows divided by their frequency": ("looked_up", scaled, {"scale_grad_by_freq": True}),
    "no 1e-7 in the norm": ("renormalised", exact, {"max_norm": 0.5}),
    "short rows made longer": ("renormalised", to_the_norm, {"max_norm": 9.0}),
}


@pytest.mark.parametrize(("name", "fault", "options"), FUNCTIONS.values(), ids=FUNCTIONS)
def test_a_function(name: str, fault: Any, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    kept = {"looked_up": LOOKED_UP, "renormalised": RENORMALISED}[name]
    module = drawn(nn.Embedding(5, 3, **options))
    monkeypatch.setattr(f"{HERE}.{name}", lambda *given: fault(kept, *given))
    assert disagree(module, INDICES)


def test_a_gradient_through_the_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{HERE}.renormalised", lambda *given: to_a_limit(None, *given))
    module = drawn(nn.Embedding(5, 3, max_norm=0.5))
    assert disagree(module, INDICES) == {}
    monkeypatch.setattr(f"{HERE}.instead", lambda x, value: value)
    assert disagree(module, INDICES)


def by_axis(pick: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    """Bags reduced as one would write it: `pick(rows, kept)` of each."""

    def bagged(rows: Any, kept: Any, bags: Any, count: int, mode: str) -> Any:
        inside = (bags == jnp.arange(count)[:, None]) & kept
        return jax.vmap(lambda one: pick(rows, one[:, None]))(inside)

    return bagged


def mean(rows: Any, kept: Any) -> Any:
    """A mean that is 0 / 0 of an empty bag."""
    return jnp.where(kept, rows, 0).sum(0) / kept.sum(0)


def root(rows: Any, kept: Any) -> Any:
    """A sum over the root of the number, as other libraries' sqrtn."""
    return jnp.where(kept, rows, 0).sum(0) / jnp.sqrt(jnp.maximum(kept.sum(0), 1))


def top(rows: Any, kept: Any) -> Any:
    """A maximum that is -inf of an empty bag."""
    return jnp.where(kept, rows, -jnp.inf).max(0)


def top_or_zero(rows: Any, kept: Any) -> Any:
    """A maximum over zeros where no row is."""
    return jnp.where(kept, rows, 0).max(0)


@pytest.mark.parametrize(
    ("mode", "pick"),
    [("mean", mean), ("mean", root), ("max", top), ("max", top_or_zero)],
    ids=lambda given: getattr(given, "__name__", given),
)
def test_a_bag(mode: str, pick: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{HERE}.bagged", by_axis(pick))
    assert disagree(drawn(nn.EmbeddingBag(5, 3, mode=mode)), FLAT, OFFSETS)


def test_ties_of_a_maximum_that_share_the_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    module = nn.EmbeddingBag(5, 3, mode="max")
    nn.init.constant_(module.weight, 0.5)
    call = np.array([1, 2, 4, 3]), np.array([0, 3])
    assert disagree(module, *call, moved=()) == {}
    monkeypatch.setattr(f"{HERE}.bagged", lambda rows, kept, bags, count, mode: jax.ops.segment_max(rows, bags, count))
    assert disagree(module, *call, moved=())


@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_the_frequency_of_each_word_in_a_bag_is_not_what_torch_divides_by(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = drawn(nn.EmbeddingBag(5, 3, mode=mode, scale_grad_by_freq=True))
    assert disagree(module, FLAT, OFFSETS) == {}
    monkeypatch.setattr(f"{HERE}.bag_frequency", ours.frequency)
    assert disagree(module, FLAT, OFFSETS)


def changed(change: Callable[..., tuple[Any, ...]]) -> Callable[[Any], Any]:
    """A port that is handed something else than torch."""

    def port(subject: Any) -> Any:
        def apply(params: Any, buffers: Any, args: Any, kwargs: Any, train: bool) -> Any:
            return subject.apply(params, buffers, change(*args), kwargs, train)

        return dataclasses.replace(subject, apply=apply)

    return port


CALLS: dict[str, Callable[..., tuple[Any, ...]]] = {
    "per-sample weights left out": lambda indices, offsets, weights: (indices, offsets),
    "per-sample weights normalised": lambda indices, offsets, weights: (indices, offsets, weights / weights.sum()),
    "offsets as ends": lambda indices, offsets, weights: (indices, jnp.append(0, offsets[:-1]), weights),
}


@pytest.mark.parametrize("change", CALLS.values(), ids=CALLS)
def test_a_call(change: Any) -> None:
    module = drawn(nn.EmbeddingBag(5, 3, mode="sum"))
    assert disagree(module, FLAT, OFFSETS, normal(7), port=changed(change))


@pytest.mark.parametrize("to", ["nnx", "linen"])
def test_max_norm_on_rows_that_were_not_asked_for(to: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{HERE}.renormalised", lambda *given: to_a_limit(None, *given))
    with pytest.raises(AssertionError):
        moved_by_max_norm(nn.Embedding, to)
