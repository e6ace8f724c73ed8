"""Adafactor and Muon, to which the order of a matrix's axes matters.

https://docs.pytorch.org/docs/stable/generated/torch.optim.Adafactor.html and
https://docs.pytorch.org/docs/stable/generated/torch.optim.Muon.html
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from equivalence.errors import InputError, unknown
from equivalence.optimizers.rules.common import (
    STEP,
    Options,
    Rule,
    Slot,
    add_decoupled_decay,
    count_steps,
    descend,
    gradient_of,
    lerp,
    like,
    number,
)


class TorchAdafactorState(NamedTuple):
    """How many gradients came; each leaf's mean square by row and by column, or whole where it has one axis or none.

    What a leaf does not have is `optax.MaskedNode()`, which holds no array.
    """

    count: Any
    row_var: Any
    col_var: Any
    variance: Any


def _norm(array: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.sum(array * array))


def _at_least(bound: float, value: jax.Array) -> jax.Array:
    """Python's `max(bound, value)`: the bound where the value is NaN."""
    return jnp.where(value > bound, value, bound)


def torch_adafactor(
    learning_rate: Any = 1e-2,
    beta2_decay: float = -0.8,
    eps: tuple[float | None, float] = (None, 1e-3),
    d: float = 1.0,
    weight_decay: float = 0.0,
) -> optax.GradientTransformation:
    """Adafactor's change, on leaves in torch's layout: a matrix's last two axes are its rows and columns.

    Differs from `optax.adafactor`: every matrix is factored (Optax: only from 128 on), the learning rate bounds the
    relative step `1 / sqrt(step)`, eps bounds the mean and the root from below instead of being added to the squares,
    and the decay is times the learning rate.

    Args:
        learning_rate: the largest relative step; may be traced.
        beta2_decay: the mean squares move by `step ** beta2_decay`.
        eps: bound of the root mean square (None: the dtype's epsilon), and of the parameter's size.
        d: largest root mean square of the step before it is scaled.
        weight_decay: decoupled, times the learning rate.
    """

    def init(params: Any) -> TorchAdafactorState:
        def sums(axis: int) -> Any:
            return jax.tree.map(
                lambda p: jnp.zeros_like(jnp.sum(p, axis, keepdims=True)) if p.ndim > 1 else optax.MaskedNode(), params
            )

        whole = jax.tree.map(lambda p: optax.MaskedNode() if p.ndim > 1 else jnp.zeros_like(p), params)
        return TorchAdafactorState(jnp.zeros([], jnp.int32), sums(-1), sums(-2), whole)

    def update(updates: Any, state: TorchAdafactorState, params: Any = None) -> tuple[Any, TorchAdafactorState]:
        count = optax.safe_increment(state.count)
        step = number(count)
        weight = step**beta2_decay
        relative = jnp.minimum(jnp.asarray(learning_rate, float), 1 / jnp.sqrt(step))

        def mean_squares(g: jax.Array, before: Any, axis: int) -> Any:
            return lerp(before, jnp.sum(g * g, axis, keepdims=True) / g.shape[axis], weight) if g.ndim > 1 else before

        rows = jax.tree.map(lambda g, r: mean_squares(g, r, -1), updates, state.row_var)
        columns = jax.tree.map(lambda g, c: mean_squares(g, c, -2), updates, state.col_var)
        whole = jax.tree.map(lambda g, v: v if g.ndim > 1 else lerp(v, g * g, weight), updates, state.variance)

        def change(g: jax.Array, p: jax.Array, r: Any, c: Any, v: Any) -> jax.Array:
            if not p.size:
                return g
            floor = eps[0] if eps[0] is not None else float(jnp.finfo(p.dtype).eps)
            found = r * c / jnp.maximum(jnp.mean(r, -2, keepdims=True), floor) if g.ndim > 1 else v
            direction = g / jnp.maximum(jnp.sqrt(found), floor)  # floor * floor may underflow
            size = _at_least(eps[1], _norm(p) / math.sqrt(p.size)) * like(relative, p)
            size = size / _at_least(1.0, _norm(direction) / (math.sqrt(p.size) * d))
            # an infinite parameter stays: torch multiplies it by 1 - learning_rate * weight_decay
            decay = like(learning_rate, p) * weight_decay * jnp.where(jnp.isinf(p), 0, p) if weight_decay else 0
            return -size * direction - decay

        found = jax.tree.map(change, updates, params, rows, columns, whole)
        return found, TorchAdafactorState(count, rows, columns, whole)

    return optax.GradientTransformation(init, update)


def adafactor(options: Options) -> optax.GradientTransformation:
    """torch.optim.Adafactor for one leaf in torch's layout."""
    rule = torch_adafactor(*(options[name] for name in ("lr", "beta2_decay", "eps", "d", "weight_decay")))
    return optax.chain(*gradient_of(options, decay=False), rule)


def _bfloat16(array: jax.Array) -> jax.Array:
    """Rounded to bfloat16 and kept in float32; XLA may drop a cast there and back, but not this."""
    return jax.lax.reduce_precision(array.astype(jnp.float32), exponent_bits=8, mantissa_bits=7)


def _matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


@functools.partial(jax.jit, static_argnames=("coefficients", "steps", "eps"))
def orthogonalized(matrix: jax.Array, coefficients: tuple[float, float, float], steps: int, eps: float) -> jax.Array:
    """The nearest matrix of orthogonal rows or columns, roughly: torch's Newton-Schulz iteration in bfloat16.

    torch rounds once a product: the terms of `beta * C + alpha * A @ B` are summed in float32, in an order that is its
    kernel's own, and a sum near a tie of bfloat16 then rounds the other way. Up to about 16 x 16 this gives torch's
    bits; from 24 x 64 on the results part by ulps of bfloat16, as far as torch's from torch's without oneDNN (both
    1.1e-5 rms in a 256 x 512 parameter after 10 steps of 0.02). No float64 makes this smaller.

    Args:
        matrix: two axes; taken transposed where it has more rows than columns.
        coefficients: of the quintic.
        steps: how many iterations.
        eps: the norm's lower bound.

    Returns float32 values that bfloat16 holds.
    """
    a, b, c = (jnp.float32(value) for value in coefficients)
    found = _bfloat16(matrix)
    turned = matrix.shape[0] > matrix.shape[1]
    found = found.T if turned else found
    found = _bfloat16(found / jnp.maximum(_bfloat16(_norm(found)), _bfloat16(jnp.float32(eps))))

    def iteration(_: Any, x: jax.Array) -> jax.Array:
        gram = _bfloat16(_matmul(x, x.T))
        quintic = _bfloat16(b * gram + c * _matmul(gram, gram))
        return _bfloat16(a * x + _matmul(quintic, x))

    found = jax.lax.fori_loop(0, steps, iteration, found)
    return found.T if turned else found


ADJUSTMENTS = {
    None: lambda rows, columns: math.sqrt(max(1, rows / columns)),
    "original": lambda rows, columns: math.sqrt(max(1, rows / columns)),
    "match_rms_adamw": lambda rows, columns: 0.2 * math.sqrt(max(rows, columns)),
}
"""What Muon multiplies its learning rate by, by the name of `adjust_lr_fn`."""


def scale_by_torch_muon(
    momentum: Any = 0.95,
    nesterov: bool = True,
    ns_coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315),
    eps: float = 1e-7,
    ns_steps: int = 5,
    adjust_lr_fn: str | None = None,
) -> optax.GradientTransformation:
    """Muon's direction on matrices in torch's layout, its adjustment of the learning rate included.

    Differs from `optax.contrib.scale_by_muon`: the momentum is an average without bias correction, the iteration runs
    in bfloat16, whose rounding is as large as 1e-2 of the step, and eps bounds the norm instead of being added to it.

    Raises InputError for a leaf that is no matrix, and for an unknown `adjust_lr_fn`.
    """
    if adjust_lr_fn not in ADJUSTMENTS:
        raise unknown("adjust_lr_fn", str(adjust_lr_fn), [name for name in ADJUSTMENTS if name])

    def init(params: Any) -> optax.TraceState:
        odd = [leaf.shape for leaf in jax.tree.leaves(params) if leaf.ndim != 2]
        if odd:
            raise InputError(f"Muon moves matrices only, not leaves of shape {odd}: give those to another optimizer")
        return optax.TraceState(jax.tree.map(jnp.zeros_like, params))

    def update(updates: Any, state: optax.TraceState, params: Any = None) -> tuple[Any, optax.TraceState]:
        trace = jax.tree.map(lambda b, g: lerp(b, g, 1 - momentum), state.trace, updates)
        ahead = jax.tree.map(lambda g, b: lerp(g, b, momentum), updates, trace) if nesterov else trace

        def direction(u: jax.Array) -> jax.Array:
            found = orthogonalized(u, tuple(ns_coefficients), ns_steps, eps).astype(u.dtype)
            return ADJUSTMENTS[adjust_lr_fn](*u.shape) * found if u.size else u

        return jax.tree.map(direction, ahead), optax.TraceState(trace)

    return optax.GradientTransformation(init, update)


def muon(options: Options) -> optax.GradientTransformation:
    """torch.optim.Muon for one matrix in torch's layout; the decay is times the unadjusted learning rate."""
    names = ("momentum", "nesterov", "ns_coefficients", "eps", "ns_steps", "adjust_lr_fn")
    return optax.chain(
        count_steps(),
        scale_by_torch_muon(*(options[name] for name in names)),
        add_decoupled_decay(options["weight_decay"]),
        descend(options["lr"]),
    )


def _adafactor_slots(options: Options) -> dict[str, Slot]:
    factored = {name: Slot(name, "factored") for name in ("row_var", "col_var")}
    return STEP | factored | {"variance": Slot("variance", "unfactored")}


RULES = {
    "Adafactor": Rule("Adafactor", adafactor, _adafactor_slots, in_reference_layout=True),
    "Muon": Rule(
        "Muon",
        muon,
        lambda _: {"momentum_buffer": Slot("trace", "moment"), "begun": Slot("count", "begun")},
        in_reference_layout=True,
    ),
}
