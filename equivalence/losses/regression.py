"""Losses of numbers against numbers: absolute and squared errors, and likelihoods of counts and normals."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.scipy.special import xlogy

from equivalence.losses.arguments import demand, floats, reduced
from equivalence.losses.kinks import absolute, clamped_straight_through


def l1(input: Any, target: Any, *, reduction: str = "mean") -> jax.Array:
    """Absolute error |input - target|, of arrays that broadcast.

    The slope where they meet is 0; that of `jnp.abs` is 1 there. Optax has none.
    https://docs.pytorch.org/docs/stable/generated/torch.nn.L1Loss.html
    """
    x, y = floats(input, target)
    return reduced(absolute(x - y), reduction)


def mse(input: Any, target: Any, *, reduction: str = "mean") -> jax.Array:
    """Squared error (input - target)^2, of arrays that broadcast.

    `optax.squared_error` is its element; `optax.l2_loss` is half of it.
    https://docs.pytorch.org/docs/stable/generated/torch.nn.MSELoss.html
    """
    x, y = floats(input, target)
    return reduced(optax.squared_error(*jnp.broadcast_arrays(x, y)), reduction)


def smooth_l1(input: Any, target: Any, *, beta: float = 1.0, reduction: str = "mean") -> jax.Array:
    """(input - target)^2 / (2 beta) where closer than beta, |input - target| - beta / 2 elsewhere; beta 0 is `l1`.

    `optax.huber_loss(delta=beta)` is beta times it; they agree at beta 1 only. Raises InputError for beta < 0.
    https://docs.pytorch.org/docs/stable/generated/torch.nn.SmoothL1Loss.html
    """
    demand(beta >= 0, f"smooth_l1 takes beta >= 0, got {beta}")
    if beta == 0:
        return l1(input, target, reduction=reduction)
    x, y = floats(input, target)
    far = jnp.abs(x - y) >= beta
    # inside each branch the other's values are replaced: an infinite difference would make 0 * inf of the gradient
    near = jnp.where(far, 0, x - y)
    return reduced(jnp.where(far, jnp.abs(x - y) - beta / 2, near * near / (2 * beta)), reduction)


def huber(input: Any, target: Any, *, delta: float = 1.0, reduction: str = "mean") -> jax.Array:
    """(input - target)^2 / 2 where closer than delta, delta (|input - target| - delta / 2) elsewhere.

    `optax.huber_loss` is its element. Raises InputError for delta <= 0, as torch does.
    https://docs.pytorch.org/docs/stable/generated/torch.nn.HuberLoss.html
    """
    demand(delta > 0, f"huber takes delta > 0, got {delta}")
    x, y = floats(input, target)
    return reduced(optax.huber_loss(x, y, delta=delta), reduction)


def poisson_nll(
    input: Any, target: Any, *, log_input: bool = True, full: bool = False, eps: float = 1e-8, reduction: str = "mean"
) -> jax.Array:
    """Negative log-likelihood of counts: exp(input) - target * input, or of a rate where `log_input` is False.

    `full` adds Stirling's log(target!) where target > 1. `-jax.scipy.stats.poisson.logpmf` has the exact log(target!)
    and no eps. As in torch, the gradient by a target of 0 is nan under `full`.
    https://docs.pytorch.org/docs/stable/generated/torch.nn.PoissonNLLLoss.html
    """
    x, y = floats(input, target)
    loss = jnp.exp(x) - y * x if log_input else x - y * jnp.log(x + eps)
    if full:
        loss = loss + jnp.where(y <= 1, 0, y * jnp.log(y) - y + 0.5 * jnp.log(2 * math.pi * y))
    return reduced(loss, reduction)


def gaussian_nll(
    input: Any, target: Any, var: Any, *, full: bool = False, eps: float = 1e-6, reduction: str = "mean"
) -> jax.Array:
    """Negative log-likelihood under a normal: (log var + (input - target)^2 / var) / 2, with var at least eps.

    Args:
        input, target: arrays that broadcast.
        var: a number, or an array of the input's shape, of that shape without its last axis, or with one axis of 1.
        full: add log(2 pi) / 2.

    The clamp of var passes gradients as if it were not there (`jnp.maximum` would stop them); `-norm.logpdf` has no
    clamp and always the constant. Raises InputError for another shape of var; a negative var, at which torch raises,
    makes nan.
    https://docs.pytorch.org/docs/stable/generated/torch.nn.GaussianNLLLoss.html
    """
    x, y, v = floats(input, target, var)
    if isinstance(var, float | int):
        v = jnp.broadcast_to(v, x.shape)
    elif v.shape == x.shape[:-1] and x.ndim:
        v = v[..., None]
    fits = v.ndim == x.ndim and all(b in (a, 1) for a, b in zip(x.shape, v.shape, strict=True))
    demand(
        fits and sum(a != b for a, b in zip(x.shape, v.shape, strict=True)) <= 1,
        f"var of shape {jnp.shape(var)} does not fit an input of shape {x.shape}",
    )
    v = clamped_straight_through(jnp.where(v < 0, jnp.nan, v), eps)
    loss = 0.5 * (jnp.log(v) + jnp.square(x - y) / v)
    return reduced(loss + 0.5 * math.log(2 * math.pi) if full else loss, reduction)


def kl_div(input: Any, target: Any, *, log_target: bool = False, reduction: str = "mean") -> jax.Array:
    """Pointwise target * (log target - input) of log-probabilities `input`, of arrays that broadcast.

    The arguments are (log of the model, target), and "mean" divides by the number of *elements*; "batchmean" divides
    by the length of the first axis. `optax.kl_divergence` sums over the last axis, which is neither; its value at
    target 0 agrees, its gradient there does not (nan in torch, by the target).
    https://docs.pytorch.org/docs/stable/generated/torch.nn.KLDivLoss.html
    """
    x, y = floats(input, target)
    loss = jnp.exp(y) * (y - x) if log_target else xlogy(y, y) - y * x
    if reduction != "batchmean":
        return reduced(loss, reduction)
    return jnp.sum(loss) / (x.shape[0] if x.ndim else 1)
