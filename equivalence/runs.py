"""What the two sides are run on and what their runs show: examples, the four runs, and every step's observation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from equivalence.numerics import Measure, measure
from equivalence.observation import Batch, Observation

CALLS = 3
"""Training-mode calls that `state` compares."""


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


def buffers_of(values: Observation) -> Observation:
    """The buffers of an observation, by leaf."""
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
        if stepper.other(reference.optimizer, fields.get(slot, "")):
            leaves = {}
        if not leaves:
            unmatched.add(slot)
        shared = dict.fromkeys(held, leaves[""]) if "" in leaves else {}
        for path, value in {**shared, **leaves}.items():
            if path:
                found[f"optimizer.{slot}.{path}"] = _counter(value) if slot == "step" else value
    return found


def finite(leaves: Observation) -> bool:
    """Whether every leaf is: what follows a NaN in the parameters is NaN too, at other places on either side."""
    return all(bool(np.isfinite(value).all()) for value in leaves.values())
