"""Multi-head attention."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from equivalence.layers.dropout import dropped
from equivalence.layers.form import Carrier, Form
from equivalence.layers.linear import linear
from equivalence.layers.registry import Example, layer, leaves
from equivalence.losses.arguments import demand
from equivalence.weights import Rule

Inside = Callable[[Any], Form]

RULES = (
    Rule("in_proj_weight", "kernel", "o k -> k o"),
    Rule("q_proj_weight", "query_kernel", "o k -> k o"),
    Rule("k_proj_weight", "key_kernel", "o k -> k o"),
    Rule("v_proj_weight", "value_kernel", "o k -> k o"),
    Rule("in_proj_bias", "bias"),
    Rule("bias_k", "key_bias"),
    Rule("bias_v", "value_bias"),
)
"""Queries, keys and values of one size share a kernel (embed, 3 embed); those of other sizes have one each."""


def _example(rng: np.random.Generator) -> tuple[Any, ...]:
    x = rng.standard_normal((3, 4, 6)).astype(np.float32)
    hidden = np.arange(3) >= np.array([[3], [2], [1], [0]])
    return x, x, x, hidden, False


@layer(
    "MultiheadAttention",
    Example("nn.MultiheadAttention(6, 2)", _example),
    "True in a mask hides; a query that sees nothing gives 0, and nan with need_weights (Flax: the mean of all values);"
    " nnx computes its softmax in float32",
)
def multihead_attention(module: Any, inside: Inside) -> Form:
    """nn.MultiheadAttention as it is under gradients; without them torch's fused kernel gives nan instead of 0."""
    held, _ = leaves(module)
    heads, p, zero, batch_first = module.num_heads, float(module.dropout), module.add_zero_attn, module.batch_first
    sizes = (module.embed_dim, module.kdim, module.vdim)

    def call(
        m: Carrier,
        query: Any,
        key: Any,
        value: Any,
        key_padding_mask: Any = None,
        need_weights: bool = True,
        attn_mask: Any = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[jax.Array, jax.Array | None]:
        inputs = [jnp.asarray(x) for x in (query, key, value)]
        batched = _batched(inputs, sizes)
        if not batched:
            inputs = [x[None] for x in inputs]
            key_padding_mask = None if key_padding_mask is None else jnp.asarray(key_padding_mask)[None]
        elif not batch_first:
            inputs = [x.swapaxes(0, 1) for x in inputs]
        lengths = _lengths(inputs, heads)
        demand(not is_causal or attn_mask is not None, "is_causal is a hint about attn_mask, which must be given too")
        hint = is_causal and key_padding_mask is None and not need_weights
        mask = None if hint else merged(attn_mask, key_padding_mask, lengths, inputs[0].dtype)
        q, k, v = projected(m, inputs)
        k, v, mask = extended(m, k, v, mask, zero)
        q, k, v = (split_heads(x, heads) for x in (q, k, v))
        if hint:
            mask = causal(q.shape[1], k.shape[1], q.dtype)
        weights = attention_weights(q, k, mask, unseen=jnp.nan if need_weights else 0.0)
        if m.train:
            shape = weights.shape  # torch draws its mask with batch and heads as one axis where it returns the weights
            drawn = (shape[0] * heads, *shape[2:]) if need_weights else shape
            weights = dropped(weights.reshape(drawn), p, m.key, drawn).reshape(shape)
        outputs = jnp.einsum("nhls,nshd->nlhd", weights, v)
        outputs = m.layer("out_proj")(outputs.reshape(*outputs.shape[:2], sizes[0]))
        if not batched:
            outputs = outputs[0]
        elif not batch_first:
            outputs = outputs.swapaxes(0, 1)
        if not need_weights:
            return outputs, None
        weights = jnp.mean(weights, axis=1) if average_attn_weights else weights
        return outputs, weights if batched else weights[0]

    return Form(
        "MultiheadAttention",
        call,
        text="attention_weights(q, k, mask) @ v, between linear layers",
        rules=tuple(rule for rule in RULES if rule.source in held),
        held=held,
        children={"out_proj": linear(module.out_proj, inside)},
        draws=p > 0,
    )


def projected(m: Carrier, inputs: list[jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries, keys and values (n, length, embed) by the layer's kernels."""
    if m["kernel"] is not None:
        kernels = jnp.split(m["kernel"], 3, axis=1)
    else:
        kernels = [m[name] for name in ("query_kernel", "key_kernel", "value_kernel")]
    q, k, v = (x @ kernel for x, kernel in zip(inputs, kernels, strict=True))
    if m["bias"] is None:
        return q, k, v
    of_q, of_k, of_v = jnp.split(m["bias"], 3)
    return q + of_q, k + of_k, v + of_v


def extended(
    m: Carrier, k: jax.Array, v: jax.Array, mask: jax.Array | None, zero: bool
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Further keys and values after the last: a learned one, one of zeros; no mask hides them."""
    rows = [(m["key_bias"], m["value_bias"])] if m["key_bias"] is not None else []
    for key, value in [*rows, (0.0, 0.0)] if zero else rows:
        k, v = (
            jnp.concatenate([x, jnp.broadcast_to(jnp.asarray(row, x.dtype), (len(x), 1, x.shape[2]))], axis=1)
            for x, row in ((k, key), (v, value))
        )
        mask = None if mask is None else jnp.pad(mask, [*[(0, 0)] * (mask.ndim - 1), (0, 1)])
    return k, v, mask


def split_heads(x: jax.Array, heads: int) -> jax.Array:
    """(n, length, embed) as (n, length, heads, d): a head's features lie together."""
    return x.reshape(*x.shape[:2], heads, x.shape[2] // heads)


def attention_weights(q: jax.Array, k: jax.Array, mask: jax.Array | None, unseen: float) -> jax.Array:
    """softmax(q k / sqrt(d) + mask) of queries (n, l, heads, d) and keys (n, s, heads, d): (n, heads, l, s).

    Args:
        mask: added to the scores, broadcasts to (n, heads, l, s); -inf hides.
        unseen: the weights of a query that sees no key: torch's are 0, and nan where it returns them.

    https://docs.pytorch.org/docs/stable/generated/torch.nn.MultiheadAttention.html
    """
    scores = jnp.einsum("nlhd,nshd->nhls", q / math.sqrt(q.shape[-1]), k)
    if mask is not None:
        scores = scores + mask
    if not scores.shape[-1]:
        return scores
    if unseen != 0:
        return jax.nn.softmax(scores, axis=-1)
    blind = jnp.all(jnp.isneginf(scores), axis=-1, keepdims=True)
    return jnp.where(blind, 0, jax.nn.softmax(jnp.where(blind, 0, scores), axis=-1))


def additive(mask: Any, dtype: Any) -> jax.Array:
    """A mask to be added to scores: a boolean one hides where it is True. Raises InputError for other dtypes."""
    mask = jnp.asarray(mask)
    if mask.dtype == bool:
        return jnp.where(mask, jnp.array(-jnp.inf, dtype), jnp.array(0, dtype))
    demand(jnp.issubdtype(mask.dtype, jnp.floating), f"a mask must be boolean or floating, got {mask.dtype}")
    return mask


def causal(queries: int, keys: int, dtype: Any) -> jax.Array:
    """The mask (queries, keys) that hides what comes later, counted from the first query and the first key."""
    return additive(jnp.arange(keys) > jnp.arange(queries)[:, None], dtype)


def merged(attn_mask: Any, key_padding_mask: Any, lengths: tuple[int, int, int, int], dtype: Any) -> jax.Array | None:
    """One mask to be added to scores (n, heads, l, s), or None.

    Args:
        attn_mask: (l, s) or (n * heads, l, s), or None.
        key_padding_mask: (n, s), or None.

    Raises InputError for other shapes.
    """
    n, heads, queries, keys = lengths
    masks = []
    if attn_mask is not None:
        mask, shapes = additive(attn_mask, dtype), ((queries, keys), (n * heads, queries, keys))
        demand(mask.shape in shapes, f"attn_mask must be {shapes[0]} or {shapes[1]}, got {mask.shape}")
        masks.append(mask if mask.ndim == 2 else mask.reshape(lengths))
    if key_padding_mask is not None:
        mask = additive(key_padding_mask, dtype)
        demand(mask.shape == (n, keys), f"key_padding_mask must be {(n, keys)}, got {mask.shape}")
        masks.append(mask[:, None, None])
    return sum(masks[1:], masks[0]) if masks else None


def _batched(inputs: list[jax.Array], sizes: tuple[int, int, int]) -> bool:
    ndim, features = inputs[0].ndim, tuple(x.shape[-1] for x in inputs if x.ndim)
    same = {x.ndim for x in inputs} == {ndim}
    demand(ndim in (2, 3) and same, f"query, key and value must all be 2-D or 3-D, got {[x.shape for x in inputs]}")
    demand(features == sizes, f"query, key and value must have {sizes} features, got {features}")
    return ndim == 3


def _lengths(inputs: list[jax.Array], heads: int) -> tuple[int, int, int, int]:
    query, key, value = (x.shape for x in inputs)
    fits = query[0] == key[0] and key[:2] == value[:2]
    demand(fits, f"query {query}, key {key} and value {value} (batch, length, features) do not fit together")
    return query[0], heads, query[1], key[1]
