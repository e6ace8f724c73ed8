"""Training loops as a user of each framework writes them, one batch at a time from Python: a small file a framework."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from equivalence.frameworks.subject import Flat, Subject
from equivalence.paths import rebuild
from equivalence.spec import Arrays, TrainingData

LOOPS: dict[str, str] = {
    "torch": "equivalence.loops.torch",
    "nnx": "equivalence.loops.nnx",
    "linen": "equivalence.loops.linen",
}
"""framework -> module with `loops(task)`, an iterator of the framework's loops."""


@dataclass(frozen=True, eq=False)
class Task:
    """One implementation, the weights it starts from (in its own paths and axes), and what it trains on."""

    implementation: ModuleType
    subject: Subject
    params: Flat
    buffers: Flat
    data: TrainingData
    learning_rate: float
    seed: int

    def batches(self, epoch: int) -> Iterator[Arrays]:
        """The batches of one epoch of the plan: inputs, then targets, as NumPy arrays."""
        plan = self.data.plan
        for step in range(epoch * plan.batches, (epoch + 1) * plan.batches):
            rows = plan.batch(step)
            yield tuple(array[rows] for array in (*self.data.inputs, *self.data.targets))

    def shapes(self) -> list[Arrays]:
        """One batch of every size that the plan has, so that all compiling can be done before training."""
        return list({len(batch[0]): batch for batch in self.batches(0)}.values())


@dataclass(frozen=True)
class Loop:
    """A model in training, and how to go on with it.

    `epoch(number)` trains on one epoch of the plan and returns the loss of every step, shape (batches,);
    `outputs()` are those of the held-out rows in eval mode, a tree of NumPy arrays; `compile()` compiles what the
    epochs run and leaves the model as it was. A loop too slow to train to the end says for how many epochs (`few`)
    it is worth running.
    """

    name: str
    epoch: Callable[[int], np.ndarray]
    outputs: Callable[[], Any]
    compile: Callable[[], None] | None = None
    few: int | None = None


def loops(framework: str, task: Task) -> Iterator[Loop]:
    """The loops of one framework; none for a framework that has no file here."""
    if framework in LOOPS:
        yield from importlib.import_module(LOOPS[framework]).loops(task)


def as_numpy(tree: Any) -> Any:
    """A tree of outputs with its arrays as NumPy."""
    return rebuild(tree, lambda path, leaf: np.asarray(leaf))
