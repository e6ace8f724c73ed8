"""Which of torch's simple schedulers are stepped at which counts, below a SequentialLR or ChainedScheduler."""

from __future__ import annotations

import dataclasses
from bisect import bisect_right
from dataclasses import dataclass
from typing import Any

from equivalence.errors import InputError
from equivalence.optimizers.schedule_forms import FAR, FORMS

MODULES = ("torch.optim.lr_scheduler", "torch.optim.swa_utils")
LEAVES = (*FORMS, "SWALR")
HOLDERS = ("SequentialLR", "ChainedScheduler")


@dataclass(frozen=True)
class Run:
    """A simple scheduler, stepped at counts `begin` <= count < `end`; its position at `begin` is 0.

    `entry`: how it came to position 0: "built" by its constructor, "stepped", or "restarted" by SequentialLR.
    `ahead`: steps that enclosing SequentialLRs made before count 0 and took back in part only. `reset`: the rates were
    set back to initial_lr before.
    """

    scheduler: Any
    begin: int
    end: int
    entry: str
    ahead: int = 0
    reset: bool = False


def kind_of(scheduler: Any) -> str:
    """The name of a scheduler's class; InputError unless it is exactly one of torch's that follow a count."""
    name = type(scheduler).__qualname__
    if type(scheduler).__module__ in MODULES and name in (*LEAVES, *HOLDERS):
        return name
    if name == "ReduceLROnPlateau":
        raise InputError("ReduceLROnPlateau follows a metric, not a count: it has no schedule")
    raise InputError(
        f"a scheduler of class {type(scheduler).__module__}.{name} is not torch's own: write its rate as a function of "
        "the count (an Optax schedule) and pass scheduler=that function"
    )


def leaves_of(scheduler: Any) -> list[Any]:
    """The simple schedulers below a scheduler, or itself."""
    if kind_of(scheduler) not in HOLDERS:
        return [scheduler]
    return [leaf for child in scheduler._schedulers for leaf in leaves_of(child)]


def runs_of(scheduler: Any, entry: str = "built", ahead: int = 0) -> list[Run]:
    """Every run below a scheduler, in the order in which torch steps them at one count.

    Raises InputError for nestings that torch cannot run, and for those in which it counts a step three times.
    """
    kind = kind_of(scheduler)
    if ahead > 1 and kind in ("SequentialLR", "SWALR"):
        raise InputError(f"{kind} inside two other SequentialLRs: torch steps it ahead twice; nest it less deeply")
    if kind in HOLDERS and entry == "restarted":
        raise InputError(f"SequentialLR turns to a {kind} at a milestone, where torch raises NotImplementedError")
    if kind == "ChainedScheduler":
        return [run for child in scheduler._schedulers for run in runs_of(child, entry, ahead)]
    if kind == "SequentialLR":
        return _sequence(scheduler, entry, ahead)
    return [Run(scheduler, 0, FAR, entry, ahead)]


def _sequence(scheduler: Any, entry: str, ahead: int) -> list[Run]:
    milestones = list(scheduler._milestones)
    if milestones != sorted(milestones) or any(m != int(m) for m in milestones):
        raise InputError(f"SequentialLR's milestones {milestones} are not integers in ascending order")
    # Inside another SequentialLR it has counted a step already: its milestones come early.
    start = ahead if entry == "stepped" else 0
    first = bisect_right(milestones, start)
    begins = [0, *(int(m) - start for m in milestones[first:])]
    found: list[Run] = []
    for child, begin, end in zip(scheduler._schedulers[first:], begins, [*begins[1:], FAR], strict=True):
        if begin >= end:
            continue
        if begin or (entry == "stepped" and start in milestones):
            inside = runs_of(child, "restarted")
        elif kind_of(child) in HOLDERS:
            inside = runs_of(child, "stepped", ahead + 1)
        else:
            inside = runs_of(child, entry, ahead)
        if not begin and entry == "built":
            inside[0] = dataclasses.replace(inside[0], reset=True)
        moved = [dataclasses.replace(run, begin=run.begin + begin, end=min(end, run.end + begin)) for run in inside]
        found += [run for run in moved if run.begin < run.end]
    return found
