"""From decisions to a report: one conclusion a check, caveats, coverage, and the verdict they add up to."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from equivalence.judgement import Decision, imprecise, typical_precision
from equivalence.numerics import U32
from equivalence.paths import natural, parent
from equivalence.verdict import (
    FLOAT64,
    Caveat,
    CheckReport,
    Coverage,
    Divergence,
    PortReport,
    Verdict,
    worst_verdict,
)
from equivalence.weights import Bound

if TYPE_CHECKING:
    from equivalence.frameworks.subject import Subject

ILL_CONDITIONED = 1e-3
"""Relative float32 error of the reference beyond which float32 says little of it."""

STEPWISE = ("step", "optimizer_state", "handover")
"""The checks that follow optimizer steps."""
LOST = "rounding decides an update in every example: no example's later steps were judged"

EMPTY = {
    "loss": "no loss was given",
    "input_gradients": "no input is floating",
    "parameter_gradients": "no parameter is trainable",
    "state": "the model has no buffers",
    "step": "no parameter is trainable",
    "optimizer_state": "the optimizer keeps no state",
    "handover": "no parameter is trainable",
}
"""Why a check may have had nothing to compare."""


@dataclass
class Conclusions:
    """What has been concluded about one port so far."""

    checks: tuple[str, ...]
    resolution: float
    asked: bool
    finished: dict[str, CheckReport] = field(default_factory=dict)
    stopped: dict[str, str] = field(default_factory=dict)
    decisions: dict[str, list[Decision]] = field(default_factory=dict)
    caveats: list[Caveat] = field(default_factory=list)
    noticed: dict[str, dict[str, float]] = field(default_factory=dict)
    coverage: Coverage | None = None
    training: dict[str, Any] | None = None
    smallest: str | None = None
    unmatched: set[str] = field(default_factory=set)
    steps: int = 0
    """Optimizer steps of an example."""
    float64: dict[str, str] = field(default_factory=lambda: dict.fromkeys(("reference", "port"), FLOAT64[0]))
    """How the float64 runs of each side were made."""
    unseen: bool = False
    """Whether a part of what was handed in, which no check covers, was never at work."""

    def direct(self, report: CheckReport) -> None:
        """A check that concluded by itself; a divergence already found stays."""
        if report.name not in self.finished or report.verdict == "divergent":
            self.finished[report.name] = report

    def stop(self, names: Iterable[str], reason: str) -> None:
        """These checks cannot run any more."""
        for name in names:
            self.stopped.setdefault(name, reason)

    def nothing(self, name: str, why: str) -> None:
        """A check that does not apply here: equivalent over 0 examples, unless the user asked for it by name."""
        self.direct(CheckReport(name, "inconclusive" if self.asked else "equivalent", examples=0, message=why))

    def take(self, decisions: Iterable[Decision]) -> None:
        """Take in judged findings."""
        for decision in decisions:
            self.decisions.setdefault(decision.finding.check, []).append(decision)

    def caveat(self, kind: str, summary: str, module: str | None = None, check: str | None = None) -> None:
        """Add a caveat once."""
        made = Caveat(kind, summary, module, check)
        if made not in self.caveats:
            self.caveats.append(made)

    def precision(self, side: str, float64: str, surviving: Iterable[str]) -> None:
        """Take in how a side's float64 runs were made, and what of float32 survived in them."""
        self.float64[side] = max(self.float64[side], float64, key=FLOAT64.index)
        listed = list(surviving)
        names = ", ".join(listed[:5]) + (f" and {len(listed) - 5} more" if len(listed) > 5 else "")
        if names and float64 == "float32 only":
            self.caveat("float32", f"the {side}'s float64 runs hold operations in float32: {names}")
        elif names:
            self.caveat("lifted", f"float32 rounded what the {side} holds before any run: {names}")

    @property
    def diverged(self) -> list[str]:
        """The checks that diverged so far, in order."""
        found = []
        for name in self.checks:
            direct = name in self.finished and self.finished[name].verdict == "divergent"
            decided = self.decisions.get(name, ())
            if direct or any(d.differs for d in decided) or (name != "jit" and imprecise(decided)):
                found.append(name)
        return found


def concluded(conclusions: Conclusions, name: str) -> CheckReport:
    """The conclusion of one check."""
    if name in conclusions.finished:
        return conclusions.finished[name]
    decisions = conclusions.decisions.get(name, [])
    if not decisions:
        return _empty(conclusions, name)
    worst = max(decisions, key=lambda d: (d.differs, d.ratio))
    scale = worst.scale or 1.0
    resolution = max(conclusions.noticed.get(name, {}).values(), default=None)
    verdict: Verdict = "equivalent"
    message = None
    low = {} if name == "jit" else imprecise(decisions)
    broken = sorted(
        {d.finding.path for d in decisions if d.finding.measure.nonfinite and d.finding.ordinary}, key=natural
    )
    if any(d.differs for d in decisions):
        verdict, message = "divergent", _difference(decisions, worst)
    elif low:
        path = max(low, key=lambda p: low[p])
        worst = max((d for d in decisions if d.finding.path == path), key=lambda d: d.precision)
        verdict = "divergent"
        message = f"less precise than the reference: {path} errs {low[path]:.3g} times as much in float32"
    elif broken:
        verdict, message = "inconclusive", f"NaN or infinity on both sides in {', '.join(broken[:5])}"
    elif _only_early_steps(conclusions, name, decisions):
        verdict, message = "inconclusive", LOST
    elif resolution is not None and resolution > conclusions.resolution:
        verdict = "inconclusive"
        message = (
            f"a change smaller than {resolution:.2g} would not have shown; {conclusions.resolution:.2g} was asked for"
        )
    return CheckReport(
        name,
        verdict,
        gap=worst.finding.measure.gap / scale,
        expected_gap=worst.expected / scale,
        precision=typical_precision(decisions, worst.finding.path),
        resolution=resolution,
        examples=len({(d.finding.where[0], d.finding.where[1]) for d in decisions}),
        worst=worst.finding.path,
        message=message,
    )


def _only_early_steps(conclusions: Conclusions, name: str, decisions: Sequence[Decision]) -> bool:
    """Whether chaos ended every example before its last step: what shows only from step 2 on was never looked at."""
    if name not in STEPWISE or all(caveat.kind != "chaos" for caveat in conclusions.caveats):
        return False
    return not any(f"step{conclusions.steps}." in d.finding.path for d in decisions)


def _empty(conclusions: Conclusions, name: str) -> CheckReport:
    if name in conclusions.stopped:
        return CheckReport(name, "inconclusive", message=f"not judged: {conclusions.stopped[name]}")
    if name in STEPWISE and any(caveat.kind == "chaos" for caveat in conclusions.caveats):
        return CheckReport(name, "inconclusive", message=LOST)
    if name == "optimizer_state" and conclusions.unmatched:
        slots = ", ".join(sorted(conclusions.unmatched))
        return CheckReport(name, "inconclusive", message=f"the port's optimizer state holds no counterpart of {slots}")
    judged_nothing: Verdict = "inconclusive" if conclusions.asked and name not in EMPTY else "equivalent"
    return CheckReport(name, judged_nothing, message=EMPTY.get(name, "nothing to compare"))


def _difference(decisions: Sequence[Decision], worst: Decision) -> str:
    measure = worst.finding.measure
    paths = {d.finding.path for d in decisions if d.differs}
    if measure.exact:
        text = f"{measure.gap:.3g} of the elements of {worst.finding.path} differ"
    elif not math.isfinite(measure.gap):
        text = f"{worst.finding.path} is NaN or infinite on one side only"
    else:
        text = f"{worst.finding.path} is {worst.ratio:.3g} times as far off as rounding explains"
        if measure.gap < U32 * worst.scale:
            text += " (below float32 rounding)"
    return text + (f"; so are {len(paths) - 1} more paths" if len(paths) > 1 else "")


def add_caveats(conclusions: Conclusions) -> None:
    """What the reader must know beside the verdict: extreme inputs, ill-conditioned float32, exact leaves that noise
    flips, optimizer state without counterpart, leaves that move nothing."""
    for name, decisions in conclusions.decisions.items():
        low = {} if name == "jit" else imprecise(decisions, ordinary=False)
        if low and not imprecise(decisions):
            path = max(low, key=lambda p: low[p])
            text = f"on constructed inputs {path} errs {low[path]:.3g} times as much as the reference in float32"
            conclusions.caveat("precision on extreme inputs", text, check=name)
        rough = [
            d for d in decisions if d.finding.ordinary and d.finding.measure.rounding > ILL_CONDITIONED * d.scale > 0
        ]
        if rough and name == "outputs":
            d = max(rough, key=lambda d: d.finding.measure.rounding / d.scale)
            part = d.finding.measure.rounding / d.scale
            text = f"the reference's own float32 is {part:.2g} off its float64 at {d.finding.path}"
            conclusions.caveat("ill-conditioned", text, check=name)
        flipped = sorted(
            {d.finding.path for d in decisions if d.finding.measure.exact and d.finding.measure.gap and not d.differs}
        )
        if flipped:
            text = f"{', '.join(flipped[:3])} differ where the reference's own rounding flips them"
            conclusions.caveat("noise flips", text, check=name)
        odd = sorted(
            {d.finding.path for d in decisions if d.finding.measure.nonfinite and not d.finding.ordinary}, key=natural
        )
        if odd:
            text = f"NaN or infinity on both sides at constructed inputs in {', '.join(odd[:3])}"
            conclusions.caveat("nonfinite", text, check=name)
    if conclusions.unmatched and conclusions.decisions.get("optimizer_state"):
        text = f"optimizer state without a counterpart was not compared: {', '.join(sorted(conclusions.unmatched))}"
        conclusions.caveat("optimizer state", text, check="optimizer_state")
    if conclusions.coverage is not None:
        for leaf in conclusions.coverage.inert:
            text = f"{leaf} moves neither side: it is inert, and a fault in it would change nothing"
            conclusions.caveat("inert", text, module=parent(leaf) or None)


def conclude(conclusions: Conclusions, port: str, reference: Subject, bound: Bound, reproduce: str) -> PortReport:
    """The report of one port."""
    add_caveats(conclusions)
    if reference.low:
        text = f"the reference holds {len(reference.low)} leaves below float32; they ran in float32 and float64"
        conclusions.caveat("low precision", text, module=parent(reference.low[0]) or None)
    ours, theirs = bound.without_counterpart()
    for leaf in [*(p for p in ours if p in reference.buffers or p in reference.frozen), *theirs]:
        conclusions.caveat(
            "no counterpart", f"{leaf} exists on one side only and was not compared", parent(leaf) or None
        )
    checks = tuple(concluded(conclusions, name) for name in conclusions.checks)
    verdicts: list[str] = [check.verdict for check in checks]
    coverage = conclusions.coverage
    if coverage is None:
        coverage = Coverage(0.0)
        if not conclusions.diverged:
            conclusions.caveat("coverage", "no gradients were observed, so coverage was not measured")
    elif coverage.uncovered:
        verdicts.append("inconclusive")
    if conclusions.unseen:
        verdicts.append("inconclusive")
    verdict = worst_verdict(verdicts)
    divergence = None
    if verdict == "divergent":
        first = next(check for check in checks if check.verdict == "divergent")
        if conclusions.smallest:
            conclusions.caveat("smallest example", conclusions.smallest, check=first.name)
        divergence = _located(first, reference, bound)
    return PortReport(
        port,
        verdict,
        checks,
        coverage,
        tuple(conclusions.caveats),
        tuple(bound.pairs()),
        divergence,
        conclusions.float64,
        conclusions.training,
        conclusions.noticed or None,
        reproduce,
    )


def _located(check: CheckReport, reference: Subject, bound: Bound) -> Divergence:
    """The module of the worst leaf, where the check's worst path is one of a leaf."""
    leaves: Mapping[str, Any] = {**reference.params, **reference.buffers}
    worst = check.worst or ""
    owned = [leaf for leaf in leaves if worst == leaf or worst.endswith(f".{leaf}")]
    if not owned:
        return Divergence(check.name)
    leaf = max(owned, key=len)
    targets = bound.targets_of(leaf)
    return Divergence(check.name, parent(leaf) or None, parent(targets[0]) or None if targets else None)
