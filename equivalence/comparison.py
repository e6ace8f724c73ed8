"""One structure, both sides: the four runs of an example and what they measured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from equivalence.checks import REGISTRY
from equivalence.errors import InputError
from equivalence.judgement import Finding, Where
from equivalence.noise import noise
from equivalence.numerics import Measure
from equivalence.observation import Observation, Seen
from equivalence.runs import CALLS, Example, Four, Gradient, Run, buffers_of, finite, port_stepped, stepped

if TYPE_CHECKING:
    from equivalence.optimizers import OptimizerPair
    from equivalence.runtimes.jax import JaxRunner
    from equivalence.runtimes.torch import TorchRunner


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
    inert: dict[str, bool] = field(default_factory=dict)
    shaken: dict[Where, tuple[Example, dict[str, float]]] = field(default_factory=dict)
    """How far shaking what survives of float32 in float64 runs moved each path, by run, of the example last asked."""
    _programs: dict[tuple[int, bool], Any] = field(default_factory=dict)
    _draws: dict[int, list[Seen]] = field(default_factory=dict)
    _fields: dict[str, str] = field(default_factory=dict)
    """torch's name of each piece of optimizer state, and the field that holds it in Optax's."""

    @property
    def steps(self) -> int:
        """Optimizer steps that are compared."""
        return self.optimizer.steps

    def sides(self) -> tuple[tuple[str, TorchRunner | JaxRunner], ...]:
        """Every runner, by its side; those that step see an optimizer too."""
        return ("reference", self.reference), ("port", self.port), ("port", self.stepping_port)

    @property
    def survives(self) -> bool:
        """Whether anything of float32 survives in the float64 runs of either side."""
        return bool(self.reference.surviving or self.port.surviving)

    # --- observe -----------------------------------------------------------------------------------------------

    def reference_seen(self, example: Example, bits: int, train: bool) -> Seen:
        """The reference's observation of an example's first batch."""
        return self.reference.observe(bits, example.weights, example.batches[0], train, example.seed)

    def four(self, example: Example, train: bool) -> tuple[Four, Seen]:
        """All four observations, and the reference's float64 run with the draws it was served."""
        ours = {bits: self.reference_seen(example, bits, train) for bits in (32, 64)}
        try:
            theirs = {
                bits: self.port.observe(bits, example.port_weights, example.batches[0], train, example.seed, ours[64])
                for bits in (32, 64)
            }
        except (NotImplementedError, TypeError, ValueError) as error:  # JAX refuses some programs a derivative
            raise InputError(f"the port fails when its gradients are taken: {str(error).splitlines()[0]}") from error
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
            after = {f"r{b}": buffers_of(seen.values) for b, seen in ours.items()}
            after |= {f"p{b}": self.port.advance(b, weights[f"p{b}"], batch, ours[64]) for b in (32, 64)}
            for key, buffers in after.items():
                weights[key].update(buffers)
            four = Four(*({f"buffers.{p}": v for p, v in after[key].items()} for key in ("r32", "r64", "p32", "p64")))
            where = ("state", example.index)
            for path, m in four.measures(example.elements).items():
                found.append(Finding("state", where, f"call{number + 1}.{path}", "plain", m, example.ordinary))
        return found

    # --- steps -------------------------------------------------------------------------------------------------

    def program(self, bits: int, gradients: bool = True) -> Any:
        """The port's compiled step at one precision, made once; without gradients it moves a quarter less memory."""
        key = bits, gradients
        if key not in self._programs:
            rates = self.optimizer.rates(self.steps)
            self._programs[key] = self.stepping_port.program(self.optimizer, rates, bits, gradients)
        return self._programs[key]

    def stepped(self, example: Example, wanted: Sequence[str]) -> Iterator[list[Finding]]:
        """The findings of `step` and `optimizer_state`, one step at a time; nothing of a step is kept."""
        from equivalence.runtimes.jax_steps import JaxStepper

        rates = self.optimizer.rates(self.steps)
        ours = {b: self.stepping_reference.stepper(b, example.weights, self.optimizer, rates) for b in (32, 64)}
        theirs = {b: JaxStepper(self.program(b), example.port_weights) for b in (32, 64)}
        where = ("steps", example.index)
        self.gradients[where] = []
        run = self.seen.get(("observe", example.index, True), Run())
        for number in range(self.steps):
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
            if not finite(ours[64].parameters()):
                return

    # --- the port alone ----------------------------------------------------------------------------------------

    def port_states(self, example: Example, weights: Observation, shaken: int | None = None) -> Observation:
        """The port's buffers after each training-mode call in float64, from other weights."""
        weights, found = dict(weights), {}
        for number in range(CALLS):
            batch, seed = example.batches[number % len(example.batches)], example.seed + number
            ours = self.reference.observe(64, example.weights, batch, True, seed, gradients=False)
            after = self.port.advance(64, weights, batch, ours, shaken)
            weights.update(after)
            found.update({f"call{number + 1}.buffers.{path}": value for path, value in after.items()})
        return found

    def port_steps(self, example: Example, weights: Observation) -> Iterator[Observation]:
        """Everything the port's float64 steps show from other weights, one step at a time."""
        from equivalence.runtimes.jax_steps import JaxStepper

        served = self.served(example)
        stepper = JaxStepper(self.program(64, gradients=False), weights)
        names = {field_: slot for slot, field_ in self._fields.items()}
        for number in range(self.steps):
            batch = example.batches[number % len(example.batches)]
            found = stepper.step(batch, served[number]).values
            found |= {f"parameters.{path}": value for path, value in stepper.parameters().items()}
            for slot, leaves in stepper.optimizer_state().items():
                found |= {f"optimizer.{names.get(slot, slot)}.{p}": v for p, v in leaves.items() if p}
            yield {f"step{number + 1}.{path}": value for path, value in found.items()}

    def first_move(self, example: Example, steps: int, ahead: int) -> int | None:
        """The first count at which the port's schedules make another step than at 0: within `steps` the very one, after
        them one at or behind it, up to `ahead`; None where they do not."""
        from equivalence.runtimes.jax_steps import JaxStepper

        counts = [*range(1, steps), *np.unique(np.geomspace(steps, ahead, 24).astype(int)).tolist()]
        moved = JaxStepper(self.program(64), example.port_weights).moved_at(counts)
        return next((count for count, move in zip(counts, moved, strict=True) if move), None)

    def served(self, example: Example) -> list[Seen]:
        """The draws of the reference's steps: kept from the last time they were asked for this example."""
        if example.index not in self._draws:
            rates = self.optimizer.rates(self.steps)
            stepper = self.stepping_reference.stepper(64, example.weights, self.optimizer, rates)
            self._fields = stepper.fields()
            seeds = [(example.batches[n % len(example.batches)], example.step_seed(n)) for n in range(self.steps)]
            self._draws = {example.index: [stepper.step(batch, seed) for batch, seed in seeds]}
        return self._draws[example.index]

    def noise(self, example: Example, where: Where, paths: Sequence[str], amplitude: float = 1.0) -> dict[str, float]:
        """How far the reference's own noise moves each path; see `equivalence.noise`."""
        return noise(self, example, where, paths, amplitude)

    def rounded(self, example: Example, where: Where) -> dict[str, float]:
        """How far what survives of float32 may move each path; see `equivalence.survivors`."""
        from equivalence.survivors import survived

        return survived(self, example, where)
