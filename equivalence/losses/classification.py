"""Losses of one class among many: from logits, from log-probabilities, and with the last layer inside."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from equivalence.losses.arguments import demand, floats, labels, reduced


def nll(input: Any, target: Any, *, weight: Any = None, ignore_index: int = -100, reduction: str = "mean") -> jax.Array:
    """Minus the log-probability of the target's class, times the class's weight.

    Args:
        input: log-probabilities (classes,), (b, classes) or (b, classes, d1, ...): the classes are axis 1, not last.
        target: integers (), (b,) or (b, d1, ...).
        weight: (classes,); the mean divides by the sum of the targets' weights, not by their number.
        ignore_index: targets of this value, negative or a class, count nowhere; nan is the mean of nothing else.

    Optax starts from logits, along the last axis, without weights and ignored labels: `jnp.take_along_axis` reads a
    label of -1 as the last class. Raises InputError for shapes that do not fit; a label outside the classes, at which
    torch raises IndexError, makes nan.
    https://docs.pytorch.org/docs/stable/generated/torch.nn.NLLLoss.html
    """
    (x,), y = floats(input), labels(target)
    demand(x.ndim > 0, "a class loss takes an input with a class axis, got a scalar")
    axis = min(x.ndim - 1, 1)
    expected = x.shape[:axis] + x.shape[axis + 1 :]
    demand(y.shape == expected, f"an input of shape {x.shape} takes labels of shape {expected}, got {y.shape}")
    ignored, known = y == ignore_index, (y >= 0) & (y < x.shape[axis])
    index = jnp.where(known & ~ignored, y, 0)
    loss = -jnp.take_along_axis(x, jnp.expand_dims(index, axis), axis=axis).squeeze(axis)
    if weight is not None:
        loss = loss * _by_class(weight, x, axis)[index]
    loss = jnp.where(ignored, 0, jnp.where(known, loss, jnp.nan))
    return reduced(loss, reduction, _total(x, y, weight, ignore_index))


def _by_class(weight: Any, x: jax.Array, axis: int) -> jax.Array:
    w = floats(weight, x)[0]
    demand(w.shape == (x.shape[axis],), f"weight must have shape ({x.shape[axis]},), got {w.shape}")
    return w


def _total(x: jax.Array, y: jax.Array, weight: Any, ignore_index: int) -> jax.Array:
    """What the mean divides by: the number of targets that count, or the sum of their weights."""
    counts = y != ignore_index
    if weight is None:
        return jnp.sum(counts).astype(x.dtype)
    return jnp.sum(jnp.where(counts, floats(weight, x)[0][jnp.where(counts, y, 0)], 0))


def cross_entropy(
    input: Any,
    target: Any,
    *,
    weight: Any = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> jax.Array:
    """Cross-entropy of logits against classes, or against probabilities of classes.

    Args:
        input: logits (classes,), (b, classes) or (b, classes, d1, ...): the classes are axis 1, not the last.
        target: integers of the input's shape without its class axis, or probabilities of the input's shape.
        weight: (classes,). For integers the mean divides by the sum of the targets' weights; for probabilities by the
            number of positions, whatever their weights.
        ignore_index: integers of this value count nowhere; nan is the mean of nothing else.
        label_smoothing: from 0 to 1, mixes the uniform distribution in; unlike T5X's and Flax's examples torch
            subtracts no constant entropy.

    `optax.softmax_cross_entropy_with_integer_labels` is its unweighted element, along the last axis; -1 is the last
    class there. Raises InputError for shapes, dtypes and options that torch refuses (and for label_smoothing < 0,
    which torch reads as 0); a label outside the classes, at which torch raises IndexError, makes nan.
    https://docs.pytorch.org/docs/stable/generated/torch.nn.CrossEntropyLoss.html
    """
    (x,) = floats(input)
    demand(0 <= label_smoothing <= 1, f"label_smoothing must be from 0 to 1, got {label_smoothing}")
    demand(x.ndim > 0, "cross_entropy takes an input with a class axis, got a scalar")
    axis = min(x.ndim - 1, 1)
    logs, classes = jax.nn.log_softmax(x, axis=axis), x.shape[axis]
    options = {"weight": weight, "ignore_index": ignore_index, "reduction": reduction}
    if jnp.shape(target) == x.shape:
        return _soft(logs, target, axis, label_smoothing, **options)
    hard = nll(logs, target, **options)
    if label_smoothing == 0:
        return hard
    y = jnp.asarray(target)
    uniform = jnp.where(y == ignore_index, 0, -_summed(logs, weight, axis))
    spread = reduced(uniform, reduction, _total(x, y, weight, ignore_index))
    return (1 - label_smoothing) * hard + spread * (label_smoothing / classes)


def _summed(logs: jax.Array, weight: Any, axis: int) -> jax.Array:
    """The weighted sum over the classes."""
    if weight is not None:
        logs = logs * jnp.expand_dims(_by_class(weight, logs, axis), [i for i in range(logs.ndim) if i != axis])
    return jnp.sum(logs, axis=axis)


def _soft(
    logs: jax.Array, target: Any, axis: int, smoothing: float, weight: Any, ignore_index: int, reduction: str
) -> jax.Array:
    floating = jnp.issubdtype(jnp.asarray(target).dtype, jnp.floating)
    demand(floating, f"a target of the input's shape {logs.shape} holds probabilities, got {jnp.asarray(target).dtype}")
    demand(ignore_index < 0, "ignore_index is for integer targets: these are probabilities")
    logs, y = floats(logs, target)
    if smoothing > 0:
        y = y * (1 - smoothing) + smoothing / logs.shape[axis]
    return reduced(-_summed(logs * y, weight, axis), reduction)


def linear_cross_entropy(
    input: Any,
    linear_weight: Any,
    target: Any,
    *,
    linear_bias: Any = None,
    weight: Any = None,
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> jax.Array:
    """`cross_entropy` of the logits that a linear layer makes of the input.

    Args:
        input: (features,) or (b, features).
        linear_weight: (classes, d1, ..., features), and linear_bias (classes, d1, ...): the module keeps both flat,
            its `linear.weight` is (classes * d1 * ..., features).
        target: as for cross_entropy of logits (b, classes, d1, ...).
        ignore_index: None is -100; anything else is refused with probabilities.

    torch's `options` cut the batch in chunks to save memory and change no number; there is nothing to pass here. JAX
    and Optax have none. Raises InputError for shapes that do not fit.
    https://docs.pytorch.org/docs/stable/generated/torch.nn.LinearCrossEntropyLoss.html
    """
    x, w = floats(input, linear_weight)
    demand(x.ndim in (1, 2) and w.ndim >= 2, f"input {x.shape} and linear_weight {w.shape} have the wrong dimensions")
    demand(x.shape[-1] == w.shape[-1], f"input {x.shape} and linear_weight {w.shape} differ in features")
    demand(x.ndim == 2 or w.ndim == 2, f"linear_weight {w.shape} needs a batched input, got {x.shape}")
    logits = jnp.tensordot(x, w, axes=(-1, -1))
    if linear_bias is not None:
        demand(jnp.shape(linear_bias) == w.shape[:-1], f"linear_bias must have shape {w.shape[:-1]}")
        logits = logits + jnp.asarray(linear_bias)
    soft = jnp.shape(target) == logits.shape
    demand(not soft or ignore_index is None, "ignore_index is for integer targets: these are probabilities")
    ignore = -100 if ignore_index is None else ignore_index
    options = {"weight": weight, "ignore_index": ignore, "label_smoothing": label_smoothing, "reduction": reduction}
    return cross_entropy(logits, target, **options)


def adaptive_log_softmax(input: Any, target: Any, params: Mapping[str, Any]) -> tuple[jax.Array, jax.Array]:
    """The log-probability of each target under a softmax in clusters, and minus its mean.

    Args:
        input: (b, features) or (features,).
        target: integers (b,) or ().
        params: the torch module's own leaves: `head.weight`, perhaps `head.bias`, and for each cluster i
            `tail.{i}.0.weight`, `tail.{i}.1.weight`. Their shapes say the cutoffs, so there are no options.

    Returns (output, loss), as torch does; there is no reduction. JAX and Optax have none. Every cluster is computed
    for every row (torch skips clusters without targets, whose leaves then have no gradient: here it is 0). Raises
    InputError for shapes and leaves that do not fit; a label outside the classes, at which torch raises, makes nan.
    https://docs.pytorch.org/docs/stable/generated/torch.nn.AdaptiveLogSoftmaxWithLoss.html
    """
    clusters = sum(name.startswith("tail.") and name.endswith(".0.weight") for name in params)
    tails = [f"tail.{i}.{layer}.weight" for i in range(clusters) for layer in (0, 1)]
    needed = {"head.weight", *tails}
    demand(
        clusters > 0 and needed == set(params) - {"head.bias"},
        f"params must hold {sorted(needed)}, got {sorted(params)}",
    )
    (x,), y = floats(input), labels(target)
    fits = y.ndim == x.ndim - 1 and y.shape == x.shape[:-1] and y.ndim <= 1
    demand(fits, f"an input of shape {x.shape} does not take labels of shape {y.shape}")
    head = x @ jnp.asarray(params["head.weight"]).T
    heads = jax.nn.log_softmax(head + jnp.asarray(params["head.bias"]) if "head.bias" in params else head)
    short = heads.shape[-1] - clusters
    output, start = jnp.where((y >= 0) & (y < short), _picked(heads[..., :short], y), jnp.nan), short
    for i in range(clusters):
        inner, outer = (jnp.asarray(params[f"tail.{i}.{layer}.weight"]) for layer in (0, 1))
        stop = start + outer.shape[0]
        inside = (y >= start) & (y < stop)
        tail = jax.nn.log_softmax(x @ inner.T @ outer.T)
        output = jnp.where(inside, heads[..., short + i] + _picked(tail, y - start), output)
        start = stop
    return output, -jnp.mean(output)


def _picked(logs: jax.Array, index: jax.Array) -> jax.Array:
    within = jnp.clip(index, 0, logs.shape[-1] - 1)
    return jnp.take_along_axis(logs, within[..., None], axis=-1)[..., 0]
