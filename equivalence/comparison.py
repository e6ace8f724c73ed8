"""One structure, both sides: the four runs of an example, what they measured, and the reference's own noise."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from equivalence.checks import REGISTRY
from equivalence.judgement import Finding, Largest, Where
from equivalence.numerics import DIFFERS, U64, Measure, accumulation, distance, expected, finite, measure, rms, ulp_twin
from equivalence.observation import Batch, Observation, Seen

if TYPE_CHECKING:
    from equivalence.optimizers import OptimizerPair
    from equivalence.runtimes.jax import JaxRunner
    from equivalence.runtimes.torch import TorchRunner

STEPS = 5
"""Optimizer steps that `step` and `optimizer_state` compare."""
CALLS = 3
"""Training-mode calls that `state` compares."""
NOISE_RUNS = 4
"""Further runs of the reference that measure its noise."""
DECIDED = 1e-3
"""The part of an update beyond which it is rounding's: the step is the last of its example that is judged."""
ULP = 2.0**-52
"""How far a noise run moves each weight, relative: one ulp of float64."""


@dataclass(frozen=True)
class Example:
    """One example: weights by reference path (float32), batches to step through (the first is observed), a seed."""

    index: int
    kind: str
    ordinary: bool
    weights: Observation
    batches: tuple[Batch, ...]
    seed: int
    label: str
    kept: Observation | None = None
    """The weights the port already holds, in the reference's terms, when it is they that are judged."""

    @property
    def port_weights(self) -> Observation:
        """The weights that the port runs with."""
        return self.weights if self.kept is None else self.kept

    @property
    def elements(self) -> int:
        """Elements of the largest array among weights and inputs."""
        arrays = [*self.weights.values(), *self.batches[0].arrays().values()]
        return max((array.size for array in arrays), default=1)

    def step_seed(self, step: int) -> int:
        """The tape's seed of one optimizer step."""
        return self.seed + 7919 * (step + 1)


@dataclass(frozen=True)
class Four:
    """The four runs of one example: reference and port, in float32 and in float64."""

    reference32: Observation
    reference64: Observation
    port32: Observation
    port64: Observation

    def measures(self, elements: int) -> dict[str, Measure]:
        """Every distance at every path that both sides have."""
        return {
            path: measure(path, self.reference32[path], value, self.port32[path], self.port64[path], elements)
            for path, value in self.reference64.items()
            if path in self.port64 and value.shape == self.port64[path].shape
        }

    def one_sided(self) -> list[str]:
        """Outputs and gradients that one side alone has, or that differ in shape."""
        ours, theirs = self.reference64, self.port64
        missing = [path for path in ours if path not in theirs or ours[path].shape != theirs[path].shape]
        missing += [path for path in theirs if path.startswith("outputs.") and path not in ours]
        return [path for path in missing if not path.startswith("buffers.")]


@dataclass(frozen=True)
class Run:
    """The scale of one observation: rms of its outputs, of the loss's derivative by them, and of every gradient under
    a random unit cotangent (by the path that it has under the loss)."""

    size: float = 0.0
    slope: float = 0.0
    units: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Gradient:
    """A leaf's gradient in one optimizer step: how it compared, its rms under a random unit cotangent, and the elements
    at which either side has one at all (a dead unit has none, and rounding gives it none)."""

    measure: Measure
    unit: float
    moves: np.ndarray


@dataclass
class Comparison:
    """The reference and a port of one structure, ready to run.

    `reference` and `port` observe; `stepping_reference` and `stepping_port` take optimizer steps (with a loss of
    their own where the user gave none).
    """

    reference: TorchRunner
    port: JaxRunner
    stepping_reference: TorchRunner
    stepping_port: JaxRunner
    optimizer: OptimizerPair
    seen: dict[Where, Run] = field(default_factory=dict)
    """What each observation says of the scale of its gradients."""
    gradients: dict[Where, list[dict[str, Gradient]]] = field(default_factory=dict)
    """How the gradients of every optimizer step compared, by run: what the jitter of its noise runs follows from."""
    unmatched_slots: set[str] = field(default_factory=set)
    observed_examples: dict[int, tuple[float, Example]] = field(default_factory=dict)
    """Every example observed, by index, with the rms of its outputs."""
    _inert: dict[str, bool] = field(default_factory=dict)
    _programs: dict[tuple[int, bool], Any] = field(default_factory=dict)
    _draws: dict[int, list[Seen]] = field(default_factory=dict)
    _fields: dict[str, str] = field(default_factory=dict)
    """torch's name of each piece of optimizer state, and the field that holds it in Optax's."""

    # --- observe -----------------------------------------------------------------------------------------------

    def reference_seen(self, example: Example, bits: int, train: bool) -> Seen:
        """The reference's observation of an example's first batch."""
        return self.reference.observe(bits, example.weights, example.batches[0], train, example.seed)

    def four(self, example: Example, train: bool) -> tuple[Four, Seen]:
        """All four observations, and the reference's float64 run with the draws it was served."""
        ours = {bits: self.reference_seen(example, bits, train) for bits in (32, 64)}
        theirs = {
            bits: self.port.observe(bits, example.port_weights, example.batches[0], train, example.seed, ours[64])
            for bits in (32, 64)
        }
        return Four(ours[32].values, ours[64].values, theirs[32].values, theirs[64].values), ours[64]

    def observed(
        self, example: Example, train: bool, wanted: Sequence[str]
    ) -> tuple[list[Finding], Four, dict[str, Measure]]:
        """The findings of every check that reads an observation, the four runs, and all that was measured."""
        four, _ = self.four(example, train)
        where = ("observe", example.index, train)
        measures = four.measures(example.elements)
        findings = self._findings(measures, where, example, wanted, "train" if train else "eval")
        return findings, four, measures

    def _findings(
        self, measures: dict[str, Measure], where: Where, example: Example, wanted: Sequence[str], mode: str
    ) -> list[Finding]:
        size, slope = (
            max((m.scale_reference for path, m in measures.items() if path.startswith(prefix)), default=0.0)
            for prefix in ("outputs.", "output_gradients.")
        )
        units = {
            path.replace(".cotangent.", ".loss.", 1): m.scale_reference
            for path, m in measures.items()
            if ".cotangent." in path
        }
        self.seen[where] = Run(size, slope, units)
        self.observed_examples[example.index] = size, example
        found = []
        for path, m in measures.items():
            for name in wanted:
                family = REGISTRY[name].claims(path)
                if family is not None:
                    unit = units.get(path, 0.0)
                    found.append(Finding(name, where, f"{mode}.{path}", family, m, example.ordinary, slope, unit, size))
        return found

    def compiled_or_not(self, example: Example, train: bool) -> list[Finding]:
        """The port's float64 run not compiled, held against its compiled run."""
        ours = self.reference_seen(example, 64, train)
        runs = {
            (bits, compiled): self.port.observe(
                bits, example.port_weights, example.batches[0], train, example.seed, ours, compiled
            ).values
            for bits in (32, 64)
            for compiled in (True, False)
        }
        four = Four(runs[32, True], runs[64, True], runs[32, False], runs[64, False])
        mode = "train" if train else "eval"
        return self._findings(
            four.measures(example.elements), ("observe", example.index, train), example, ["jit"], mode
        )

    # --- state -------------------------------------------------------------------------------------------------

    def states(self, example: Example) -> list[Finding]:
        """The findings of `state`: buffers after each of several training-mode calls."""
        found = []
        weights = {key: dict(example.weights) for key in ("r32", "r64")}
        weights |= {key: dict(example.port_weights) for key in ("p32", "p64")}
        for number in range(CALLS):
            batch, seed = example.batches[number % len(example.batches)], example.seed + number
            ours = {
                b: self.reference.observe(b, weights[f"r{b}"], batch, True, seed, gradients=False) for b in (32, 64)
            }
            after = {f"r{b}": _buffers(seen.values) for b, seen in ours.items()}
            after |= {f"p{b}": self.port.advance(b, weights[f"p{b}"], batch, ours[64]) for b in (32, 64)}
            for key, buffers in after.items():
                weights[key].update(buffers)
            four = Four(*({f"buffers.{p}": v for p, v in after[key].items()} for key in ("r32", "r64", "p32", "p64")))
            where = ("state", example.index)
            for path, m in four.measures(example.elements).items():
                found.append(Finding("state", where, f"call{number + 1}.{path}", "plain", m, example.ordinary))
        return found

    def _states64(self, example: Example, weights: Observation) -> Observation:
        weights, found = dict(weights), {}
        for number in range(CALLS):
            batch, seed = example.batches[number % len(example.batches)], example.seed + number
            seen = self.reference.observe(64, weights, batch, True, seed, gradients=False)
            weights.update(_buffers(seen.values))
            found.update({f"call{number + 1}.buffers.{p}": v for p, v in _buffers(seen.values).items()})
        return found

    # --- steps -------------------------------------------------------------------------------------------------

    def program(self, bits: int, gradients: bool = True) -> Any:
        """The port's compiled step at one precision, made once; without gradients it moves a quarter less memory."""
        key = bits, gradients
        if key not in self._programs:
            rates = self.optimizer.rates(STEPS)
            self._programs[key] = self.stepping_port.program(self.optimizer, rates, bits, gradients)
        return self._programs[key]

    def stepped(self, example: Example, wanted: Sequence[str]) -> Iterator[list[Finding]]:
        """The findings of `step` and `optimizer_state`, one step at a time; nothing of a step is kept."""
        from equivalence.runtimes.jax_steps import JaxStepper

        rates = self.optimizer.rates(STEPS)
        ours = {b: self.stepping_reference.stepper(b, example.weights, self.optimizer, rates) for b in (32, 64)}
        theirs = {b: JaxStepper(self.program(b), example.port_weights) for b in (32, 64)}
        where = ("steps", example.index)
        self.gradients[where] = []
        run = self.seen.get(("observe", example.index, True), Run())
        for number in range(STEPS):
            batch, seed = example.batches[number % len(example.batches)], example.step_seed(number)
            seen = {bits: stepper.step(batch, seed) for bits, stepper in ours.items()}
            losses = {bits: stepper.step(batch, seen[64]) for bits, stepper in theirs.items()}
            four = Four(
                seen[32].values | stepped(ours[32]),
                seen[64].values | stepped(ours[64]),
                losses[32].values | port_stepped(theirs[32], ours[32], self.unmatched_slots),
                losses[64].values | port_stepped(theirs[64], ours[64], self.unmatched_slots),
            )
            measures = four.measures(example.elements)
            gradients: dict[str, Gradient] = {}
            for path in [path for path in measures if path.startswith("gradients.")]:
                m, leaf = measures.pop(path), path.removeprefix("gradients.")
                unit = run.units.get(f"parameter_gradients.loss.{leaf}", 0.0)
                moves = (four.reference64[path] != 0) | (four.port64[path] != 0)
                gradients[leaf] = Gradient(m, unit, moves)
            self.gradients[where].append(gradients)
            findings = []
            for path, m in measures.items():
                for name in wanted:
                    family = REGISTRY[name].claims(path)
                    if family is not None:
                        at = f"step{number + 1}.{path}"
                        findings.append(Finding(name, where, at, family, m, example.ordinary, size=run.size))
            yield findings

    def _steps64(
        self, example: Example, noise: list[dict[str, np.ndarray]] | None, seed: int, amplitude: float
    ) -> Observation:
        """Everything a float64 run of the reference's steps shows, its gradients jittered by `amplitude` x `noise`."""
        rng = np.random.default_rng((example.seed, seed))
        stepper = self.stepping_reference.stepper(64, example.weights, self.optimizer, self.optimizer.rates(STEPS))
        found: Observation = {}
        for number in range(STEPS):
            if noise is not None:
                scales = noise[number]
                stepper.jitter = lambda gradients, scales=scales: {
                    path: rng.standard_normal(tuple(gradients[path].shape)) * sigma * amplitude
                    for path, sigma in scales.items()
                    if path in gradients
                }
            batch = example.batches[number % len(example.batches)]
            with _rounding(None if noise is None else seed + STEPS * number, amplitude):
                seen = stepper.step(batch, example.step_seed(number)).values | stepped(stepper)
            found |= {f"step{number + 1}.{path}": np.array(value) for path, value in seen.items()}
        return found

    # --- the port alone ----------------------------------------------------------------------------------------

    def port_states(self, example: Example, weights: Observation) -> Observation:
        """The port's buffers after each training-mode call in float64, from other weights."""
        weights, found = dict(weights), {}
        for number in range(CALLS):
            batch, seed = example.batches[number % len(example.batches)], example.seed + number
            ours = self.reference.observe(64, example.weights, batch, True, seed, gradients=False)
            after = self.port.advance(64, weights, batch, ours)
            weights.update(after)
            found.update({f"call{number + 1}.buffers.{path}": value for path, value in after.items()})
        return found

    def port_steps(self, example: Example, weights: Observation) -> Iterator[Observation]:
        """Everything the port's float64 steps show from other weights, one step at a time."""
        from equivalence.runtimes.jax_steps import JaxStepper

        served = self.served(example)
        stepper = JaxStepper(self.program(64, gradients=False), weights)
        names = {field_: slot for slot, field_ in self._fields.items()}
        for number in range(STEPS):
            batch = example.batches[number % len(example.batches)]
            found = stepper.step(batch, served[number]).values
            found |= {f"parameters.{path}": value for path, value in stepper.parameters().items()}
            for slot, leaves in stepper.optimizer_state().items():
                found |= {f"optimizer.{names.get(slot, slot)}.{p}": v for p, v in leaves.items() if p}
            yield {f"step{number + 1}.{path}": value for path, value in found.items()}

    def served(self, example: Example) -> list[Seen]:
        """The draws of the reference's steps: kept from the last time they were asked for this example."""
        if example.index not in self._draws:
            rates = self.optimizer.rates(STEPS)
            stepper = self.stepping_reference.stepper(64, example.weights, self.optimizer, rates)
            self._fields = stepper.fields()
            seeds = [(example.batches[n % len(example.batches)], example.step_seed(n)) for n in range(STEPS)]
            self._draws = {example.index: [stepper.step(batch, seed) for batch, seed in seeds]}
        return self._draws[example.index]

    # --- noise -------------------------------------------------------------------------------------------------

    def noise(self, example: Example, where: Where, paths: Sequence[str], amplitude: float = 1.0) -> dict[str, float]:
        """How far the reference's own noise moves each path, over the noise's amplitude.

        Four float64 runs of it: weights moved by one ulp, or for steps the gradients jittered by what they may differ;
        and the result of every operation moved by one ulp (all of them times `amplitude`).
        """
        if where[0] == "handover":
            plain = {path: path.partition(".")[2] for path in paths}
            found = self.noise(example, ("steps", where[1]), sorted(set(plain.values())), amplitude)
            return {path: found[plain[path]] for path in paths}
        largest = dict.fromkeys(paths, 0.0)
        base = self._noise_run(example, where, None, amplitude)
        for number in range(NOISE_RUNS):
            run = self._noise_run(example, where, number, amplitude)
            for path in paths:
                if path in base:
                    largest[path] = max(largest[path], finite(_apart(run[path], base[path])) / amplitude)
            if where[0] == "steps" and amplitude == 1.0:
                lost = self._lost(example, base, run)
                largest |= {path: np.inf for path in paths if _step_of(path) > lost}
        return largest

    def _lost(self, example: Example, base: Observation, run: Observation) -> int:
        """The first step in which rounding decides an update, of a leaf that the outputs depend on: the steps after it
        are rounding's, not the model's. (Adam makes a step of the learning rate out of a gradient that is noise.)"""
        before = example.weights
        for number in range(1, STEPS + 1):
            after = {leaf: base[f"step{number}.parameters.{leaf}"] for leaf in self.reference.subject.params}
            for leaf, value in after.items():
                moved, size = distance(run[f"step{number}.parameters.{leaf}"], value), distance(value, before[leaf])
                if moved > DECIDED * size and leaf not in self.reference.subject.frozen and not self.inert(leaf):
                    return number
            before = after
        return STEPS

    def inert(self, leaf: str) -> bool:
        """Whether moving a leaf by O(1) leaves the reference's training-mode outputs where they are (a key bias under
        softmax, a bias before a normalisation), on examples from the smallest to the largest outputs observed."""
        if leaf not in self._inert:
            ranked = sorted(self.observed_examples.values(), key=lambda pair: pair[0])
            spread = {round(part * (len(ranked) - 1) / 4) for part in range(5)}
            self._inert[leaf] = not any(self._matters(leaf, ranked[place][1]) for place in sorted(spread))
        return self._inert[leaf]

    def _matters(self, leaf: str, example: Example) -> bool:
        rng, value = np.random.default_rng(example.seed), example.weights[leaf]
        weights = {**example.weights, leaf: value + rng.standard_normal(value.shape).astype(value.dtype)}
        before, after = (
            self.reference.observe(64, held, example.batches[0], True, example.seed, gradients=False).values
            for held in (example.weights, weights)
        )
        return any(
            distance(after[path], value) > DIFFERS * U64 * rms(value) * accumulation(example.elements)
            for path, value in before.items()
            if path.startswith("outputs.") and value.dtype.kind == "f"
        )

    def _jitter(self, where: Where) -> list[dict[str, np.ndarray]]:
        """The standard deviation of the jitter of every gradient element, by step and leaf."""
        run = self.seen.get(("observe", where[1], True), Run())
        slope = Largest((seen.size, seen.slope) for seen in self.seen.values()).up_to(run.size)
        return [
            {leaf: gradient_noise(g.measure, slope * g.unit) * g.moves for leaf, g in gradients.items()}
            for gradients in self.gradients[where]
        ]

    def _noise_run(self, example: Example, where: Where, number: int | None, amplitude: float) -> Observation:
        kind = where[0]
        if kind == "steps":
            noise = None if number is None else self._jitter(where)
            return self._steps64(example, noise, number or 0, amplitude)
        weights = example.weights
        if number is not None:
            rng = np.random.default_rng((example.seed, number))
            weights = {
                path: ulp_twin(value.astype(np.float64) if value.dtype.kind == "f" else value, rng, ULP * amplitude)
                for path, value in example.weights.items()
            }
        if kind == "state":
            with _rounding(number, amplitude):
                return self._states64(example, weights)
        train = bool(where[2])
        with _rounding(number, amplitude):
            seen = self.reference.observe(64, weights, example.batches[0], train, example.seed)
        mode = "train" if train else "eval"
        return {f"{mode}.{path}": value for path, value in seen.values.items()}


def _rounding(seed: int | None, amplitude: float) -> contextlib.AbstractContextManager[Any]:
    """Every operation of torch off by `amplitude` ulps, or nothing."""
    if seed is None:
        return contextlib.nullcontext()
    from equivalence.runtimes.torch_rounding import Rounding

    return Rounding(seed, amplitude)


def _step_of(path: str) -> int:
    """The number of the optimizer step that a path `step3.parameters...` belongs to."""
    return int(path.partition(".")[0].removeprefix("step"))


def gradient_noise(m: Measure, floor: float) -> float:
    """How far a step's gradient may differ: its gap, at least its expectation and at most a hundred of them."""
    first = expected(m, max(m.scale_reference, floor))
    return min(max(finite(m.gap), first), DIFFERS * first)


def _apart(a: np.ndarray, b: np.ndarray) -> float:
    return distance(a, b) if b.dtype.kind == "f" else float(np.mean(a != b))


def _buffers(values: Observation) -> Observation:
    return {path.removeprefix("buffers."): value for path, value in values.items() if path.startswith("buffers.")}


def _counter(value: Any) -> np.ndarray:
    return np.asarray(value).astype(np.int64)


def stepped(stepper: Any) -> Observation:
    """The reference after a step, by the paths of the step checks."""
    found = {f"parameters.{path}": value for path, value in stepper.parameters().items()}
    found |= {f"buffers.{path}": value for path, value in stepper.held_buffers().items()}
    found |= {f"gradients.{path}": value for path, value in stepper.seen_gradients().items()}
    for slot, leaves in stepper.optimizer_state().items():
        count = _counter if slot == "step" else np.asarray
        found |= {f"optimizer.{slot}.{path}": count(value) for path, value in leaves.items()}
    return found


def port_stepped(stepper: Any, reference: Any, unmatched: set[str]) -> Observation:
    """The port after a step, by the same paths; slots of the reference's that it lacks go to `unmatched`."""
    found = {f"parameters.{path}": value for path, value in stepper.parameters().items()}
    found |= {f"buffers.{path}": value for path, value in stepper.held_buffers().items()}
    found |= {f"gradients.{path}": value for path, value in stepper.seen_gradients().items()}
    state, fields = stepper.optimizer_state(), reference.fields()
    for slot, held in reference.optimizer_state().items():
        leaves = state.get(fields.get(slot, ""), {})
        if not leaves:
            unmatched.add(slot)
        shared = dict.fromkeys(held, leaves[""]) if "" in leaves else {}
        for path, value in {**shared, **leaves}.items():
            if path:
                found[f"optimizer.{slot}.{path}"] = _counter(value) if slot == "step" else value
    return found
