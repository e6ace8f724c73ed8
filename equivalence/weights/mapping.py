"""Mappings: all rules of a pair, bound to the leaves of both models; total, invertible, or an error that lists why."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from collections.abc import Mapping as MappingOf
from dataclasses import dataclass, field

import numpy as np

from equivalence.errors import MappingError, nearest
from equivalence.paths import natural
from equivalence.weights.rules import Array, Move, Rule, fill, holes, matcher

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Leaves:
    """The leaves of one model: shape by canonical path, and aliases (tied leaves) to canonical paths."""

    shapes: MappingOf[str, Shape]
    aliases: MappingOf[str, str] = field(default_factory=dict)

    def names(self) -> list[str]:
        """Every name a rule may use, aliases included, in natural order."""
        return sorted({*self.shapes, *self.aliases}, key=natural)

    def canonical(self, path: str) -> str:
        """The path under which a leaf is stored."""
        return self.aliases.get(path, path)

    def shape(self, path: str) -> Shape:
        """The shape of a leaf or of an alias."""
        return self.shapes[self.canonical(path)]


class Mapping:
    """The rules that carry a reference's leaves to a port.

    >>> mapping = Mapping([Rule("fc.weight", "fc.kernel", "o k -> k o")])
    >>> bound = mapping.bind(Leaves({"fc.weight": (2, 3)}), Leaves({"fc.kernel": (3, 2)}))
    >>> bound.forward({"fc.weight": np.ones((2, 3))})["fc.kernel"].shape
    (3, 2)
    """

    def __init__(self, rules: Iterable[Rule]) -> None:
        self.rules = tuple(rules)

    def inverse(self) -> Mapping:
        """The mapping from the port to the reference."""
        return Mapping(rule.inverse() for rule in self.rules)

    def __repr__(self) -> str:
        return "Mapping([\n" + "".join(f"    {rule!r},\n" for rule in self.rules) + "])"

    def about(self, source: Leaves, target: Leaves) -> Mapping:
        """The rules that match any of these leaves: a model's mapping cut down to its parameters."""

        def concerns(rule: Rule) -> bool:
            sides = ((rule.source, source), (rule.target, target))
            return any(_matches(template, leaves, dict(rule.values)) for template, leaves in sides)

        return Mapping(rule for rule in self.rules if concerns(rule))

    def bind(self, source: Leaves, target: Leaves) -> Bound:
        """Resolve every rule against the leaves of both models.

        Every source leaf is claimed exactly once and every target leaf produced exactly once; tied leaves may be
        named under any of their names. Raises MappingError with all problems in one message.
        """
        moves, problems = self._moves(source, target)
        claimed = [path for move in moves for path in move.sources]
        produced = [path for move in moves for path in move.targets]
        problems += _totality("reference", source, claimed, "claimed", produced)
        problems += _totality("port", target, produced, "produced", claimed)
        if problems:
            raise MappingError("the mapping does not fit: " + "; ".join(problems))
        return Bound(tuple(moves), source, target)

    def bind_part(self, source: Leaves, target: Leaves) -> Bound:
        """Resolve rules that are about some leaves only. Raises MappingError where one does not fit."""
        moves, problems = self._moves(source, target)
        if problems:
            raise MappingError("; ".join(problems))
        return Bound(tuple(moves), source, target)

    def _moves(self, source: Leaves, target: Leaves) -> tuple[list[Move], list[str]]:
        problems: list[str] = []
        moves: list[Move] = []
        for rule in self.rules:
            try:
                moves += _bind(rule, source, target)
            except MappingError as error:
                problems.append(str(error))
        return moves, problems


def _totality(side: str, leaves: Leaves, used: Sequence[str], verb: str, others: Sequence[str]) -> list[str]:
    problems = []
    for path in sorted({path for path in used if used.count(path) > 1}, key=natural):
        problems.append(f"{side} leaf {path} is {verb} {used.count(path)} times")
    reached = {leaves.canonical(path) for path in used}
    for path in sorted(set(leaves.shapes) - reached, key=natural):
        near = nearest(path, others, 1)
        hint = f" (nearest on the other side: {near[0]})" if near else ""
        problems.append(f"{side} leaf {path} {tuple(leaves.shapes[path])} is not {verb}{hint}")
    return problems


def _bind(rule: Rule, source: Leaves, target: Leaves) -> list[Move]:
    values = dict(rule.values)
    found_source = _matches(rule.source, source, values)
    found_target = _matches(rule.target, target, values)
    for side, template, found, leaves in (
        ("reference", rule.source, found_source, source),
        ("port", rule.target, found_target, target),
    ):
        if template is not None and not found:
            near = nearest(template, leaves.names(), 2)
            raise MappingError(f"{rule} matches no {side} leaf" + (f" (nearest: {', '.join(near)})" if near else ""))
    if rule.source is None:
        return [Move(rule, (), (path,)) for path in found_target.values()]
    if rule.target is None:
        return [Move(rule, (path,), ()) for path in found_source.values()]
    names_source, names_target = holes(rule.source), holes(rule.target)
    shared = [name for name in names_source if name in names_target]
    only_source = list(dict.fromkeys(name for name in names_source if name not in shared))
    only_target = list(dict.fromkeys(name for name in names_target if name not in shared))
    moves = []
    for key, inner_source in _grouped(found_source, names_source, shared).items():
        inner_target = _grouped(found_target, names_target, shared).get(key)
        if inner_target is None:
            binding = dict(zip(shared, key, strict=True))
            wanted = rule.target if only_target else fill(rule.target, binding)
            near = nearest(wanted, target.names(), 2)
            raise MappingError(
                f"{rule} matches {', '.join(inner_source.values())} but the port has no leaf {wanted}"
                + (f" (nearest: {', '.join(near)})" if near else "")
            )
        moves.append(
            _move(
                rule,
                _grid(rule, inner_source, names_source, only_source, values, "reference"),
                _grid(rule, inner_target, names_target, only_target, values, "port"),
                source,
                target,
                (only_source, only_target),
            )
        )
    return moves


def _matches(template: str | None, leaves: Leaves, values: dict[str, tuple[str, ...]]) -> dict[tuple[str, ...], str]:
    """Paths that a template matches, by the values of its holes, in natural order."""
    if template is None:
        return {}
    if not holes(template):
        return {(): template} if template in leaves.shapes or template in leaves.aliases else {}
    pattern, names, found = matcher(template, values), holes(template), {}
    for path in leaves.names():
        match = pattern.fullmatch(path)
        if match:
            found[tuple(match.group(name) for name in names)] = path
    return found


def _grouped(
    found: dict[tuple[str, ...], str], names: list[str], shared: list[str]
) -> dict[tuple[str, ...], dict[tuple[str, ...], str]]:
    """Matches grouped by the values of the shared holes."""
    grouped: dict[tuple[str, ...], dict[tuple[str, ...], str]] = {}
    for binding, path in found.items():
        bound = dict(zip(names, binding, strict=True))
        grouped.setdefault(tuple(bound[name] for name in shared), {})[binding] = path
    return grouped


def _grid(
    rule: Rule,
    found: dict[tuple[str, ...], str],
    names: list[str],
    own: list[str],
    values: dict[str, tuple[str, ...]],
    side: str,
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """The leaves over the full product of a side's own holes, row-major, with the number of values of each."""
    by_own: dict[tuple[str, ...], str] = {}
    for binding, path in found.items():
        bound = dict(zip(names, binding, strict=True))
        by_own[tuple(bound[name] for name in own)] = path
    axes = [
        values.get(name) or tuple(sorted({key[number] for key in by_own}, key=natural))
        for number, name in enumerate(own)
    ]
    grid = list(itertools.product(*axes))
    missing = [", ".join(f"{n}={v}" for n, v in zip(own, key, strict=True)) for key in grid if key not in by_own]
    if missing:
        raise MappingError(f"{rule}: the {side} has no leaf for {'; '.join(missing)}")
    return tuple(by_own[key] for key in grid), tuple(len(axis) for axis in axes)


def _move(
    rule: Rule,
    left: tuple[tuple[str, ...], tuple[int, ...]],
    right: tuple[tuple[str, ...], tuple[int, ...]],
    source: Leaves,
    target: Leaves,
    own: tuple[list[str], list[str]],
) -> Move:
    (sources, source_sizes), (targets, target_sizes) = left, right
    shapes_source = {tuple(source.shape(path)) for path in sources}
    shapes_target = {tuple(target.shape(path)) for path in targets}
    if len(shapes_source) > 1 or len(shapes_target) > 1:
        raise MappingError(f"{rule} joins leaves of different shapes: {sorted(shapes_source | shapes_target)}")
    shape_source, shape_target = shapes_source.pop(), shapes_target.pop()
    sides = rule.sides()
    if sides is None:
        if shape_source != shape_target:
            raise MappingError(f"{sources[0]} {shape_source} does not fit {targets[0]} {shape_target} without axes")
        return Move(rule, sources, targets)
    axes_source = tuple(sides[0].index([name]) for name in own[0])
    axes_target = tuple(sides[1].index([name]) for name in own[1])
    full_source = _with_axes(shape_source, axes_source, source_sizes)
    full_target = _with_axes(shape_target, axes_target, target_sizes)
    lengths = solve(rule, sides, (full_source, full_target), (sources[0], targets[0]))
    return Move(rule, sources, targets, source_sizes, target_sizes, axes_source, axes_target, tuple(lengths.items()))


def _with_axes(shape: Shape, axes: Sequence[int], sizes: Sequence[int]) -> Shape:
    whole = list(shape)
    for axis, size in sorted(zip(axes, sizes, strict=True)):
        whole.insert(axis, size)
    return tuple(whole)


def solve(
    rule: Rule, sides: tuple[list[list[str]], list[list[str]]], shapes: tuple[Shape, Shape], paths: tuple[str, str]
) -> dict[str, int]:
    """The length of every axis of a pattern, from the shapes of both sides."""
    for side, shape, path in zip(sides, shapes, paths, strict=True):
        if len(side) != len(shape):
            raise MappingError(f"{rule}: {path} {shape} has {len(shape)} axes, the pattern names {len(side)}")
    lengths: dict[str, int] = dict(rule.lengths)
    rows = [row for side, shape in zip(sides, shapes, strict=True) for row in zip(side, shape, strict=True)]
    for _ in range(len(rows)):
        for axes, size in rows:
            unknown = [axis for axis in axes if axis not in lengths]
            known = math.prod(lengths[axis] for axis in axes if axis in lengths)
            if len(unknown) == 1 and known and size % known == 0:
                lengths[unknown[0]] = size // known
    if any(math.prod(lengths.get(axis, 0) for axis in axes) != size for axes, size in rows):
        left = list(dict.fromkeys(axis for axes, _ in rows for axis in axes if axis not in lengths))
        hint = f" (the shapes leave {', '.join(left)} open: give lengths, {left[0]}=...)" if len(left) > 1 else ""
        raise MappingError(f"{paths[0]} {shapes[0]} does not fit {paths[1]} {shapes[1]} by {rule.axes!r}{hint}")
    return lengths


@dataclass(frozen=True)
class Bound:
    """A mapping resolved on two models. Moves dictionaries of arrays both ways, NumPy or JAX."""

    moves: tuple[Move, ...]
    source: Leaves
    target: Leaves

    def forward(
        self,
        arrays: MappingOf[str, Array],
        *,
        gradient: bool = False,
        stack: Callable[..., Array] = np.stack,
    ) -> dict[str, Array]:
        """Reference leaves -> port leaves, under canonical paths. Leaves that are not given are not produced."""
        new: dict[str, Array] = {}
        for move in self.moves:
            paths = [self.source.canonical(path) for path in move.sources]
            if not paths or any(path not in arrays for path in paths):
                continue
            for path, array in zip(move.targets, move.run([arrays[p] for p in paths], stack, gradient), strict=False):
                new.setdefault(self.target.canonical(path), array)
        return new

    def backward(
        self,
        arrays: MappingOf[str, Array],
        *,
        gradient: bool = False,
        stack: Callable[..., Array] = np.stack,
    ) -> dict[str, Array]:
        """Port leaves -> reference leaves, under canonical paths."""
        return self.inverse().forward(arrays, gradient=gradient, stack=stack)

    def inverse(self) -> Bound:
        """The same mapping, read from the port."""
        moves = tuple(
            Move(
                move.rule.inverse(),
                move.targets,
                move.sources,
                move.target_sizes,
                move.source_sizes,
                move.target_axes,
                move.source_axes,
                move.lengths,
            )
            for move in self.moves
        )
        return Bound(moves, self.target, self.source)

    def pairs(self) -> list[dict[str, str | None]]:
        """The JSON contract's `mapping`: one entry a pair of leaves."""
        found: list[dict[str, str | None]] = []
        for move in self.moves:
            for source, target in itertools.product(move.sources or ("",), move.targets or ("",)):
                found.append({"source": source, "target": target, "axes": move.rule.axes})
        return found

    def targets_of(self, path: str) -> tuple[str, ...]:
        """The port leaves that a reference leaf goes to."""
        return tuple(t for move in self.moves if path in move.sources for t in move.targets)

    def without_counterpart(self) -> tuple[list[str], list[str]]:
        """Leaves that the rules declare to exist on one side only: (reference, port)."""
        return (
            [path for move in self.moves if not move.targets for path in move.sources],
            [path for move in self.moves if not move.sources for path in move.targets],
        )
