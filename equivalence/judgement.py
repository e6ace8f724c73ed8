"""The two-stage decision over everything measured on one structure. Pure NumPy; runs are asked for through a callback.

Stage one costs nothing beyond the four runs. Only where a gap exceeds ten first expectations is the reference's own
noise measured, by further runs of it, and only a gap beyond a hundred of those is a difference.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from equivalence.checks import Family
from equivalence.numerics import AGREES, DIFFERS, IMPRECISE, Measure, expected, precision, ratio

Where = tuple[Any, ...]
"""Which run a finding came from: (run, example, mode or nothing)."""

Noise = Callable[[Where, Sequence[str]], dict[str, float]]
"""Further reference runs: the largest distance that its own noise moved each path."""


@dataclass(frozen=True)
class Finding:
    """One leaf of one check on one example, measured and not yet judged.

    `slope` is the rms of the loss's derivative by the outputs in that run, `unit` the rms of the leaf under a
    random unit cotangent: the scale of a gradient that a saturated loss may have swallowed.
    """

    check: str
    where: Where
    path: str
    family: Family
    measure: Measure
    ordinary: bool = True
    slope: float = 0.0
    unit: float = 0.0


@dataclass(frozen=True)
class Decision:
    """A finding, judged: `expected` is the expectation that decided, `scale` what both are relative to."""

    finding: Finding
    expected: float
    scale: float
    differs: bool
    precision: float
    second_stage: bool = False

    @property
    def ratio(self) -> float:
        """Gap over the expectation that decided."""
        return ratio(self.finding.measure.gap, self.expected)


@dataclass
class Judge:
    """Collects findings of one structure and decides them together."""

    findings: list[Finding] = field(default_factory=list)

    def add(self, findings: Iterable[Finding]) -> None:
        """Take findings in; nothing is decided yet."""
        self.findings += findings

    def scales(self) -> list[float]:
        """The scale of every finding: the reference's rms, or the largest of its family over the examples."""
        loss = _largest(f.measure.scale_reference for f in self.findings if f.family == "loss")
        slope = _largest(f.slope for f in self.findings)
        of_family = {"plain": 0.0, "loss": loss, "output_gradient": slope}
        return [max(f.measure.scale_reference, of_family.get(f.family, slope * f.unit)) for f in self.findings]

    def decide(self, noise: Noise) -> list[Decision]:
        """Judge every finding; `noise` is asked once for each run that stage one could not settle."""
        scales = self.scales()
        firsts = [expected(f.measure, scale) for f, scale in zip(self.findings, scales, strict=True)]
        open_: dict[Where, list[str]] = {}
        for finding, first in zip(self.findings, firsts, strict=True):
            if unsettled(finding.measure, first):
                open_.setdefault(finding.where, []).append(finding.path)
        seen = {where: noise(where, paths) for where, paths in open_.items()}
        decisions = []
        for finding, first, scale in zip(self.findings, firsts, scales, strict=True):
            second = finding.where in seen and unsettled(finding.measure, first)
            limit = max(first, seen[finding.where].get(finding.path, 0.0)) if second else first
            decisions.append(
                Decision(
                    finding,
                    limit,
                    scale,
                    second and differs(finding.measure, limit),
                    self._precision(finding, scale),
                    second,
                )
            )
        return decisions

    @staticmethod
    def _precision(finding: Finding, scale: float) -> float:
        return 0.0 if finding.measure.exact else precision(finding.measure, scale)


def _largest(values: Iterable[float]) -> float:
    return max((value for value in values if math.isfinite(value)), default=0.0)


def unsettled(measure: Measure, first: float) -> bool:
    """Whether stage one leaves a leaf open."""
    return measure.gap > 0.0 if measure.exact else measure.gap > AGREES * first


def differs(measure: Measure, second: float) -> bool:
    """Stage two: a difference beyond a hundred times the reference's noise; exact leaves that noise does not flip."""
    return second == 0.0 if measure.exact else not measure.gap <= DIFFERS * second


def imprecise(decisions: Iterable[Decision], ordinary: bool = True) -> dict[str, float]:
    """Paths at which the port's float32 error is more than a thousand times the reference's, by the median over
    ordinary examples (over constructed ones: their largest)."""
    by_path: dict[str, list[float]] = {}
    for decision in decisions:
        if decision.finding.ordinary == ordinary and not decision.finding.measure.exact:
            by_path.setdefault(decision.finding.path, []).append(decision.precision)
    middle = {path: _median(values) if ordinary else max(values) for path, values in by_path.items()}
    return {path: value for path, value in middle.items() if value > IMPRECISE}


def _median(values: Sequence[float]) -> float:
    ordered = sorted(values)
    return ordered[(len(ordered) - 1) // 2]


def typical_precision(decisions: Iterable[Decision], path: str) -> float | None:
    """The median precision of one path over ordinary examples."""
    values = [
        d.precision for d in decisions if d.finding.path == path and d.finding.ordinary and not d.finding.measure.exact
    ]
    return _median(values) if values else None
