"""Rprop and ASGD, whose steps are part of their state.

https://docs.pytorch.org/docs/stable/generated/torch.optim.Rprop.html and
https://docs.pytorch.org/docs/stable/generated/torch.optim.ASGD.html
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from equivalence.optimizers.rules.common import STEP, Options, Rule, Slot, gradient_of, like, number, zeros


class TorchRpropState(NamedTuple):
    """How many gradients came, the last one where its sign held, each element's step."""

    count: Any
    prev: Any
    step_size: Any


def _product(gradient: jax.Array, prev: jax.Array) -> jax.Array:
    """The product in units of the smallest subnormal: XLA drops subnormal products, torch keeps them and their sign."""
    smallest = np.finfo(gradient.dtype).smallest_subnormal
    half = int(-np.log2(smallest) + 1) // 2
    rest = int(-np.log2(smallest) + 1) - half
    return (gradient * 2.0**half) * (prev * 2.0**rest)


def torch_rprop(
    learning_rate: Any = 1e-2,
    etas: tuple[float, float] = (0.5, 1.2),
    step_sizes: tuple[float, float] = (1e-6, 50.0),
) -> optax.GradientTransformation:
    """Rprop's change: each element's own step against the gradient's sign; a turned sign shrinks it and is skipped.

    Differs from `optax.rprop`, which takes every step one gradient late (its first update is zero) and does not clip
    the step it starts from.

    Args:
        learning_rate: every element's step at its first gradient; not read afterwards. May be traced.
        etas: factors of a step whose gradient turned, and of one that kept its sign.
        step_sizes: smallest and largest step.
    """
    down, up = etas

    def init(params: Any) -> TorchRpropState:
        return TorchRpropState(jnp.zeros([], jnp.int32), *zeros(params, 2))

    def update(updates: Any, state: TorchRpropState, params: Any = None) -> tuple[Any, TorchRpropState]:
        products = jax.tree.map(_product, updates, state.prev)

        def step(s: jax.Array, product: jax.Array) -> jax.Array:
            before = jnp.where(state.count == 0, like(learning_rate, s), s)
            grown = jnp.where(product > 1, before * up, jnp.where(product < -1, before * down, before))
            # A division by one: XLA on CPUs would work the step out once more for the change, from copies of the old
            # state (1.5 times the memory moved), but it does not do a division twice.
            return jnp.clip(grown, *step_sizes) / (1 + 0 * before)

        size = jax.tree.map(step, state.step_size, products)
        kept = jax.tree.map(lambda g, product: jnp.where(product < -1, 0, g), updates, products)
        # torch.sign is 0 for NaN
        change = jax.tree.map(lambda g, s: jnp.where(g > 0, -s, jnp.where(g < 0, s, 0)), kept, size)
        return change, TorchRpropState(optax.safe_increment(state.count), kept, size)

    return optax.GradientTransformation(init, update)


def rprop(options: Options) -> optax.GradientTransformation:
    """torch.optim.Rprop; a schedule moves nothing after the first step."""
    rule = torch_rprop(options["lr"], options["etas"], options["step_sizes"])
    return optax.chain(*gradient_of(options, decay=False), rule)


class TorchAsgdState(NamedTuple):
    """How many gradients came, the rate and the weight of the next one, the averaged parameters."""

    count: Any
    eta: jax.Array
    mu: jax.Array
    ax: Any


def torch_asgd(
    learning_rate: Any = 1e-2, lambd: float = 1e-4, alpha: float = 0.75, t0: float = 1e6
) -> optax.GradientTransformation:
    """ASGD's change; the state's `ax` is the averaged parameters, which torch leaves to its user too.

    Optax has no counterpart. The rate of a step is the one made at the step before, from the learning rate then: a
    schedule takes effect one step late, and the first step's rate is the learning rate undivided.

    Args:
        learning_rate: may be traced.
        lambd: decay of the parameters, times the rate.
        alpha: power of the rate's decay.
        t0: step from which the parameters are averaged.
    """

    def init(params: Any) -> TorchAsgdState:
        ax = jax.tree.map(jnp.zeros_like, params)
        return TorchAsgdState(jnp.zeros([], jnp.int32), jnp.zeros([], float), jnp.ones([], float), ax)

    def update(updates: Any, state: TorchAsgdState, params: Any = None) -> tuple[Any, TorchAsgdState]:
        count, rate = optax.safe_increment(state.count), jnp.asarray(learning_rate, float)
        eta = jnp.where(state.count == 0, rate, state.eta)

        def change(g: jax.Array, p: jax.Array) -> jax.Array:
            # an infinite parameter stays: torch multiplies it by 1 - lambd * eta
            return -like(lambd * eta, p) * jnp.where(jnp.isinf(p), 0, p) - like(eta, g) * g

        def average(a: jax.Array, p: jax.Array, c: jax.Array) -> jax.Array:
            return jnp.where(state.mu == 1, p + c, a + (p + c - a) * like(state.mu, a))

        found = jax.tree.map(change, updates, params)
        ax = jax.tree.map(average, state.ax, params, found)
        step = number(count)
        after = rate / (1 + lambd * rate * step) ** alpha, 1 / jnp.maximum(1.0, step - t0)
        return found, TorchAsgdState(count, *after, ax)

    return optax.GradientTransformation(init, update)


def asgd(options: Options) -> optax.GradientTransformation:
    """torch.optim.ASGD; `weight_decay` is added to the gradient, beside the decay by `lambd`."""
    rule = torch_asgd(options["lr"], options["lambd"], options["alpha"], options["t0"])
    return optax.chain(*gradient_of(options), rule)


RULES = {
    "Rprop": Rule(
        "Rprop",
        rprop,
        lambda _: STEP | {"prev": Slot("prev", "moment"), "step_size": Slot("step_size", "moment")},
    ),
    "ASGD": Rule(
        "ASGD",
        asgd,
        lambda _: STEP | {"eta": Slot("eta", "scalar"), "mu": Slot("mu", "scalar"), "ax": Slot("ax", "value")},
    ),
}
