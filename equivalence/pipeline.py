"""The pipeline: every port of a target judged against its reference, told as a stream of events.

For each port: what needs no run, then every example of every structure through the checks asked for, then the
reference's own noise where a gap is too large to pass and too small to condemn, then plants for the resolution,
then whole training.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from equivalence import coverage as seen
from equivalence.checks import REGISTRY
from equivalence.comparison import Comparison, Example
from equivalence.conclusion import Conclusions, conclude
from equivalence.errors import DrawsDiffer, EquivalenceError, InputError, UnsupportedDraw
from equivalence.events import CheckFinished, Event, Finished, PortFinished, PortStarted, Progress, Started
from equivalence.frameworks.subject import Subject
from equivalence.judgement import Decision, Judge, Noise
from equivalence.numerics import DIFFERS, IMPRECISE, SHRINK, U32, U64, accumulation, distance
from equivalence.spec import TrainingData
from equivalence.structural import roundtrip, structure
from equivalence.verdict import CheckReport, Coverage, Report
from equivalence.weights import Bound


@dataclass
class Structure:
    """One structure of a model, both sides made: what all its examples share."""

    reference: Subject
    port: Subject
    bound: Bound
    comparison: Comparison
    examples: list[Example]
    keep: bool = False

    @property
    def trainable(self) -> bool:
        """Whether any parameter can be stepped."""
        return bool(set(self.reference.params) - self.reference.frozen)

    @property
    def sample(self) -> Example:
        """The example that extra runs are made on: moved weights where there is one, else the first."""
        return self.examples[min(1, len(self.examples) - 1)]


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

    def notes(self, port: str) -> list[str]:
        """What the report must say about where this port's parts come from."""


@dataclass(frozen=True)
class Plan:
    """What to do: the checks asked for (`asked` when the user named them) and how sharp the verdict must be."""

    checks: tuple[str, ...]
    resolution: float = 1e-6
    seed: int = 0
    shrink: bool = True
    asked: bool = False


def run(source: Source, plan: Plan) -> Iterator[Event]:
    """Judge every port of a source; the last event is `Finished`."""
    from equivalence.environment import environment

    yield Started(source.target, source.reference, source.ports, plan.checks)
    reports = []
    for port in source.ports:
        yield PortStarted(port, source.count(port))
        report = None
        for event in _port(source, port, plan):
            if isinstance(event, PortFinished):
                report = event.report
            yield event
        assert report is not None
        reports.append(report)
    facts = environment(plan.seed)
    yield Finished(Report(source.target, source.reference, facts, tuple(reports)))


@dataclass
class _Work:
    """What gathers while one port is judged."""

    port: str
    plan: Plan
    conclusions: Conclusions
    covered: seen.Covered = field(default_factory=seen.Covered)
    first: Structure | None = None
    done: int = 0
    ties: dict[Any, bool] = field(default_factory=dict)
    blind: set[bool] = field(default_factory=set)
    tied: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    limits: dict[Any, dict[str, float]] = field(default_factory=dict)

    def wants(self, run: str) -> list[str]:
        """The checks asked for that read this kind of run and that nothing has stopped."""
        return [n for n in self.plan.checks if REGISTRY[n].run == run and n not in self.conclusions.stopped]


def _port(source: Source, port: str, plan: Plan) -> Iterator[Event]:
    work = _Work(port, plan, Conclusions(plan.checks, plan.resolution, plan.asked))
    first: Structure | None = None
    total = source.count(port)
    decided: list[Decision] = []
    for structure_ in source.structures(port):
        if first is None:
            first = work.first = structure_
            if not _standing(work, structure_):
                break
        if not any(work.wants(kind) for kind in ("observe", "state", "steps", "jit")):
            break
        judge = Judge()
        for example in structure_.examples:
            _observe(work, structure_, example, judge)
            work.done += 1
            yield Progress(port, "examples", work.done, total)
        examples = {example.index: example for example in structure_.examples}
        decisions = judge.decide(_noise(structure_.comparison, examples))
        decisions = [d for d in decisions if not _at_a_tie(work, structure_, examples, d)]
        work.conclusions.take(decisions)
        work.conclusions.unmatched |= structure_.comparison.unmatched_slots
        if structure_ is first:
            decided = decisions
            _dtype_dependence(work, structure_, examples, decisions)
    assert first is not None
    if decided and not work.conclusions.diverged:
        yield from _plant(work, first, decided)
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
    for note in source.notes(port):
        work.conclusions.caveat("translated", note)
    report = conclude(work.conclusions, port, first.reference, first.bound, source.reproduce.format(port=port))
    for check in report.checks:
        yield CheckFinished(port, check)
    yield PortFinished(port, report)


def _noise(comparison: Comparison, examples: dict[int, Example]) -> Noise:
    return lambda where, paths: comparison.noise(examples[where[1]], where, paths)


def _standing(work: _Work, structure_: Structure) -> bool:
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


def _observe(work: _Work, structure_: Structure, example: Example, judge: Judge) -> None:
    """All runs of one example; other draws on the port's side are a divergence of the first check that sees them."""
    comparison, observing = structure_.comparison, work.wants("observe")
    # steps need the scale of their gradients, which the train-mode observation measures
    modes = (False, True) if observing or work.wants("jit") else (True,) if work.wants("steps") else ()
    for train in modes:
        try:
            findings, four, measures = comparison.observed(example, train, observing)
        except (DrawsDiffer, UnsupportedDraw) as error:
            name = observing[0] if observing else work.wants("steps")[0]
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
    except (DrawsDiffer, UnsupportedDraw) as error:
        _other_draws(work, "state" if work.wants("state") and structure_.reference.buffers else "step", error, True)


def _one_sided(work: _Work, paths: list[str], train: bool) -> None:
    """A path that only one side shows is a divergence of the first check that would have compared it."""
    for name in work.plan.checks:
        mine = [path for path in paths if REGISTRY[name].claims(path) is not None]
        if mine and name != "jit":
            mode = "train" if train else "eval"
            text = f"in {mode} mode one side alone has {', '.join(mine[:5])}, or with another shape"
            work.conclusions.direct(CheckReport(name, "divergent", examples=1, worst=f"{mode}.{mine[0]}", message=text))


def _other_draws(work: _Work, name: str, error: DrawsDiffer | UnsupportedDraw, train: bool) -> None:
    verdict = "divergent" if isinstance(error, DrawsDiffer) else "inconclusive"
    mode = "train" if train else "eval"
    check = CheckReport(name, verdict, examples=1, worst=f"{mode}.draws", message=str(error))  # type: ignore[arg-type]
    work.conclusions.direct(check)
    blind = [n for n in work.plan.checks if REGISTRY[n].run in ("steps", "state", "training")] if train else []
    work.conclusions.stop([n for n in blind if n != name], str(error))


def _dtype_dependence(
    work: _Work, structure_: Structure, examples: dict[int, Example], decisions: Sequence[Decision]
) -> None:
    """Whether the reference is another function in float32 than in float64, far beyond what its noise explains. Then
    float64 says nothing of float32: that is named, and the two sides are compared in float32 directly."""
    comparison = structure_.comparison
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
        four, _ = comparison.four(example, where[2])
        path = finding.path.partition(".")[2]
        if distance(four.port32[path], four.reference32[path]) > DIFFERS * explained:
            message = f"{finding.path} differs in float32, where the reference is another function"
            work.conclusions.direct(
                CheckReport("outputs", "divergent", examples=1, worst=finding.path, message=message)
            )
        return


def _at_a_tie(work: _Work, structure_: Structure, examples: dict[int, Example], decision: Decision) -> bool:
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
    decisions = judge.decide(lambda where, paths: comparison.noise(example, where, paths))
    return any(decision.differs for decision in decisions)


def _differs(structure_: Structure, plan: Plan, conclusions: Conclusions) -> bool:
    """Whether the first example of a structure shows a divergence of one of the checks that diverged."""
    work = _Work(
        "", plan, Conclusions(tuple(n for n in plan.checks if n in conclusions.diverged), plan.resolution, False)
    )
    if not work.conclusions.checks:
        return False
    judge = Judge()
    work.plan = dataclasses.replace(plan, checks=work.conclusions.checks)
    example = structure_.examples[0]
    _observe(work, structure_, example, judge)
    decisions = judge.decide(lambda where, paths: structure_.comparison.noise(example, where, paths))
    return bool(work.conclusions.diverged) or any(decision.differs for decision in decisions)


def _plant(work: _Work, structure_: Structure, decisions: Sequence[Decision]) -> Iterator[Event]:
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
    work: _Work,
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


def _train(work: _Work, source: Source, structure_: Structure) -> Iterator[Event]:
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
