"""Which layouts a torch layer's leaf may have in a port: patterns by layer type, leaf name and shapes. Facts only.

`o` is the axis of a layer's outputs, `h d` are heads and what is in each. A pattern here is a candidate: several that
fit are told apart by the port's other leaves, by a probe, or by the user.

Source: the parameter shapes in the reference pages of torch.nn, flax.linen, flax.nnx and equinox.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np

from equivalence.errors import MappingError
from equivalence.weights.mapping import solve
from equivalence.weights.naming import concepts
from equivalence.weights.rules import Change, Rule, flip

COUNTERS = ("num_batches_tracked",)
"""Buffers that count calls and that Flax does not keep."""

PROJECTS = frozenset(("query", "key", "value", "qkv", "kv"))
"""Concepts of projections into heads; the one out of them is `out`."""

PROJECTING = frozenset(
    ("MultiheadAttention", *(f"{name}{suffix}" for name in ("LSTM", "GRU", "RNN") for suffix in ("", "Cell")))
)
"""Layer types whose own matrices are (outputs, inputs), as a linear layer's are."""

LINEAR = ("Linear", "LazyLinear", "NonDynamicallyQuantizableLinear", *PROJECTING)
"""Layer types that keep (outputs, inputs). What a user calls a `SomethingLinear` keeps what it likes."""

Shape = tuple[int, ...]


def constants(arrays: Mapping[str, np.ndarray]) -> set[str]:
    """Of a reference's frozen parameters those that a port may compute instead of holding them. Zeros alone or ones
    alone are none: a port that forgets them would agree as well."""
    return {path for path, array in arrays.items() if array.size and not ((array == 0).all() or (array == 1).all())}


@dataclass(frozen=True)
class Layout:
    """An einops pattern from a torch leaf's axes to its port's, and a change of values, if there is one."""

    axes: str
    change: Change | None = None

    @property
    def plain(self) -> bool:
        """Whether nothing moves."""
        left, _, right = self.axes.partition("->")
        return self.change is None and left.split() == right.split()


SPATIAL = {1: "w", 2: "h w", 3: "d h w"}


def family(kind: str) -> str:
    """Layer types whose leaves have one layout, under one name."""
    return "Linear" if kind in LINEAR else kind


@cache
def layouts(kind: str, role: str, leaf: str, words: tuple[str, ...], ours: Shape, theirs: Shape) -> tuple[Layout, ...]:
    """Every layout that a leaf of a torch layer type may have in a port and that fits the shapes, likely ones first.

    Args:
        kind: torch layer type of the module that owns the leaf; one that is not known allows what any of its rank does.
        role: `weight`, `bias`, `mean`, `var` or `value`, as `naming.read` says.
        leaf: the last part of the port's path: `kernel` is Flax's own layout.
        words: the words of both paths.
        ours, theirs: the shapes.
    """
    found = _patterns(kind, role, leaf, words, len(ours), len(theirs)) if role in ("weight", "bias") else ()
    if not found and len(ours) == len(theirs):
        axes = " ".join("abcdefgh"[: len(ours)])
        found = (Layout(f"{axes} -> {axes}"),)
    elif not found or (role == "value" and len(ours) != len(theirs)):
        found = _squeezed(ours, theirs)
    return tuple(layout for layout in found if fits(layout, ours, theirs))


def _patterns(kind: str, role: str, leaf: str, words: tuple[str, ...], ours: int, theirs: int) -> tuple[Layout, ...]:
    if role == "bias":
        return _all("(h d) -> h d") if (ours, theirs) == (1, 2) else _all("o -> o") if ours == theirs == 1 else ()
    if kind.startswith("ConvTranspose"):
        return _transposed_convolution(leaf, ours - 2) if ours == theirs else ()
    if kind.startswith("Conv") and kind != "Conv1D" and ours == theirs and ours - 2 in SPATIAL:
        return _convolution(leaf, ours - 2)
    if ours != 2 or "Embedding" in kind:
        return ()
    means = frozenset().union(*(concepts(word) for word in words))
    if theirs == 3:
        into, out = (
            ("k (h d) -> k h d", "(h d) o -> h d o") if kind == "Conv1D" else ("(h d) k -> k h d", "o (h d) -> h d o")
        )
        return _all(into) if means & PROJECTS else _all(out) if "out" in means else _all(into, out)
    if theirs != 2:
        return ()
    if kind == "Conv1D":
        return _all("k o -> k o", "k o -> o k")
    if family(kind) == "Linear" and leaf == "kernel":
        return _all("o k -> k o")
    if leaf == "embedding":
        return _all("o k -> o k")
    return _all("o k -> k o", "o k -> o k") if leaf == "kernel" else _all("o k -> o k", "o k -> k o")


def _all(*axes: str) -> tuple[Layout, ...]:
    return tuple(Layout(pattern) for pattern in axes)


def _convolution(leaf: str, rank: int) -> tuple[Layout, ...]:
    places = SPATIAL[rank]
    last, first = Layout(f"o i {places} -> {places} i o"), Layout(f"o i {places} -> o i {places}")
    return (last,) if leaf == "kernel" else (first, last)


def _transposed_convolution(leaf: str, rank: int) -> tuple[Layout, ...]:
    """Flax applies the kernel as it is, torch its mirror image; with `transpose_kernel=True` both mean the same.
    Equinox, last here, applies it as it is and keeps its groups with the outputs."""
    places = SPATIAL[rank]
    flipped = Layout(f"i o {places} -> {places} i o", flip(*range(rank)))
    last = flipped, Layout(f"i o {places} -> {places} o i")
    turned = flip(*range(2, rank + 2))
    equinox = Layout(f"(g i) o {places} -> (g o) i {places}", turned), Layout(f"i o {places} -> o i {places}", turned)
    return last if leaf == "kernel" else (Layout(f"i o {places} -> i o {places}"), *last, *equinox)


def _squeezed(ours: Shape, theirs: Shape) -> tuple[Layout, ...]:
    """Axes of length 1 that one side alone has, folded into their neighbours: a table (1, n, d) kept (n, d)."""
    longer, shorter = (ours, theirs) if len(ours) > len(theirs) else (theirs, ours)
    if tuple(n for n in longer if n != 1) != shorter or not shorter:
        return ()
    folded: list[list[str]] = [[]]
    for name, size in zip("abcdefgh", longer, strict=False):
        folded[-1].append(name)
        if size != 1:
            folded.append([])
    trailing = folded.pop()
    folded[-1] += trailing
    whole = " ".join("abcdefgh"[: len(longer)])
    tight = " ".join(f"({' '.join(group)})" if len(group) > 1 else group[0] for group in folded)
    return (Layout(f"{whole} -> {tight}" if longer is ours else f"{tight} -> {whole}"),)


def fits(layout: Layout, ours: Shape, theirs: Shape) -> bool:
    """Whether a pattern takes one shape to the other."""
    rule = Rule("a", "b", layout.axes)
    sides = rule.sides()
    assert sides is not None
    try:
        solve(rule, sides, (ours, theirs), ("a", "b"))
    except MappingError:
        return False
    return True


def fused(layout: Layout, hole: str, count: int, source: bool) -> Layout:
    """The layout where one side keeps `count` layers in one leaf, along the outputs, and the other each in its own.

    >>> fused(Layout("(h d) k -> k h d"), "s", 3, source=True).axes
    '(s h d) k -> s k h d'
    """
    left, _, right = layout.axes.partition(" -> ")
    output = "h d" if "(h d)" in left and "h d" in right and "o" not in left.split() else "o"
    one, whole = (left, right) if source else (right, left)
    grouped = f"({output})" if f"({output})" in one else output
    one = one.replace(grouped, f"({hole} {output})", 1)
    whole = f"{hole} {whole}"
    return Layout(f"{one} -> {whole}" if source else f"{whole} -> {one}", layout.change)
