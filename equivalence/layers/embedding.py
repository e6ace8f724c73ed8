"""Embedding and EmbeddingBag: rows of a matrix, looked up or reduced bag by bag."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from equivalence.errors import InputError
from equivalence.layers.form import Carrier, Form, Own
from equivalence.layers.registry import Example, layer, leaves
from equivalence.weights import Rule

Inside = Callable[[Any], Form]


@jax.custom_jvp
def instead(x: Any, value: Any) -> Any:
    """`value` forward, with the derivative of `x`."""
    del x
    return value


@instead.defjvp
def _(primals: Any, tangents: Any) -> Any:
    return primals[1], tangents[0]


def looked_up(embedding: Any, indices: Any, padding_idx: int | None = None, often: Any = None) -> Any:
    """Rows of `embedding` (n, d) at integers of any shape; NaN where torch raises, for an index outside 0 ... n - 1.

    The row `padding_idx` has no gradient; each other row's is divided by its element of `often`, of indices' shape.
    https://docs.pytorch.org/docs/stable/generated/torch.nn.Embedding.html
    """
    found = embedding.at[indices].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
    if often is not None:
        found = instead(found / often[..., None], found)
    if padding_idx is not None:
        found = jnp.where((indices == padding_idx)[..., None], jax.lax.stop_gradient(found), found)
    return found


def frequency(embedding: Any, indices: Any) -> Any:
    """How often each index stands in `indices`: what `scale_grad_by_freq` divides by."""
    counts = jnp.zeros(len(embedding), embedding.dtype).at[indices].add(1, mode="drop")
    return counts.at[indices].get(mode="fill", fill_value=1)


def bag_frequency(embedding: Any, indices: Any) -> Any:
    """What torch divides by in a bag, on the CPU: for the k-th smallest word, how often the k-th sorted index stands.

    It is the word's own frequency only where no smaller word stands twice.
    """
    order = jnp.sort(indices)
    rank = jnp.cumsum(jnp.diff(order, prepend=order[:1]) != 0)
    return frequency(embedding, order)[rank][jnp.searchsorted(order, indices)]


def renormalised(embedding: Any, indices: Any, max_norm: float, norm_type: float = 2.0) -> Any:
    """`embedding` with the rows that are asked for, where longer than `max_norm`, shortened to it; no gradient.

    torch does this to the weight itself whenever the layer is called, in eval mode too; it adds 1e-7 to the norm.
    https://docs.pytorch.org/docs/stable/generated/torch.nn.Embedding.html
    """
    embedding = jax.lax.stop_gradient(embedding)
    norms = jnp.linalg.norm(embedding, ord=norm_type, axis=-1, keepdims=True)
    asked = jnp.zeros((len(embedding), 1), bool).at[jnp.ravel(indices)].set(True, mode="drop")
    return jnp.where(asked & (norms > max_norm), embedding * (max_norm / (norms + 1e-7)), embedding)


def bagged(rows: Any, kept: Any, bags: Any, count: int, mode: str) -> Any:
    """Rows (n, d) reduced to (count, d) by their bags' numbers (n,); an empty bag is 0, not NaN and not -inf.

    The whole gradient of a maximum goes to the first of equal rows; `jax.ops.segment_max` shares it.
    https://docs.pytorch.org/docs/stable/generated/torch.nn.EmbeddingBag.html

    Args:
        rows: what is looked up.
        kept: (n,), False for padding, which is in no bag.
        bags: the bag of each row; those outside 0 ... count - 1 are in none.
        count: the number of bags.
        mode: "sum", "mean" or "max".
    """
    kept = kept[:, None]
    if mode == "max":
        top = jax.ops.segment_max(jnp.where(kept, rows, -jnp.inf), bags, count)[bags]
        places = jnp.where(kept & ((rows == top) | jnp.isnan(rows)), jnp.arange(len(rows))[:, None], len(rows))
        first = jnp.minimum(jax.ops.segment_min(places, bags, count), len(rows))
        return jnp.take_along_axis(
            jnp.concatenate([rows, jnp.zeros_like(rows, shape=(1, rows.shape[1]))]), first, axis=0
        )
    total = jax.ops.segment_sum(jnp.where(kept, rows, 0), bags, count)
    if mode == "sum":
        return total
    return total / jnp.maximum(jax.ops.segment_sum(kept.astype(rows.dtype), bags, count), 1)


@layer(
    "Embedding",
    Example("nn.Embedding(7, 3, padding_idx=2)", lambda rng: (rng.integers(0, 7, (4, 5)),)),
    "padding_idx has no gradient; max_norm moves the weight in a call (Linen: mutable=['params']); gradients are dense;"
    " Flax wraps -1, torch refuses",
)
def embedding(module: Any, inside: Inside) -> Form:
    """nn.Embedding."""
    module = copy.copy(module)  # its options as they are now
    held, _ = leaves(module)
    count, features = held["weight"].shape
    padding = _padding(module, count)
    own = Own("Embed", count, features)
    plain = padding is None and module.max_norm is None and not module.scale_grad_by_freq

    def call(m: Carrier, indices: Any) -> Any:
        indices = _whole(module, indices)
        table = _table(module, m, indices)
        return looked_up(table, indices, padding, frequency(table, indices) if module.scale_grad_by_freq else None)

    return Form(
        "Embedding",
        call,
        text="embedding[indices]" if plain else f"looked_up(embedding, indices, {padding})",
        rules=(Rule("weight", "embedding"),),
        held=held,
        own={"linen": own} if plain and count > 1 else {},  # of one row Flax takes no bare number
    )


@layer(
    "EmbeddingBag",
    Example('nn.EmbeddingBag(7, 3, mode="max")', lambda rng: (rng.integers(0, 7, 9), np.array([0, 4, 4]))),
    "an empty bag is 0; padding is not counted in a mean; ties in a maximum: the gradient goes to the first;"
    " scale_grad_by_freq divides by torch's CPU counts",
)
def embedding_bag(module: Any, inside: Inside) -> Form:
    """nn.EmbeddingBag."""
    module = copy.copy(module)
    held, _ = leaves(module)
    mode, padding = module.mode, _padding(module, len(held["weight"]))
    if mode == "max" and (module.scale_grad_by_freq or module.sparse):
        raise InputError('nn.EmbeddingBag(mode="max") has no scale_grad_by_freq and no sparse gradient, in torch too')

    def call(m: Carrier, indices: Any, offsets: Any = None, per_sample_weights: Any = None) -> Any:
        flat, bags, count, wrong = _bags(module, _whole(module, indices), offsets)
        table = _table(module, m, flat)
        rows = looked_up(table, flat, padding, bag_frequency(table, flat) if module.scale_grad_by_freq else None)
        if per_sample_weights is not None:
            rows = rows * _weights(module, per_sample_weights, indices).reshape(-1, 1)
        found = bagged(rows, jnp.ones(flat.shape, bool) if padding is None else flat != padding, bags, count, mode)
        return jnp.where(wrong, jnp.nan, found)

    text = f'bagged(embedding[indices], kept, bags, count, "{mode}")'
    return Form("EmbeddingBag", call, text=text, rules=(Rule("weight", "embedding"),), held=held)


def _padding(module: Any, count: int) -> int | None:
    """The padding row of `count`, which may be counted from the end. Raises InputError for none of them."""
    row = module.padding_idx
    if row is not None and not -count <= row < count:
        raise InputError(f"{type(module).__name__}'s padding_idx {row} is none of its {count} rows")
    return row if row is None else row % count


def _bags(module: Any, indices: Any, offsets: Any) -> tuple[Any, Any, int, Any]:
    """Flat indices, the bag of each, the number of bags, and whether the offsets are some that torch refuses."""
    if indices.ndim == 2 and offsets is None and indices.shape[1]:
        return indices.ravel(), jnp.arange(indices.size) // indices.shape[1], len(indices), False
    if indices.ndim != 1 or offsets is None or jnp.ndim(offsets) != 1:
        raise InputError(
            "EmbeddingBag takes indices (bags, words) with at least one word and no offsets, or flat indices with"
            f" offsets (bags,); not indices {indices.shape} with offsets {getattr(offsets, 'shape', offsets)}"
        )
    offsets = _whole(module, offsets)
    count = len(offsets) - bool(module.include_last_offset)
    if count < 0:
        raise InputError("EmbeddingBag(include_last_offset=True) takes at least one offset")
    ends = jnp.concatenate([jnp.zeros(1, offsets.dtype), offsets, jnp.full(1, len(indices), offsets.dtype)])
    wrong = (jnp.diff(ends) < 0).any() | (offsets[:1] != 0).any()
    return indices, jnp.searchsorted(offsets, jnp.arange(len(indices)), side="right") - 1, count, wrong


def _weights(module: Any, weights: Any, indices: Any) -> Any:
    if module.mode != "sum":
        raise InputError(f'EmbeddingBag takes per_sample_weights with mode="sum" alone, not with "{module.mode}"')
    if jnp.shape(weights) != jnp.shape(indices):
        raise InputError(f"per_sample_weights are of the indices' shape {indices.shape}, not {jnp.shape(weights)}")
    return jnp.asarray(weights)


def _whole(module: Any, indices: Any) -> Any:
    indices = jnp.asarray(indices)
    if not jnp.issubdtype(indices.dtype, jnp.integer):
        raise InputError(f"{type(module).__name__} takes integers, not {indices.dtype}")
    return indices


def _table(module: Any, m: Carrier, indices: Any) -> Any:
    """The matrix to look rows up in; with `max_norm` the renormalised one, which is kept."""
    table = m["embedding"]
    if module.max_norm is None:
        return table
    short = renormalised(table, indices, float(module.max_norm), float(module.norm_type))
    m["embedding"] = table = instead(table, short)
    return table
