"""PyTorch's loop: a DataLoader, on one thread, which is fastest for small models."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, TensorDataset

from equivalence.frameworks.torch import mode
from equivalence.loops import Loop, Task, as_numpy


def loops(task: Task) -> Iterator[Loop]:
    """One loop, over the plan's batches through a DataLoader; it trains the task's own model."""
    model, plan = task.subject.model, task.data.plan
    optimizer = task.implementation.make_optimizer(task.learning_rate)(model.parameters())
    rows = TensorDataset(*map(torch.from_numpy, (*task.data.inputs, *task.data.targets)))
    settings = _Settings(task.seed)

    def epoch(number: int) -> np.ndarray:
        first = number * plan.batches
        sampler = [plan.batch(step).tolist() for step in range(first, first + plan.batches)]
        with settings.applied(), mode(model, True):
            # The loader's own generator keeps its worker seed from the global one.
            loader = DataLoader(rows, batch_sampler=sampler, generator=torch.Generator())
            losses = [task.implementation.train_step(model, optimizer, *batch) for batch in loader]
            return torch.stack(losses).numpy()

    def outputs() -> Any:
        with settings.applied(), mode(model, False), torch.no_grad():
            return as_numpy(model(*map(torch.from_numpy, task.data.held_out_inputs)))

    yield Loop("torch with DataLoader", epoch, outputs)


class _Settings:
    """One thread and a random state of its own, only while training: the process gets back what it had."""

    def __init__(self, seed: int) -> None:
        self.random = torch.Generator().manual_seed(seed).get_state()

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        threads, before = torch.get_num_threads(), torch.get_rng_state()
        torch.set_num_threads(1)
        torch.set_rng_state(self.random)
        try:
            yield
        finally:
            self.random = torch.get_rng_state()
            torch.set_rng_state(before)
            torch.set_num_threads(threads)
