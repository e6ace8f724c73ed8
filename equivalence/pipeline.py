"""The pipeline: every port of a target judged against its reference, told as a stream of events.

For each port: what needs no run, then every example of every structure through the checks asked for, then the
reference's own noise where a gap is too large to pass and too small to condemn, then plants for the resolution,
then whole training.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from equivalence import coverage as seen
from equivalence.checks import REGISTRY
from equivalence.comparison import Comparison
from equivalence.conclusion import Conclusions, conclude
from equivalence.conventions import at_a_tie, dtype_dependence
from equivalence.errors import DrawsDiffer, EquivalenceError, InputError, UnsupportedDraw
from equivalence.events import CheckFinished, Event, Finished, PortFinished, PortStarted, Progress, Started
from equivalence.handover import handed_over
from equivalence.judgement import Decision, Judge, Noise, Survived
from equivalence.optimizers.pairs import LOOKS_AHEAD, YOURS
from equivalence.plants import plant
from equivalence.runs import Example
from equivalence.spec import TrainingData
from equivalence.structural import roundtrip, structure
from equivalence.verdict import CheckReport, Coverage, Report
from equivalence.work import Plan, Structure, Work


class Source(Protocol):
    """Where structures and examples come from: a spec, or the user's own pair."""

    @property
    def target(self) -> str:
        """What is judged."""

    @property
    def reference(self) -> str:
        """The reference's framework."""

    @property
    def ports(self) -> tuple[str, ...]:
        """The ports' frameworks."""

    @property
    def reproduce(self) -> str:
        """The command that repeats a port's run, with `{port}` left open."""

    def structures(self, port: str) -> Iterator[Structure]:
        """The structures of one port, the user's own or the default configuration first."""

    def count(self, port: str) -> int:
        """How many examples there will be."""

    def training(self, structure: Structure) -> TrainingData | None:
        """What the first structure is trained on, or None."""

    def smaller(self, port: str, fails: Any) -> str | None:
        """A small description of an example that `fails(structure)` holds for, or None."""

    def findings(self, port: str) -> list[str]:
        """Of a port that diverges: under which rearrangement of its weights it would not."""

    def notes(self, port: str) -> list[str]:
        """What the report must say about where this port's parts come from."""


def run(source: Source, plan: Plan) -> Iterator[Event]:
    """Judge every port of a source; the last event is `Finished`."""
    from equivalence.environment import environment

    yield Started(source.target, source.reference, source.ports, plan.checks)
    reports = []
    for port in source.ports:
        yield PortStarted(port, source.count(port))
        report = None
        for event in _blaming(_port(source, port, plan), port):
            if isinstance(event, PortFinished):
                report = event.report
            yield event
        assert report is not None
        reports.append(report)
    facts = environment(plan.seed)
    yield Finished(Report(source.target, source.reference, facts, tuple(reports)))


def _blaming(events: Iterator[Event], port: str) -> Iterator[Event]:
    """The same events; an error raised in code that is neither ours nor a library's becomes the caller's."""
    try:
        yield from events
    except EquivalenceError:
        raise
    except Exception as error:
        if _in_users_code(error):
            raise InputError(f"{port}: your own code fails: {_first_line(error)}") from error
        raise


def _in_users_code(error: BaseException) -> bool:
    """Whether a frame of the traceback lies outside this package, installed packages and Python itself."""
    ours = (str(Path(__file__).parent), sys.base_prefix, sys.prefix, "<")
    trace = error.__traceback__
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if not file.startswith(ours) and "site-packages" not in file:
            return True
        trace = trace.tb_next
    return False


def _port(source: Source, port: str, plan: Plan) -> Iterator[Event]:
    work = Work(port, plan, Conclusions(plan.checks, plan.resolution, plan.asked))
    first: Structure | None = None
    total = source.count(port)
    decided: list[Decision] = []
    for structure_ in source.structures(port):
        if first is None:
            first = work.first = structure_
            work.conclusions.steps = structure_.comparison.steps
            if not _standing(work, structure_):
                break
        if not any(work.wants(kind) for kind in ("observe", "state", "steps", "jit", "handover")):
            break
        judge = Judge()
        for example in structure_.examples:
            _observe(work, structure_, example, judge)
            work.done += 1
            yield Progress(port, "examples", work.done, total)
        examples = {example.index: example for example in structure_.examples}
        decisions = judge.decide(*_noise(structure_.comparison, examples))
        decisions = [d for d in decisions if not at_a_tie(work, structure_, examples, d)]
        work.conclusions.take(decisions)
        work.conclusions.unmatched |= structure_.comparison.unmatched_slots
        for side, runner in structure_.comparison.sides():
            work.conclusions.precision(side, runner.float64, runner.surviving)
        if judge.lost:
            lost = len({where[1] for where in judge.lost})
            text = f"rounding decides an update in {lost} examples; the steps after it were not judged"
            work.conclusions.caveat("chaos", text, check="step")
        if structure_ is first:
            decided = decisions
            dtype_dependence(work, structure_, examples, decisions)
    assert first is not None
    if decided and not work.conclusions.diverged:
        yield from plant(work, first, decided)
        if work.covered.masks:
            work.conclusions.coverage = seen.coverage(work.covered, first.comparison, first.examples[-1])
    elif work.covered.masks:
        work.conclusions.coverage = Coverage(work.covered.fraction())
    if "training" in plan.checks:
        yield from _train(work, source, first)
    if work.conclusions.diverged and plan.shrink and total > 1:
        work.conclusions.smallest = source.smaller(port, lambda s: _differs(s, plan, work.conclusions))
    for name, found in work.tied.items():
        kind, path = found[0]
        more = f" (and {len(found) - 1} more paths)" if len(found) > 1 else ""
        text = f"{path}{more} differs at {kind} inputs and agrees beside them: a tie, a kink or a cancellation there"
        work.conclusions.caveat("tie", text, check=name)
    _unseen_schedule(work, first)
    if work.conclusions.diverged:
        for text in source.findings(port):
            work.conclusions.caveat("mapping", text)
    for note in source.notes(port):
        work.conclusions.caveat("translated", note)
    report = conclude(work.conclusions, port, first.reference, first.bound, source.reproduce.format(port=port))
    for check in report.checks:
        yield CheckFinished(port, check)
    yield PortFinished(port, report)


def _unseen_schedule(work: Work, structure_: Structure) -> None:
    """Say how much of a user's own schedules was seen; where one first moves after that, nothing is proven of it."""
    comparison, conclusions = structure_.comparison, work.conclusions
    pair = comparison.optimizer
    if pair.name != YOURS or conclusions.diverged or not set(work.plan.checks) & {"step", "handover", "training"}:
        return
    steps = conclusions.training["steps"] if conclusions.training else pair.steps
    theirs = comparison.first_move(structure_.examples[0], steps, LOOKS_AHEAD)
    for side, move in (("scheduler", pair.first_move), ("port's schedule", theirs)):
        if move is not None and move >= steps:
            conclusions.unseen = True
            text = f"the {side} first moves a rate after step {steps}, and {steps} steps were run"
            conclusions.caveat("schedule", text, check="step")
        elif move is not None:
            text = f"the {side} was followed for {steps} steps; what it does later was not seen"
            conclusions.caveat("schedule", text, check="step")


def _noise(comparison: Comparison, examples: dict[int, Example]) -> tuple[Noise, Survived]:
    return (
        lambda where, paths, size: comparison.noise(examples[where[1]], where, paths, size),
        lambda where: comparison.rounded(examples[where[1]], where),
    )


def _standing(work: Work, structure_: Structure) -> bool:
    """The checks that need no run; whether the outputs can be compared at all."""
    example = structure_.examples[0]
    comparison = structure_.comparison
    try:
        ours = comparison.reference_seen(example, 64, False).values
    except EquivalenceError:
        raise
    except Exception as error:
        raise InputError(f"the reference fails on these inputs: {_first_line(error)}") from error
    shapes = {p.removeprefix("outputs."): (v.shape, v.dtype.kind) for p, v in ours.items() if p.startswith("outputs.")}
    try:
        theirs = comparison.port.outputs_of(64, example.port_weights, example.batches[0])
    except Exception as error:
        raise InputError(f"the port {work.port} fails on these inputs: {_first_line(error)}") from error
    report = structure(structure_.reference, structure_.port, structure_.bound, (shapes, theirs))
    fits = all(path in theirs and theirs[path][0] == shape for path, (shape, _) in shapes.items())
    if "structure" in work.plan.checks or not fits:
        work.conclusions.direct(report)
    if "roundtrip" in work.plan.checks:
        work.conclusions.direct(roundtrip(structure_.reference, structure_.port, structure_.bound, structure_.keep))
    if not fits:
        work.conclusions.stop(
            [n for n in work.plan.checks if REGISTRY[n].run != "once"], "the outputs have other shapes"
        )
    return fits


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"


def _observe(work: Work, structure_: Structure, example: Example, judge: Judge) -> None:
    """All runs of one example; other draws on the port's side are a divergence of the first check that sees them."""
    comparison, observing = structure_.comparison, work.wants("observe")
    stepping = [*work.wants("steps"), *work.wants("handover")]
    # steps need the scale of their gradients, which the train-mode observation measures
    modes = (False, True) if observing or work.wants("jit") else (True,) if stepping else ()
    for train in modes:
        try:
            findings, four, measures = comparison.observed(example, train, observing)
        except (DrawsDiffer, UnsupportedDraw) as error:
            name = (*observing, *stepping, "jit")[0]
            _other_draws(work, name, error, train)
            work.blind.add(train)
            continue
        if four.one_sided():
            _one_sided(work, four.one_sided(), train)
        judge.add(findings)
        if work.first is structure_:
            work.covered.add(four.reference64, measures)
        if work.wants("jit") and example is structure_.sample:
            judge.add(comparison.compiled_or_not(example, train))
    try:
        if work.wants("state") and structure_.reference.buffers and comparison.port.buffer_paths:
            judge.add(comparison.states(example))
        if work.wants("steps") and structure_.trainable:
            for found in comparison.stepped(example, work.wants("steps")):
                judge.add(found)
        if work.wants("handover") and structure_.trainable:
            _hand_over(work, comparison, example, judge)
    except (DrawsDiffer, UnsupportedDraw) as error:
        _other_draws(work, "state" if work.wants("state") and structure_.reference.buffers else "step", error, True)


def _hand_over(work: Work, comparison: Comparison, example: Example, judge: Judge) -> None:
    """The findings of `handover`; a state that cannot be moved says so, once."""
    if ("steps", example.index) not in comparison.gradients:
        for _ in comparison.stepped(example, ()):
            """How the gradients compare is what the noise of later steps follows from."""
    try:
        for found in handed_over(comparison, example):
            judge.add(found)
    except InputError as error:
        work.conclusions.direct(CheckReport("handover", "inconclusive", message=str(error)))


def _one_sided(work: Work, paths: list[str], train: bool) -> None:
    """A path that only one side shows is a divergence of the first check that would have compared it."""
    for name in work.plan.checks:
        mine = [path for path in paths if REGISTRY[name].claims(path) is not None]
        if mine and name != "jit":
            mode = "train" if train else "eval"
            text = f"in {mode} mode one side alone has {', '.join(mine[:5])}, or with another shape"
            work.conclusions.direct(CheckReport(name, "divergent", examples=1, worst=f"{mode}.{mine[0]}", message=text))


def _other_draws(work: Work, name: str, error: DrawsDiffer | UnsupportedDraw, train: bool) -> None:
    verdict = "divergent" if isinstance(error, DrawsDiffer) else "inconclusive"
    mode = "train" if train else "eval"
    check = CheckReport(name, verdict, examples=1, worst=f"{mode}.draws", message=str(error))  # type: ignore[arg-type]
    work.conclusions.direct(check)
    later = work.plan.checks[work.plan.checks.index(name) + 1 :] if train else ()
    work.conclusions.stop(
        [n for n in later if REGISTRY[n].run in ("steps", "state", "handover", "training")], str(error)
    )


def _differs(structure_: Structure, plan: Plan, conclusions: Conclusions) -> bool:
    """Whether the first example of a structure shows a divergence of one of the checks that diverged."""
    work = Work(
        "", plan, Conclusions(tuple(n for n in plan.checks if n in conclusions.diverged), plan.resolution, False)
    )
    if not work.conclusions.checks:
        return False
    judge = Judge()
    work.plan = dataclasses.replace(plan, checks=work.conclusions.checks)
    example = structure_.examples[0]
    _observe(work, structure_, example, judge)
    decisions = judge.decide(*_noise(structure_.comparison, {example.index: example}))
    return bool(work.conclusions.diverged) or any(decision.differs for decision in decisions)


def _train(work: Work, source: Source, structure_: Structure) -> Iterator[Event]:
    from equivalence.trained import train

    if "training" in work.conclusions.stopped:
        return
    data = source.training(structure_)
    if data is None or not structure_.trainable:
        work.conclusions.nothing("training", "no loss and no data to train on")
        return
    try:
        for done in train(structure_.comparison, structure_.examples[0], data, work.plan.seed, work.conclusions):
            yield Progress(work.port, "training", *done)
    except (DrawsDiffer, UnsupportedDraw) as error:
        verdict = "divergent" if isinstance(error, DrawsDiffer) else "inconclusive"
        work.conclusions.direct(CheckReport("training", verdict, examples=1, worst="draws", message=str(error)))  # type: ignore[arg-type]
