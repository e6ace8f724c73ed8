"""Dotted leaf paths, their natural order, and trees of arrays flattened to them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

ROOT = "output"
"""The path of a tree that is one bare array."""


def natural(path: str) -> tuple[tuple[int, int | str], ...]:
    """Sort key under which `layers.2` comes before `layers.10`.

    >>> sorted(["h.10.w", "h.2.w", "h.x"], key=natural)
    ['h.2.w', 'h.10.w', 'h.x']
    """
    return tuple((0, int(part)) if part.isdigit() else (1, part) for part in re.split(r"(\d+)", path) if part)


def join(parts: Iterable[Any]) -> str:
    """The dotted path of a sequence of keys."""
    return ".".join(str(part) for part in parts)


def parent(path: str) -> str:
    """The module a leaf belongs to; empty for a leaf of the root.

    >>> parent("blocks.0.weight"), parent("weight")
    ('blocks.0', '')
    """
    return path.rpartition(".")[0]


def children(tree: Any) -> Iterator[tuple[str, Any]] | None:
    """The named children of one container, or None for a leaf.

    Containers are mappings, tuples (named ones too), lists and dataclass instances; keys of a mapping keep
    their order.
    """
    if isinstance(tree, Mapping):
        return ((str(key), value) for key, value in tree.items())
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return ((name, getattr(tree, name)) for name in tree._fields)
    if isinstance(tree, (tuple, list)):
        return ((str(number), value) for number, value in enumerate(tree))
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type) and not hasattr(tree, "shape"):
        return ((item.name, getattr(tree, item.name)) for item in dataclasses.fields(tree))
    return None


def flatten(tree: Any) -> dict[str, Any]:
    """Every leaf of a tree by its dotted path, in order; None leaves are left out.

    >>> flatten({"a": (1, 2), "b": None})
    {'a.0': 1, 'a.1': 2}
    >>> flatten(3)
    {'output': 3}
    """
    found: dict[str, Any] = {}

    def walk(node: Any, path: tuple[str, ...]) -> None:
        inside = children(node)
        if inside is not None:
            for key, value in inside:
                walk(value, (*path, key))
        elif node is not None:
            found[join(path) or ROOT] = node

    walk(tree, ())
    return found


def rebuild(tree: Any, leaf: Callable[[str, Any], Any]) -> Any:
    """The same tree with every leaf replaced by `leaf(path, value)`; None stays None."""

    def walk(node: Any, path: tuple[str, ...]) -> Any:
        inside = children(node)
        if inside is None:
            return None if node is None else leaf(join(path) or ROOT, node)
        new = {key: walk(value, (*path, key)) for key, value in inside}
        if isinstance(node, Mapping):
            plain = dict(zip(node.keys(), new.values(), strict=True))
            return plain if type(node) is dict else type(node)(plain)  # type: ignore[call-arg]
        if isinstance(node, tuple) and hasattr(node, "_fields"):
            return type(node)(**new)
        if isinstance(node, (tuple, list)):
            return type(node)(new.values())
        return dataclasses.replace(node, **new)

    return walk(tree, ())


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dictionaries of dotted paths.

    >>> unflatten({"a.b": 1, "a.c": 2})
    {'a': {'b': 1, 'c': 2}}
    """
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *inner, last = path.split(".")
        node = tree
        for part in inner:
            node = node.setdefault(part, {})
        node[last] = value
    return tree
