"""Functions with a kink, with the derivative that torch gives them there; JAX's own rules choose differently."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp

EPSILON = 9.999999960041972e-13
"""The 1e-12 of torch's C++ losses, which is a float32 constant also where everything else is float64."""


@jax.custom_jvp
def absolute(x: jax.Array) -> jax.Array:
    """|x|; its slope at 0 and at nan is 0 (jnp.abs: 1 and -1)."""
    return jnp.abs(x)


absolute.defjvps(lambda t, ans, x: t * _sign(x))


def _sign(x: jax.Array) -> jax.Array:
    return jnp.where(jnp.isnan(x), 0, jnp.sign(x))


@jax.custom_jvp
def clamp_min(x: jax.Array, low: float) -> jax.Array:
    """max(x, low); its slope where x == low is 1 (jnp.maximum: 1/2, jax.nn.relu: 0) and at nan 0."""
    return jnp.maximum(x, low)


clamp_min.defjvps(lambda t, ans, x, low: jnp.where(x >= low, t, 0), None)


@jax.custom_jvp
def clamped_straight_through(x: jax.Array, low: float) -> jax.Array:
    """max(x, low) whose slope is 1 everywhere: what torch's clamp under no_grad amounts to."""
    return jnp.maximum(x, low)


clamped_straight_through.defjvps(lambda t, ans, x, low: t, None)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def norm(x: jax.Array, p: float) -> jax.Array:
    """The p-norm over the last axis as torch.linalg.vector_norm has it.

    Its gradient is 0 at the zero vector (JAX: nan), split evenly over ties for p = inf, and 0 for p = 0.
    """
    size = jnp.abs(x)
    if p == 0:
        return jnp.sum(x != 0, axis=-1).astype(x.dtype)
    if p == 2:
        return jnp.sqrt(jnp.sum(jnp.square(x), axis=-1))
    if math.isinf(p):
        return jnp.max(size, axis=-1) if p > 0 else jnp.min(size, axis=-1)
    return jnp.sum(size, axis=-1) if p == 1 else jnp.sum(size**p, axis=-1) ** (1 / p)


@norm.defjvp
def _norm_jvp(p: float, primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    (x,), (t,) = primals, tangents
    value = norm(x, p)
    return value, jnp.sum(t * _norm_slope(x, p, value[..., None]), axis=-1)


def _norm_slope(x: jax.Array, p: float, value: jax.Array) -> jax.Array:
    if p == 0:
        return jnp.zeros_like(x)
    if p == 1:
        return _sign(x)
    if math.isinf(p):
        ties = (jnp.abs(x) == value) | (jnp.isnan(x) & jnp.isnan(value))
        return _sign(x) * ties / jnp.sum(ties, axis=-1, keepdims=True)
    nonzero = jnp.where(value == 0, 1, value)
    if p == 2:
        slope = x / nonzero
    else:
        slope = jnp.where(x == 0, 0, _sign(x) * jnp.abs(jnp.where(x == 0, 1, x)) ** (p - 1)) * nonzero ** (1 - p)
    return jnp.where(value == 0, 0, slope)
