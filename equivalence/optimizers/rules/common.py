"""What the rules of torch's optimizers share: their description, scalars as exact as torch's, decay, averages.

torch computes the scalars of a step (bias corrections, decayed rates) in Python floats, hence in float64 whatever the
parameter's dtype; Optax computes them in float32 where x64 is off. What is here is as exact in both precisions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

Options = Mapping[str, Any]


@dataclass(frozen=True)
class Slot:
    """Where the rule's Optax state holds one entry of torch's state.

    Attributes:
        field: the name of the NamedTuple field, unique within the rule's state.
        kind: "moment" (shaped like the parameter, moves as a gradient), "value" (like the parameter, moves as a
            value), "count" (integer step of the leaf), "scalar" (a float of the leaf), "factored" and "unfactored" (in
            the reference's layout: of leaves with two axes or more, and of the others), "begun" (1 once the leaf
            has had a gradient: torch says so by holding any state for it).
        python: torch holds a Python number, not a tensor.
    """

    field: str
    kind: Literal["moment", "value", "count", "scalar", "factored", "unfactored", "begun"]
    python: bool = False


@dataclass(frozen=True)
class Rule:
    """One torch optimizer as an Optax transformation.

    Attributes:
        name: torch's class name.
        make: one param group's options -> the transformation; it adds its own sign, learning rate and decay.
        slots: one param group's options -> torch's state names under these options, and where they are held.
        in_reference_layout: the axes' order matters, so that it has to run on torch's own layout.
        needs_rows: `update` takes `rows=`, which rows of the parameter the gradient held.
        whole: it moves all parameters together (LBFGS), so that `make` gives a transformation of the whole tree.
        eager: torch makes its state with the optimizer, not with a parameter's first gradient (Adagrad).
    """

    name: str
    make: Callable[[Options], optax.GradientTransformation]
    slots: Callable[[Options], dict[str, Slot]]
    in_reference_layout: bool = False
    needs_rows: bool = False
    whole: bool = False
    eager: bool = False


STEP = {"step": Slot("count", "count")}


class Steps(NamedTuple):
    """How many gradients came, for a rule whose formula does not need to know but whose torch state says so."""

    count: Any


def count_steps() -> optax.GradientTransformation:
    """Change nothing and count, as torch's `step`."""
    return optax.GradientTransformation(
        lambda params: Steps(jnp.zeros([], jnp.int32)),
        lambda updates, state, params=None: (updates, Steps(optax.safe_increment(state.count))),
    )


def zeros(params: Any, times: int) -> list[Any]:
    """So many trees of zeros, each in arrays of its own: a step that donates its state cannot give one away twice."""
    return [jax.tree.map(jnp.zeros_like, params) for _ in range(times)]


def is_zero(option: Any) -> bool:
    """Whether an option is switched off; one that a schedule moves (a traced scalar) is on."""
    return isinstance(option, (int, float)) and option == 0


def number(count: jax.Array) -> jax.Array:
    """A step counter as a float: of float64 where x64 is on."""
    return jnp.asarray(count, float)


def like(value: Any, array: jax.Array) -> Any:
    """A scalar that promotes nothing: Python numbers never do, a traced one is cast to the array's dtype."""
    return value if isinstance(value, (int, float)) else jnp.asarray(value, array.dtype)


def wide() -> bool:
    """Whether scalars are computed in float64 (x64 is on)."""
    return bool(jnp.result_type(float) == jnp.float64)


def one_minus_power(base: Any, count: jax.Array) -> jax.Array:
    """`1 - base ** count`, torch's bias correction, which it computes in Python floats.

    In float32 the plain form (Optax's) cancels: off by 2e-5 of itself for base 0.999 and 2e-4 for 0.9999, against
    3e-7 here. In float64 the plain form is kept, for its rounding is torch's own.

    Args:
        base: a Python float in [0, 1), or a traced one.
        count: the step, an integer from 1.
    """
    if wide():
        return 1 - base ** number(count)  # an integer power is multiplied out, which rounds otherwise
    if not isinstance(base, (int, float)):
        return -jnp.expm1(count * jnp.log1p(base - 1))
    return -jnp.expm1(count * math.log1p(base - 1)) if base else jnp.ones([])


def lerp(start: jax.Array, end: jax.Array, weight: Any) -> jax.Array:
    """torch.lerp: from the nearer end, so that an infinite gradient leaves NaN in an average where Optax keeps it."""
    if isinstance(weight, (int, float)):
        return start + weight * (end - start) if weight < 0.5 else end - (1 - weight) * (end - start)
    near = jnp.asarray(weight, start.dtype)
    return jnp.where(near < 0.5, start + near * (end - start), end - (1 - near) * (end - start))


def mean_square(average: jax.Array, gradient: jax.Array, decay: float) -> jax.Array:
    """`decay * average + (1 - decay) * gradient ** 2`, multiplied in torch's order: it overflows where torch's does."""
    return decay * average + (1 - decay) * gradient * gradient


def gradient_of(options: Options, decay: bool = True) -> list[optax.GradientTransformation]:
    """The pieces before a rule: the sign of `maximize`, then the decay that is added to the gradient."""
    sign = [optax.scale(-1.0)] if options.get("maximize") else []
    weight_decay = options.get("weight_decay", 0)
    return sign + ([optax.add_decayed_weights(weight_decay)] if decay and not is_zero(weight_decay) else [])


def add_decoupled_decay(weight_decay: Any) -> optax.GradientTransformation:
    """`optax.add_decayed_weights`, but an infinite parameter stays: torch multiplies it by `1 - lr * weight_decay`."""

    def add(updates: Any, params: Any) -> Any:
        return jax.tree.map(lambda u, p: u + like(weight_decay, p) * jnp.where(jnp.isinf(p), 0, p), updates, params)

    return optax.identity() if is_zero(weight_decay) else optax.stateless(add)


def descend(learning_rate: Any) -> optax.GradientTransformation:
    """`optax.scale_by_learning_rate` for a rate that may be traced: it does not promote the update."""
    return optax.stateless(lambda updates, _: jax.tree.map(lambda u: -like(learning_rate, u) * u, updates))
