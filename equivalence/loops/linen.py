"""Flax Linen's loop: a train state through the step under jax.jit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from equivalence.loops import Loop, Task, as_numpy


def loops(task: Task) -> Iterator[Loop]:
    """The compiled step."""
    own = task.subject.own_step
    assert own is not None
    step = jax.jit(task.implementation.train_step)
    params, buffers = jax.tree.map(jnp.asarray, (task.params, task.buffers))
    state = own.init(params, buffers, task.implementation.make_optimizer(task.learning_rate))

    def epoch(number: int) -> np.ndarray:
        nonlocal state
        losses = []
        for batch in task.batches(number):
            state, loss = step(state, *batch)
            losses.append(loss)
        return np.array(jax.device_get(losses))

    def outputs() -> Any:
        held_out = tuple(map(jnp.asarray, task.data.held_out_inputs))
        return as_numpy(task.subject.apply(own.params(state), own.buffers(state), held_out, {}, False)[0])

    def compile() -> None:
        for batch in task.shapes():
            after, _ = step(state, *batch)
            # TrainState.create counts from a Python int, a step returns an array: both are compiled for.
            jax.block_until_ready(step(after, *batch))

    yield Loop("linen, compiled step", epoch, outputs, compile)
