"""The two-stage decision over everything measured on one structure. Pure NumPy; runs are asked for through a callback.

Stage one costs nothing beyond the four runs. Only where a gap exceeds ten first expectations is the reference's own
noise measured, by further runs of it, and only a gap beyond a hundred of those is a difference.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from equivalence.checks import Family
from equivalence.numerics import AGREES, DIFFERS, IMPRECISE, Measure, expected, precision, ratio

Where = tuple[Any, ...]
"""Which run a finding came from: (run, example, mode or nothing)."""

Noise = Callable[[Where, Sequence[str], float], dict[str, float]]
"""Further reference runs under noise of an amplitude: the largest distance each path moved, over the amplitude."""


Survived = Callable[[Where], dict[str, float]]
"""How far what survives of float32 in the float64 runs of either side may move each path of a run."""


@dataclass(frozen=True)
class Finding:
    """One leaf of one check on one example, measured and not yet judged.

    `slope` is the rms of the loss's derivative by the outputs in that run, `unit` the rms of the leaf under a
    random unit cotangent: the scale of a gradient that a saturated loss may have swallowed. `size` is the rms of
    the outputs.
    """

    check: str
    where: Where
    path: str
    family: Family
    measure: Measure
    ordinary: bool = True
    slope: float = 0.0
    unit: float = 0.0
    size: float = 0.0


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
    lost: set[Where] = field(default_factory=set)
    """Runs of which some findings could not be judged: what they show is the reference's own rounding."""

    def add(self, findings: Iterable[Finding]) -> None:
        """Take findings in; nothing is decided yet."""
        self.findings += findings

    def scales(self) -> list[float]:
        """The scale of every finding: the reference's rms, or the largest of its family over the examples.

        Only examples whose outputs are no larger count: a loss saturates where outputs are large, and what it was
        before says what rounding it carries; larger outputs say nothing of smaller ones.
        """
        losses = Largest((f.size, f.measure.scale_reference) for f in self.findings if f.family == "loss")
        slopes = Largest((f.size, f.slope) for f in self.findings)
        found = []
        for f in self.findings:
            own = f.measure.scale_reference
            if f.family == "loss":
                own = max(own, losses.up_to(f.size))
            elif f.family == "output_gradient":
                own = max(own, slopes.up_to(f.size))
            elif f.family == "loss_gradient":
                own = max(own, slopes.up_to(f.size) * f.unit)
            found.append(own)
        return found

    def decide(self, noise: Noise, survived: Survived = lambda where: {}) -> list[Decision]:
        """Judge every finding; `noise` and `survived` are asked once for each run that stage one could not settle."""
        scales = self.scales()
        firsts = [expected(f.measure, scale) for f, scale in zip(self.findings, scales, strict=True)]
        open_: dict[Where, list[str]] = {}
        for finding, first in zip(self.findings, firsts, strict=True):
            if unsettled(finding.measure, first):
                open_.setdefault(finding.where, []).append(finding.path)
        seen = {where: noise(where, paths, 1.0) for where, paths in open_.items()}
        for where, found in seen.items():
            widened = survived(where)
            found |= {path: max(own, widened.get(path, 0.0)) for path, own in found.items()}
        for where, paths in self._beyond(firsts, seen).items():
            # A hundred expectations are forgiven wherever they arise, so what such a noise makes of the rest of the
            # run is forgiven too: where a choice or a saturated unit flips, that is more than a hundred times as much.
            more = noise(where, paths, DIFFERS)
            seen[where] |= {path: max(seen[where].get(path, 0.0), more[path]) for path in paths}
        decisions = []
        for finding, first, scale in zip(self.findings, firsts, scales, strict=True):
            second = finding.where in seen and unsettled(finding.measure, first)
            limit = max(first, seen[finding.where].get(finding.path, 0.0)) if second else first
            if limit == math.inf:
                self.lost.add(finding.where)
                continue
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
        return self._second_look(decisions, noise)

    def _second_look(self, decisions: list[Decision], noise: Noise) -> list[Decision]:
        """Where a port looks less precise than the reference, its errors held against the reference's own noise too:
        the float32 of one side may happen to be exact where the other's is not (a saturated tanh)."""
        suspects = imprecise(d for d in decisions if d.finding.check != "jit")
        asked: dict[Where, list[str]] = {}
        for decision in decisions:
            if decision.finding.path in suspects and decision.finding.ordinary:
                asked.setdefault(decision.finding.where, []).append(decision.finding.path)
        seen = {where: noise(where, paths, 1.0) for where, paths in asked.items()}

        def looked_at(decision: Decision) -> Decision:
            finding = decision.finding
            own = seen.get(finding.where, {}).get(finding.path, 0.0)
            if own == 0.0 or finding.measure.exact:
                return decision
            return dataclasses.replace(decision, precision=precision(finding.measure, decision.scale, own))

        return [looked_at(decision) for decision in decisions]

    def _beyond(self, firsts: list[float], seen: dict[Where, dict[str, float]]) -> dict[Where, list[str]]:
        """The leaves whose gap is a difference by the noise seen so far."""
        found: dict[Where, list[str]] = {}
        for finding, first in zip(self.findings, firsts, strict=True):
            m = finding.measure
            if not m.exact and unsettled(m, first):
                limit = max(first, seen[finding.where].get(finding.path, 0.0))
                if differs(m, limit):
                    found.setdefault(finding.where, []).append(finding.path)
        return found

    @staticmethod
    def _precision(finding: Finding, scale: float) -> float:
        return 0.0 if finding.measure.exact else precision(finding.measure, scale)


class Largest:
    """The largest finite value seen at any size up to a given one.

    >>> seen = Largest([(1.0, 5.0), (3.0, 2.0), (2.0, 9.0)])
    >>> seen.up_to(1.5), seen.up_to(2.0), seen.up_to(0.5)
    (5.0, 9.0, 0.0)
    """

    def __init__(self, pairs: Iterable[tuple[float, float]]) -> None:
        kept = sorted(pair for pair in set(pairs) if math.isfinite(pair[0]) and math.isfinite(pair[1]))
        self._sizes = [size for size, _ in kept]
        self._largest = list(itertools.accumulate((value for _, value in kept), max))

    def up_to(self, size: float) -> float:
        """The largest value at sizes of at most `size`; 0 when there is none. A size that is not finite takes all."""
        place = bisect.bisect_right(self._sizes, size) if math.isfinite(size) else len(self._sizes)
        return self._largest[place - 1] if place else 0.0


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
