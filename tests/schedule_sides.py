"""Both sides of a scheduler: what torch's does to an optimizer step by step, and what its translation says."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from equivalence.optimizers.schedules import Schedule, schedules
from equivalence.runtimes.jax import environment
from tests.agreement import Arrays, Side

STEPS = 60
RATES: Arrays = {"rates": np.asarray([0.3, 0.071])}
Make = Callable[[Any], Any]
Evaluate = Callable[[Schedule], Any]


def optimizer(rates: Sequence[float] = (0.3, 0.071), kind: str = "SGD") -> Any:
    """An optimizer of one group a rate."""
    groups = [{"params": [torch.nn.Parameter(torch.zeros(2))], "lr": float(rate)} for rate in rates]
    return torch.optim.SGD(groups, momentum=0.9) if kind == "SGD" else torch.optim.AdamW(groups)


def built(make: Make, rates: Sequence[float] = (0.3, 0.071), kind: str = "SGD", stepped: int = 0) -> Any:
    """A scheduler after some steps."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a nested SequentialLR steps before the optimizer does; torch says so
        scheduler = make(optimizer(rates, kind))
        scheduler.optimizer.step()  # torch warns unless it comes first
        for _ in range(stepped):
            scheduler.step()
    return scheduler


def held(scheduler: Any) -> dict[str, float]:
    """What the optimizer holds, by group and name."""
    found = {}
    for index, group in enumerate(scheduler.optimizer.param_groups):
        found[f"{index}.lr"] = float(group["lr"])
        if "betas" in group:
            found[f"{index}.beta1"] = float(group["betas"][0])
        else:
            found[f"{index}.momentum"] = float(group["momentum"])
    return found


def torch_side(make: Make, kind: str = "SGD", steps: int = STEPS) -> Side:
    """Every value of every group at counts 0 ... steps - 1, by running torch."""

    def run(bits: int, arrays: Arrays) -> Arrays:
        scheduler, rows = built(make, arrays["rates"].astype(float), kind), []
        for count in range(steps):
            rows.append(held(scheduler))
            if count < steps - 1:
                scheduler.step()
        dtype = {32: np.float32, 64: np.float64}[bits]
        return {name: np.asarray([row[name] for row in rows], dtype) for name in rows[0]}

    return run


def over(steps: int) -> Evaluate:
    """A schedule at counts 0 ... steps - 1, all at once."""
    return lambda schedule: jax.vmap(schedule)(jnp.arange(steps, dtype=jnp.int32))


def jax_side(
    make: Make,
    kind: str = "SGD",
    steps: int = STEPS,
    at: int = 0,
    translate: Callable[[Any], list[dict[str, Schedule]]] = schedules,
    evaluate: Evaluate | None = None,
) -> Side:
    """The same by the translation of a scheduler that has been stepped `at` times."""
    evaluate = evaluate or over(steps)

    def run(bits: int, arrays: Arrays) -> Arrays:
        scheduler = built(make, arrays["rates"].astype(float), kind, at)
        with environment(bits):
            groups = translate(scheduler)
            found = {
                f"{i}.{name}": np.asarray(evaluate(f)) for i, group in enumerate(groups) for name, f in group.items()
            }
        assert all(value.dtype == {32: np.float32, 64: np.float64}[bits] for value in found.values())
        fixed = held(scheduler)
        return {name: found.get(name, np.full(steps, fixed[name], f"f{bits // 8}")) for name in fixed}

    return run
