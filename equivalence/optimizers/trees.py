"""Trees of parameters and Optax states by dotted leaf path, and where torch's parameters lie in them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from equivalence.paths import ROOT, join
from equivalence.weights import Bound
from equivalence.weights import Mapping as Rules

Flat = dict[str, Any]
"""Arrays by leaf path."""

Shapes = Mapping[str, tuple[int, ...]]
"""Shapes by leaf path."""

STEPS_TAKEN = {
    "TranslatedState": "count",
    "ScaleByScheduleState": "count",
    "WrappedScheduleState": "count",
    "InjectHyperparamsState": "count",
    "InjectStatefulHyperparamsState": "count",
    "ScaleByPlateauState": "count",
    "MultiStepsState": "gradient_step",
    "WithAverageState": "step",
}
"""Fields of Optax states that count the optimizer's steps, as a schedule does, and not those of a leaf."""


def by_path(tree: Any) -> Flat:
    """The arrays of a tree of parameters by dotted path; None and masked nodes are left out.

    >>> list(by_path({"fc": {"kernel": 1.0, "bias": None}}))
    ['fc.kernel']
    """
    return {join(map(_step, keys)) or ROOT: leaf for keys, leaf in _keyed(tree)}


def shapes_of(leaves: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shapes of arrays by path."""
    return {path: tuple(jnp.shape(leaf)) for path, leaf in leaves.items()}


def like(tree: Any, leaves: Mapping[str, Any]) -> Any:
    """A tree of the same structure that holds `leaves`."""
    structure = jax.tree_util.tree_structure(tree)
    return jax.tree_util.tree_unflatten(structure, [leaves[path] for path in by_path(tree)])


def _keyed(tree: Any) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """The arrays of a tree with the keys that lead to them; a framework's box around an array is no step."""
    for keys, node in jax.tree_util.tree_flatten_with_path(tree, is_leaf=_boxed)[0]:
        for leaf in jax.tree_util.tree_leaves(node):
            yield keys, leaf if hasattr(leaf, "dtype") else np.asarray(leaf)


def _boxed(node: Any) -> bool:
    """Whether a node is an `nnx.Variable`, or array metadata of Linen's."""
    return hasattr(type(node), "get_raw_value") or hasattr(type(node), "replace_boxed")


def _step(key: Any) -> str:
    """One step of a pytree path as text."""
    return str(next((getattr(key, name) for name in ("key", "name", "idx") if hasattr(key, name)), key))


def nodes(tree: Any, kind: type) -> list[Any]:
    """The nodes of a type in a tree."""
    found = jax.tree_util.tree_leaves(tree, is_leaf=lambda node: isinstance(node, kind))
    return [node for node in found if isinstance(node, kind)]


@dataclass(frozen=True)
class Entry:
    """One array of an Optax state: the field that holds it, the leaf it belongs to, the state that owns the field.

    `leaf` is '' for an array that belongs to no leaf; a counter that leaves share belongs to `shared`, those of the
    state that it stands in ((): all). `own` says that the leaf is named, and laid out, as in the reference; otherwise
    as in the port. `translated`: it is inside the state of `to_optax`.
    """

    owner: str
    field: str
    leaf: str
    array: Any
    own: bool = False
    translated: bool = False
    shared: tuple[str, ...] = ()


def entries(state: Any, paths: Mapping[str, Any]) -> list[Entry]:
    """Every array of an Optax state, in the order of its leaves.

    Args:
        state: any Optax state. A translated one names leaves first and fields after (`leaves.<path>...mu`), Optax's
            own ones fields first (`mu.<path>`).
        paths: the port's leaves, or their shapes, by path.
    """
    found: list[tuple[tuple[str, ...], Entry]] = []
    for keys, array in _keyed(state):
        parts, owners = [_step(key) for key in keys] or ["state"], _owners(state, keys) or [""]
        top = owners.index("TranslatedState") if "TranslatedState" in owners else None
        if top is not None and parts[top] in ("leaves", "reference"):
            entry = Entry(owners[-1], parts[-1], parts[top + 1], array, parts[top] == "reference", True)
            found.append(((), entry))
        else:
            at, leaf = _place(keys, parts, array, paths)
            owner = owners[at - 1] if at and parts[at - 1] == "hyperparams" else owners[at]
            found.append((tuple(parts[:at]), Entry(owner, parts[at], leaf, array, translated=top is not None)))
    together: dict[tuple[str, ...], dict[str, None]] = {}
    for node, entry in found:
        if entry.leaf and not entry.own:
            together.setdefault(node, {})[entry.leaf] = None
    return [
        entry if entry.leaf else Entry(entry.owner, entry.field, "", entry.array, False, entry.translated, shared)
        for node, entry in found
        for shared in [tuple(together.get(node, ()))]
    ]


def _place(keys: tuple[Any, ...], parts: list[str], array: Any, paths: Mapping[str, Any]) -> tuple[int, str]:
    """The position of a field among the steps to an array, and the leaf that the steps after it name."""
    for cut in range(1, len(parts)):
        if join(parts[cut:]) in paths and not hasattr(keys[cut - 1], "idx"):
            return cut - 1, join(parts[cut:])
    if set(paths) == {ROOT} and "hyperparams" not in parts and jnp.issubdtype(array.dtype, jnp.inexact):
        shape = getattr(paths[ROOT], "shape", paths[ROOT])
        return len(parts) - 1, ROOT if tuple(array.shape) == tuple(shape) else ""
    return len(parts) - 1, ""


def _owners(node: Any, keys: tuple[Any, ...]) -> list[str]:
    """The types of what the steps of a pytree path start from."""
    found = []
    for key in keys:
        found.append(type(node).__name__)
        if hasattr(key, "idx"):
            node = node[key.idx]
        elif hasattr(key, "name"):
            node = getattr(node, key.name)
        elif hasattr(key, "key"):
            try:
                node = node[key.key]
            except (TypeError, KeyError, IndexError):
                node = getattr(node, str(key.key), None)
    return found


@dataclass(frozen=True)
class Layout:
    """Where torch's parameters lie in the port's tree: a mapping bound to the leaves of both."""

    bound: Bound

    @classmethod
    def named_alike(cls, shapes: Shapes) -> Layout:
        """The port holds torch's parameters under torch's names, in torch's layouts."""
        from equivalence.weights import Leaves, Rule

        leaves = Leaves(dict(shapes))
        return cls(Rules(Rule(path, path) for path in shapes).bind(leaves, leaves))

    @cached_property
    def moves(self) -> tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]:
        """The torch parameters and the port leaves of every move."""
        source, target = self.bound.source, self.bound.target
        return tuple(
            (tuple(map(source.canonical, move.sources)), tuple(map(target.canonical, move.targets)))
            for move in self.bound.moves
        )

    @cached_property
    def _sources(self) -> dict[str, tuple[str, ...]]:
        return {target: sources for sources, targets in reversed(self.moves) for target in targets}

    @cached_property
    def _targets(self) -> dict[str, tuple[str, ...]]:
        return {source: targets for sources, targets in reversed(self.moves) for source in sources}

    def sources(self, leaf: str) -> tuple[str, ...]:
        """The torch parameters that a port leaf holds."""
        return self._sources.get(leaf, ())

    def targets(self, name: str) -> tuple[str, ...]:
        """The port leaves that hold a torch parameter."""
        return self._targets.get(name, ())

    def forward(self, leaves: Mapping[str, Any], gradient: bool = True) -> Flat:
        """Torch's leaves as the port's; moments and changes move as gradients do."""
        return self.bound.forward(leaves, gradient=gradient, stack=_stack(leaves))

    def backward(self, leaves: Mapping[str, Any], gradient: bool = True) -> Flat:
        """The port's leaves as torch's."""
        return self.bound.backward(leaves, gradient=gradient, stack=_stack(leaves))


def _stack(leaves: Mapping[str, Any]) -> Any:
    return np.stack if all(isinstance(leaf, np.ndarray) for leaf in leaves.values()) else jnp.stack


def slots_in_reference(
    state: Any, layout: Layout, shapes: Shapes, as_values: frozenset[str] = frozenset()
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
    # counters of steps come last: they stand for those of leaves where a state has no others
    for entry in sorted(entries(state, shapes), key=lambda entry: STEPS_TAKEN.get(entry.owner) == entry.field):
        leaves = found.setdefault(entry.field, {})
        if entry.leaf == "" or entry.own:
            leaves.setdefault(entry.leaf, entry.array)
            if 0 < len(entry.shared) < len(shapes):
                leaves.update({name: entry.array for leaf in entry.shared for name in layout.sources(leaf)})
        elif tuple(entry.array.shape) == tuple(shapes[entry.leaf]) and not _of_leaf(entry):
            moving.setdefault(entry.field, {}).setdefault(entry.leaf, entry.array)
        else:
            for name in layout.sources(entry.leaf):
                leaves.setdefault(name, entry.array)
    for field, moved in moving.items():
        found[field].update(layout.backward(moved, field not in as_values))
    return {field: leaves for field, leaves in found.items() if leaves}


def _of_leaf(entry: Entry) -> bool:
    """Whether an array is one number about a leaf rather than one number an element of it."""
    return bool(math.prod(entry.array.shape) == 1 and jnp.issubdtype(entry.array.dtype, jnp.integer))
