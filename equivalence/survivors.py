"""What of float32 survives in float64 runs, and how far that may move them: a constant that was rounded before any run.

Either side is run again with what survives on it shaken by its own rounding. That widens what is expected of a gap,
and the resolution that is stated with it; where nothing survives, nothing here runs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import numpy as np

from equivalence.judgement import Where
from equivalence.noise import NOISE_RUNS, apart, in_mode, states64, steps64
from equivalence.numerics import AGREES, DIFFERS, finite, rms
from equivalence.observation import Observation
from equivalence.runs import Example

if TYPE_CHECKING:
    from equivalence.comparison import Comparison
    from equivalence.spec import TrainingData
    from equivalence.training import Recorded

ROUNDED_ONCE = AGREES / DIFFERS
"""What a shaken run counts for: a constant that survives has been rounded once, and the shaking shows all of that.
Ten times as much is a difference."""
LOSS = ""
"""The loss, among leaves."""


def survived(comparison: Comparison, example: Example, where: Where) -> dict[str, float]:
    """How far what survives of float32 in float64 runs may move each path, as noise; nothing where nothing survived.

    Float64 runs of either side with what survives on it shaken, against the same run without. For steps the reference
    is shaken, and each step's gradients are jittered by what shaking either side does to them.
    """
    if not comparison.survives:
        return {}
    return {path: ROUNDED_ONCE * value for path, value in _shaken(comparison, example, where).items()}


def _shaken(comparison: Comparison, example: Example, where: Where) -> dict[str, float]:
    known, found = comparison.shaken.get(where, (None, {}))
    if known is not example:
        run = {"steps": _shaken_steps, "handover": _shaken_handover}.get(where[0], _shaken_runs)
        comparison.shaken[where] = example, (found := run(comparison, example, where))
    return found


def _shaken_runs(comparison: Comparison, example: Example, where: Where) -> dict[str, float]:
    largest: dict[str, float] = {}
    for run in _shaken_sides(comparison, example, where):
        base = run(None)
        _widen(largest, base, (run(number) for number in range(NOISE_RUNS)))
    return largest


def _widen(largest: dict[str, float], base: Observation, runs: Iterable[Observation]) -> None:
    """Take in how far each path of these runs is from that of the base."""
    for run in runs:
        for path in base.keys() & run.keys():
            largest[path] = max(largest.get(path, 0.0), finite(apart(run[path], base[path])))


def _shaken_sides(comparison: Comparison, example: Example, where: Where) -> list[Callable[[int | None], Observation]]:
    """The float64 run of each side on which something survives, by the seed that it is shaken with."""
    reference, port, batch = comparison.reference, comparison.port, example.batches[0]

    def ours(shaken: int | None) -> Observation:
        if where[0] == "state":
            return states64(comparison, example, example.weights, shaken)
        seen = reference.observe(64, example.weights, batch, where[2], example.seed, shaken=shaken)
        return in_mode(seen.values, where[2])

    def theirs(shaken: int | None) -> Observation:
        if where[0] == "state":
            return comparison.port_states(example, example.port_weights, shaken)
        served = comparison.reference_seen(example, 64, where[2])
        seen = port.observe(64, example.port_weights, batch, where[2], example.seed, served, shaken=shaken)
        return in_mode(seen.values, where[2])

    return [run for run, runner in ((ours, reference), (theirs, port)) if runner.surviving]


def _shaken_steps(comparison: Comparison, example: Example, where: Where) -> dict[str, float]:
    moves, steps = relative(comparison, example), comparison.gradients[where]
    jitter = [
        {leaf: moves.get(leaf, 0.0) * gradient.measure.scale_reference * gradient.moves for leaf, gradient in s.items()}
        for s in steps
    ]
    largest: dict[str, float] = {}
    base = steps64(comparison, example, None, 0, 1.0)
    _widen(largest, base, (steps64(comparison, example, jitter, n, 1.0, n) for n in range(NOISE_RUNS)))
    for path in largest:
        if path.endswith(".loss"):
            largest[path] = max(largest[path], moves[LOSS] * rms(base[path]))
    return largest


def relative(comparison: Comparison, example: Example) -> dict[str, float]:
    """How far shaking either side moves each leaf's gradient, over the gradient; and the loss, under `LOSS`."""
    observed = ("observe", example.index, True)
    raw, base = _shaken(comparison, example, observed), comparison.reference_seen(example, 64, True).values

    def largest(*paths: str) -> float:
        sizes = [(raw.get(f"train.{path}", 0.0), rms(base[path])) for path in paths if path in base]
        return max((moved / size for moved, size in sizes if size > 0), default=0.0)

    families = ("parameter_gradients.cotangent", "parameter_gradients.loss")
    found = {
        leaf: largest(*(f"{family}.{leaf}" for family in families)) for leaf in comparison.reference.subject.params
    }
    outputs = [path for path in base if path.startswith("outputs.") and base[path].dtype.kind == "f"]
    return {**found, LOSS: largest(*(["loss"] if "loss" in base else outputs))}


def in_training(
    comparison: Comparison, example: Example, recorded: Recorded, data: TrainingData, seed: int
) -> Recorded:
    """A record whose noise takes in what survives on either side: further runs of the reference with its constants
    shaken, every step's gradients jittered by what shaking either side does to them."""
    from equivalence.runtimes.torch_training import Trajectory, train
    from equivalence.training import distances

    if not comparison.survives:
        return recorded
    moves, runner = relative(comparison, example), comparison.stepping_reference
    largest = {
        **recorded.jittered,
        "loss": np.fmax(recorded.jittered["loss"], ROUNDED_ONCE * moves[LOSS] * np.abs(recorded.losses)),
    }
    for number in range(NOISE_RUNS):
        for run in train(
            runner,
            64,
            example.weights,
            comparison.optimizer,
            data,
            seed,
            noise=lambda leaf, size: moves[leaf] * size,
            noise_seed=number,
            shaken=number,
        ):
            if isinstance(run, Trajectory):
                moved = {path: distances(run.parameters[path], ours) for path, ours in recorded.parameters.items()}
                moved["loss"] = distances(run.losses, recorded.losses)
                largest = {path: np.fmax(value, ROUNDED_ONCE * moved[path]) for path, value in largest.items()}
    return dataclasses.replace(recorded, jittered=largest)


def _shaken_handover(comparison: Comparison, example: Example, where: Where) -> dict[str, float]:
    steps, state = ("steps", where[1]), ("state", where[1])
    moved = _shaken(comparison, example, steps)
    largest = {f"{way}.{path}": value for way in ("to_port", "to_reference") for path, value in moved.items()}
    if comparison.reference.subject.buffers:
        for path, value in _shaken(comparison, example, state).items():
            buffer = path.partition(".")[2]
            for known in [known for known in largest if known.endswith(f".{buffer}")]:
                largest[known] = max(largest[known], value)
    return largest
