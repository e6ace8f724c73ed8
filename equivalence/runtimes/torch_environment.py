"""What a torch run is given of the process: dtype, threads, precision; every setting is put back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from equivalence.runtimes.pinned import pinned

DTYPES = {32: torch.float32, 64: torch.float64}
"""The default dtype of a run, by its bits."""


@contextlib.contextmanager
def environment(bits: int, threads: int | None = None) -> Iterator[None]:
    """Default dtype, threads and matmul precision for a run, no autocast; settings and generator states put back."""
    dtype, threads_before = torch.get_default_dtype(), torch.get_num_threads()
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=range(torch.cuda.device_count())))
        stack.enter_context(torch.autocast("cpu", enabled=False))
        if torch.cuda.is_available():
            stack.enter_context(torch.autocast("cuda", enabled=False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(_highest_precision())
        if bits == 64:
            stack.enter_context(pinned(torch, _told))
            stack.enter_context(_Pinned())
        try:
            if threads is not None:
                torch.set_num_threads(threads)
            torch.set_default_dtype(DTYPES[bits])
            yield
        finally:
            torch.set_num_threads(threads_before)
            torch.set_default_dtype(dtype)


@contextlib.contextmanager
def _highest_precision() -> Iterator[None]:
    """Full float32 everywhere, by torch's older and its newer interface; both are put back, even where the user has
    mixed them, which torch's own getters refuse."""
    places = [place for place in _precision_places() if hasattr(place, "fp32_precision")]
    before = [place.fp32_precision for place in places]
    try:
        matmul: str | None = torch.get_float32_matmul_precision()
    except RuntimeError:
        matmul = None
    try:
        torch.set_float32_matmul_precision("highest")
        for convolutional in _precision_places()[4:6]:
            convolutional.fp32_precision = "ieee"
        yield
    finally:
        if matmul is not None:
            torch.set_float32_matmul_precision(matmul)
        for place, value in zip(places, before, strict=True):
            place.fp32_precision = value


def _precision_places() -> list[Any]:
    """Everything that has a float32 precision of its own, the general before the particular."""
    backends: Any = torch.backends
    particular = [getattr(backends.cudnn, name) for name in ("conv", "rnn")]
    particular += [getattr(backends.mkldnn, name, None) for name in ("matmul", "conv", "rnn")]
    return [backends, backends.cudnn, backends.mkldnn, backends.cuda.matmul, *particular]


class _Pinned(TorchFunctionMode):
    """In a float64 run, code that asks for its dtype's limits is told float32's: `RMSNorm(eps=None)` would otherwise
    be another function in float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.rms_norm, torch.nn.functional.rms_norm) and _eps(args, kwargs) is None:
            args, kwargs = args[:3], {**kwargs, "eps": torch.finfo(torch.float32).eps}
        return func(*args, **kwargs)


def _eps(args: Any, kwargs: dict[str, Any]) -> Any:
    return args[3] if len(args) > 3 else kwargs.get("eps")


def _told(dtype: torch.dtype | None) -> torch.dtype:
    """The dtype whose limits a float64 run tells."""
    return torch.float32 if dtype is None or dtype == torch.float64 else dtype
