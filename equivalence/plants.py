"""The resolution of every check, measured: one plant in each leaf of the port, and how small it could have been."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from equivalence import coverage as seen
from equivalence.events import Progress
from equivalence.judgement import Decision
from equivalence.work import Structure, Work


def plant(work: Work, structure_: Structure, decisions: Sequence[Decision]) -> Iterator[Progress]:
    """The resolution of every check: one plant in each leaf of the port, and how small it could have been."""
    comparison = structure_.comparison
    example = structure_.sample
    leaves = [p for p in structure_.reference.params if structure_.bound.targets_of(p) and example.weights[p].size]
    observed = work.wants("observe") or work.wants("jit")
    runs = [("observe", train) for train in (False, True) if observed and train not in work.blind]
    base: dict[Any, Any] = {}
    ours = {train: comparison.reference_seen(example, 64, train) for _, train in runs}
    for number, leaf in enumerate([None, *leaves]):
        weights = example.port_weights if leaf is None else seen.planted(example, leaf)
        for kind, train in runs:
            mode = "train" if train else "eval"
            got = comparison.port.observe(64, weights, example.batches[0], train, example.seed, ours[train]).values
            got = {f"{mode}.{path}": value for path, value in got.items()}
            _note(
                work,
                base,
                decisions,
                (kind, example.index, train),
                got,
                leaf,
                [*work.wants("observe"), *work.wants("jit")],
            )
        if work.wants("state") and structure_.reference.buffers and comparison.port.buffer_paths:
            got = comparison.port_states(example, weights)
            _note(work, base, decisions, ("state", example.index), got, leaf, ["state"])
        if work.wants("steps") and structure_.trainable:
            for step, got in enumerate(comparison.port_steps(example, weights)):
                where = ("steps", example.index)
                _note(work, base, decisions, where, got, leaf, work.wants("steps"), step)
        yield Progress(work.port, "plants", number, len(leaves))


def _note(
    work: Work,
    base: dict[Any, Any],
    decisions: Sequence[Decision],
    where: tuple[Any, ...],
    got: dict[str, np.ndarray],
    leaf: str | None,
    checks: Sequence[str],
    step: int = 0,
) -> None:
    if leaf is None:
        base[where, step] = {path: np.array(value) for path, value in got.items()}
        return
    for check in checks:
        key = (check, where)
        if key not in work.limits:
            work.limits[key] = seen.limits(decisions, check, where)
        limits = {p: v for p, v in work.limits[key].items() if p in got}
        smallest = seen.noticed(base[where, step], got, limits)
        if smallest is not None:
            found = work.conclusions.noticed.setdefault(check, {})
            found[leaf] = min(found.get(leaf, np.inf), smallest)
