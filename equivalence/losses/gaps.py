"""How far a form of a torch loss is from torch's, in value and gradient, on the example of its row in float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import torch

from equivalence.losses.table import Loss
from equivalence.numerics import U64, distance, rms
from equivalence.runtimes import jax as jax_runtime
from equivalence.runtimes import torch_environment

Arrays = Mapping[str, np.ndarray]

INPUTS = ("x", "a", "b", "p", "n", "v")
"""The arrays of the examples whose gradients are compared: what a model gives, not targets and weights of classes."""


def loss_gap(row: Loss, naive: bool = False) -> tuple[float, float]:
    """The larger of the relative distances in value and in gradient, and what rounding explains of it.

    `naive` takes the row's JAX form, else ours. Every element of the example may add one rounding.
    """
    arrays = row.example(np.random.default_rng(0))
    moving = {name: value for name, value in arrays.items() if name in INPUTS}
    theirs = _torch_side(row, arrays, moving)
    ours = _jax_side(row.form_call if naive else row.ours_call, arrays, moving)
    gap = max(distance(ours[path], value) / rms(value) for path, value in theirs.items())
    return gap, U64 * sum(value.size for value in moving.values())


def _torch_side(row: Loss, arrays: Arrays, moving: Arrays) -> dict[str, np.ndarray]:
    with torch_environment.environment(64, threads=1):
        tensors = {name: torch.tensor(value, requires_grad=name in moving) for name, value in arrays.items()}
        value = eval(row.call, {"torch": torch, "F": torch.nn.functional, **tensors})
        gradients = torch.autograd.grad(value, [tensors[name] for name in moving])
    found = {name: gradient.numpy() for name, gradient in zip(moving, gradients, strict=True)}
    return {"value": value.detach().numpy(), **found}


def _jax_side(call: Callable[[Arrays], Any], arrays: Arrays, moving: Arrays) -> dict[str, np.ndarray]:
    with jax_runtime.environment(64):
        program = jax.jit(jax.value_and_grad(lambda given: call({**arrays, **given})))
        value, gradients = program(dict(moving))
        return {"value": np.asarray(value), **{name: np.asarray(gradient) for name, gradient in gradients.items()}}
