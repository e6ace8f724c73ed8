"""Gradient clipping as torch does it: by the total norm, and element by element."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from equivalence.errors import InputError

EPS = 1e-6
"""What torch adds to the norm before it divides by it."""


class ClipNormState(NamedTuple):
    """`norm`: the total norm before clipping, what `clip_grad_norm_` returns; 0 before the first step."""

    norm: jax.Array


def total_norm(grads: Any, norm_type: float = 2.0) -> jax.Array:
    """The norm of the leaves' norms, as `torch.nn.utils.get_total_norm`.

    Args:
        grads: a tree of arrays; leaves that are None or `optax.MaskedNode` do not count.
        norm_type: p; inf, -inf and 0 too. With 0 it counts the *leaves* that are not all zero, not the elements.

    Returns a scalar in the leaves' widest dtype (each leaf's norm in its own). Raises InputError for an empty leaf
    where the norm of nothing has no value (p < 0 or inf; torch raises there too).

    https://docs.pytorch.org/docs/stable/generated/torch.nn.utils.get_total_norm.html
    """
    order = float(norm_type)
    norms = [_norm(leaf, order) for leaf in jax.tree.leaves(grads)]
    if not norms:
        return jnp.zeros(())
    dtype = jnp.result_type(*norms)
    return _norm(jnp.stack([norm.astype(dtype) for norm in norms]), order)


def _norm(leaf: jax.Array, order: float) -> jax.Array:
    if leaf.size == 0 and (order < 0 or math.isinf(order)):
        raise InputError(f"norm_type={order}: a leaf without elements has no such norm; mask it out (optax.masked)")
    sizes = jnp.abs(jnp.ravel(leaf))
    wide = jnp.promote_types(sizes.dtype, jnp.float32)  # bfloat16 and float16 are summed in float32
    return jnp.linalg.norm(sizes.astype(wide), order).astype(sizes.dtype)


def clip_grad_norm(
    max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False
) -> optax.GradientTransformation:
    """`torch.nn.utils.clip_grad_norm_`: every gradient times min(1, max_norm / (total norm + 1e-6)).

    Args:
        max_norm: the largest total norm that is left alone.
        norm_type: p of the norm; see `total_norm`.
        error_if_nonfinite: only False. The norm before clipping stands in the state as `norm`.

    Only what may move may count: frozen leaves must not reach it (put it inside `freeze` or `optax.masked`, which hand
    on `optax.MaskedNode`). Raises InputError for error_if_nonfinite=True: a compiled step cannot raise.

    Differs from optax.clip_by_global_norm, which has no 1e-6 and leaves a gradient below max_norm untouched where torch
    multiplies by at most 1: at max_norm=1 the clipped gradients differ by 1e-6 / norm relative.

    https://docs.pytorch.org/docs/stable/generated/torch.nn.utils.clip_grad_norm_.html

    >>> clip = clip_grad_norm(1.0)
    >>> updates, state = clip.update({"w": jnp.array([3.0, 4.0])}, clip.init({"w": jnp.zeros(2)}))
    >>> float(state.norm)
    5.0
    """
    if error_if_nonfinite:
        raise InputError(
            "clip_grad_norm(error_if_nonfinite=True): a compiled step cannot raise; read `norm` from the state after"
            " the step (optax.tree.get(state, 'norm')) and raise where it is not finite"
        )

    def init(params: optax.Params) -> ClipNormState:
        norm = jax.eval_shape(lambda tree: total_norm(tree, norm_type), params)
        return ClipNormState(jnp.zeros(norm.shape, norm.dtype))

    def update(
        grads: optax.Updates, state: ClipNormState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, ClipNormState]:
        del params
        norm = total_norm(grads, norm_type)
        # torch rounds a number over a tensor as the tensor's reciprocal times the number
        coefficient = jnp.minimum(1 / (norm + EPS) * max_norm, 1)
        clipped = jax.tree.map(lambda grad: (grad * coefficient).astype(grad.dtype), grads)
        return clipped, ClipNormState(norm.astype(state.norm.dtype))

    return optax.GradientTransformation(init, update)


def clip_grad_value(clip_value: float) -> optax.GradientTransformation:
    """`torch.nn.utils.clip_grad_value_`: every element into [-clip_value, clip_value]; NaN stays NaN.

    Exactly optax.clip, under the name torch knows it by: optax.clip is *not* clip_grad_norm_, whose name it resembles.

    https://docs.pytorch.org/docs/stable/generated/torch.nn.utils.clip_grad_value_.html
    """
    return optax.clip(clip_value)
