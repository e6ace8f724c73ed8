"""Whole training: the reference's recorded runs, and the port's one program held against them at every step.

Six kinds of reference run: float64; float64 with every step's gradients jittered by their own rounding (what
rounding alone makes of the run); float32; and float32 from weights moved by one ulp (twins: how long float32 says
anything). The runs depend on the reference alone, so they are kept in a cache and shared by all ports.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from equivalence.numerics import (
    AGREES,
    DIFFERS,
    SHRINK,
    U32,
    U64,
    accumulation,
    distance,
    finite,
    measure,
    representable,
    rms,
    ulp_twin,
)
from equivalence.observation import Batch, Observation
from equivalence.spec import TrainingData

if TYPE_CHECKING:
    from equivalence.optimizers import OptimizerPair
    from equivalence.runtimes.torch import TorchRunner
    from equivalence.runtimes.torch_training import Trajectory

JITTERED = 4
"""Jittered float64 runs of the reference."""
TWINS = 3
"""Float32 runs of the reference from weights moved by one ulp."""
TOGETHER = 1e-3
"""Float32 is compared step by step while twins of the reference stay within this relative distance."""

PLANT = 1e-6
"""The relative change of a leaf that is planted to measure the resolution."""


@dataclass(frozen=True)
class Recorded:
    """What the reference's runs showed; distances are per step, `steps` long, by path (`loss` and every leaf)."""

    losses: np.ndarray
    parameters: Observation
    losses32: np.ndarray
    final32: Observation
    rounding: Observation
    jittered: Observation
    twins: Observation
    """Largest relative distance of a float32 twin from the float32 run."""
    twin_ends: tuple[tuple[float, Observation], ...]
    """Mean loss of the last epoch and the final parameters of each twin."""
    draws: dict[int, Any] = field(default_factory=dict)

    @property
    def together(self) -> int:
        """Steps for which float32 twins of the reference stay together."""
        apart = np.max(np.stack(list(self.twins.values())), axis=0) > TOGETHER
        return int(np.argmax(apart)) if apart.any() else len(self.losses)


@dataclass(frozen=True)
class TrainingFinding:
    """One path of the training check: its worst step, judged."""

    path: str
    step: int
    gap: float
    expected: float
    scale: float
    precision: float
    differs: bool
    nonfinite: bool = False

    @property
    def ratio(self) -> float:
        """Gap over expectation at the worst step."""
        return 0.0 if self.gap == 0 else self.gap / self.expected if self.expected > 0 else float("inf")


def distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """RMS distance at every step (the first axis); infinite where one side alone is not finite."""
    flat_a, flat_b = a.reshape(len(a), -1), b.reshape(len(b), -1)
    if flat_a.shape[1] == 0:
        return np.zeros(len(a))
    with np.errstate(all="ignore"):
        found: np.ndarray = np.sqrt(np.mean(np.square(flat_a.astype(np.float64) - flat_b), axis=1))
    for step in np.flatnonzero(~np.isfinite(found)):
        found[step] = distance(a[step], b[step])
    return found


def sizes(a: np.ndarray) -> np.ndarray:
    """RMS at every step (the first axis)."""
    return _finite(distances(a, np.zeros_like(a)))


def _first_rows(data: TrainingData) -> Batch:
    return Batch(*data.rows(data.plan.batch(0)))


def gradient_rounding(
    runner: TorchRunner, weights: Observation, data: TrainingData, seed: int
) -> Callable[[str, float], float]:
    """`noise(leaf, rms of its gradient)`: what rounding may do to that leaf's gradient in one step.

    Measured on the first batch as a multiple of the unit of rounding at the gradient's scale, which is at least
    what the loss's slope makes of the leaf under a random unit cotangent (a saturated loss has gradients of 0).
    """
    batch = _first_rows(data)
    runs = {bits: runner.observe(bits, weights, batch, True, seed).values for bits in (32, 64)}
    elements = max(value.size for value in [*weights.values(), *batch.arrays().values()])
    slope = max((rms(v) for p, v in runs[64].items() if p.startswith("output_gradients.")), default=0.0)
    factors, floors = {}, {}
    for path in weights:
        name = f"parameter_gradients.loss.{path}"
        if name not in runs[64]:
            continue
        m = measure(name, runs[32][name], runs[64][name], runs[32][name], runs[64][name], elements)
        unit = rms(runs[64][f"parameter_gradients.cotangent.{path}"])
        floors[path] = slope * unit
        scale = max(m.scale_reference, floors[path])
        factors[path] = max(accumulation(elements), SHRINK * finite(m.rounding) / (U64 * scale) if scale > 0 else 1.0)

    def noise(path: str, size: float) -> float:
        return U64 * factors[path] * max(size, floors[path])

    return noise


def record(
    runner: TorchRunner, weights: Observation, optimizer: OptimizerPair, data: TrainingData, seed: int
) -> Iterator[tuple[int, int] | Recorded]:
    """Run the reference in every way; yields (steps done, steps in all) as it goes and the record at the end."""
    from equivalence.runtimes.torch_training import Trajectory, train

    total, done = (2 + JITTERED + TWINS) * data.plan.steps, 0

    def run(*arguments: Any, **options: Any) -> Iterator[tuple[int, int] | Trajectory]:
        nonlocal done
        for news in train(*arguments, **options):
            if isinstance(news, Trajectory):
                done += data.plan.steps
                yield news
            else:
                yield done + news, total

    found: dict[str, Trajectory] = {}
    for name, bits in (("64", 64), ("32", 32)):
        for item in run(runner, bits, weights, optimizer, data, seed):
            if isinstance(item, tuple):
                yield item
            else:
                found[name] = item
    base, single = found["64"], found["32"]
    rounding = _apart(single, base)
    jittered: Observation = {path: np.zeros(len(base.losses)) for path in rounding}
    noise = gradient_rounding(runner, weights, data, seed)
    for number in range(JITTERED):
        for item in run(runner, 64, weights, optimizer, data, seed, noise=noise, noise_seed=number):
            if isinstance(item, tuple):
                yield item
            else:
                jittered = {path: np.fmax(jittered[path], value) for path, value in _apart(item, base).items()}
    twins: Observation = {path: np.zeros(len(base.losses)) for path in rounding}
    ends = []
    for number in range(TWINS):
        rng = np.random.default_rng((seed, 32, number))
        near = {path: representable(ulp_twin(value, rng, 2.0**-23)) for path, value in weights.items()}
        for item in run(runner, 32, near, optimizer, data, seed):
            if isinstance(item, tuple):
                yield item
            else:
                relative = {p: d / np.fmax(_scale(single, p), 1e-30) for p, d in _apart(item, single).items()}
                twins = {path: np.fmax(twins[path], value) for path, value in relative.items()}
                ends.append((_end_loss(item.losses, data), item.final()))
    yield Recorded(
        base.losses, base.parameters, single.losses, single.final(), rounding, jittered, twins, tuple(ends), base.draws
    )


def _apart(a: Trajectory, b: Trajectory) -> Observation:
    found = {path: distances(a.parameters[path], b.parameters[path]) for path in b.parameters}
    found["loss"] = distances(a.losses, b.losses)
    return found


def _scale(run: Trajectory, path: str) -> np.ndarray:
    return np.full(len(run.losses), rms(run.losses)) if path == "loss" else sizes(run.parameters[path])


def _end_loss(losses: np.ndarray, data: TrainingData) -> float:
    return float(np.mean(losses[-data.plan.batches :]))


def judge(
    recorded: Recorded,
    port32: tuple[np.ndarray, Observation],
    port64: tuple[np.ndarray, Observation],
    elements: int,
    batches: int,
) -> list[TrainingFinding]:
    """Hold the port's two runs against the record, every path at every step.

    Stage one at each step is 2^-29 of either side's float32 error and the rounding of one sum; stage two is the
    largest distance of the jittered reference. Precision is the median over the steps for which float32 means
    anything on both sides: twins of the reference are together and the port is as near to float64 (`compared32`).
    """
    together = compared32(recorded, port32, batches)
    found = []
    for path in ["loss", *recorded.parameters]:
        ours = recorded.losses if path == "loss" else recorded.parameters[path]
        theirs64 = port64[0] if path == "loss" else port64[1][path]
        theirs32 = port32[0] if path == "loss" else port32[1][path]
        gap = distances(theirs64, ours)
        scale = np.full(len(ours), rms(ours)) if path == "loss" else sizes(ours)
        first = np.max(
            [
                SHRINK * _finite(recorded.rounding[path]),
                SHRINK * _finite(distances(theirs32, theirs64)),
                U64 * scale * accumulation(elements),
            ],
            axis=0,
        )
        second = np.where(gap > AGREES * first, np.fmax(first, _finite(recorded.jittered[path])), first)
        with np.errstate(all="ignore"):
            ratios = np.where(gap == 0, 0.0, gap / np.where(second > 0, second, np.nan))
        ratios = np.where(np.isnan(ratios), np.inf, ratios)
        worst = int(np.argmax(ratios))
        error = distances(theirs32[:together], ours[:together])
        floor = np.fmax(_finite(recorded.rounding[path][:together]), U32 * scale[:together])
        found.append(
            TrainingFinding(
                path,
                worst,
                float(gap[worst]),
                float(second[worst]),
                float(scale[worst]),
                float(np.median(error / np.fmax(floor, 2.0**-126))),
                bool(np.any(gap > DIFFERS * second)),
                not bool(np.isfinite(ours).all()),
            )
        )
    return found


def compared32(recorded: Recorded, port32: tuple[np.ndarray, Observation], batches: int) -> int:
    """Steps over which float32 is compared: until twins of the reference part, or the port leaves float64 by as much
    (a run whose rounding is a few times larger meets the first kink earlier), and never less than one epoch."""
    apart = np.zeros(len(recorded.losses), bool)
    for path, ours in recorded.parameters.items():
        apart |= ~(distances(port32[1][path], ours) <= TOGETHER * sizes(ours))
    parted = int(np.argmax(apart)) if apart.any() else len(apart)
    return min(max(min(parted, recorded.together), batches), len(apart))


def _finite(values: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(values), values, 0.0)


def moved(recorded: Recorded, weights: Observation, data: TrainingData, frozen: frozenset[str]) -> str | None:
    """Why the reference's run proves nothing, or None: a leaf that did not move, a loss that did not fall."""
    still = [
        path
        for path, value in recorded.parameters.items()
        if path not in frozen and value[-1].size and distance(value[-1], np.asarray(weights[path], np.float64)) == 0.0
    ]
    if len(still) == len([path for path in recorded.parameters if path not in frozen]):
        return "training moved no parameter of the reference"
    if not data.must_learn:
        return None
    part = min(data.plan.batches, max(1, len(recorded.losses) // 2))
    start, end = float(np.mean(recorded.losses[:part])), float(np.mean(recorded.losses[-part:]))
    if not end < start:
        return f"the reference learned nothing: its loss went from {start:.4g} to {end:.4g}"
    return None


def noticed(
    recorded: Recorded,
    planted: Mapping[str, Observation],
    losses: Mapping[str, np.ndarray],
    base: Observation,
    base_losses: np.ndarray,
    elements: int,
    batches: int,
) -> dict[str, float]:
    """The smallest relative change of each planted leaf that the check would have noticed.

    Scaled linearly from the plant at the step of the first epoch where it shows best: later on a plant meets kinks
    that a smaller one would not have met. Never below the unit of rounding.
    """
    smallest = {}
    for leaf, run in planted.items():
        best = 0.0
        for path in ["loss", *recorded.parameters]:
            if path == "loss":
                response = distances(losses[leaf][:batches], base_losses[:batches])
            else:
                response = distances(run[path][:batches], base[path][:batches])
            ours = recorded.losses if path == "loss" else recorded.parameters[path]
            scale = np.full(len(ours), rms(ours)) if path == "loss" else sizes(ours)
            limit = np.max(
                [
                    SHRINK * _finite(recorded.rounding[path]),
                    recorded.jittered[path],
                    U64 * scale * accumulation(elements),
                ],
                axis=0,
            )
            best = max(best, float(np.max(response / (DIFFERS * np.fmax(limit[:batches], 1e-300)))))
        if best > 0:
            smallest[leaf] = max(PLANT / best, U64)
    return smallest


def summary(
    recorded: Recorded,
    runner: TorchRunner,
    port32: tuple[np.ndarray, Observation],
    port64: tuple[np.ndarray, Observation],
    data: TrainingData,
) -> dict[str, Any]:
    """Ends of all runs: mean loss of the last epoch, accuracy on held-out rows, and the scatter of the twins.

    Read beside the verdict, never for it: runs that differ in a doubled learning rate end as close as twins do.
    """

    def accuracy(weights: Observation, bits: int) -> float | None:
        if data.accuracy is None:
            return None
        held = Batch(data.held_out_inputs, data.held_out_targets)
        seen = runner.observe(bits, {**base, **weights}, held, False, 0, gradients=False)
        outputs = [value for path, value in seen.values.items() if path.startswith("outputs.")]
        return data.accuracy(outputs[0], *data.held_out_targets)

    base = {**runner.subject.params, **runner.subject.buffers}

    def end(losses: np.ndarray, final: Observation, bits: int) -> dict[str, float | None]:
        return {"loss": _end_loss(losses, data), "accuracy": accuracy(final, bits)}

    ends = {
        "reference, float64": end(recorded.losses, _last(recorded.parameters), 64),
        "port, float64": end(port64[0], _last(port64[1]), 64),
        "reference, float32": end(recorded.losses32, recorded.final32, 32),
        "port, float32": end(port32[0], _last(port32[1]), 32),
    }
    for number, (loss, final) in enumerate(recorded.twin_ends, 1):
        ends[f"one-ulp twin {number}, float32"] = {"loss": loss, "accuracy": accuracy(final, 32)}
    return {
        "steps": len(recorded.losses),
        "float32_steps_compared": compared32(recorded, port32, data.plan.batches),
        "ends": ends,
    }


def _last(parameters: Observation) -> Observation:
    return {path: value[-1] for path, value in parameters.items()}
