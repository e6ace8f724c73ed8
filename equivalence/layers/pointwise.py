"""Elementwise functions that jax.nn has not, or has with another slope at their kinks: each is torch's, slope too."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def leaky_relu(x: Any, slope: Any) -> Any:
    """`x` above 0, else `slope * x`; at 0 the slope is `slope`, where jax.nn.leaky_relu's is 1.

    https://docs.pytorch.org/docs/stable/generated/torch.nn.LeakyReLU.html
    """
    return jnp.where(x > 0, x, slope * x)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def celu(x: Any, alpha: float, inplace: bool) -> Any:
    """`x` above 0, else `alpha * (exp(x / alpha) - 1)`. Its slope has 1 / alpha of alpha in float32, in float64 too.

    `inplace` is torch's: the slope is then computed from the value, which is all that is left.

    https://docs.pytorch.org/docs/stable/generated/torch.nn.CELU.html
    """
    return jax.nn.celu(x, alpha)


@celu.defjvp
def _celu_slope(alpha: float, inplace: bool, primals: tuple[Any], tangents: tuple[Any]) -> tuple[Any, Any]:
    (x,), (moved,) = primals, tangents
    value, inside = jax.nn.celu(x, alpha), 1 / float(np.float32(alpha))
    bent = jnp.where(x > 0, jnp.zeros_like(x), x)  # exp must not overflow where it is not taken
    below = inside * (value + alpha) if inplace else alpha * inside * jnp.exp(bent * inside)
    return value, jnp.where(x > 0, jnp.ones_like(x), below) * moved


def hardtanh(x: Any, low: float, high: float) -> Any:
    """`x` held between `low` and `high`; the slope at both is 0, where jnp.clip's is 1/2 and jax.nn.hard_tanh's 1.

    https://docs.pytorch.org/docs/stable/generated/torch.nn.Hardtanh.html
    """
    return jnp.where(x <= low, low, jnp.where(x >= high, high, x)).astype(x.dtype)


SIXTH = float(np.float32(1 / 6))
"""1/6 in float32, the slope of torch's Hardsigmoid in every dtype."""


@jax.custom_jvp
def hardsigmoid(x: Any) -> Any:
    """`(x + 3) / 6` held between 0 and 1. Its slope is float32's 1/6 in float64 too, as in torch; 0 at both kinks.

    https://docs.pytorch.org/docs/stable/generated/torch.nn.Hardsigmoid.html
    """
    return hardtanh((x + 3) / 6, 0.0, 1.0)


@hardsigmoid.defjvp
def _hardsigmoid_slope(primals: tuple[Any], tangents: tuple[Any]) -> tuple[Any, Any]:
    (x,), (moved,) = primals, tangents
    slope = jnp.where((x > -3) & (x < 3), jnp.asarray(SIXTH, x.dtype), jnp.zeros_like(x))
    return hardsigmoid(x), slope * moved


def hardswish(x: Any) -> Any:
    """`x * (x + 3) / 6` between -3 and 3, 0 below and `x` above, whose slopes 0 and 1 are those at the kinks.

    https://docs.pytorch.org/docs/stable/generated/torch.nn.Hardswish.html
    """
    return x * (hardtanh(x, -3.0, 3.0) + 3) / 6


def hardshrink(x: Any, lambd: float) -> Any:
    """0 from `-lambd` to `lambd`, both included, else `x`.

    https://docs.pytorch.org/docs/stable/generated/torch.nn.Hardshrink.html
    """
    return jnp.where((x >= -lambd) & (x <= lambd), jnp.zeros_like(x), x)


def softshrink(x: Any, lambd: float) -> Any:
    """`x` moved towards 0 by `lambd`, and 0 within it; the slope at both edges is 0. NaN stays NaN.

    https://docs.pytorch.org/docs/stable/generated/torch.nn.Softshrink.html
    """
    return jnp.where((x >= -lambd) & (x <= lambd), jnp.zeros_like(x), x - lambd * jnp.sign(x))


def threshold(x: Any, limit: float, value: float) -> Any:
    """`x` above `limit`, else `value`, which `limit` itself becomes too.

    https://docs.pytorch.org/docs/stable/generated/torch.nn.Threshold.html
    """
    return jnp.where(x <= limit, jnp.asarray(value, x.dtype), x)


def softplus(x: Any, beta: float, limit: float) -> Any:
    """`log(1 + exp(beta x)) / beta` where `beta x` is at most `limit`, and `x` itself above, unlike jax.nn.softplus.

    https://docs.pytorch.org/docs/stable/generated/torch.nn.Softplus.html
    """
    straight = beta * x > limit
    bent = jnp.where(straight, jnp.zeros_like(x), beta * x)  # exp must not overflow where it is not taken
    return jnp.where(straight, x, jnp.log1p(jnp.exp(bent)) / beta)


def rrelu(x: Any, lower: float, upper: float, key: Any) -> Any:
    """Leaky ReLU in training: every element draws its slope between `lower` and `upper`, used at 0 and below.

    https://docs.pytorch.org/docs/stable/generated/torch.nn.RReLU.html
    """
    return leaky_relu(x, jax.random.uniform(key, x.shape, x.dtype, lower, upper))
