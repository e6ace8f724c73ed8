"""A whole training run of the reference over a batch plan, recorded at every step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from equivalence.observation import Observation
from equivalence.optimizers import OptimizerPair
from equivalence.randomness import Draw
from equivalence.runtimes.torch import TorchRunner, tensor
from equivalence.runtimes.torch_environment import environment
from equivalence.spec import TrainingData


@dataclass
class Trajectory:
    """A recorded run: losses (steps,), parameters by leaf (steps, *shape), and the draws of a step by batch length."""

    losses: np.ndarray
    parameters: dict[str, np.ndarray]
    draws: dict[int, tuple[Draw, ...]]

    def final(self) -> Observation:
        """The parameters after the last step."""
        return {path: value[-1] for path, value in self.parameters.items()}


def train(
    runner: TorchRunner,
    bits: int,
    weights: Observation,
    optimizer: OptimizerPair,
    data: TrainingData,
    seed: int,
    noise: Callable[[str, float], float] | None = None,
    noise_seed: int = 0,
    shaken: int | None = None,
) -> Iterator[Trajectory | int]:
    """Train over the whole plan; yields the number of steps done now and then, and the trajectory at the end.

    `noise(leaf, rms of its gradient)` is the standard deviation of the jitter added to that leaf's gradient.
    With `shaken`, a seed, what survives of float32 is moved by its rounding.
    The draws of step t come from the tape of `seed + t`. Raises DrawsDiffer where two steps of one batch length ask
    for different draws, since one compiled program could not serve both.
    """
    stepper = runner.stepper(bits, weights, optimizer, [optimizer.learning_rate], shaken)
    stepper.recording = False
    plan = data.plan
    inputs = tuple(tensor(array, bits) for array in data.inputs)
    targets = tuple(tensor(array, bits) for array in data.targets)
    losses = np.zeros(plan.steps)
    recorded = {
        p: np.zeros((plan.steps, *v.shape), np.float32 if bits == 32 else np.float64) for p, v in stepper.params.items()
    }
    live = {path: value.detach() for path, value in stepper.params.items()}
    draws: dict[int, tuple[Draw, ...]] = {}
    if noise is not None:
        rng = np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, noise_seed))))

        def jitter(gradients: dict[str, object]) -> dict[str, np.ndarray]:
            found = {}
            for path, gradient in gradients.items():
                value = gradient.numpy()  # type: ignore[attr-defined]
                size = float(np.sqrt(np.mean(np.square(value)))) if value.size else 0.0
                found[path] = rng.standard_normal(value.shape) * noise(path, size)
            return found

        stepper.jitter = jitter  # type: ignore[assignment]
    with environment(bits, runner.threads):
        for step in range(plan.steps):
            rows = plan.batch(step)
            pick = rows[0] if data.rows_are_batches else rows
            taped = None if draws.get(len(rows)) == () else seed + step
            seen = stepper.step_tensors(
                data.named(tuple(a[pick] for a in inputs)), tuple(a[pick] for a in targets), taped
            )
            draws.setdefault(len(rows), seen.draws)
            if seen.draws != draws[len(rows)]:
                from equivalence.randomness import assert_same_draws

                assert_same_draws(draws[len(rows)], seen.draws, f"training step {step}")
            losses[step] = seen.values["loss"]
            for path, value in live.items():
                recorded[path][step] = value.numpy()
            if step % 100 == 99:
                yield step + 1
    yield Trajectory(losses, recorded, draws)
