"""Copying a gigabyte of weights through a mapping: time beside NumPy's own copy, and memory beside the two models.

`python benchmarks/copying.py [--layers N]`; exits 1 where it is more than 3 times slower than copying the same arrays,
or holds more than the two models and one leaf.
"""

from __future__ import annotations

import argparse
import sys
import time
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np

from equivalence.weights import Leaves, Mapping, Rule
from equivalence.weights.copying import copied

E, HEADS, MLP, REPEATS = 1024, 16, 4096, 5
SLOWER = 3.0
"""Times NumPy's own copy that a mapping may take."""

RULES = [
    Rule("wte.weight", "wte.embedding"),
    Rule("patch.weight", "patch.kernel", "o i h w -> h w i o"),
    Rule("h.{i}.ln.weight", "h_{i}.ln.scale"),
    Rule("h.{i}.qkv.weight", "h_{i}.attn.{s}.kernel", "(s h d) e -> s e h d", s=("query", "key", "value"), h=HEADS),
    Rule("h.{i}.out.weight", "h_{i}.attn.out.kernel", "e (h d) -> h d e", h=HEADS),
    Rule("h.{i}.up.weight", "h_{i}.up.kernel", "o k -> k o"),
    Rule("h.{i}.down.weight", "mlp.down.kernel", "i o k -> i k o"),
]


def sides(layers: int) -> tuple[Leaves, Leaves]:
    """The leaves of a transformer in torch, and of its port: split heads, and one projection stacked for scan."""
    d = E // HEADS
    ours: dict[str, tuple[int, ...]] = {"wte.weight": (20_000, E), "patch.weight": (E, 3, 16, 16)}
    theirs: dict[str, tuple[int, ...]] = {
        "wte.embedding": (20_000, E), "patch.kernel": (16, 16, 3, E), "mlp.down.kernel": (layers, MLP, E),
    }  # fmt: skip
    for i in range(layers):
        ours |= {f"h.{i}.ln.weight": (E,), f"h.{i}.qkv.weight": (3 * E, E), f"h.{i}.out.weight": (E, E)}
        ours |= {f"h.{i}.up.weight": (MLP, E), f"h.{i}.down.weight": (E, MLP)}
        theirs |= {f"h_{i}.ln.scale": (E,), f"h_{i}.attn.out.kernel": (HEADS, d, E), f"h_{i}.up.kernel": (E, MLP)}
        theirs |= {f"h_{i}.attn.{s}.kernel": (E, HEADS, d) for s in ("query", "key", "value")}
    return Leaves(ours), Leaves(theirs)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=18, help="blocks of 12.6 million weights (18: one gigabyte)")
    layers = parser.parse_args().layers
    ours, theirs = sides(layers)
    bound = Mapping(RULES).bind(ours, theirs)
    tracemalloc.start()
    rng = np.random.default_rng(0)
    model = {path: rng.standard_normal(shape, dtype=np.float32) for path, shape in ours.shapes.items()}
    size = sum(array.nbytes for array in model.values())
    leaf = max(4 * int(np.prod(shape)) for shape in (*ours.shapes.values(), *theirs.shapes.values()))
    moved = dict(copied(bound, model))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert {path: array.shape for path, array in moved.items()} == theirs.shapes
    del moved
    plain = _fastest(lambda: {path: array.copy() for path, array in model.items()})
    naive = _fastest(lambda: {path: np.ascontiguousarray(a) for path, a in bound.forward(model).items()})
    ours_took = _fastest(lambda: dict(copied(bound, model)))
    allowed = 2 * size + leaf
    print(f"weights {size / 1e9:.2f} GB, {len(model)} leaves to {len(theirs.shapes)}, largest {leaf / 1e6:.0f} MB")
    print(f"memory  {peak / 1e9:.2f} GB at the peak; two models and the largest leaf are {allowed / 1e9:.2f} GB")
    print(f"time    {ours_took:.2f} s; NumPy's copy {plain:.2f} s: {ours_took / plain:.2f} times")
    print(f"        moved by ascontiguousarray {naive:.2f} s: {naive / plain:.2f} times")
    return int(ours_took > SLOWER * plain or peak > allowed * 1.001)


def _fastest(run: Callable[[], Any]) -> float:
    """The fastest of some runs, in seconds."""
    took = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        made = run()
        took.append(time.perf_counter() - start)
        del made
    return min(took)


if __name__ == "__main__":
    sys.exit(main())
