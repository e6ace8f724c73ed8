"""Losses of yes or no for every element: binary cross-entropies and the logistic losses."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from equivalence.losses.arguments import demand, floats, reduced
from equivalence.losses.kinks import EPSILON


def bce(input: Any, target: Any, *, weight: Any = None, reduction: str = "mean") -> jax.Array:
    """Binary cross-entropy of probabilities from 0 to 1 against targets from 0 to 1, of one shape.

    Args:
        weight: array that broadcasts against the input, a factor of each element; the mean divides by their number.

    Both logarithms are clamped at -100, so a certain and wrong answer costs 100 and not infinity, while the slope by
    the input divides by max(input (1 - input), 1e-12) and is not clamped away: 1e12 there. Optax has none. Raises
    InputError for two shapes; an input or target outside [0, 1], at which torch raises, makes nan.
    https://docs.pytorch.org/docs/stable/generated/torch.nn.BCELoss.html
    """
    x, y = floats(input, target)
    demand(x.shape == y.shape, f"bce takes input and target of one shape, got {x.shape} and {y.shape}")
    inside = (x >= 0) & (x <= 1) & (y >= 0) & (y <= 1)
    loss = jnp.where(inside, _bce(jnp.where(inside, x, 0.5), jnp.where(inside, y, 0.5)), jnp.nan)
    return reduced(loss if weight is None else loss * floats(weight, x)[0], reduction)


@jax.custom_jvp
def _bce(x: jax.Array, y: jax.Array) -> jax.Array:
    return (y - 1) * jnp.maximum(jnp.log1p(-x), -100) - y * jnp.maximum(jnp.log(x), -100)


_bce.defjvps(
    lambda t, ans, x, y: t * (x - y) / jnp.maximum((1 - x) * x, EPSILON),
    lambda t, ans, x, y: t * (jnp.log1p(-x) - jnp.log(x)),
)


def bce_with_logits(
    input: Any, target: Any, *, weight: Any = None, pos_weight: Any = None, reduction: str = "mean"
) -> jax.Array:
    """Binary cross-entropy of logits against targets from 0 to 1, of one shape.

    Args:
        weight: array that broadcasts against the input, a factor of each element; the mean divides by their number.
        pos_weight: array that broadcasts against the input: a factor of the positive term.

    `optax.sigmoid_binary_cross_entropy` is its element without pos_weight, which Optax lacks; at infinite logits torch
    returns nan where Optax may return inf. Raises InputError for two shapes.
    https://docs.pytorch.org/docs/stable/generated/torch.nn.BCEWithLogitsLoss.html
    """
    x, y = floats(input, target)
    demand(x.shape == y.shape, f"bce_with_logits takes input and target of one shape, got {x.shape} and {y.shape}")
    loss = _bce_with_logits(x, y) if pos_weight is None else _bce_weighted(x, y, floats(pos_weight, x)[0])
    return reduced(loss if weight is None else loss * floats(weight, x)[0], reduction)


@jax.custom_jvp
def _bce_with_logits(x: jax.Array, y: jax.Array) -> jax.Array:
    return (1 - y) * x - jax.nn.log_sigmoid(x)


_bce_with_logits.defjvps(lambda t, ans, x, y: t * (jax.nn.sigmoid(x) - y), lambda t, ans, x, y: t * -x)


@jax.custom_jvp
def _bce_weighted(x: jax.Array, y: jax.Array, positive: jax.Array) -> jax.Array:
    return (1 - y) * x - ((positive - 1) * y + 1) * jax.nn.log_sigmoid(x)


_bce_weighted.defjvps(
    lambda t, ans, x, y, positive: t * ((positive * y + 1 - y) * jax.nn.sigmoid(x) - positive * y),
    lambda t, ans, x, y, positive: t * (jax.nn.log_sigmoid(-x) - positive * jax.nn.log_sigmoid(x)),
    lambda t, ans, x, y, positive: t * -y * jax.nn.log_sigmoid(x),
)


def soft_margin(input: Any, target: Any, *, reduction: str = "mean") -> jax.Array:
    """Logistic loss log(1 + exp(-target * input)) of targets 1 and -1, of arrays that broadcast.

    Written as torch computes it, overflow included: where exp(-target * input) is infinite (-target * input above 88
    in float32), the loss is inf and its gradient nan. `optax.sigmoid_binary_cross_entropy` of targets 0 and 1 and
    `jax.nn.softplus(-target * input)` stay finite.
    https://docs.pytorch.org/docs/stable/generated/torch.nn.SoftMarginLoss.html
    """
    x, y = floats(input, target)
    return reduced(jnp.log1p(jnp.exp(-y * x)), reduction)


def multi_label_soft_margin(input: Any, target: Any, *, weight: Any = None, reduction: str = "mean") -> jax.Array:
    """Binary cross-entropy of logits (..., classes), averaged over the classes: "none" returns (...).

    Args:
        target: 0 or 1, of the input's shape.
        weight: array that broadcasts against the input: a factor of each class.

    The mean of `optax.sigmoid_binary_cross_entropy` is its mean; at infinite logits torch returns nan.
    https://docs.pytorch.org/docs/stable/generated/torch.nn.MultiLabelSoftMarginLoss.html
    """
    x, y = floats(input, target)
    demand(x.ndim > 0, "multi_label_soft_margin takes an input with a class axis, got a scalar")
    loss = -(y * jax.nn.log_sigmoid(x) + (1 - y) * jax.nn.log_sigmoid(-x))
    if weight is not None:
        loss = loss * floats(weight, x)[0]
    return reduced(jnp.sum(loss, axis=-1) / x.shape[-1], reduction)
