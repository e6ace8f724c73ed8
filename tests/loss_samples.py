"""The sample inputs that torch tests its own losses with, in double precision: which of ours differ.

Of samples alike in options, shapes and dtypes the first is run, and all of them under HYPOTHESIS_PROFILE=thorough:
most differ only in how torch cuts LinearCrossEntropyLoss into chunks. A class's samples are one compiled program.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from equivalence import losses
from equivalence.losses.modules import OPTIONS
from equivalence.runtimes.jax import environment
from tests.agreement import Arrays, disagreements
from tests.torch_tables import modules

LINEAR = "LinearCrossEntropyLoss"


@dataclass(frozen=True)
class Sample:
    """A torch loss, what it is called with, and the numbers of the inputs that torch has a gradient by."""

    module: Any
    inputs: tuple[Any, ...]

    @property
    def moving(self) -> list[int]:
        return [i for i, v in enumerate(self.inputs) if isinstance(v, torch.Tensor) and v.requires_grad]

    def placed(self, moved: Any) -> list[Any]:
        """The inputs, the moving ones replaced."""
        values = [v.detach().numpy() if isinstance(v, torch.Tensor) else v for v in self.inputs]
        return [moved[self.moving.index(i)] if i in self.moving else value for i, value in enumerate(values)]

    def port(self) -> Callable[..., Any]:
        """Ours; the weights of a linear layer are no inputs of the sample, so they are bound."""
        m = self.module
        if type(m).__name__ != LINEAR:
            return losses.translate(m)
        shape = (m.num_classes, *m.out_features)
        weight = m.linear.weight.detach().numpy().reshape(*shape, -1)
        bias = None if m.linear.bias is None else m.linear.bias.detach().numpy().reshape(shape)
        options = {name: getattr(m, name) for name in ("ignore_index", "label_smoothing", "reduction")}
        by_class = None if m.weight is None else m.weight.numpy()
        return lambda x, y: losses.linear_cross_entropy(x, weight, y, linear_bias=bias, weight=by_class, **options)


def described(value: Any) -> Any:
    return (tuple(value.shape), str(value.dtype)) if isinstance(value, torch.Tensor) else repr(value)


def samples(name: str, info: Any) -> dict[str, Sample]:
    """The samples of a class, by class and number."""
    torch.manual_seed(0)
    found: dict[Any, tuple[str, Sample]] = {}
    for number, one in enumerate(info.module_inputs_func(info, "cpu", torch.float64, True, False)):
        made, called = one.constructor_input, one.forward_input
        options = {k: described(v) for k, v in made.kwargs.items() if k != "options"}
        alike = repr((options, *map(described, (*made.args, *called.args))))
        if os.environ.get("HYPOTHESIS_PROFILE") == "thorough":
            alike = str(number)
        sample = Sample(info.module_cls(*made.args, **made.kwargs), called.args)
        found.setdefault(alike, (f"{name} {number}", sample))
    return dict(found.values())


def sides(given: dict[str, Sample]) -> tuple[Any, Any, dict[str, np.ndarray]]:
    """Both sides of a class's samples: losses, and the slopes of their sums, in float64 at either precision."""

    def named(name: str, value: Any, slopes: Any) -> Arrays:
        return {name: value, **{f"{name} by {i}": s for i, s in zip(given[name].moving, slopes, strict=True)}}

    def arrays_of(name: str, arrays: Arrays) -> list[np.ndarray]:
        return [np.asarray(arrays[f"{name} {i}"], np.float64) for i in given[name].moving]

    def reference(bits: int, arrays: Arrays) -> Arrays:
        found: dict[str, np.ndarray] = {}
        for name, sample in given.items():
            moved = [torch.tensor(value, requires_grad=True) for value in arrays_of(name, arrays)]
            inputs = [torch.from_numpy(v) if isinstance(v, np.ndarray) else v for v in sample.placed(moved)]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                value = sample.module(*inputs)
            value.sum().backward()
            found |= named(name, value.detach().numpy(), [m.grad.numpy() for m in moved])
        return found

    @jax.jit
    def program(moving: Any) -> Any:
        found = {}
        for name, moved in moving.items():

            def scalar(moved: Any, sample: Sample = given[name]) -> Any:
                value = sample.port()(*sample.placed(moved))
                return value.sum(), value

            found[name] = jax.value_and_grad(scalar, has_aux=True)(moved)
        return found

    def ours(bits: int, arrays: Arrays) -> Arrays:
        with environment(64):
            found = program({name: [jnp.asarray(v) for v in arrays_of(name, arrays)] for name in given})
        return {
            k: np.asarray(v)
            for name, ((_, value), slopes) in found.items()
            for k, v in named(name, value, slopes).items()
        }

    arrays = {f"{name} {i}": s.inputs[i].detach().numpy() for name, s in given.items() for i in s.moving}
    return reference, ours, arrays


def outcome() -> dict[str, dict[str, Any]]:
    """By class: how many samples were run, and which differ."""
    found = {}
    for name, info in modules().items():
        if name in {*OPTIONS, LINEAR}:
            given = samples(name, info)
            differing = {" ".join(path.split()[:2]) for path in disagreements(*sides(given))}
            found[name] = {"run": len(given), "differing": sorted(differing)}
    return found
