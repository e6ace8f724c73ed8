"""Constants of a traced program: kept from being rounded while it is traced, or given back the double they came from.

A float64 run lifts float32 arithmetic after the trace. By then a constant written in float32 has lost half its digits,
so NumPy is watched while user code is traced: the tables that it makes stay in float64, and for each number that JAX
itself rounds the double it was is remembered. What is still float32 afterwards is recovered where it is plain what was
written (0.1, 1e-6, 3, sqrt(2/pi)), and survives where it is not.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from equivalence.runtimes.closed_forms import closed_form

LEFT_ALONE = frozenset(("jax", "jaxlib", "flax", "numpy", "optax", "equivalence", "scipy", "ml_dtypes", "torch"))
"""Packages whose own NumPy arrays stay as they are: theirs are not the user's tables."""

EXACT = ("zeros", "ones", "full")
"""NumPy's functions that make arrays which rounding leaves as plain as they were: the dtype asked for is theirs."""

FACTORIES = (*EXACT, "arange", "linspace", "logspace", "geomspace", "outer", "array", "asarray")
"""NumPy's functions that make arrays of what are not arrays. Not `empty`, by which NumPy makes its random ones."""

FOLDED = (np.float32, np.float16, jnp.bfloat16)
"""Dtypes that code casts numbers to."""

KEPT = 64
"""Tables remembered at once, the last ones; numbers are all remembered."""

_state, _lock = threading.local(), threading.Lock()
_originals: dict[str, Callable[..., Any]] = {}
_inside: list[None] = []
_serial = itertools.count(1)
_traced_for = jax.make_user_context(0)
"""Part of the key of JAX's caches: what was traced for one memory is traced again for another, which must see it."""


class Memory:
    """The doubles that JAX was seen to round while the programs of one subject were traced, by what they became."""

    def __init__(self) -> None:
        self.serial = next(_serial)
        self.numbers: dict[Any, np.ndarray | None] = {}
        self.tables: dict[Any, np.ndarray | None] = {}
        self.widened: set[float] = set()

    def note(self, rounded: np.ndarray, doubles: np.ndarray) -> None:
        """Remember what was rounded; where two doubles became one number, that neither is known."""
        if np.array_equal(doubles, rounded, equal_nan=True):
            return
        memory, key = (self.tables if rounded.ndim else self.numbers), _key(rounded)
        known = memory.pop(key, doubles)
        memory[key] = doubles if known is not None and np.array_equal(known, doubles, equal_nan=True) else None
        while len(self.tables) > KEPT:
            del self.tables[next(iter(self.tables))]


_shared = Memory()


def low(dtype: Any) -> bool:
    """Whether a dtype is a float, real or complex, of less than double precision."""
    return bool(jnp.issubdtype(dtype, jnp.inexact)) and np.dtype(dtype) not in (np.float64, np.complex128)


def wide(dtype: Any) -> Any:
    """The double-precision dtype of a float's kind."""
    return np.dtype(np.complex128 if jnp.issubdtype(dtype, jnp.complexfloating) else np.float64)


class _Table(np.ndarray):
    """An array that user code made while it was traced: casting it down leaves it in float64, and what follows too."""

    def astype(self, dtype: Any, *args: Any, **kwargs: Any) -> Any:
        return super().astype(_raised(dtype) if watching() else dtype, *args, **kwargs)

    def __array_function__(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        made = super().__array_function__(func, types, args, kwargs)
        return _table(made) if isinstance(made, np.ndarray) else made


def _table(made: np.ndarray) -> np.ndarray:
    """An array as a table; not what is rounded already."""
    return made.view(_Table) if type(made) is np.ndarray and made.dtype.kind in "iuf" and not low(made.dtype) else made


def _raised(dtype: Any) -> Any:
    """float64 for what names a lower float; anything else as it is (one letter is an order: "F")."""
    if not isinstance(dtype, (type, np.dtype, str)) or (isinstance(dtype, str) and len(dtype) < 2):
        return dtype
    try:
        named = np.dtype(dtype)
    except TypeError:
        return dtype
    return wide(named) if low(named) else dtype


@contextlib.contextmanager
def watched(memory: Memory | None = None) -> Iterator[None]:
    """NumPy watched in this thread: what user code makes stays in float64, what JAX rounds is put into the memory;
    None is that of the block around this one, or one that all such blocks share."""
    with _lock:
        if not _originals:
            _originals.update({name: getattr(np, name) for name in FACTORIES})
            for name, original in _originals.items():
                setattr(np, name, _watch(original))
        _inside.append(None)
    before = getattr(_state, "depth", 0), getattr(_state, "memory", None)
    _state.depth, _state.memory = 1, memory or before[1] or _shared
    try:
        with _traced_for(_state.memory.serial):
            yield
    finally:
        _state.depth, _state.memory = before
        with _lock:
            _inside.pop()
            if not _inside:
                for name, original in _originals.items():
                    setattr(np, name, original)
                _originals.clear()


@contextlib.contextmanager
def unwatched() -> Iterator[None]:
    """NumPy as it is, in this thread, inside `watched`."""
    depth, _state.depth = getattr(_state, "depth", 0), 0
    try:
        yield
    finally:
        _state.depth = depth


def leniently(function: Callable[..., Any], *args: Any) -> Any:
    """What a function gives; without the watch where it fails under it. Loops, branches and the user's own checks may
    insist on the dtype of a NumPy array, which a float64 run keeps in float64, or on its type."""
    with contextlib.suppress(*((Exception,) if watching() else ())):
        return function(*args)
    with unwatched():
        return function(*args)


def watching() -> bool:
    """Whether this thread is inside `watched`."""
    return bool(getattr(_state, "depth", 0))


def _watch(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def factory(*args: Any, **kwargs: Any) -> Any:
        made = original(*args, **kwargs)
        if not watching() or not isinstance(made, np.ndarray):
            return made
        caller = sys._getframe(1).f_globals.get("__name__", "").partition(".")[0]
        if caller == "jax" and args:
            _remember(made, args[0])
        if caller in LEFT_ALONE or any(isinstance(arg, np.ndarray) and low(arg.dtype) for arg in args):
            return made
        if made.ndim and low(made.dtype) and original.__name__ not in EXACT:
            made = original(*map(_raised, args), **{key: _raised(value) for key, value in kwargs.items()})
        return _table(made)

    return factory


def _remember(made: np.ndarray, source: Any) -> None:
    """Note the doubles that JAX rounds to an array, or may round next: it folds the cast of a number afterwards; and
    the float32 numbers that it may make doubles of."""
    if made.ndim == 0 and getattr(source, "dtype", None) == np.float32:
        if not stays(np.asarray(source)).all():
            _state.memory.widened.add(float(made))
        return
    if made.ndim == 0 and made.dtype == np.float64:
        with np.errstate(over="ignore", under="ignore"):
            for dtype in FOLDED:
                _state.memory.note(made.astype(dtype), made)
    elif low(made.dtype) and not low(getattr(source, "dtype", np.int64)):
        doubles = np.array(source, dtype=wide(made.dtype))
        if doubles.shape == made.shape:
            _state.memory.note(made, doubles)


def widened(value: Any) -> bool:
    """Whether a number of the trace is a double that JAX made of a float32 one."""
    memory: Memory | None = getattr(_state, "memory", None)
    if memory is None or np.ndim(value) or getattr(value, "dtype", None) != np.float64:
        return False
    return float(value) in memory.widened


def _key(rounded: np.ndarray) -> Any:
    return rounded.dtype.name, rounded.shape, rounded.tobytes()


def exact(rounded: np.ndarray) -> np.ndarray | None:
    """The doubles that a low-precision constant was rounded from, or None where that cannot be known.

    Known are: what JAX was seen to round; arrays whose every element is an exact binary number or a decimal of no more
    digits than the dtype keeps (float32: 6, and 5 where one number is all there is: one in twenty is a decimal of six
    by chance); and single numbers that are 1/n, sqrt(n), 1/sqrt(n), or such times pi.
    """
    memory: Memory | None = getattr(_state, "memory", None)
    remembered = {} if memory is None else memory.tables if rounded.ndim else memory.numbers
    if _key(rounded) in remembered:
        return remembered[_key(rounded)]
    if rounded.dtype.kind == "c":
        parts = [exact(np.array(part)) for part in (rounded.real, rounded.imag)]
        return None if parts[0] is None or parts[1] is None else parts[0] + 1j * parts[1]
    flat = rounded.reshape(-1)
    decimals = None if flat.size > 16 and _decimals(flat[:16], False) is None else _decimals(flat, True)
    if rounded.size > 1 or rounded.dtype != np.float32:
        return None if decimals is None else decimals.reshape(rounded.shape)
    found = {None if decimals is None else float(decimals[0]), None if stays(flat)[0] else closed_form(float(flat[0]))}
    found.discard(None)
    return np.full(rounded.shape, found.pop()) if len(found) == 1 else None  # two say that neither is known


def _decimals(rounded: np.ndarray, whole: bool) -> np.ndarray | None:
    """The decimals and exact numbers that an array's elements were written as; None where one is neither."""
    doubles, loose = rounded.astype(np.float64), ~stays(rounded)
    values, places = np.unique(doubles[loose], return_inverse=True)
    digits = ml_dtypes.finfo(rounded.dtype).precision
    if whole and rounded.dtype == np.float32 and np.unique(np.abs(values)).size == 1:
        digits -= 1
    decimals = np.array([float(f"{value:.{digits - 1}e}") for value in values.tolist()])
    if not np.array_equal(decimals.astype(rounded.dtype).astype(np.float64), values):
        return None
    doubles[loose] = decimals[places]
    return doubles


def stays(rounded: np.ndarray) -> np.ndarray:
    """Elements that rounding is most unlikely to have made: few significant bits, integers, limits of the dtype."""
    limits = ml_dtypes.finfo(rounded.dtype)
    plain = np.asarray(rounded).astype(np.float64)
    bits = np.frexp(plain)[0] * 2.0 ** ((limits.nmant + 1) // 2)
    integers = (plain == np.round(plain)) & (np.abs(plain) < 2.0 ** (limits.nmant - 1))
    found: np.ndarray = ~np.isfinite(plain) | (bits == np.round(bits)) | integers | (np.abs(plain) == float(limits.max))
    return found
