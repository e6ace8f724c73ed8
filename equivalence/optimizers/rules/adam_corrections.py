"""NAdam and RAdam: Adams whose corrections are formulas of the step.

https://docs.pytorch.org/docs/stable/generated/torch.optim.NAdam.html and
https://docs.pytorch.org/docs/stable/generated/torch.optim.RAdam.html
"""

from __future__ import annotations

import math
from itertools import count as naturals
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from equivalence.optimizers.rules.common import (
    STEP,
    Options,
    Rule,
    Slot,
    add_decoupled_decay,
    descend,
    gradient_of,
    lerp,
    like,
    mean_square,
    number,
    one_minus_power,
    wide,
    zeros,
)


class TorchNAdamState(NamedTuple):
    """Adam's state and the product of the momenta so far."""

    count: Any
    mu: Any
    nu: Any
    mu_product: jax.Array


def scale_by_torch_nadam(
    b1: Any = 0.9, b2: float = 0.999, eps: float = 1e-8, momentum_decay: float = 0.004
) -> optax.GradientTransformation:
    """NAdam's direction, with the momentum schedule `b1 * (1 - 0.96 ** (step * momentum_decay) / 2)`.

    Differs from `optax.nadam`, whose momentum is b1 throughout: torch starts near b1 / 2 and corrects by the product
    of the momenta so far, `mu_product`, not by `b1 ** step`.

    Args:
        b1, b2: decay of the moments; b1 may be traced.
        eps: added to the root of the bias-corrected second moment.
        momentum_decay: how fast the momentum rises to b1.
    """

    def init(params: Any) -> TorchNAdamState:
        mu, nu = zeros(params, 2)
        return TorchNAdamState(jnp.zeros([], jnp.int32), mu, nu, jnp.ones([], float))

    def momentum(step: jax.Array) -> jax.Array:
        return like(b1, step) * (1.0 - 0.5 * 0.96 ** (step * momentum_decay))

    def update(updates: Any, state: TorchNAdamState, params: Any = None) -> tuple[Any, TorchNAdamState]:
        count = optax.safe_increment(state.count)
        now, then = momentum(number(count)), momentum(number(count + 1))
        product = state.mu_product * now
        mu = jax.tree.map(lambda m, g: lerp(m, g, 1 - b1), state.mu, updates)
        nu = jax.tree.map(lambda v, g: mean_square(v, g, b2), state.nu, updates)
        of_gradient, of_moment = (1 - now) / (1 - product), then / (1 - product * then)
        second = one_minus_power(b2, count)

        def direction(g: jax.Array, m: jax.Array, v: jax.Array) -> jax.Array:
            size = jnp.sqrt(v / like(second, v)) + eps
            return like(of_gradient, g) * g / size + like(of_moment, m) * m / size

        return jax.tree.map(direction, updates, mu, nu), TorchNAdamState(count, mu, nu, product)

    return optax.GradientTransformation(init, update)


def first_rectified(b2: float) -> int | None:
    """The first step at which RAdam's average is longer than 5 gradients, as torch's Python floats find it.

    >>> first_rectified(0.999), first_rectified(0.6)
    (6, None)
    """
    longest = 2 / (1 - b2) - 1
    if longest <= 5.0:
        return None
    for step in naturals(1):
        left = b2 ** float(step)
        if longest - 2 * step * left / (1 - left) > 5.0:
            return step
        if left == 0.0:
            return None
    return None


def _average_length(b2: float, count: jax.Array) -> jax.Array:
    """How many gradients the second moment averages over, `rho_inf - 2 t b2^t / (1 - b2^t)`, without cancellation.

    In float32 the terms cancel (2000 - 1994 at step 6 of b2 = 0.999). With x = -t log b2 the length is
    2 (1 - x / (e^x - 1)) / -log b2 and a constant; the bracket is a series of Bernoulli numbers where x is small.
    """
    longest, step = 2 / (1 - b2) - 1, number(count)
    if wide():
        return longest - 2 * step * b2**step / one_minus_power(b2, count)
    rate = -math.log1p(b2 - 1)
    x = step * rate
    square = x * x
    series = x / 2 - square / 12 * (1 - square / 60 * (1 - square / 42 * (1 - square / 40 * (1 - square / 39.6))))
    bracket = jnp.where(x < 1, series, 1 - x / jnp.expm1(jnp.maximum(x, 1)))
    return 2 / rate * bracket + (longest - 2 / rate)


def scale_by_torch_radam(b1: Any = 0.9, b2: float = 0.999, eps: float = 1e-8) -> optax.GradientTransformation:
    """RAdam's direction: the corrected first moment, over the root of the second once that averages over more than 5.

    Differs from `optax.scale_by_radam`: eps is added before the second moment's bias is corrected, the rectified steps
    start where the length exceeds 5 (Optax: reaches 5), and in float32 the length does not cancel.

    Args:
        b1, b2: decay of the moments; b1 may be traced.
        eps: added to the root of the second moment as it is.
    """
    first, longest = first_rectified(b2), 2 / (1 - b2) - 1

    def init(params: Any) -> optax.ScaleByAdamState:
        return optax.ScaleByAdamState(jnp.zeros([], jnp.int32), *zeros(params, 2))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        count = optax.safe_increment(state.count)
        mu = jax.tree.map(lambda m, g: lerp(m, g, 1 - b1), state.mu, updates)
        nu = jax.tree.map(lambda v, g: mean_square(v, g, b2), state.nu, updates)
        bias = one_minus_power(b1, count)
        found = jax.tree.map(lambda m: m / like(bias, m), mu)
        if first is not None:
            length = jnp.maximum(_average_length(b2, count), 5.0)
            part = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
            size, root = jnp.sqrt(part), jnp.sqrt(one_minus_power(b2, count))

            def rectified(m: jax.Array, v: jax.Array) -> jax.Array:
                return jnp.where(count >= first, m * (like(root, v) / (jnp.sqrt(v) + eps)) * like(size, m), m)

            found = jax.tree.map(rectified, found, nu)
        return found, optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformation(init, update)


def _decayed(options: Options, direction: optax.GradientTransformation) -> optax.GradientTransformation:
    decoupled = bool(options.get("decoupled_weight_decay"))
    return optax.chain(
        *gradient_of(options, decay=not decoupled),
        direction,
        add_decoupled_decay(options["weight_decay"] if decoupled else 0),
        descend(options["lr"]),
    )


def nadam(options: Options) -> optax.GradientTransformation:
    """torch.optim.NAdam; weight decay is added to the gradient unless `decoupled_weight_decay`."""
    b1, b2 = options["betas"]
    return _decayed(options, scale_by_torch_nadam(b1, b2, options["eps"], options["momentum_decay"]))


def radam(options: Options) -> optax.GradientTransformation:
    """torch.optim.RAdam; weight decay is added to the gradient unless `decoupled_weight_decay`."""
    b1, b2 = options["betas"]
    return _decayed(options, scale_by_torch_radam(b1, b2, options["eps"]))


_MOMENTS = STEP | {"exp_avg": Slot("mu", "moment"), "exp_avg_sq": Slot("nu", "moment")}

RULES = {
    "NAdam": Rule("NAdam", nadam, lambda _: _MOMENTS | {"mu_product": Slot("mu_product", "scalar")}),
    "RAdam": Rule("RAdam", radam, lambda _: _MOMENTS),
}
