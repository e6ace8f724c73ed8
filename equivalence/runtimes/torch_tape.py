"""The tape on torch: every random operation that reaches the dispatcher is served from it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from equivalence.errors import UnsupportedDraw
from equivalence.randomness import Draw, Tape


class TapeMode(TorchDispatchMode):
    """Serves every random operation that reaches the dispatcher from a tape."""

    def __init__(self, tape: Tape) -> None:
        super().__init__()
        self.tape = tape

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing here is compiled: without dynamo's guard around every operation a step takes a third less time."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        sampler = _SAMPLERS.get(func)
        if sampler is not None:
            return sampler(self.tape, func, *args, **(kwargs or {}))
        if torch.Tag.nondeterministic_seeded in func.tags and not _drops_nothing(func, args, kwargs or {}):
            raise UnsupportedDraw(f"the reference draws random numbers by {func}, which the tape cannot serve")
        return func(*args, **(kwargs or {}))


def _drops_nothing(func: Any, args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether an operation tagged as random has its dropout at 0 (attention's fused kernels)."""
    for place, argument in enumerate(func._schema.arguments):
        if argument.name in ("dropout_p", "dropout"):
            value = args[place] if place < len(args) else kwargs.get(argument.name, argument.default_value)
            return value == 0
    return False


def _standard(tape: Tape, kind: str, like: torch.Tensor) -> torch.Tensor:
    value = tape.take(Draw(kind, tuple(like.shape)))
    return torch.from_numpy(np.asarray(value)).to(like)


def _bernoulli(tape: Tape, like: torch.Tensor, p: float) -> torch.Tensor:
    value = tape.take(Draw("bernoulli", tuple(like.shape), float(p)))
    return torch.from_numpy(np.asarray(value)).to(like)


def _native_dropout(tape: Tape, func: Any, x: torch.Tensor, p: float, train: bool | None) -> Any:
    if train is False or p == 0:
        return x, torch.ones_like(x, dtype=torch.bool)
    mask = _bernoulli(tape, x, 1.0 - p)
    return x * mask / (1.0 - p), mask.bool()


def _rrelu(
    tape: Tape,
    func: Any,
    x: torch.Tensor,
    noise: torch.Tensor,
    lower: float = 0.125,
    upper: float = 1 / 3,
    training: bool = False,
    generator: Any = None,
) -> torch.Tensor:
    """Its kernel draws a slope for every element that is not positive; the tape serves one for each element."""
    if not training:
        return func(x, noise, lower, upper, training)
    slopes = _standard(tape, "uniform", x) * (upper - lower) + lower
    noise.copy_(torch.where(x > 0, torch.ones_like(x), slopes))  # what its derivative reads
    return x.mul_(noise) if func is _aten.rrelu_with_noise_.default else x * noise


_aten = torch.ops.aten
_SAMPLERS: dict[Any, Callable[..., Any]] = {
    _aten.bernoulli_.float: lambda tape, f, x, p=0.5, generator=None: x.copy_(_bernoulli(tape, x, p)),
    _aten.bernoulli.p: lambda tape, f, x, p=0.5, generator=None: _bernoulli(tape, x, p),
    _aten.native_dropout.default: _native_dropout,
    _aten.rrelu_with_noise.default: _rrelu,
    _aten.rrelu_with_noise_.default: _rrelu,
    _aten.uniform_.default: lambda tape, f, x, low=0.0, high=1.0, generator=None: x.copy_(
        _standard(tape, "uniform", x) * (high - low) + low
    ),
    _aten.normal_.default: lambda tape, f, x, mean=0.0, std=1.0, generator=None: x.copy_(
        _standard(tape, "normal", x) * std + mean
    ),
    _aten.exponential_.default: lambda tape, f, x, rate=1.0, generator=None: x.copy_(
        _standard(tape, "exponential", x) / rate
    ),
}


def _factory(kind: str, like: bool) -> Callable[..., Any]:
    def sample(tape: Tape, func: Any, first: Any, **kwargs: Any) -> torch.Tensor:
        kwargs.pop("generator", None)
        empty = torch.empty_like(first, **kwargs) if like else torch.empty(first, **kwargs)
        return empty.copy_(_standard(tape, kind, empty))

    return sample


_SAMPLERS.update(
    {
        _aten.rand.default: _factory("uniform", False),
        _aten.randn.default: _factory("normal", False),
        _aten.rand_like.default: _factory("uniform", True),
        _aten.randn_like.default: _factory("normal", True),
    }
)
