"""What every benchmark runs under, imported before the frameworks; and what they share in timing and printing."""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent

os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")


def versions() -> dict[str, str]:
    """The versions that figures depend on."""
    return {"python": platform.python_version(), **{n: version(n) for n in ("torch", "jax", "flax", "optax", "numpy")}}


def progress(text: str) -> None:
    """One line that is written over, on a terminal only."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[2K{text[:110]}")
        sys.stderr.flush()


def interleaved(runs: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """The median seconds of each run; they take turns, so that what else the machine does falls on all alike."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(repeats):
        names = list(runs) if number % 2 == 0 else list(runs)[::-1]
        for name in names:
            progress(f"repeat {number + 1} of {repeats}: {name}")
            before = time.perf_counter()
            runs[name]()
            taken[name].append(time.perf_counter() - before)
    progress("")
    return {name: median(values) for name, values in taken.items()}


def line(name: str, value: float, bound: float, unit: str = "x", at_least: bool = False) -> str:
    """One demand: what was measured, what was asked for, and whether it holds."""
    held = value >= bound if at_least else value <= bound
    demand = f"{'at least' if at_least else 'at most'} {bound:g}{unit}"
    return f"{'pass' if held else 'FAIL'}  {name}: {value:.3g}{unit} ({demand})"
