"""Copying leaves one at a time: the arrays that a mapping makes, contiguous, and no third model in memory."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from equivalence.weights import Leaves, Mapping, Rule
from equivalence.weights.copying import contiguous, copied


@given(
    shape=st.lists(st.integers(0, 6) | st.sampled_from((129, 300)), min_size=0, max_size=3).map(tuple),
    order=st.randoms(),
    flip=st.booleans(),
)
def test_a_contiguous_copy_is_the_array(shape: tuple[int, ...], order: object, flip: bool) -> None:
    axes = list(range(len(shape)))
    order.shuffle(axes)  # type: ignore[attr-defined]
    array = np.arange(np.prod(shape, dtype=int), dtype=np.float32).reshape(shape).transpose(axes)
    if flip and array.ndim:
        array = array[::-1]
    made = contiguous(array)
    assert made.flags.c_contiguous
    assert not np.shares_memory(made, array)
    np.testing.assert_array_equal(made, array)


RULES = [
    Rule("h.{i}.qkv", "h_{i}.{s}", "(s h d) e -> s e h d", s=("q", "k", "v"), h=2),
    Rule("h.{i}.down", "mlp.down", "i o k -> i k o"),
    Rule("head", "head", "o k -> k o"),
]
OURS = Leaves({"h.0.qkv": (12, 5), "h.1.qkv": (12, 5), "h.0.down": (5, 7), "h.1.down": (5, 7), "head": (300, 5)})
THEIRS = Leaves({f"h_{i}.{s}": (5, 2, 2) for i in range(2) for s in "qkv"} | {"mlp.down": (2, 7, 5), "head": (5, 300)})


def test_copied_leaves_are_those_of_the_mapping() -> None:
    rng = np.random.default_rng(0)
    arrays = {path: rng.standard_normal(shape) for path, shape in OURS.shapes.items()}
    bound = Mapping(RULES).bind(OURS, THEIRS)
    made, wanted = dict(copied(bound, arrays)), bound.forward(arrays)
    assert made.keys() == wanted.keys()
    for path, array in wanted.items():
        np.testing.assert_array_equal(made[path], array)
        assert made[path].flags.c_contiguous


def test_a_leaf_that_is_not_given_is_not_made() -> None:
    bound = Mapping(RULES).bind(OURS, THEIRS)
    assert [path for path, _ in copied(bound, {"head": np.ones((300, 5))})] == ["head"]


@pytest.mark.parametrize("axes", ["o k -> k o", None])
def test_no_more_than_the_copy_and_one_leaf_is_held(axes: str | None) -> None:
    count, side = 8, 256
    mapping = Mapping([Rule("{i}.w", "{i}.k", axes)])
    leaves = (Leaves({f"{i}.{name}": (side, side) for i in range(count)}) for name in "wk")
    bound = mapping.bind(*leaves)
    arrays = {f"{i}.w": np.ones((side, side), np.float32) for i in range(count)}
    tracemalloc.start()
    made = dict(copied(bound, arrays))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    leaf = 4 * side**2
    assert len(made) == count
    assert peak < (count + 1.5) * leaf
