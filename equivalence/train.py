"""The work behind `equivalence train`: all implementations trained from the same weights and batches, and timed."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from equivalence.errors import InputError
from equivalence.frameworks import adapt
from equivalence.frameworks.subject import Flat, Subject
from equivalence.loops import Loop, Task, loops
from equivalence.sources import SpecSource
from equivalence.spec import REFERENCE, Spec, TrainingData
from equivalence.weights import Mapping


@dataclass(frozen=True)
class TrainProgress:
    """`done` of `total` epochs of one variant are finished; `loss` is the last one's, None before the first."""

    name: str
    done: int
    total: int
    loss: float | None = None


@dataclass(frozen=True, eq=False)
class Trained:
    """One variant's run.

    `losses` is float64, shape (epochs,): the mean of each epoch's batch losses, in train mode. `seconds` is the
    time of `planned` epochs, compiling apart; where only `epochs` < `planned` were run it is extrapolated from them,
    and `extrapolated` says so. `accuracy` is that on held-out rows after the last epoch run, None where the spec has
    no measure; `compile_seconds` is None where nothing is compiled.
    """

    name: str
    framework: str
    epochs: int
    planned: int
    losses: np.ndarray
    accuracy: float | None
    seconds: float
    compile_seconds: float | None
    extrapolated: bool

    @property
    def loss(self) -> float:
        """The training loss of the last epoch run."""
        return float(self.losses[-1])

    @property
    def seconds_per_epoch(self) -> float:
        """Seconds an epoch, compiling apart."""
        return self.seconds / self.planned


def train(spec: Spec, *, epochs: int | None = None, seed: int = 0) -> Iterator[Trained | TrainProgress]:
    """Train every implementation of `spec` in every way there is a loop for, the reference first.

    All start from the weights of the reference built from `seed`, and take the batches of one plan. Loops draw their
    own dropout as they go; the whole-training program of a JAX framework, which the check `training` judges, is handed
    the tape's. `epochs` defaults to the plan's. Yields progress (after every epoch of a loop, at both ends of a
    program), then the run it belongs to.
    Raises InputError for a spec without training data and for `epochs` that the plan cannot serve.
    """
    data = _data(spec, epochs, seed)
    reference = adapt(spec.implementation(REFERENCE).build(spec.config, seed))
    for framework in spec.implementations:
        for loop in loops(framework, _task(spec, framework, reference, data, seed)):
            yield from _run(loop, framework, data)
        if framework != REFERENCE:
            yield from _whole(spec, framework, data, seed)


def _data(spec: Spec, epochs: int | None, seed: int) -> TrainingData:
    if spec.training is None:
        raise InputError(f"{spec.name} has no training data: its spec declares no `training`")
    config = spec.config
    if epochs is not None:
        if epochs < 1:
            raise InputError(f"epochs must be at least 1, not {epochs}")
        if any(field.name == "epochs" for field in dataclasses.fields(config)):
            config = dataclasses.replace(config, epochs=epochs)
    data = spec.training(config, seed)
    if epochs is not None and epochs > data.plan.epochs:
        raise InputError(f"{spec.name} plans {data.plan.epochs} epochs, not {epochs}")
    return data if epochs is None else dataclasses.replace(data, plan=data.plan.first(epochs))


def _task(spec: Spec, framework: str, reference: Subject, data: TrainingData, seed: int) -> Task:
    implementation = spec.implementation(framework)
    subject, leaves = reference, {**reference.params, **reference.buffers}
    if framework != REFERENCE:
        subject = adapt(implementation.build(spec.config, seed))
        leaves = Mapping(spec.rules[framework]).bind(reference.leaves, subject.leaves).forward(leaves)
    return Task(
        implementation,
        subject,
        _only(leaves, subject.params),
        {**subject.buffers, **_only(leaves, subject.buffers)},
        data,
        spec.config.learning_rate,
        seed,
    )


def _only(leaves: Flat, names: Any) -> Flat:
    return {path: leaves[path] for path in names if path in leaves}


def _run(loop: Loop, framework: str, data: TrainingData) -> Iterator[Trained | TrainProgress]:
    planned = data.plan.epochs
    epochs = planned if loop.few is None else min(loop.few, planned)
    yield TrainProgress(loop.name, 0, epochs)
    compile_seconds = None
    if loop.compile is not None:
        before = time.perf_counter()
        loop.compile()
        compile_seconds = time.perf_counter() - before
    losses, seconds = np.empty(epochs), 0.0
    for number in range(epochs):
        before = time.perf_counter()
        steps = loop.epoch(number)
        seconds += time.perf_counter() - before
        losses[number] = steps.mean(dtype=np.float64)
        yield TrainProgress(loop.name, number + 1, epochs, float(losses[number]))
    accuracy = None
    if data.accuracy is not None:
        accuracy = data.accuracy(loop.outputs(), *data.held_out_targets)
    yield Trained(
        name=loop.name,
        framework=framework,
        epochs=epochs,
        planned=planned,
        losses=losses,
        accuracy=accuracy,
        seconds=seconds * planned / epochs,
        compile_seconds=compile_seconds,
        extrapolated=epochs < planned,
    )


def _whole(spec: Spec, framework: str, data: TrainingData, seed: int) -> Iterator[Trained | TrainProgress]:
    """All steps in one program, timed at its second run: what the first takes longer is compiling."""
    from equivalence.runtimes.jax_training import WholeTraining

    name, epochs = f"{framework}, whole training", data.plan.epochs
    yield TrainProgress(name, 0, epochs)
    structure = next(SpecSource(spec, (framework,), examples=1, seed=seed).structures(framework))
    comparison, weights = structure.comparison, structure.examples[0].weights
    program = WholeTraining(comparison.stepping_port, comparison.optimizer, 32, data)
    run = program.prepare(weights, program.draws(weights), seed)
    seconds = []
    for _ in range(2):
        before = time.perf_counter()
        steps, _, carry = run()
        seconds.append(time.perf_counter() - before)
    losses = steps.reshape(epochs, -1).mean(axis=1, dtype=np.float64)
    accuracy = None
    if data.accuracy is not None:
        accuracy = data.accuracy(program.outputs(carry, data.held_out_inputs), *data.held_out_targets)
    yield TrainProgress(name, epochs, epochs, float(losses[-1]))
    yield Trained(
        name=name,
        framework=framework,
        epochs=epochs,
        planned=epochs,
        losses=losses,
        accuracy=accuracy,
        seconds=seconds[1],
        compile_seconds=max(0.0, seconds[0] - seconds[1]),
        extrapolated=False,
    )
