"""What a difference may be besides a mistake: a convention at a tie, a reference that looks at its dtype."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from equivalence.judgement import Decision, Judge, typical_precision
from equivalence.numerics import AGREES, DIFFERS, IMPRECISE, SHRINK, U32, U64, accumulation, distance
from equivalence.runs import Example
from equivalence.verdict import CheckReport
from equivalence.work import Structure, Work


def at_a_tie(work: Work, structure_: Structure, examples: dict[int, Example], decision: Decision) -> bool:
    """Whether a difference on constructed inputs is a convention at a point without derivative: it is gone once the
    inputs are moved off the tie. Such a finding becomes a caveat. Inputs called ordinary have no such excuse."""
    finding = decision.finding
    if not decision.differs or finding.ordinary:
        return False
    example = examples[finding.where[1]]
    if example.kind not in ("zeros", "repeated", "ties"):
        return False
    key = (finding.where, finding.check)
    if key not in work.ties:
        work.ties[key] = not _still_differs(structure_, _off_the_tie(example), finding.check, finding.where)
    if work.ties[key]:
        work.tied.setdefault(finding.check, []).append((example.kind, finding.path))
    return work.ties[key]


def _off_the_tie(example: Example) -> Example:
    rng = np.random.default_rng(example.seed + 1)

    def move(array: np.ndarray) -> np.ndarray:
        if array.dtype.kind != "f":
            return array
        size = float(np.max(np.abs(array))) if array.size else 0.0
        return (array + 1e-2 * (size or 1.0) * rng.standard_normal(array.shape)).astype(array.dtype)

    moved = tuple(dataclasses.replace(b, inputs=b.map(move).inputs) for b in example.batches)
    return dataclasses.replace(example, batches=moved)


def _still_differs(structure_: Structure, example: Example, check: str, where: tuple[Any, ...]) -> bool:
    comparison, judge = structure_.comparison, Judge()
    if where[0] == "observe":
        judge.add(comparison.observed(example, where[2], [check])[0])
    elif where[0] == "state":
        judge.add(comparison.states(example))
    else:
        comparison.observed(example, True, [])
        for found in comparison.stepped(example, [check]):
            judge.add(found)
    decisions = judge.decide(
        lambda where, paths, size: comparison.noise(example, where, paths, size),
        lambda where: comparison.rounded(example, where),
    )
    return any(decision.differs for decision in decisions)


def dtype_dependence(
    work: Work, structure_: Structure, examples: dict[int, Example], decisions: Sequence[Decision]
) -> None:
    """Whether the reference is another function in float32 than in float64, far beyond what its noise explains. Then
    float64 says nothing of float32: that is named, and the two sides are compared in float32 directly."""
    comparison = structure_.comparison
    _coarser(work, comparison.reference.coarsest, comparison.port.coarsest, decisions)
    for decision in decisions:
        finding = decision.finding
        m, where = finding.measure, finding.where
        floor = IMPRECISE * U32 * decision.scale * accumulation(m.elements)
        if finding.check != "outputs" or not finding.ordinary or not m.rounding > floor > 0:
            continue
        example = examples[where[1]]
        noise = comparison.noise(example, where, [finding.path])[finding.path]
        explained = max(U64 * decision.scale * accumulation(m.elements), noise) / SHRINK
        if m.rounding <= IMPRECISE * explained:
            continue
        summary = (
            f"the reference is another function in float32: {finding.path} moves {m.rounding / decision.scale:.2g}"
        )
        work.conclusions.caveat("dtype", summary, check="outputs")
        if IMPRECISE * m.port_rounding > m.rounding:  # both compute in the low precision that the reference asks for
            explained = max(explained, comparison.reference.coarsest * decision.scale * accumulation(m.elements))
        four, _ = comparison.four(example, where[2])
        path = finding.path.partition(".")[2]
        if distance(four.port32[path], four.reference32[path]) > DIFFERS * explained:
            message = f"{finding.path} differs in float32, where the reference is another function"
            work.conclusions.direct(
                CheckReport("outputs", "divergent", examples=1, worst=finding.path, message=message)
            )
        return


def _coarser(work: Work, reference: float, port: float, decisions: Sequence[Decision]) -> None:
    """Whether one side computes in a dtype coarser than float32 and than all of the other's: lifting hides that from
    the gap. It is named; of a port it is a difference where the outputs show it beyond what rounding may do."""
    if max(reference, port) <= U32 or reference == port:
        return
    side, roundoff = ("port", port) if port > reference else ("reference", reference)
    work.conclusions.caveat(
        "dtype", f"the {side} computes in a dtype that rounds by {roundoff:.1g}, the other in none so coarse"
    )
    if side == "reference":
        return
    shown = {
        d.finding.path: typical_precision(decisions, d.finding.path) for d in decisions if d.finding.check == "outputs"
    }
    path, worst = max(((p, value or 0.0) for p, value in shown.items()), key=lambda pair: pair[1], default=("", 0.0))
    if worst > AGREES:
        message = f"less precise than the reference: {path} errs {worst:.3g} times as much in float32"
        work.conclusions.direct(CheckReport("outputs", "divergent", examples=1, worst=path, message=message))
