"""The resolution of every check, measured: a plant in each leaf of the port, and how small it could have been."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from equivalence import coverage as seen
from equivalence.events import Progress
from equivalence.handover import planted_runs
from equivalence.judgement import Decision, Where
from equivalence.observation import Observation
from equivalence.work import Structure, Work

LARGER = 1e-3
"""The second plant in a leaf whose first one was not noticed."""
GROWS = 30.0
"""A response that falls this far behind the larger plant is rounding: the check does not see that leaf at all."""

Shown = tuple[Where, int, list[str], Observation]
"""What a run of the port showed: which run, its step, the checks that read it, and the paths."""


def plant(work: Work, structure: Structure, decisions: Sequence[Decision]) -> Iterator[Progress]:
    """Plant in every leaf and note, by check, the smallest change that would have been noticed."""
    example = structure.sample
    leaves = [p for p in structure.reference.params if structure.bound.targets_of(p) and example.weights[p].size]
    base = {
        (where, step): {path: np.array(value) for path, value in shown.items()}
        for where, step, _, shown in _runs(work, structure, example.port_weights, None, 0.0)
    }
    limits: dict[Any, dict[str, float]] = {}

    def smallest(leaf: str, size: float) -> dict[str, float]:
        found: dict[str, float] = {}
        for where, step, checks, shown in _runs(work, structure, seen.planted(example, leaf, size), leaf, size):
            for check in checks:
                if (check, where) not in limits:
                    own, widened = seen.limits(decisions, check, where), structure.comparison.rounded(example, where)
                    limits[check, where] = {path: max(limit, widened.get(path, 0.0)) for path, limit in own.items()}
                here = {path: limit for path, limit in limits[check, where].items() if path in shown}
                change = seen.noticed(base[where, step], shown, here, size)
                if change is not None:
                    found[check] = min(found.get(check, np.inf), change)
        return found

    for number, leaf in enumerate(leaves, 1):
        found = smallest(leaf, seen.PLANT)
        faint = [check for check, change in found.items() if change > seen.PLANT]
        if faint:
            larger = smallest(leaf, LARGER)
            for check in faint:
                if larger.get(check, np.inf) > GROWS * found[check]:
                    del found[check]
        # what an optimizer keeps of an inert leaf shows nowhere but in that leaf, where rounding decides
        found = {check: change for check, change in found.items() if check != "handover" or change < 1.0}
        for check, change in found.items():
            work.conclusions.noticed.setdefault(check, {})[leaf] = change
        yield Progress(work.port, "plants", number, len(leaves))


def _runs(work: Work, structure: Structure, weights: Observation, leaf: str | None, size: float) -> Iterable[Shown]:
    """Everything the port shows in float64 from these weights, one run and one step at a time; a run handed over has
    the plant in what was handed over."""
    comparison, example = structure.comparison, structure.sample
    reading = [*work.wants("observe"), *work.wants("jit")]
    for train in (False, True):
        if reading and train not in work.blind:
            key = (example.index, train)
            if key not in work.references:
                work.references[key] = comparison.reference_seen(example, 64, train)
            got = comparison.port.observe(64, weights, example.batches[0], train, example.seed, work.references[key])
            mode = "train" if train else "eval"
            yield ("observe", *key), 0, reading, {f"{mode}.{path}": value for path, value in got.values.items()}
    if work.wants("state") and structure.reference.buffers and comparison.port.buffer_paths:
        yield ("state", example.index), 0, ["state"], comparison.port_states(example, weights)
    if work.wants("steps") and structure.trainable:
        for step, shown in enumerate(comparison.port_steps(example, weights)):
            yield ("steps", example.index), step, work.wants("steps"), shown
    if work.wants("handover") and structure.trainable and "handover" not in work.conclusions.finished:
        for step, shown in planted_runs(comparison, example, leaf, size):
            yield ("handover", example.index), step, ["handover"], shown
