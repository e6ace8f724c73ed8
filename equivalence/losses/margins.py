"""Hinge losses: something must be larger than something else by a margin. Where it just is, the slope differs."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from equivalence.losses.arguments import demand, floats, labels, reduced
from equivalence.losses.kinks import clamp_min


def margin_ranking(input1: Any, input2: Any, target: Any, *, margin: float = 0.0, reduction: str = "mean") -> jax.Array:
    """max(0, margin - target * (input1 - input2)) of targets 1 and -1, of arrays of as many axes that broadcast.

    The slope where the margin is just met is that of the violated side (`jnp.maximum` halves it, `jax.nn.relu` has 0).
    Optax has none. Raises InputError for unequal numbers of axes.
    https://docs.pytorch.org/docs/stable/generated/torch.nn.MarginRankingLoss.html
    """
    x1, x2, y = floats(input1, input2, target)
    demand(
        x1.ndim == x2.ndim == y.ndim, f"margin_ranking takes as many axes each, got {x1.shape}, {x2.shape}, {y.shape}"
    )
    return reduced(clamp_min(-y * (x1 - x2) + margin, 0), reduction)


def hinge_embedding(input: Any, target: Any, *, margin: float = 1.0, reduction: str = "mean") -> jax.Array:
    """The input where target is 1 and max(0, margin - input) where it is -1, of arrays that broadcast.

    Any other target (0, say) counts both, as in torch. `optax.hinge_loss` is another function,
    max(0, 1 - input * target). The slope where input == margin is -1 (`jnp.maximum`: -1/2).
    https://docs.pytorch.org/docs/stable/generated/torch.nn.HingeEmbeddingLoss.html
    """
    x, y = floats(input, target)
    apart = jnp.where(y != 1, clamp_min(margin - x, 0), 0)
    return reduced(apart + jnp.where(y != -1, x, 0), reduction)


def _rows(input: Any, name: str) -> tuple[jax.Array, jax.Array]:
    (x,) = floats(input)
    demand(x.ndim <= 2 and 0 not in x.shape[-1:], f"{name} takes an input (classes,) or (b, classes), got {x.shape}")
    return x, x.reshape(-1, x.shape[-1] if x.ndim else 1)


def multi_margin(
    input: Any, target: Any, *, p: int = 1, margin: float = 1.0, weight: Any = None, reduction: str = "mean"
) -> jax.Array:
    """Mean over the classes of max(0, margin - input[target] + input[class])^p, but for the target itself.

    Args:
        input: (classes,) or (b, classes).
        target: integers () or (b,).
        p: 1 or 2.
        weight: (classes,): a factor by target; unlike `nll`'s the mean still divides by b.

    `optax.losses.multiclass_hinge_loss` takes the largest violation only, where this takes the mean of all. The slope
    where the margin is just met is 0. Raises InputError for other p and shapes; a label outside the classes, at which
    torch raises, makes nan. The mean of an empty batch is nan and its sum 0 (torch returns uninitialised memory).
    https://docs.pytorch.org/docs/stable/generated/torch.nn.MultiMarginLoss.html
    """
    demand(p in (1, 2), f"multi_margin takes p 1 or 2, got {p}")
    (x, rows), y = _rows(input, "multi_margin"), labels(target)
    count, classes = rows.shape
    demand(y.ndim <= 1 and y.size == count, f"an input of shape {x.shape} does not take labels of shape {y.shape}")
    index = y.reshape(count, 1)
    known, within = (index >= 0) & (index < classes), jnp.clip(index, 0, classes - 1)
    gap = margin - jnp.take_along_axis(rows, within, axis=1) + rows
    gap = jnp.where((gap > 0) & (jnp.arange(classes) != index), gap, 0)
    loss = gap if p == 1 else gap * gap
    if weight is not None:
        w = floats(weight, x)[0]
        demand(w.shape == (classes,), f"weight must have shape ({classes},), got {w.shape}")
        loss = loss * w[within]
    loss = jnp.where(known[:, 0], jnp.sum(loss, axis=1) / classes, jnp.nan)
    return reduced(loss.reshape(y.shape), reduction)


def multi_label_margin(input: Any, target: Any, *, reduction: str = "mean") -> jax.Array:
    """Sum over the labels of a row and over its other classes of max(0, 1 - input[label] + input[class]) / classes.

    Args:
        input: (classes,) or (b, classes).
        target: integers of the input's shape: the labels of a row up to its first -1; what follows is not read. A
            label that stands there twice counts twice.

    JAX and Optax have none. The slope where the margin of 1 is just met is 0. Raises InputError for other shapes; a
    label outside -1 ... classes - 1, at which torch raises, makes nan. The mean of an empty batch is nan and its sum 0
    (torch returns uninitialised memory).
    https://docs.pytorch.org/docs/stable/generated/torch.nn.MultiLabelMarginLoss.html
    """
    (x, rows), y = _rows(input, "multi_label_margin"), labels(target)
    classes = rows.shape[1]
    demand(
        x.shape == y.shape or y.size == 1 == x.size, f"the target must have the input's shape {x.shape}, got {y.shape}"
    )
    index = y.reshape(rows.shape)
    listed = jnp.cumsum(index == -1, axis=1) == 0
    known = jnp.all((index >= -1) & (index < classes), axis=1)
    within = jnp.clip(index, 0, classes - 1)
    is_label = jnp.any((within[:, :, None] == jnp.arange(classes)) & listed[:, :, None], axis=1)
    gap = 1 - jnp.take_along_axis(rows, within, axis=1)[:, :, None] + rows[:, None, :]
    loss = jnp.where((gap > 0) & listed[:, :, None] & ~is_label[:, None, :], gap, 0)
    total = jnp.where(known, jnp.sum(loss, axis=(1, 2)) / classes, jnp.nan)
    return reduced(total if y.ndim == 2 else total.reshape(()), reduction)
