"""Trees of parameters and Optax states by dotted leaf path, and where torch's parameters lie in them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from equivalence.paths import ROOT, join
from equivalence.weights import Bound
from equivalence.weights import Mapping as Rules

Flat = dict[str, Any]
"""Arrays by leaf path."""

WRAPPERS = ("value", "raw_value")
"""What a framework's boxes (an `nnx.Param`) add to the end of a leaf's path."""


def by_path(tree: Any) -> Flat:
    """The arrays of a tree of parameters by dotted path; None and masked nodes are left out.

    >>> list(by_path({"fc": {"kernel": 1.0, "bias": None}}))
    ['fc.kernel']
    """
    return {join(_parts(keys)) or ROOT: leaf for keys, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def like(tree: Any, leaves: Mapping[str, Any]) -> Any:
    """A tree of the same structure that holds `leaves`."""
    keyed, structure = jax.tree_util.tree_flatten_with_path(tree)
    return jax.tree_util.tree_unflatten(structure, [leaves[join(_parts(keys)) or ROOT] for keys, _ in keyed])


def _parts(keys: tuple[Any, ...]) -> list[str]:
    parts = [plain(key) for key in keys]
    while len(parts) > 1 and parts[-1] in WRAPPERS:
        parts.pop()
    return parts


def plain(key: Any) -> str:
    """One step of a pytree path as text."""
    for name in ("key", "name", "idx"):
        if hasattr(key, name):
            return str(getattr(key, name))
    return str(key)


@dataclass(frozen=True)
class Entry:
    """One array of an Optax state: the field that holds it, the leaf it belongs to, the state that owns the field.

    `leaf` is '' for an array that belongs to no leaf (a counter that all of them share). `own` says that the leaf is
    named, and laid out, as in the reference; otherwise as in the port.
    """

    owner: str
    field: str
    leaf: str
    own: bool
    array: Any


def entries(state: Any, paths: Mapping[str, Any]) -> Iterator[Entry]:
    """Every array of an Optax state, in the order of its leaves.

    Args:
        state: any Optax state. A translated one names leaves first and fields after (`leaves.<path>...mu`), Optax's
            own ones fields first (`mu.<path>`).
        paths: the port's leaf paths.
    """
    for keys, value in jax.tree_util.tree_flatten_with_path(state)[0]:
        parts = _parts(keys)
        for number, part in enumerate(parts[:-1]):
            if part in ("leaves", "reference") and _owner(state, keys[:number]) == "TranslatedState":
                owner = _owner(state, keys[: len(parts) - 1])
                yield Entry(owner, parts[-1], parts[number + 1], part == "reference", value)
                break
        else:
            cut = next((c for c in range(1, len(parts)) if join(parts[c:]) in paths), len(parts))
            leaf = join(parts[cut:])
            yield Entry(_owner(state, keys[: cut - 1]), parts[cut - 1], leaf, False, value)


def _owner(node: Any, keys: tuple[Any, ...]) -> str:
    """The type of what a pytree path leads to."""
    for key in keys:
        if hasattr(key, "idx"):
            node = node[key.idx]
        elif hasattr(key, "name"):
            node = getattr(node, key.name)
        elif hasattr(key, "key"):
            try:
                node = node[key.key]
            except (TypeError, KeyError, IndexError):
                node = getattr(node, str(key.key))
    return type(node).__name__


@dataclass(frozen=True)
class Layout:
    """Where torch's parameters lie in the port's tree: a mapping bound to the leaves of both."""

    bound: Bound

    @classmethod
    def named_alike(cls, shapes: Mapping[str, tuple[int, ...]]) -> Layout:
        """The port holds torch's parameters under torch's names, in torch's layouts."""
        from equivalence.weights import Leaves, Rule

        leaves = Leaves(dict(shapes))
        return cls(Rules(Rule(path, path) for path in shapes).bind(leaves, leaves))

    def sources(self, leaf: str) -> tuple[str, ...]:
        """The torch parameters that a port leaf holds."""
        return tuple(
            self.bound.source.canonical(source)
            for move in self.bound.moves
            for source in move.sources
            if leaf in {self.bound.target.canonical(target) for target in move.targets}
        )

    def targets(self, name: str) -> tuple[str, ...]:
        """The port leaves that hold a torch parameter."""
        return tuple(
            self.bound.target.canonical(target)
            for move in self.bound.moves
            if name in {self.bound.source.canonical(source) for source in move.sources}
            for target in move.targets
        )

    def forward(self, leaves: Flat, gradient: bool = True) -> Flat:
        """Torch's leaves as the port's; moments and changes move as gradients do."""
        return self.bound.forward(leaves, gradient=gradient, stack=_stack(leaves))

    def backward(self, leaves: Flat, gradient: bool = True) -> Flat:
        """The port's leaves as torch's."""
        return self.bound.backward(leaves, gradient=gradient, stack=_stack(leaves))


def _stack(leaves: Flat) -> Any:
    return np.stack if all(isinstance(leaf, np.ndarray) for leaf in leaves.values()) else jnp.stack


def slots_in_reference(
    state: Any, layout: Layout, shapes: Mapping[str, tuple[int, ...]], as_values: frozenset[str] = frozenset()
) -> dict[str, Flat]:
    """An Optax state as field -> torch leaf -> array; what belongs to no leaf has the leaf ''. Traceable.

    Args:
        state: an Optax state whose trees are shaped like the port's parameters.
        layout: where torch's parameters lie in the port.
        shapes: the port's parameters.
        as_values: fields that move as parameters do (an average of them), not as gradients.
    """
    found: dict[str, Flat] = {}
    moving: dict[str, Flat] = {}
    for entry in entries(state, shapes):
        if entry.leaf == "" or entry.own:
            found.setdefault(entry.field, {}).setdefault(entry.leaf, entry.array)
        elif tuple(entry.array.shape) == tuple(shapes[entry.leaf]) and not _of_leaf(entry):
            moving.setdefault(entry.field, {}).setdefault(entry.leaf, entry.array)
        else:
            for name in layout.sources(entry.leaf):
                found.setdefault(entry.field, {}).setdefault(name, entry.array)
    for field, leaves in moving.items():
        found.setdefault(field, {}).update(layout.backward(leaves, field not in as_values))
    return found


def _of_leaf(entry: Entry) -> bool:
    """Whether an array is one number about a leaf rather than one number an element of it."""
    return bool(math.prod(entry.array.shape) == 1 and jnp.issubdtype(entry.array.dtype, jnp.integer))
