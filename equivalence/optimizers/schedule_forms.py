"""One torch scheduler on one parameter group as functions of its position, in float64.

Everything here runs where 64-bit types are on, whatever the caller's precision (`schedules.in_float64`): positions are
int64 scalars, rates float64. Plain formulas are then exact to a few ulps of float64 at any count. In float32 they would
not be: `0.999**1000` by `jnp.power` is wrong by thousands of ulps, and a loop's rounding adds up.

Sources: https://docs.pytorch.org/docs/stable/optim.html#how-to-adjust-learning-rate and the installed
torch/optim/lr_scheduler.py, whose schedulers mostly multiply the present rate: what is written here is the closed form
of that recursion, not torch's `_get_closed_form_lr`, where the two differ.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from equivalence.optimizers.schedule_functions import user_function

Rate = Any
FAR = 2**31 - 1
"""Counts are int32: no position lies beyond."""


@dataclass(frozen=True)
class Form:
    """A scheduler on one group.

    `run(n, x)`: the rate at position n >= 0, constructed at rate x; n is 0, or x the `base` (or anything if it
    `scales`). `step(n, x)`: torch's `step()` to position n from rate x. `restarted(n, x)`: n steps after SequentialLR
    turned to it at rate x; None is run(n, base). `scales`: `run` multiplies x by what depends on n alone, up to
    position `until`. `absolute`: x is never looked at. `momentum(n)`: what it sets beside the rate.
    `condition`: by how much torch's own rounding is amplified past `until`.
    """

    base: float
    run: Callable[[Any, Rate], Rate]
    step: Callable[[Any, Rate], Rate]
    restarted: Callable[[Any, Rate], Rate] | None = None
    scales: bool = False
    until: int = FAR
    absolute: bool = False
    momentum: Callable[[Any], Any] | None = None
    condition: float = 1.0


def number(value: Any) -> float:
    """A Python float, also of a tensor."""
    return float(value)


def half_wave(x: Any) -> Any:
    """(1 - cos(pi x)) / 2 without its cancellation near x = 0."""
    return jnp.square(jnp.sin(0.5 * math.pi * x))


def _absolute(base: float, value: Callable[[Any], Any], momentum: Callable[[Any], Any] | None = None) -> Form:
    return Form(base, lambda n, x: value(n), lambda n, x: value(n), absolute=True, momentum=momentum)


def _scaling(
    base: float, factor: Callable[[Any], Any], ratio: Callable[[Any], Any], restarted: float | None = None
) -> Form:
    """A rate that is multiplied by `ratio(n)` at each step; `restarted`: the factor that holds after a restart."""
    again = None if restarted is None else lambda n, x: jnp.float64(base * restarted)
    return Form(base, lambda n, x: x * factor(n), lambda n, x: x * ratio(n), again, scales=True)


# --- schedulers that multiply -----------------------------------------------------------------------------------------


def _lambda(s: Any, group: int, base: float) -> Form:
    function = user_function(s.lr_lambdas[group])
    return _absolute(base, lambda n: base * function(n))


def _multiplicative(s: Any, group: int, base: float) -> Form:
    function = user_function(s.lr_lambdas[group])

    def through(first: int) -> Callable[[Any, Rate], Rate]:
        return lambda n, x: jax.lax.fori_loop(
            jnp.int64(first), n + 1, lambda i, rate: rate * function(i), jnp.asarray(x, jnp.float64)
        )

    return Form(base, through(1), lambda n, x: x * function(n), through(0), scales=True)


def _step(s: Any, group: int, base: float) -> Form:
    every = abs(Fraction(s.step_size).numerator)  # the positions that are multiples of step_size, also of one like 2.5
    gamma = number(s.gamma)
    return _scaling(
        base, lambda n: jnp.power(gamma, n // every), lambda n: jnp.where((n > 0) & (n % every == 0), gamma, 1.0)
    )


def _multistep(s: Any, group: int, base: float) -> Form:
    gamma = number(s.gamma)
    reached = sorted(m for m in s.milestones.elements() if m >= 0 and m == int(m))
    powers = np.asarray([gamma**k for k in range(len(reached) + 1)])
    # At a restart torch counts the milestones up to 0 anew, negative ones too.
    extra = gamma ** sum(m < 0 for m in s.milestones.elements())

    def factor(n: Any) -> Any:
        return jnp.asarray(powers)[jnp.sum(n >= jnp.asarray(reached, jnp.int64))]

    def ratio(n: Any) -> Any:
        return jnp.asarray(powers)[jnp.sum(n == jnp.asarray(reached, jnp.int64))]

    form = _scaling(base, factor, ratio)
    return Form(base, form.run, form.step, lambda n, x: base * extra * factor(n), scales=True)


def _constant(s: Any, group: int, base: float) -> Form:
    low, total = number(s.factor), s.total_iters
    # torch multiplies back at position total_iters exactly; position 0 multiplies by the factor before that is asked.
    back = int(total) if total > 0 and total == int(total) else FAR
    again = 1 / low if low else 0.0  # torch divides by zero there
    full = 1.0 if low else 0.0
    return _scaling(
        base,
        lambda n: jnp.where(n < back, low, full),
        lambda n: jnp.where(n == 0, low, jnp.where(n == back, again, 1.0)),
        restarted=1.0 if total <= 0 else None,
    )


def _linear(s: Any, group: int, base: float) -> Form:
    start, end, total = number(s.start_factor), number(s.end_factor), s.total_iters
    last = max(0, math.floor(total))

    def factor(n: Any) -> Any:
        at = jnp.minimum(n, last)
        return (start * (total - at) + end * at) / total if last else jnp.float64(start)

    def ratio(n: Any) -> Any:
        rise = end - start
        up = 1.0 + rise / jnp.where((n > 0) & (n <= last), total * start + (n - 1) * rise, 1.0)
        return jnp.where(n == 0, start, jnp.where(n <= last, up, 1.0))

    return _scaling(base, factor, ratio, restarted=end if total <= 0 else None)


def _exponential(s: Any, group: int, base: float) -> Form:
    gamma = number(s.gamma)
    return _scaling(base, lambda n: jnp.power(gamma, n), lambda n: jnp.float64(gamma))


def _polynomial(s: Any, group: int, base: float) -> Form:
    total, power = s.total_iters, number(s.power)
    last = max(0, math.floor(total))

    def factor(n: Any) -> Any:
        return jnp.power((total - jnp.minimum(n, last)) / total, power) if last else jnp.float64(1.0)

    def ratio(n: Any) -> Any:
        if not total:
            return jnp.float64(1.0)
        left = jnp.where(n <= last, (total - n) / (total - n + 1.0), 1.0)
        return jnp.where(n <= last, jnp.power(left, power), 1.0)

    return _scaling(base, factor, ratio, restarted=0.0**power if total <= 0 else None)


# --- schedulers that anneal -------------------------------------------------------------------------------------------


def _cosine(s: Any, group: int, base: float) -> Form:
    low, total = number(s.eta_min), abs(s.T_max)

    def height(n: Any) -> Any:
        return half_wave(jnp.abs(total - n % (2 * total)) / total)

    def run(n: Any, x: Rate) -> Rate:
        return low + (x - low) * height(n) if total else jnp.asarray(x)

    def step(n: Any, x: Rate) -> Rate:
        before = height(n - 1)
        at_the_bottom = (n - 1 - total) % (2 * total) == 0
        up = x + (base - low) * half_wave(1 / total)
        return jnp.where(at_the_bottom, up, low + (x - low) * height(n) / jnp.where(at_the_bottom, 1.0, before))

    # 1 + cos is about 5 / T_max^2 next to the bottom: dividing by it, torch amplifies its rounding for all that follows
    return Form(
        base, run, step, scales=low == 0, until=math.floor(total) if low == 0 else 0, condition=float(total) ** 2
    )


def _warm_restarts(s: Any, group: int, base: float) -> Form:
    low = number(s.eta_min)
    starts, lengths = [0], [s.T_0]
    while s.T_mult > 1 and starts[-1] + lengths[-1] <= FAR:
        starts.append(starts[-1] + lengths[-1])
        lengths.append(lengths[-1] * s.T_mult)

    def value(n: Any) -> Rate:
        if s.T_mult == 1:
            begun, length = n - n % s.T_0, s.T_0
        else:
            cycle = jnp.sum(n >= jnp.asarray(starts)) - 1
            begun, length = jnp.asarray(starts)[cycle], jnp.asarray(lengths)[cycle]
        return low + (base - low) * half_wave((length - (n - begun)) / length)

    return _absolute(base, value)


def _anneal(kind: str, start: float, end: float, left: Any) -> Any:
    """From start to end; `left` is the share of the way that is left, exactly 0 at its end."""
    return end + (start - end) * (half_wave(left) if kind == "cos" else left)


def _one_cycle(s: Any, group: int, base: float) -> Form:
    held = s.optimizer.param_groups[group]
    ends = [0.0, *(float(phase["end_step"]) for phase in s._schedule_phases)]
    # torch raises past total_steps (and, where the last phase is empty, at it): the last rate is held from there on.
    last = s.total_steps if ends[-1] > ends[-2] else s.total_steps - 1

    def of(what: str) -> Callable[[Any], Any]:
        def value(n: Any) -> Any:
            at = jnp.minimum(n, last)
            found: Any = None
            for begin, end, phase in reversed(list(zip(ends, ends[1:], s._schedule_phases, strict=False))):
                if end == begin:
                    continue
                start, stop = (number(held[phase[f"{side}_{what}"]]) for side in ("start", "end"))
                here = _anneal(s._anneal_func_type, start, stop, (end - at) / (end - begin))
                found = here if found is None else jnp.where(at <= end, here, found)
            return found

        return value

    return _absolute(base, of("lr"), of("momentum") if s.cycle_momentum else None)


def _cyclic(s: Any, group: int, base: float) -> Form:
    top = number(s.max_lrs[group])
    total, share_up = s.total_size, s.step_ratio
    if s._scale_fn_custom is not None:
        scale = user_function(s._scale_fn_custom)
    else:
        scale = {
            "triangular": lambda at: jnp.float64(1.0),
            "triangular2": lambda cycle: jnp.exp2(1.0 - cycle),
            "exp_range": lambda n: jnp.power(number(s.gamma), n),
        }[s.mode]

    def height(n: Any) -> Any:
        cycle = jnp.floor(1 + n / total).astype(jnp.int64)
        x = n % total / total
        down = (x - 1) / (share_up - 1) if share_up != 1 else x
        return jnp.where(x <= share_up, x / share_up, down) * scale(cycle if s.scale_mode == "cycle" else n)

    def momentum(n: Any) -> Any:
        low, high = number(s.base_momentums[group]), number(s.max_momentums[group])
        return high - (high - low) * height(n)

    def value(n: Any) -> Rate:
        return base + (top - base) * height(n)

    # Its constructor takes its first step before it knows base_lr, and leaves the rate at the group's initial_lr.
    first = number(s.optimizer.param_groups[group]["initial_lr"])
    cycled = momentum if s.cycle_momentum else None
    return Form(
        base, lambda n, x: jnp.where(n == 0, first, value(n)), lambda n, x: value(n), absolute=True, momentum=cycled
    )


def swa(scheduler: Any, group: int, entry: str = "built", ahead: int = 0) -> Form:
    """SWALR, which counts its steps, not positions: `ahead` of them were made before position 0.

    It starts from whatever rate it finds, as torch's documentation uses it: beside another scheduler, and later.
    """
    held, epochs = scheduler.optimizer.param_groups[group], scheduler.anneal_epochs
    target, base = number(held["swa_lr"]), number(scheduler.base_lrs[group])
    if entry == "built":
        ahead = scheduler._step_count - 1 - scheduler.last_epoch
        base = number(held["lr"]) if scheduler._step_count == 1 else base

    def away(n: Any) -> Any:
        left = (epochs - jnp.clip(n + ahead, 0, epochs)) / epochs if epochs else jnp.float64(0.0)
        return _anneal(scheduler._anneal_strategy, 1.0, 0.0, left)

    def run(n: Any, x: Rate) -> Rate:
        return target + (x - target) * away(n)

    def step(n: Any, x: Rate) -> Rate:
        before = away(n - 1) if epochs else jnp.float64(1.0)
        before = jnp.where(n + ahead == 0, 1.0, before)
        return jnp.where(before > 0, target + (x - target) * away(n) / jnp.where(before > 0, before, 1.0), target)

    return Form(base, run, step, run)


FORMS: Mapping[str, Callable[[Any, int, float], Form]] = {
    "LambdaLR": _lambda,
    "MultiplicativeLR": _multiplicative,
    "StepLR": _step,
    "MultiStepLR": _multistep,
    "ConstantLR": _constant,
    "LinearLR": _linear,
    "ExponentialLR": _exponential,
    "PolynomialLR": _polynomial,
    "CosineAnnealingLR": _cosine,
    "CosineAnnealingWarmRestarts": _warm_restarts,
    "OneCycleLR": _one_cycle,
    "CyclicLR": _cyclic,
}
"""torch's class -> its form, from the scheduler, the group's number and the group's base rate."""


def form_of(scheduler: Any, group: int, entry: str = "built", ahead: int = 0) -> Form:
    """The form of a scheduler that holds no others; `entry` and `ahead` as in `schedules.Run`."""
    if type(scheduler).__name__ == "SWALR":
        return swa(scheduler, group, entry, ahead)
    return FORMS[type(scheduler).__name__](scheduler, group, number(scheduler.base_lrs[group]))
