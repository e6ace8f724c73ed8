"""Lifting on torch: what code hard-codes in low precision (`.float()`, `dtype=torch.float32`) runs in float64.

A dispatch mode turns every low dtype that an operation is asked for into float64, and every low tensor that it is
given (a constant, rounded before) into a float64 copy. A constant whose decimals say what was meant is recovered;
one whose do not survives: it is listed, and shaken by its own rounding where a run is asked to.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from equivalence.errors import EquivalenceError
from equivalence.runtimes.constants import recovered, shaken_by
from equivalence.runtimes.torch_found import Found

WIDE: dict[torch.dtype, torch.dtype] = {
    dtype: torch.complex128 if dtype.is_complex else torch.float64
    for dtype in vars(torch).values()
    if isinstance(dtype, torch.dtype) and (dtype.is_floating_point or dtype.is_complex)
    if dtype not in (torch.float64, torch.complex128)
}
"""The dtype that each low one is lifted to."""
NARROW = {torch.float64: torch.float32, torch.complex128: torch.complex64}
FLOAT32_INSIDE = frozenset(
    getattr(torch.ops.aten, name)
    for name in (
        "fake_quantize_per_tensor_affine_cachemask",
        "fake_quantize_per_channel_affine_cachemask",
        "_fake_quantize_per_tensor_affine_cachemask_tensor_qparams",
        "_fake_quantize_learnable_per_tensor_affine",
        "_fake_quantize_learnable_per_channel_affine",
    )
)
"""Operations that take float64 and round it, or their scales, to float32 inside."""
_view_dtype = torch.ops.aten.view.dtype


@dataclass(frozen=True)
class Shadow:
    """A low tensor's whole storage, and what stands for it in float64 while a lifted run lasts."""

    low: torch.Tensor
    wide: torch.Tensor
    survives: bool


class Lift(TorchDispatchMode):
    """Runs everything under it in float64.

    Enter it on top of other modes, so that they see what was lifted; `found` says what there was. With `shaken`, a
    seed, what survives is moved by its own rounding.
    """

    def __init__(self, shaken: int | None = None) -> None:
        super().__init__()
        self.shaken, self.found = shaken, Found()
        self._shadows: dict[tuple[int, torch.dtype], Shadow] = {}
        self._held: dict[int, tuple[str, Shadow]] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """As in `TapeMode`: nothing here is compiled."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._held:
            self._notice(args)
        if func is _view_dtype:
            return self._bits(*args)
        if _any_low(args) or _any_low(kwargs.values()):
            return self._lifted(func, args, kwargs)
        return self._wide_result(func, self._run(func, args, kwargs))

    def _lifted(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        originals: dict[int, torch.Tensor] = {}

        def wide(value: Any) -> Any:
            if isinstance(value, torch.dtype):
                return self._dtype(value)
            if isinstance(value, torch.Tensor) and value.dtype in WIDE:
                made = self.wide(value)
                originals[id(made)] = value
                return made
            return type(value)(map(wide, value)) if isinstance(value, (list, tuple)) else value

        args, kwargs = wide(list(args)), {name: wide(value) for name, value in kwargs.items()}
        if not any(isinstance(v, torch.Tensor) and v.dtype in WIDE for v in args) and "half_to_float" in _names(func):
            args = [False if v is True else v for v in args]
        result = self._run(func, args, kwargs)
        if func._schema.is_mutable:
            return _mapped(result, lambda value: originals.get(id(value), value))
        return self._wide_result(func, result)

    def _dtype(self, dtype: torch.dtype) -> torch.dtype:
        if dtype in WIDE:
            self.found.dtypes.add(dtype)
        return WIDE.get(dtype, dtype)

    def _run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """The operation; in float32 where there is none in float64 (quantised and custom ones)."""
        if func.overloadpacket in FLOAT32_INSIDE:
            return self._narrowed(func, args, kwargs)
        try:
            return func(*args, **kwargs)
        except EquivalenceError:
            raise
        except RuntimeError:
            if func._schema.is_mutable:
                raise
            with contextlib.suppress(RuntimeError):
                return self._narrowed(func, args, kwargs)
            raise

    def _narrowed(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        result = func(*_mapped(list(args), _narrow), **{k: _mapped(v, _narrow) for k, v in kwargs.items()})
        self.found.operations.add(str(func))
        return result

    def _wide_result(self, func: Any, result: Any) -> Any:
        """The result in float64: an operation that answers in less was not lifted."""
        if not _any_low((result,)):
            return result
        self.found.operations.add(str(func))

        def wide(value: Any) -> Any:
            if not isinstance(value, torch.Tensor) or value.dtype not in WIDE:
                return value
            with _disable_current_modes():
                return self._shake(value.to(WIDE[value.dtype]))

        return _mapped(result, wide)

    def _bits(self, value: torch.Tensor, dtype: torch.dtype) -> Any:
        """A view of a tensor's bits: those of float32 where they are asked for as such."""
        if value.dtype == torch.float64 and dtype.itemsize < 8:
            self.found.operations.add(str(_view_dtype))
            value = value.to(torch.float32)
        return self._wide_result(_view_dtype, _view_dtype(value, dtype))

    # --- constants -----------------------------------------------------------------------------------------------

    def wide(self, value: torch.Tensor) -> torch.Tensor:
        """The float64 tensor that stands for a low one; views of one storage share theirs."""
        shadow, place = self._shadow(value)
        self._met(f"a constant at {_place()}" if shadow.survives else "", shadow)
        with _disable_current_modes():
            return torch.as_strided(shadow.wide, *place)

    def _shadow(self, value: torch.Tensor) -> tuple[Shadow, tuple[Any, ...]]:
        with _disable_current_modes():
            value = value.detach().resolve_conj().resolve_neg()
            storage = value.untyped_storage()
            key = storage._cdata, value.dtype
            if key not in self._shadows:
                flat = torch.as_strided(value, (storage.nbytes() // value.itemsize,), (1,), 0)
                self._shadows[key] = Shadow(flat, *self._constant(flat))
            return self._shadows[key], (value.shape, value.stride(), value.storage_offset())

    def _constant(self, flat: torch.Tensor) -> tuple[torch.Tensor, bool]:
        """What a constant stands for, and whether it survives."""
        wide = flat.to(WIDE[flat.dtype])
        if flat.dtype not in (torch.float32, torch.complex64):
            return wide, False  # in float32 too it is exactly the number that it is
        parts = torch.view_as_real(wide) if wide.is_complex() else wide
        meant = recovered(parts.cpu().numpy())
        if meant is None:
            return self._shake(wide), True
        parts.copy_(torch.from_numpy(meant))
        return wide, False

    def _shake(self, wide: torch.Tensor) -> torch.Tensor:
        if self.shaken is not None:
            parts = torch.view_as_real(wide) if wide.is_complex() else wide
            parts.copy_(torch.from_numpy(shaken_by(parts.cpu().numpy(), self.shaken)))
        return wide

    def _met(self, name: str, shadow: Shadow) -> None:
        self.found.dtypes.add(shadow.low.dtype)
        if shadow.survives:
            self.found.constants.add(name)

    def _notice(self, args: Any) -> None:
        """Which of the tensors that the module holds are at work."""
        for value in args:
            if isinstance(value, torch.Tensor) and value.layout is torch.strided:
                met = self._held.pop(value.untyped_storage()._cdata, None)
                if met is not None:
                    self._met(*met)
            elif isinstance(value, (list, tuple)):
                self._notice(value)

    @contextmanager
    def holding(self, module: torch.nn.Module) -> Iterator[None]:
        """Low tensors that are attributes of a module (no state_dict shows them) stand in float64 meanwhile; what a
        run writes into them is written back, rounded."""
        swapped = []
        for path, part in module.named_modules():
            for name, value in list(vars(part).items()):
                if isinstance(value, torch.Tensor) and value.dtype in WIDE and value.layout is torch.strided:
                    shadow, place = self._shadow(value)
                    wide = torch.as_strided(shadow.wide, *place).detach()
                    vars(part)[name] = wide
                    swapped.append((part, name, value, wide))
                    self._held[wide.untyped_storage()._cdata] = f"{path}.{name}" if path else name, shadow
        try:
            yield
        finally:
            for part, name, value, wide in swapped:
                if vars(part).get(name) is wide:
                    vars(part)[name] = value
            held = {(value.untyped_storage()._cdata, value.dtype) for *_, value, _ in swapped}
            self._shadows = {
                key: shadow for key, shadow in self._shadows.items() if self._settled(shadow) or key in held
            }

    def _settled(self, shadow: Shadow) -> bool:
        """Write what a run wrote into a shadow back into the low tensor; whether it wrote anything."""
        rounded = shadow.wide.detach().to(shadow.low.dtype)
        if self.shaken is not None or torch.equal(rounded, shadow.low):
            return False
        with torch.no_grad():
            shadow.low.copy_(rounded)
        return True


class _Literals(TorchFunctionMode):
    """`torch.tensor(0.1, dtype=torch.float32)` rounds before any operation runs: Python numbers are taken as they
    are. And the dtype of autocast is noted."""

    MAKERS = (torch.tensor, torch.as_tensor, torch.asarray, torch.Tensor.new_tensor)

    def __init__(self, found: Found) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):  # which leaves float64 as it is
                self.found.dtypes.add(torch.get_autocast_dtype(device))
        dtype = kwargs.get("dtype")
        if func in self.MAKERS and dtype in WIDE and args and _plain(args[-1]):
            self.found.dtypes.add(dtype)
            kwargs = {**kwargs, "dtype": WIDE[dtype]}
        return func(*args, **kwargs)


@contextmanager
def holding(lift: Lift | None, module: torch.nn.Module) -> Iterator[None]:
    """`Lift.holding`, where there is one."""
    with contextlib.nullcontext() if lift is None else lift.holding(module):
        yield


@contextmanager
def lifting(lift: Lift | None) -> Iterator[None]:
    """`lift` at work, if there is one."""
    if lift is None:
        yield
        return
    with _Literals(lift.found), lift:
        yield


def _any_low(values: Any) -> bool:
    """Whether a low dtype, or a tensor of one, is among an operation's arguments."""
    for value in values:
        if isinstance(value, torch.Tensor):
            if value.dtype in WIDE:
                return True
        elif isinstance(value, torch.dtype):
            if value in WIDE:
                return True
        elif isinstance(value, (list, tuple)) and _any_low(value):
            return True
    return False


def _mapped(value: Any, change: Any) -> Any:
    """`change` applied to a value, or to every value of a list or tuple."""
    return type(value)(_mapped(v, change) for v in value) if isinstance(value, (list, tuple)) else change(value)


def _narrow(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(NARROW[value.dtype]) if value.dtype in NARROW else value
    return NARROW.get(value, value) if isinstance(value, torch.dtype) else value


def _names(func: Any) -> list[str]:
    return [argument.name for argument in func._schema.arguments]


def _plain(value: Any) -> bool:
    """Whether these are Python's own numbers, in lists or tuples."""
    if isinstance(value, (list, tuple)):
        return all(map(_plain, value))
    return isinstance(value, (bool, int, float, complex))


LIBRARIES = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]))


def _place() -> str:
    """File and line of the innermost frame that is neither torch's nor ours."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(LIBRARIES):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
