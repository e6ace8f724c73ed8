"""Leaves moved one at a time into memory of their own: no third model is ever held."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from collections.abc import Mapping as MappingOf

import numpy as np

from equivalence.weights.mapping import Bound

SIDE, TILE = 128, 2**14
"""Elements of a tile along one axis, and in all: what is read and what is written then both stay in the cache."""


def copied(bound: Bound, arrays: MappingOf[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    """Port leaves with their canonical paths, each contiguous and its own, from the reference's.

    A leaf is made when it is asked for. Leaves that are not given are not produced.
    """
    done: set[str] = set()
    for move in bound.moves:
        paths = [bound.source.canonical(path) for path in move.sources]
        targets = [bound.target.canonical(path) for path in move.targets]
        if not paths or any(path not in arrays for path in paths) or done.issuperset(targets):
            continue
        made = move.run([arrays[path] for path in paths], np.stack)
        for number, path in enumerate(targets):
            if path not in done:
                done.add(path)
                yield path, contiguous(made[number])


def contiguous(array: np.ndarray) -> np.ndarray:
    """A contiguous copy. Where the fastest axis is exchanged for another the copy goes tile by tile."""
    new = np.empty(array.shape, array.dtype)
    axes = [axis for axis in range(array.ndim) if array.shape[axis] > 1 and array.strides[axis]]
    nearest = sorted(axes, key=lambda axis: abs(array.strides[axis]))
    if not axes or nearest[0] == axes[-1]:
        new[...] = array
        return new
    steps, room = [1] * array.ndim, TILE
    for axis in dict.fromkeys((nearest[0], axes[-1], *nearest)):
        steps[axis] = max(1, min(array.shape[axis], SIDE, room))
        room //= steps[axis]
    starts = (range(0, size, step) for size, step in zip(array.shape, steps, strict=True))
    for corner in itertools.product(*starts):
        tile = tuple(slice(start, start + step) for start, step in zip(corner, steps, strict=True))
        # First in the order in which it lies: lines a power of two apart share few places of the cache.
        new[tile] = array[tile].copy(order="K")
    return new
