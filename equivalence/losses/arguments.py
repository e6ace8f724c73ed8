"""What every loss does with its arguments: one floating dtype, torch's reductions, one clear error for the rest."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from equivalence.errors import InputError, unknown

REDUCTIONS = ("mean", "sum", "none")


def floats(*values: Any) -> list[jax.Array]:
    """The values as arrays of the dtype that their floating ones promote to: integers and booleans follow.

    Raises InputError where nothing floats, and for complex values, whose gradient torch conjugates and JAX does not.
    """
    arrays = [jnp.asarray(value) for value in values]
    if any(jnp.issubdtype(array.dtype, jnp.complexfloating) for array in arrays):
        raise InputError("losses of complex arrays are not translated: take the real and imaginary parts apart")
    # a Python number has no dtype of its own to promote to
    given = [array for value, array in zip(values, arrays, strict=True) if not isinstance(value, float | int)]
    floating = [array.dtype for array in given if jnp.issubdtype(array.dtype, jnp.floating)]
    if not floating:
        raise InputError(f"a loss needs a floating input, got {', '.join(str(array.dtype) for array in arrays)}")
    dtype = jnp.result_type(*floating)
    return [array.astype(dtype) for array in arrays]


def labels(value: Any) -> jax.Array:
    """Class labels as integers of any width (torch takes int64 only, here and there uint8); else InputError."""
    array = jnp.asarray(value)
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise InputError(f"class labels must be integers, got {array.dtype}")
    return array


def reduced(loss: jax.Array, reduction: str, total: jax.Array | None = None) -> jax.Array:
    """The mean, the sum, or the elements themselves; the mean of nothing is nan, its sum 0.

    With `total` the mean is sum(loss) / total, as torch's class-weighted means are.
    """
    if reduction == "mean":
        return jnp.mean(loss) if total is None else jnp.sum(loss) / total
    if reduction == "sum":
        return jnp.sum(loss)
    if reduction == "none":
        return loss
    raise unknown("reduction", str(reduction), REDUCTIONS)


def demand(holds: bool, message: str) -> None:
    """Raise InputError with the message unless it holds."""
    if not holds:
        raise InputError(message)
