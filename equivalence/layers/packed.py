"""Sequences of unequal lengths, packed as torch packs them: step after step, the longest sequence first."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Packed(NamedTuple):
    """torch's PackedSequence with JAX arrays, a pytree whose `batch_sizes` are static under jit.

    https://docs.pytorch.org/docs/stable/generated/torch.nn.utils.rnn.PackedSequence.html

    Attributes:
        data: the elements (sum of lengths, features).
        batch_sizes: how many sequences reach each step, NumPy.
        sorted_indices: the caller's number of each sequence in the packed order; None where they were sorted before.
        unsorted_indices: its inverse.
    """

    data: Any
    batch_sizes: Any
    sorted_indices: Any = None
    unsorted_indices: Any = None


def _flatten(packed: Any) -> tuple[tuple[Any, ...], tuple[int, ...]]:
    return (packed[0], *packed[2:]), tuple(int(size) for size in packed[1])


def _unflatten(sizes: tuple[int, ...], arrays: tuple[Any, ...]) -> Packed:
    return Packed(arrays[0], np.asarray(sizes, np.int64), *arrays[1:])


jax.tree_util.register_pytree_node(Packed, _flatten, _unflatten)


@functools.cache
def accept_torch() -> None:
    """Let JAX's tree functions take torch's PackedSequence, which they turn into a `Packed`."""
    from torch.nn.utils.rnn import PackedSequence

    kind: Any = PackedSequence
    jax.tree_util.register_pytree_node(kind, _flatten, _unflatten)


def rows(lengths: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """The (step, sequence) of every packed element, for sequences of these lengths in any order.

    >>> rows((1, 2))
    (array([0, 0, 1]), array([1, 0, 1]))
    """
    known = np.asarray(lengths, np.int64)
    order = np.argsort(-known, kind="stable")
    reached = [order[known[order] > step] for step in range(known.max(initial=0))]
    steps = np.repeat(np.arange(len(reached)), [len(some) for some in reached])
    return steps, np.concatenate([np.zeros(0, np.int64), *reached])


def padded(packed: Packed) -> tuple[Any, tuple[int, ...]]:
    """The packed elements as (steps, sequences, features), zeros after each end, and the lengths."""
    sizes = np.asarray(packed.batch_sizes)
    lengths = tuple(int(length) for length in (sizes[None] > np.arange(sizes.max(initial=0))[:, None]).sum(1))
    empty = jnp.zeros((len(sizes), len(lengths), *packed.data.shape[1:]), packed.data.dtype)
    return empty.at[rows(lengths)].set(packed.data), lengths
