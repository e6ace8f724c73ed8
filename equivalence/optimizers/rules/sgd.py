"""SGD: https://docs.pytorch.org/docs/stable/generated/torch.optim.SGD.html"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from equivalence.optimizers.rules.common import Options, Rule, Slot, count_steps, descend, gradient_of, is_zero, like


class TorchTraceState(NamedTuple):
    """The momentum and how many gradients it has seen."""

    count: Any
    trace: Any


def scale_by_torch_momentum(momentum: Any, dampening: float) -> optax.GradientTransformation:
    """torch SGD's momentum with dampening: `b = momentum * b + (1 - dampening) * g`, but `b = g` at the first step.

    Differs from `optax.trace`, which knows no dampening, and from `optax.ema(momentum, debias=False)`, which has
    `dampening = momentum` at the first step too.

    Args:
        momentum: the factor; may be traced.
        dampening: the part of every gradient but the first that is left out.
    """

    def init(params: Any) -> TorchTraceState:
        return TorchTraceState(jnp.zeros([], jnp.int32), jax.tree.map(jnp.zeros_like, params))

    def update(updates: Any, state: TorchTraceState, params: Any = None) -> tuple[Any, TorchTraceState]:
        trace = jax.tree.map(
            lambda g, b: jnp.where(state.count == 0, g, like(momentum, b) * b + (1 - dampening) * g),
            updates,
            state.trace,
        )
        return trace, TorchTraceState(optax.safe_increment(state.count), trace)

    return optax.GradientTransformation(init, update)


def _momentum(options: Options) -> optax.GradientTransformation:
    momentum, dampening = options["momentum"], options.get("dampening", 0)
    if is_zero(momentum):
        return optax.identity()
    if not is_zero(dampening):
        return scale_by_torch_momentum(momentum, dampening)
    return optax.chain(count_steps(), optax.trace(momentum, options.get("nesterov", False)))


def sgd(options: Options) -> optax.GradientTransformation:
    """torch.optim.SGD for one leaf; without dampening its momentum is `optax.trace`, exactly."""
    return optax.chain(*gradient_of(options), _momentum(options), descend(options["lr"]))


def _slots(options: Options) -> dict[str, Slot]:
    if is_zero(options["momentum"]):
        return {}
    # torch has no counter: a buffer that is there says that the first gradient, which is not dampened, has come
    return {"momentum_buffer": Slot("trace", "moment"), "begun": Slot("count", "begun")}


RULES = {"SGD": Rule("SGD", sgd, _slots)}
