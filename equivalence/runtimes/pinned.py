"""A dtype's limits in float64 runs: code that asks for float64's is told float32's.

It must stay the function that it is in float32: `RMSNorm(eps=None)` would otherwise be another one in float64.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

_lock, _state = threading.Lock(), threading.local()
_inside: dict[str, tuple[int, Any]] = {}
"""By module: how many blocks are inside, of all threads, and the module's own `finfo`."""


@contextlib.contextmanager
def pinned(module: Any, told: Callable[[Any], Any], alone: frozenset[str] = frozenset()) -> Iterator[None]:
    """`module.finfo(dtype)` answers for `told(dtype)`, in this thread and this block; not to the packages `alone`."""
    name = module.__name__
    with _lock:
        count, ours = _inside.get(name, (0, module.finfo))
        _inside[name] = count + 1, ours
        if not count:
            module.finfo = _answering(name, ours, told, alone)
    before: frozenset[str] = getattr(_state, "names", frozenset())
    _state.names = before | {name}
    try:
        yield
    finally:
        _state.names = before
        with _lock:
            count, ours = _inside.pop(name)
            if count > 1:
                _inside[name] = count - 1, ours
            else:
                module.finfo = ours


def _answering(name: str, ours: Any, told: Callable[[Any], Any], alone: frozenset[str]) -> Callable[..., Any]:
    @functools.wraps(ours, updated=())
    def finfo(*args: Any, **kwargs: Any) -> Any:
        caller = sys._getframe(1).f_globals.get("__name__", "").partition(".")[0]
        if name not in getattr(_state, "names", ()) or caller in alone:
            return ours(*args, **kwargs)
        if kwargs:
            return ours(*args, **{key: told(value) for key, value in kwargs.items()})
        return ours(*map(told, args or (None,)))

    return finfo
