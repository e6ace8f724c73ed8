"""A torch layer and its translation, run side by side on any call: outputs, gradients, buffers, the same draws."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np
import torch

import equivalence as eq
from equivalence.frameworks.torch import subject as torch_subject
from equivalence.layers.calls import arrays_of, batch_of, closed, present
from equivalence.observation import Batch, Seen
from equivalence.runtimes.jax import JaxRunner
from equivalence.runtimes.torch import TorchRunner
from tests.agreement import disagreements

FRAMEWORKS = ("nnx", "linen")
FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
Arrays = Mapping[str, np.ndarray]


def disagree(
    module: torch.nn.Module,
    *inputs: Any,
    to: str = "nnx",
    train: bool = False,
    calls: int = 1,
    moved: Iterable[str] | None = None,
    port: Callable[..., Any] | None = None,
    seed: int = 0,
    compiled: bool = True,
    optimised: bool = False,
    **kwargs: Any,
) -> dict[str, float]:
    """Paths at which `eq.translate(module, to)` differs from the module; empty for a right translation.

    Args:
        inputs, kwargs: of one call; arrays or tensors anywhere in tuples, lists and dicts vary, all else is fixed.
        train: the mode of both sides; draws are served from one tape.
        calls: training-mode calls, whose last buffers are compared.
        moved: names of the arrays that noise moves (`"in.args.0"`, `"weight"`), see `agreement.disagreements`.
        port: a callable on the translation's subject that gives the one to judge instead, to plant a fault.
        compiled: whether the port runs under jit.
        optimised: whether XLA optimises what it compiles; without, compiling takes half as long.
    """
    arrays = {f"in.{path}": array for path, array in arrays_of(inputs, kwargs).items()}
    ours = torch_subject(module)
    theirs = eq.translate(module, to=to).subject
    assert theirs.mapping is not None
    bound = theirs.mapping.bind(ours.leaves, theirs.leaves)
    left, right = (closed(side, inputs, kwargs) for side in (ours, theirs if port is None else port(theirs)))
    reference, judged = TorchRunner(left, None, present), JaxRunner(right, bound, None, present)
    if not optimised:
        judged._compiled = jax.jit(judged._observed, static_argnames=("train", "bits"), compiler_options=FAST)
    weights = {**ours.params, **ours.buffers}
    served: dict[int, Seen] = {}

    def batch(values: Arrays, number: int = calls - 1) -> Batch:
        size = np.float32(calls - number)  # another batch in every call, the one that was given in the last
        given = {name[3:]: value for name, value in values.items() if name.startswith("in.")}
        return batch_of({name: size * value if value.dtype.kind == "f" else value for name, value in given.items()})

    def of_torch(bits: int, values: Arrays) -> Arrays:
        held = {path: values[f"leaf.{path}"] for path in weights}
        for number in range(calls - 1):
            held.update(reference.advance(bits, held, batch(values, number), seed + number))
        seen = reference.observe(bits, held, batch(values), train, seed + calls - 1)
        served[bits] = seen
        return seen.values

    def of_port(bits: int, values: Arrays) -> Arrays:
        held = {path: values[f"leaf.{path}"] for path in weights}
        for number in range(calls - 1):
            step = reference.observe(bits, held, batch(values, number), True, seed + number, gradients=False)
            held.update(judged.advance(bits, held, batch(values, number), step))
        return judged.observe(bits, held, batch(values), train, seed + calls - 1, served[bits], compiled).values

    given = {**{f"leaf.{path}": value for path, value in weights.items()}, **arrays}
    names = None if moved is None else [name if name.startswith("in.") else f"leaf.{name}" for name in moved]
    return disagreements(of_torch, of_port, given, names)


def assert_translates(
    module: torch.nn.Module, *inputs: Any, frameworks: Iterable[str] = FRAMEWORKS, **how: Any
) -> None:
    """Raise AssertionError naming every path at which a translation differs from the module; see `disagree`."""
    for to in frameworks:
        found = disagree(module, *inputs, to=to, **how)
        words = "; ".join(f"{path}: {ratio:.3g} times what rounding explains" for path, ratio in found.items())
        assert not found, f"{module} to {to}: {words}"


def perturbed(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """The module with every floating leaf moved off its initial value (a variance stays positive)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in (*module.named_parameters(), *module.named_buffers()):
            if value.is_floating_point():
                noise = torch.randn(value.shape, generator=generator, dtype=value.dtype)
                value.add_(noise.abs() if "var" in name else 0.3 * noise)
    return module


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    """Standard normal float32 numbers."""
    return np.random.default_rng((seed, *shape)).standard_normal(shape).astype(np.float32)
