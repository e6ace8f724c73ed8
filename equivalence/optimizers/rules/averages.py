"""RMSprop, Adagrad, Adadelta: https://docs.pytorch.org/docs/stable/optim.html#algorithms"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from equivalence.optimizers.rules.common import (
    STEP,
    Options,
    Rule,
    Slot,
    count_steps,
    descend,
    gradient_of,
    is_zero,
    lerp,
    like,
    mean_square,
    number,
    zeros,
)


class TorchRmsState(NamedTuple):
    """The mean of the squares and, of a centred one, of the gradients."""

    mu: Any
    nu: Any


def scale_by_torch_rms(decay: float = 0.99, eps: float = 1e-8, centered: bool = False) -> optax.GradientTransformation:
    """RMSprop's direction: the gradient over its root mean square (or standard deviation), eps added to the root.

    `optax.scale_by_rms` and `optax.scale_by_stddev` put eps inside the root unless `eps_in_sqrt=False`, and decay by
    0.9 instead of 0.99 unless told; what is left then is where they overflow and what an infinite gradient leaves.

    Args:
        decay: torch's alpha.
        eps: added to the root.
        centered: subtract the square of the mean gradient.
    """

    def init(params: Any) -> TorchRmsState:
        nu, mean = zeros(params, 2)
        return TorchRmsState(mean if centered else optax.EmptyState(), nu)

    def update(updates: Any, state: TorchRmsState, params: Any = None) -> tuple[Any, TorchRmsState]:
        nu = jax.tree.map(lambda v, g: mean_square(v, g, decay), state.nu, updates)
        if not centered:
            return jax.tree.map(lambda g, v: g / (jnp.sqrt(v) + eps), updates, nu), TorchRmsState(state.mu, nu)
        mu = jax.tree.map(lambda m, g: lerp(m, g, 1 - decay), state.mu, updates)

        def direction(g: jax.Array, m: jax.Array, v: jax.Array) -> jax.Array:
            # torch subtracts before it rounds (a fused multiply-add): an overflowing square leaves an infinite mean
            variance = jnp.where(jnp.isinf(v) & jnp.isfinite(m), v, v - m * m)
            return g / (jnp.sqrt(variance) + eps)

        return jax.tree.map(direction, updates, mu, nu), TorchRmsState(mu, nu)

    return optax.GradientTransformation(init, update)


def rmsprop(options: Options) -> optax.GradientTransformation:
    """torch.optim.RMSprop: the momentum is that of the scaled gradient, before the learning rate."""
    momentum = options["momentum"]
    return optax.chain(
        *gradient_of(options),
        count_steps(),
        scale_by_torch_rms(options["alpha"], options["eps"], bool(options["centered"])),
        optax.identity() if is_zero(momentum) else optax.trace(momentum),
        descend(options["lr"]),
    )


def _rms_slots(options: Options) -> dict[str, Slot]:
    slots = STEP | {"square_avg": Slot("nu", "moment")}
    slots |= {} if is_zero(options["momentum"]) else {"momentum_buffer": Slot("trace", "moment")}
    return slots | ({"grad_avg": Slot("mu", "moment")} if options["centered"] else {})


class TorchAdagradState(NamedTuple):
    """How many gradients came, and the sum of their squares."""

    count: Any
    sum_of_squares: Any


def scale_by_torch_adagrad(
    lr_decay: float = 0.0, initial_accumulator_value: float = 0.0, eps: float = 1e-10
) -> optax.GradientTransformation:
    """Adagrad's direction: the gradient over the root of the sum of squares, eps added to the root.

    Differs from `optax.scale_by_rss`: that adds eps inside the root, moves nothing where the sum is zero, and knows
    no `lr_decay`.

    Args:
        lr_decay: the step is divided by `1 + (step - 1) * lr_decay`.
        initial_accumulator_value: where the sum starts (torch 0, Optax 0.1).
        eps: added to the root (torch 1e-10, Optax 1e-7).
    """

    def init(params: Any) -> TorchAdagradState:
        full = jax.tree.map(lambda p: jnp.full_like(p, initial_accumulator_value), params)
        return TorchAdagradState(jnp.zeros([], jnp.int32), full)

    def update(updates: Any, state: TorchAdagradState, params: Any = None) -> tuple[Any, TorchAdagradState]:
        total = jax.tree.map(lambda s, g: s + g * g, state.sum_of_squares, updates)
        slower = 1 + number(state.count) * lr_decay
        found = jax.tree.map(lambda g, s: g / like(slower, g) / (jnp.sqrt(s) + eps), updates, total)
        return found, TorchAdagradState(optax.safe_increment(state.count), total)

    return optax.GradientTransformation(init, update)


def adagrad(options: Options) -> optax.GradientTransformation:
    """torch.optim.Adagrad. `initial_accumulator_value` is the optimizer's own: torch reads no group's."""
    return optax.chain(
        *gradient_of(options),
        scale_by_torch_adagrad(options["lr_decay"], options["initial_accumulator_value"], options["eps"]),
        descend(options["lr"]),
    )


def scale_by_torch_adadelta(rho: float = 0.9, eps: float = 1e-6) -> optax.GradientTransformation:
    """Adadelta's direction: `optax.scale_by_adadelta`, but for where the squares overflow.

    (1 - rho) g^2 is multiplied from the left in torch, so that a float32 gradient of 3e19 overflows in Optax only.

    Args:
        rho: decay of both means.
        eps: added to both means inside their roots.
    """

    def init(params: Any) -> optax.ScaleByAdaDeltaState:
        return optax.ScaleByAdaDeltaState(*zeros(params, 2))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, optax.ScaleByAdaDeltaState]:
        e_g = jax.tree.map(lambda v, g: mean_square(v, g, rho), state.e_g, updates)
        found = jax.tree.map(lambda g, v, x: jnp.sqrt(x + eps) / jnp.sqrt(v + eps) * g, updates, e_g, state.e_x)
        e_x = jax.tree.map(lambda x, u: mean_square(x, u, rho), state.e_x, found)
        return found, optax.ScaleByAdaDeltaState(e_g, e_x)

    return optax.GradientTransformation(init, update)


def adadelta(options: Options) -> optax.GradientTransformation:
    """torch.optim.Adadelta, whose learning rate is 1 unless said (`optax.adadelta` has none)."""
    return optax.chain(
        *gradient_of(options),
        count_steps(),
        scale_by_torch_adadelta(options["rho"], options["eps"]),
        descend(options["lr"]),
    )


RULES = {
    "RMSprop": Rule("RMSprop", rmsprop, _rms_slots),
    "Adagrad": Rule("Adagrad", adagrad, lambda _: STEP | {"sum": Slot("sum_of_squares", "moment")}, eager=True),
    "Adadelta": Rule(
        "Adadelta",
        adadelta,
        lambda _: STEP | {"square_avg": Slot("e_g", "moment"), "acc_delta": Slot("e_x", "moment")},
    ),
}
