"""Which lines of a Python function runs go through: the paths that an example takes, and what no example reaches."""

from __future__ import annotations

import ast
import inspect
import linecache
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import FrameType
from typing import Any

import numpy as np

from equivalence.numerics import ulp_twin

Path = tuple[int, ...]

Jitter = Callable[[np.ndarray], np.ndarray]

TWINS = 10

FLOAT32, FLOAT64 = 2.0**-22, 2.0**-51
"""A few units of rounding."""


def still(value: np.ndarray) -> np.ndarray:
    """The jitter that moves nothing."""
    return value


def path(run: Callable[[], Any], functions: Iterable[Callable[..., Any]]) -> Path:
    """The line numbers of `functions` that a run executes, in order."""
    codes = {inspect.unwrap(function).__code__ for function in functions}
    seen: list[int] = []

    def local(frame: FrameType, event: str, arg: Any) -> Any:
        if event == "line":
            seen.append(frame.f_lineno)
        return local

    before = sys.gettrace()
    sys.settrace(lambda frame, event, arg: local if frame.f_code in codes else None)
    try:
        run()
    finally:
        sys.settrace(before)
    return tuple(seen)


def unreached(paths: Iterable[Path], functions: Iterable[Callable[..., Any]]) -> list[str]:
    """The statements of `functions` that no path goes through."""
    seen = {line for path in paths for line in path}
    codes = [inspect.unwrap(function).__code__ for function in functions]
    lines = {(c.co_filename, line) for c in codes for line in _statements(c)}
    return [linecache.getline(file, line).strip() for file, line in sorted(lines) if line not in seen]


def _statements(code: Any) -> set[int]:
    source, first = inspect.getsourcelines(code)
    tree = ast.parse(textwrap.dedent("".join(source)))
    return {node.lineno + first - 1 for node in _own(tree.body[0])}


def _own(top: ast.AST) -> Iterator[ast.stmt]:
    """Statements inside one, but not those of functions defined there; docstrings are none."""
    for node in ast.iter_child_nodes(top):
        if not isinstance(node, ast.FunctionDef):
            if isinstance(node, ast.stmt) and not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):
                yield node
            yield from _own(node)


def shared(
    run: Callable[[Jitter], Any], functions: Sequence[Callable[..., Any]], *sizes: float, twins: int = TWINS
) -> tuple[Path, ...]:
    """The path of a float64 run, and for each size how much of it runs share whose arithmetic is off by that much.

    Beyond that rounding decides: the reference is no yardstick there (DESIGN section 4: ill-conditioned).

    Args:
        run: a float64 run of the reference that passes what its closure is given and answers through a jitter.
        functions: whose lines make the path.
        sizes: relative, as `FLOAT32` and `FLOAT64`.
        twins: how many runs; many for examples drawn at random, of which one in a thousand is close to a tie.
    """
    whole = path(lambda: run(still), functions)
    found = [whole]
    for size in sizes:
        common = len(whole)
        for number in range(twins):
            twin = path(lambda number=number, size=size: run(_jitter(number, size)), functions)
            pairs = zip(whole, twin, strict=False)
            common = min(common, next((k for k, (a, b) in enumerate(pairs) if a != b), min(len(whole), len(twin))))
        found.append(whole[:common])
    return tuple(found)


def _jitter(number: int, size: float) -> Jitter:
    rng = np.random.default_rng(number)
    return lambda value: np.asarray(ulp_twin(np.asarray(value), rng, size))
