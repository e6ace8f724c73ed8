"""Flax NNX's loops: the step as written, and the same step under nnx.jit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from equivalence.loops import Loop, Task, as_numpy

FEW = 2
"""Epochs worth running without compiling: about a thousand times slower each."""


def loops(task: Task) -> Iterator[Loop]:
    """The step not compiled, for a few epochs, then the compiled one."""
    step = task.implementation.train_step
    yield _loop(task, "nnx, step not compiled", step, FEW)
    yield _loop(task, "nnx, compiled step", nnx.jit(step), None)


def _loop(task: Task, name: str, step: Callable[..., Any], few: int | None) -> Loop:
    model, optimizer = _start(task)

    def epoch(number: int) -> np.ndarray:
        losses = [step(model, optimizer, *batch) for batch in task.batches(number)]
        return np.array(jax.device_get(losses))

    def outputs() -> Any:
        model.eval()
        held_out = model(*map(jnp.asarray, task.data.held_out_inputs))
        model.train()
        return as_numpy(held_out)

    def compile() -> None:
        # Clones: a second transformation, though built alike, would be other functions and compile once more.
        its_model, its_optimizer = nnx.clone((model, optimizer))
        for batch in task.shapes():
            jax.block_until_ready(step(its_model, its_optimizer, *batch))

    return Loop(name, epoch, outputs, compile, few)


def _start(task: Task) -> tuple[Any, Any]:
    """A fresh model in train mode with the task's weights, and its optimizer."""
    assert task.subject.own_step is not None
    params, buffers = jax.tree.map(jnp.asarray, (task.params, task.buffers))
    transformation = task.implementation.make_optimizer(task.learning_rate)
    carry = task.subject.own_step.init(params, buffers, transformation)
    model, optimizer = nnx.merge(carry.graph, carry.state, copy=True)
    return model, optimizer
