"""Mistakes that ports of torch's schedulers make, each planted in an otherwise right translation, and seen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from torch.optim import lr_scheduler as lrs
from torch.optim.swa_utils import SWALR

from equivalence.optimizers.schedules import Schedule, schedules
from tests.agreement import disagreements
from tests.schedule_sides import RATES, Make, jax_side, optimizer, torch_side

Groups = list[dict[str, Schedule]]
Translate = Callable[[Any], Groups]


def of(make: Make) -> Translate:
    """The right translation of another scheduler, on an optimizer of the same rates."""

    def translate(scheduler: Any) -> Groups:
        rates = [group["initial_lr"] for group in scheduler.optimizer.param_groups]
        kind = type(scheduler.optimizer).__name__
        return schedules(make(optimizer(rates, kind)))

    return translate


def instead(wrong: Callable[[Schedule], Schedule], name: str = "lr") -> Translate:
    """The right translation with one value replaced."""

    def translate(scheduler: Any) -> Groups:
        return [{**group, name: wrong(group[name])} for group in schedules(scheduler)]

    return translate


def written(schedule: Callable[[float, Any], Any]) -> Translate:
    """A schedule of a group's rate and the count, written by hand."""

    def one(rate: float) -> Schedule:
        return lambda count: jnp.asarray(schedule(rate, count), float)

    return lambda scheduler: [{"lr": one(group["initial_lr"])} for group in scheduler.optimizer.param_groups]


def without(name: str) -> Translate:
    return lambda scheduler: [
        {key: value for key, value in group.items() if key != name} for group in schedules(scheduler)
    ]


def step_lr(o: Any) -> Any:
    return lrs.StepLR(o, 7, 0.5)


def multistep(o: Any) -> Any:
    return lrs.MultiStepLR(o, [9, 20, 20, 31], 0.5)


def cosine(o: Any) -> Any:
    return lrs.CosineAnnealingLR(o, 25, 0.002)


def restarts(o: Any) -> Any:
    return lrs.CosineAnnealingWarmRestarts(o, 7, 2, 0.002)


def one_cycle(o: Any) -> Any:
    return lrs.OneCycleLR(o, 0.5, total_steps=60)


def cyclic(o: Any) -> Any:
    return lrs.CyclicLR(o, 0.01, 0.4, 6, 9, mode="triangular2")


def warm_up(o: Any) -> Any:
    return lrs.SequentialLR(o, [lrs.LinearLR(o, 0.1, 1.0, 6), lrs.CosineAnnealingLR(o, 40, 0.002)], [6])


def chain(o: Any) -> Any:
    return lrs.ChainedScheduler([lrs.ConstantLR(o, 0.2, 9), lrs.CosineAnnealingLR(o, 25, 0.002)])


def product(scheduler: Any) -> Groups:
    """The factors of a chain's schedulers multiplied, as if all of them did no more than multiply."""
    parts = [of(lambda o: lrs.ConstantLR(o, 0.2, 9))(scheduler), of(cosine)(scheduler)]
    rates = [group["initial_lr"] for group in scheduler.optimizer.param_groups]
    return [
        {"lr": lambda n, a=a, b=b, rate=rate: a["lr"](n) * b["lr"](n) / rate}
        for a, b, rate in zip(*parts, rates, strict=True)
    ]


@dataclass(frozen=True)
class Fault:
    """A scheduler, its wrong translation, and the optimizer it drives."""

    make: Make
    translate: Translate
    kind: str = "SGD"


FAULTS: dict[str, Fault] = {
    "one step early": Fault(cosine, instead(lambda f: lambda n: f(n + 1))),
    "one step late": Fault(warm_up, instead(lambda f: lambda n: f(jnp.maximum(n - 1, 0)))),
    "stepped once in four": Fault(step_lr, instead(lambda f: lambda n: f(n // 4))),
    "the first group's rate for all": Fault(step_lr, lambda s: [schedules(s)[0]] * 2),
    "decay between the steps": Fault(step_lr, written(lambda rate, n: rate * 0.5 ** (n / 7))),
    "decay one step early": Fault(step_lr, written(lambda rate, n: rate * 0.5 ** ((n + 1) // 7))),
    "a milestone one late": Fault(multistep, of(lambda o: lrs.MultiStepLR(o, [9, 20, 20, 32], 0.5))),
    "a milestone after its step": Fault(
        multistep, written(lambda rate, n: rate * 0.5 ** jnp.sum(n > jnp.asarray([9, 20, 20, 31])))
    ),
    "a double milestone counted once": Fault(multistep, of(lambda o: lrs.MultiStepLR(o, [9, 20, 31], 0.5))),
    "gamma from step 0": Fault(lambda o: lrs.ExponentialLR(o, 0.97), written(lambda rate, n: rate * 0.97 ** (n + 1.0))),
    "a factor where torch multiplies on": Fault(
        lambda o: lrs.MultiplicativeLR(o, lambda n: 1 - 0.1 / (n + 1)),
        written(lambda rate, n: rate * (1 - 0.1 / (n + 1))),
    ),
    "the product from step 0": Fault(
        lambda o: lrs.MultiplicativeLR(o, lambda n: 0.9), written(lambda rate, n: rate * 0.9 ** (n + 1.0))
    ),
    "constant one step too long": Fault(lambda o: lrs.ConstantLR(o, 0.2, 9), of(lambda o: lrs.ConstantLR(o, 0.2, 10))),
    "closed form where torch never multiplies back": Fault(
        lambda o: lrs.ConstantLR(o, 0.2, 0), written(lambda rate, n: rate + 0.0 * n)
    ),
    "warm-up (s+1)/W": Fault(
        lambda o: lrs.LinearLR(o, 0.1, 1.0, 10), written(lambda rate, n: rate * jnp.minimum(1.0, (n + 1.0) / 10))
    ),
    "polynomial of total_iters + 1": Fault(
        lambda o: lrs.PolynomialLR(o, 30, 0.9), of(lambda o: lrs.PolynomialLR(o, 31, 0.9))
    ),
    "T_max - 1": Fault(cosine, of(lambda o: lrs.CosineAnnealingLR(o, 24, 0.002))),
    "the cosine stays down": Fault(cosine, instead(lambda f: lambda n: f(jnp.minimum(n, 25)))),
    "eta_min as a share": Fault(
        cosine, written(lambda rate, n: optax.cosine_decay_schedule(rate, 25, 0.002)(jnp.minimum(n, 25)))
    ),
    "restarts of equal length": Fault(restarts, of(lambda o: lrs.CosineAnnealingWarmRestarts(o, 7, 1, 0.002))),
    "total_steps where torch has total_steps - 1": Fault(
        one_cycle, written(lambda rate, n: optax.cosine_onecycle_schedule(60, 0.5)(n))
    ),
    "one cycle in three phases": Fault(
        one_cycle, of(lambda o: lrs.OneCycleLR(o, 0.5, total_steps=60, three_phase=True))
    ),
    "beta1 not cycled": Fault(one_cycle, without("beta1"), "AdamW"),
    "momentum not cycled": Fault(cyclic, without("momentum")),
    "momentum cycled with the rate, not against it": Fault(cyclic, instead(lambda f: lambda n: 1.7 - f(n), "momentum")),
    "cycles that do not shrink": Fault(cyclic, of(lambda o: lrs.CyclicLR(o, 0.01, 0.4, 6, 9))),
    "cycles counted from 0": Fault(
        cyclic, of(lambda o: lrs.CyclicLR(o, 0.01, 0.4, 6, 9, scale_fn=lambda cycle: 0.5**cycle))
    ),
    "the count goes on through the warm-up": Fault(
        warm_up,
        lambda s: [
            {"lr": lambda n, a=a, b=b: jnp.where(n < 6, a["lr"](n), b["lr"](n))}
            for a, b in zip(schedules(s), of(lambda o: lrs.CosineAnnealingLR(o, 40, 0.002))(s), strict=True)
        ],
    ),
    "decay_steps without the warm-up": Fault(
        warm_up, written(lambda rate, n: optax.warmup_cosine_decay_schedule(0.1 * rate, rate, 6, 40, 0.002)(n))
    ),
    "a chain as a product": Fault(chain, product),
    "a chain in the other order": Fault(
        lambda o: lrs.ChainedScheduler([lrs.StepLR(o, 3), lrs.LambdaLR(o, lambda n: 1 / (1 + n))]),
        of(lambda o: lrs.ChainedScheduler([lrs.LambdaLR(o, lambda n: 1 / (1 + n)), lrs.StepLR(o, 3)])),
    ),
    "a linear anneal to the average": Fault(
        lambda o: SWALR(o, 0.05, 9), of(lambda o: SWALR(o, 0.05, 9, anneal_strategy="linear"))
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_seen(name: str) -> None:
    fault = FAULTS[name]
    reference = torch_side(fault.make, fault.kind)
    assert disagreements(reference, jax_side(fault.make, fault.kind, translate=fault.translate), RATES)


def test_a_schedule_of_float32_is_seen() -> None:
    """Rates that were rounded to float32 on the way are no translation in float64."""
    coarse = instead(lambda f: lambda n: jnp.asarray(jnp.asarray(f(n), jnp.float32), float))
    assert disagreements(torch_side(cosine), jax_side(cosine, translate=coarse), {"rates": np.asarray([0.3, 0.07])})
