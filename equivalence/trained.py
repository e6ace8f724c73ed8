"""The `training` check: recorded reference runs against the port's whole-training program, at both precisions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from equivalence import recordings
from equivalence.conclusion import Conclusions
from equivalence.coverage import planted
from equivalence.numerics import IMPRECISE
from equivalence.spec import TrainingData
from equivalence.survivors import in_training
from equivalence.training import Recorded, TrainingFinding, judge, moved, noticed, record, summary
from equivalence.verdict import CheckReport, Verdict

if TYPE_CHECKING:
    from equivalence.comparison import Comparison
    from equivalence.runs import Example


def train(
    comparison: Comparison, example: Example, data: TrainingData, seed: int, conclusions: Conclusions
) -> Iterator[tuple[int, int]]:
    """Run the check and conclude it; yields (steps of the reference done, all of them) while they run."""
    from equivalence.runtimes.jax_training import WholeTraining

    runner, optimizer = comparison.stepping_reference, comparison.optimizer
    recorded: Recorded | None = None
    name = recordings.key(runner, example.weights, optimizer, data, seed)
    if name is not None:
        recorded = recordings.read(name)
        if recorded is not None and not recordings.still_true(recorded, runner, example.weights, optimizer, data, seed):
            recorded = None
    if recorded is None:
        for news in record(runner, example.weights, optimizer, data, seed):
            if isinstance(news, Recorded):
                recorded = news
            else:
                yield news
        assert recorded is not None
        if name is not None:
            recordings.write(name, recorded)
    recorded = in_training(comparison, example, recorded, data, seed)
    programs = {bits: WholeTraining(comparison.stepping_port, optimizer, bits, data) for bits in (32, 64)}
    runs = {bits: program.run(example.port_weights, recorded.draws, seed) for bits, program in programs.items()}
    findings = judge(recorded, runs[32], runs[64], example.elements, data.plan.batches)
    losses, parameters = {}, {}
    diverged = any(f.differs for f in findings)
    if not diverged:
        leaves = [p for p in recorded.parameters if p not in runner.subject.frozen and recorded.parameters[p][0].size]
        for leaf in leaves:
            losses[leaf], parameters[leaf] = programs[64].run(planted(example, leaf), recorded.draws, seed)
    conclusions.noticed["training"] = smallest = noticed(
        recorded, parameters, losses, runs[64][1], runs[64][0], example.elements, data.plan.batches
    )
    conclusions.training = summary(recorded, runner, runs[32], runs[64], data)
    idle = moved(recorded, example.weights, data, runner.subject.frozen)
    steps32 = conclusions.training["float32_steps_compared"]
    conclusions.direct(_report(findings, smallest, (len(recorded.losses), steps32), idle, conclusions.resolution))


def _report(
    findings: list[TrainingFinding], smallest: dict[str, float], steps: tuple[int, int], idle: str | None, limit: float
) -> CheckReport:
    worst = max(findings, key=lambda f: (f.differs, f.ratio))
    low = max(findings, key=lambda f: f.precision)
    resolution = max(smallest.values(), default=None)
    verdict: Verdict = "equivalent"
    message = f"{steps[0]} steps in float64; float32 step by step for {steps[1]} of them"
    if worst.differs:
        verdict = "divergent"
        message = f"{worst.path} is {worst.ratio:.3g} times as far off as rounding explains at step {worst.step + 1}"
    elif low.precision > IMPRECISE:
        verdict, worst = "divergent", low
        message = f"less precise than the reference: {low.path} errs {low.precision:.3g} times as much in float32"
    elif idle is not None:
        verdict, message = "inconclusive", idle
    elif any(f.nonfinite for f in findings):
        verdict = "inconclusive"
        message = f"NaN or infinity on both sides in {', '.join(f.path for f in findings if f.nonfinite)}"
    elif resolution is not None and resolution > limit:
        verdict = "inconclusive"
        message = f"a change smaller than {resolution:.2g} would not have shown; {limit:.2g} was asked for"
    scale = worst.scale or 1.0
    return CheckReport(
        "training",
        verdict,
        gap=worst.gap / scale,
        expected_gap=worst.expected / scale,
        precision=worst.precision,
        resolution=resolution,
        examples=1,
        worst=f"step{worst.step + 1}.{worst.path}",
        message=message,
    )
