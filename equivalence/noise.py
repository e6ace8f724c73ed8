"""The reference's own noise: what rounding alone makes of a run, measured by further float64 runs of it."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from equivalence.judgement import Largest, Where
from equivalence.numerics import DIFFERS, U64, Measure, accumulation, distance, expected, finite, rms, ulp_twin
from equivalence.observation import Observation
from equivalence.runs import CALLS, Example, Run, buffers_of, stepped

if TYPE_CHECKING:
    from equivalence.comparison import Comparison

NOISE_RUNS = 4
"""Further runs of the reference that measure its noise."""
DECIDED = 1e-3
"""The part of an update beyond which it is rounding's: the step is the last of its example that is judged."""
ULP = 2.0**-52
"""How far a noise run moves each weight, relative: one ulp of float64."""


def noise(
    comparison: Comparison, example: Example, where: Where, paths: Sequence[str], amplitude: float = 1.0
) -> dict[str, float]:
    """How far the reference's own noise moves each path, over the noise's amplitude.

    Four float64 runs of it: weights moved by one ulp, or for steps the gradients jittered by what they may differ;
    and the result of every operation moved by one ulp (all of them times `amplitude`).
    """
    if where[0] == "handover":
        plain = {path: path.partition(".")[2] for path in paths}
        found = noise(comparison, example, ("steps", where[1]), sorted(set(plain.values())), amplitude)
        return {path: found[plain[path]] for path in paths}
    largest = dict.fromkeys(paths, 0.0)
    base = _noise_run(comparison, example, where, None, amplitude)
    for number in range(NOISE_RUNS):
        run = _noise_run(comparison, example, where, number, amplitude)
        for path in paths:
            if path in base:
                largest[path] = max(largest[path], finite(apart(run[path], base[path])) / amplitude)
        if where[0] == "steps" and amplitude == 1.0:
            lost = _lost(comparison, example, base, run)
            largest |= {path: np.inf for path in paths if _step_of(path) > lost}
    return largest


def _lost(comparison: Comparison, example: Example, base: Observation, run: Observation) -> int:
    """The first step in which rounding decides an update, of a leaf that the outputs depend on: the steps after it
    are rounding's, not the model's. (Adam makes a step of the learning rate out of a gradient that is noise.)"""
    before = example.weights
    for number in range(1, comparison.steps + 1):
        after = {leaf: base[f"step{number}.parameters.{leaf}"] for leaf in comparison.reference.subject.params}
        for leaf, value in after.items():
            moved, size = distance(run[f"step{number}.parameters.{leaf}"], value), distance(value, before[leaf])
            if (
                moved > DECIDED * size
                and leaf not in comparison.reference.subject.frozen
                and not inert(comparison, leaf)
            ):
                return number
        before = after
    return comparison.steps


def inert(comparison: Comparison, leaf: str) -> bool:
    """Whether moving a leaf by O(1) leaves the reference's training-mode outputs where they are (a key bias under
    softmax, a bias before a normalisation), on examples from the smallest to the largest outputs observed."""
    if leaf not in comparison.inert:
        ranked = sorted(comparison.observed_examples.values(), key=lambda pair: pair[0])
        spread = {round(part * (len(ranked) - 1) / 4) for part in range(5)}
        comparison.inert[leaf] = not any(_matters(comparison, leaf, ranked[place][1]) for place in sorted(spread))
    return comparison.inert[leaf]


def _matters(comparison: Comparison, leaf: str, example: Example) -> bool:
    rng, value = np.random.default_rng(example.seed), example.weights[leaf]
    weights = {**example.weights, leaf: value + rng.standard_normal(value.shape).astype(value.dtype)}
    before, after = (
        comparison.reference.observe(64, held, example.batches[0], True, example.seed, gradients=False).values
        for held in (example.weights, weights)
    )
    return any(
        distance(after[path], value) > DIFFERS * U64 * rms(value) * accumulation(example.elements)
        for path, value in before.items()
        if path.startswith("outputs.") and value.dtype.kind == "f"
    )


def _jitter(comparison: Comparison, where: Where) -> list[dict[str, np.ndarray]]:
    """The standard deviation of the jitter of every gradient element, by step and leaf."""
    run = comparison.seen.get(("observe", where[1], True), Run())
    slope = Largest((seen.size, seen.slope) for seen in comparison.seen.values()).up_to(run.size)
    return [
        {leaf: gradient_noise(g.measure, slope * g.unit) * g.moves for leaf, g in gradients.items()}
        for gradients in comparison.gradients[where]
    ]


def _noise_run(
    comparison: Comparison, example: Example, where: Where, number: int | None, amplitude: float
) -> Observation:
    kind = where[0]
    if kind == "steps":
        noise = None if number is None else _jitter(comparison, where)
        return steps64(comparison, example, noise, number or 0, amplitude)
    weights = example.weights
    if number is not None:
        rng = np.random.default_rng((example.seed, number))
        weights = {
            path: ulp_twin(value.astype(np.float64) if value.dtype.kind == "f" else value, rng, ULP * amplitude)
            for path, value in example.weights.items()
        }
    if kind == "state":
        with _rounding(number, amplitude):
            return states64(comparison, example, weights)
    train = bool(where[2])
    with _rounding(number, amplitude):
        seen = comparison.reference.observe(64, weights, example.batches[0], train, example.seed)
    return in_mode(seen.values, train)


def in_mode(values: Observation, train: bool) -> Observation:
    """The paths of an observation as findings name them."""
    return {f"{'train' if train else 'eval'}.{path}": value for path, value in values.items()}


def steps64(
    comparison: Comparison,
    example: Example,
    noise: list[dict[str, np.ndarray]] | None,
    seed: int,
    amplitude: float,
    shaken: int | None = None,
) -> Observation:
    """Everything a float64 run of the reference's steps shows, its gradients jittered by `amplitude` x `noise`."""
    rng = np.random.default_rng((example.seed, seed))
    stepper = comparison.stepping_reference.stepper(
        64, example.weights, comparison.optimizer, comparison.optimizer.rates(comparison.steps), shaken
    )
    found: Observation = {}
    for number in range(comparison.steps if noise is None else min(len(noise), comparison.steps)):
        if noise is not None:
            scales = noise[number]
            stepper.jitter = lambda gradients, scales=scales: {
                path: rng.standard_normal(tuple(gradients[path].shape)) * sigma * amplitude
                for path, sigma in scales.items()
                if path in gradients
            }
        batch = example.batches[number % len(example.batches)]
        with _rounding(None if noise is None else seed + comparison.steps * number, amplitude):
            seen = stepper.step(batch, example.step_seed(number)).values | stepped(stepper)
        found |= {f"step{number + 1}.{path}": np.array(value) for path, value in seen.items()}
    return found


def states64(comparison: Comparison, example: Example, weights: Observation, shaken: int | None = None) -> Observation:
    """The reference's buffers after each of several training-mode calls in float64."""
    weights, found = dict(weights), {}
    for number in range(CALLS):
        batch, seed = example.batches[number % len(example.batches)], example.seed + number
        seen = comparison.reference.observe(64, weights, batch, True, seed, gradients=False, shaken=shaken)
        weights.update(buffers_of(seen.values))
        found.update({f"call{number + 1}.buffers.{p}": v for p, v in buffers_of(seen.values).items()})
    return found


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


def apart(a: np.ndarray, b: np.ndarray) -> float:
    """The distance of two leaves; of exact ones the part of the elements that differ."""
    return distance(a, b) if b.dtype.kind == "f" else float(np.mean(a != b))
