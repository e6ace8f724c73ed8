"""Modules as inference sees them: leaves by role, fused and stacked ones too, and the rules that could join two."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable
from collections.abc import Mapping as MappingOf
from dataclasses import dataclass

from equivalence.paths import natural
from equivalence.weights.layouts import Layout, Shape, fused, layouts
from equivalence.weights.mapping import Leaves
from equivalence.weights.naming import FAMILIES, PLACES, STATISTICS, concepts, read
from equivalence.weights.rules import Rule

STACK = "n"
"""The hole of layers that one side keeps along a leading axis."""
FUSE = "s"
"""The hole of projections that one side keeps in one leaf."""


@dataclass(frozen=True)
class Leaf:
    """What one side of a rule may name: a leaf, or leaves of one shape that differ in the values of holes."""

    template: str
    shape: Shape
    paths: tuple[str, ...]
    holes: tuple[tuple[str, tuple[str, ...]], ...] = ()
    """Outermost first: hole and values, row-major over `paths`."""

    @property
    def last(self) -> str:
        """The last part of the path."""
        return self.template.rpartition(".")[2]


@dataclass(frozen=True)
class Module:
    """Leaves with one parent, by role. `kind` is the torch layer type, empty on the port's side."""

    words: tuple[str, ...]
    numbers: tuple[int, ...]
    leaves: MappingOf[str, Leaf]
    kind: str = ""
    optional: bool = False
    """Whether it holds other names of leaves that have one already."""

    @property
    def sort(self) -> tuple[tuple[str, int], ...]:
        """The roles it has, with their ranks: what tells a convolution from a norm on either side."""
        return tuple(sorted((role, len(leaf.shape)) for role, leaf in self.leaves.items()))

    @property
    def shapes(self) -> tuple[tuple[str, Shape], ...]:
        """The shape of each role's leaf."""
        return tuple(sorted((role, leaf.shape) for role, leaf in self.leaves.items()))

    @property
    def paths(self) -> frozenset[str]:
        """Every leaf path."""
        return frozenset(path for leaf in self.leaves.values() for path in leaf.paths)


def modules(leaves: Leaves, kinds: MappingOf[str, str], skipped: Iterable[str] = ()) -> list[Module]:
    """The modules of one side, in the order of their first leaf. Statistics are modules of their own (Linen keeps them
    in another collection), and so are leaves whose own name says more than a role (`in_proj_weight`, `cls_token`)."""
    gone = set(skipped)
    crowded = _crowded([*leaves.shapes, *leaves.aliases])
    found: dict[tuple[object, ...], dict[str, Leaf]] = {}
    for path in [*leaves.shapes, *leaves.aliases]:
        if path in gone:
            continue
        parent = path.rpartition(".")[0]
        name = read(path, parent.rpartition(".")[0] not in crowded)
        key: tuple[object, ...] = (parent, name.words, name.numbers, name.role in STATISTICS, path in leaves.aliases)
        while name.role in found.get(key, {}):
            key = (key, "and")  # a second leaf of one role: `kernel` beside `weight`
        found.setdefault(key, {})[name.role] = Leaf(path, tuple(leaves.shape(path)), (path,))
    made = []
    for held in found.values():
        first = next(iter(held.values())).template
        name = read(first, first.rpartition(".")[0].rpartition(".")[0] not in crowded)
        made.append(Module(name.words, name.numbers, held, kinds.get(first, ""), first in leaves.aliases))
    return made


def _crowded(paths: Iterable[str]) -> set[str]:
    """Blocks of more than two norms, of which no name (`ffn_norm`) implies which it is."""
    norms: dict[str, set[str]] = {}
    for path in paths:
        owner = path.rpartition(".")[0]
        words = [word for word in read(path).words if word not in PLACES]
        if words and "norm" in concepts(words[-1]):
            norms.setdefault(owner.rpartition(".")[0], set()).add(owner)
    return {block for block, held in norms.items() if len(held) > 2}


def stacked(found: Iterable[Module]) -> list[Module]:
    """Modules that differ in one number and are alike in everything else, as one whose leaves gain a leading axis."""
    groups: dict[tuple[object, ...], tuple[int, list[Module]]] = {}
    for module in found:
        for place in range(len(module.numbers)):
            rest = module.numbers[:place] + module.numbers[place + 1 :]
            groups.setdefault((place, module.words, rest, module.kind, module.shapes), (place, []))[1].append(module)
    made = []
    for place, members in groups.values():
        if len(members) > 1:
            members.sort(key=lambda module: module.numbers[place])
            joined = _joined(members, STACK, tuple(str(module.numbers[place]) for module in members))
            if joined is not None:
                at = [i for i, word in enumerate(joined.words) if word in PLACES][place]
                rest = joined.numbers[:place] + joined.numbers[place + 1 :]
                made.append(dataclasses.replace(joined, words=joined.words[:at] + joined.words[at + 1 :], numbers=rest))
    return made


def fusible(found: Iterable[Module]) -> list[Module]:
    """Modules that differ in one word of a family (query, key, value), as one named as the fused leaf is."""
    listed, made = list(found), []
    for family, parts in FAMILIES.items():
        groups: dict[object, tuple[tuple[str, ...], dict[str, Module]]] = {}
        for module in listed:
            for place, word in enumerate(module.words):
                part = next((part for part in parts if part == word or part in concepts(word)), None)
                if part is not None:
                    before, after = module.words[:place], module.words[place + 1 :]
                    key = before, after, module.numbers, module.shapes, module.kind
                    groups.setdefault(key, ((*before, family, *after), {}))[1][part] = module
        for words, members in groups.values():
            joined = _joined([members[p] for p in parts], FUSE, None) if len(members) == len(parts) else None
            if joined is not None:
                made.append(dataclasses.replace(joined, words=words))
    return made


def _joined(members: list[Module], hole: str, values: tuple[str, ...] | None) -> Module | None:
    """Modules as one, role by role; None where their paths differ in more than one place."""
    held = {}
    for role in members[0].leaves:
        made = _with_hole([module.leaves[role] for module in members], hole, values)
        if made is None:
            return None
        held[role] = made
    return dataclasses.replace(members[0], leaves=held)


def _with_hole(members: list[Leaf], hole: str, values: tuple[str, ...] | None) -> Leaf | None:
    """The template of leaves that differ inside one part of their paths, with a hole there."""
    split = [leaf.template.split(".") for leaf in members]
    if len({len(parts) for parts in split}) > 1 or len({leaf.holes for leaf in members}) > 1:
        return None
    places = [place for place, parts in enumerate(zip(*split, strict=True)) if len(set(parts)) > 1]
    if len(places) != 1:
        return None
    place = places[0]
    texts = [parts[place] for parts in split]
    start = _shared(texts)
    end = _shared([text[start:][::-1] for text in texts])
    middles = tuple(text[start : len(text) - end] for text in texts)
    while values is not None and start and any(m != v for m, v in zip(middles, values, strict=True)):
        start -= 1  # layers_10 and layers_11 share a digit
        middles = tuple(text[start : len(text) - end] for text in texts)
    if not all(middles) or len(set(middles)) < len(middles):
        return None
    parts = list(split[0])
    parts[place] = texts[0][:start] + "{" + hole + "}" + texts[0][len(texts[0]) - end :]
    paths = tuple(path for leaf in members for path in leaf.paths)
    return Leaf(".".join(parts), members[0].shape, paths, ((hole, middles), *members[0].holes))


def _shared(texts: list[str]) -> int:
    """How many characters texts begin with in common."""
    alike = (len(set(letters)) == 1 for letters in zip(*texts, strict=False))
    return sum(1 for _ in itertools.takewhile(bool, alike))


def partners(ours: Module, theirs: Module) -> list[tuple[str, str]]:
    """Which role of one module is which of the other; none where a leaf of either would have no partner.

    A bare parameter may be the one weight of a module on the other side: `pos_embed` and `pos_embed.embedding`.
    """
    if set(ours.leaves) == set(theirs.leaves):
        return [(role, role) for role in ours.leaves]
    if len(ours.leaves) == len(theirs.leaves) == 1 and {*ours.leaves, *theirs.leaves} == {"value", "weight"}:
        return [(next(iter(ours.leaves)), next(iter(theirs.leaves)))]
    return []


def rules(ours: Module, theirs: Module, role: str, other_role: str) -> list[tuple[str, Rule]]:
    """Every rule that could join a leaf of one module to one of the other, likely ones first, each after its layout
    (the same for fused and stacked leaves as for plain ones); none where nothing fits."""
    left, right = ours.leaves[role], theirs.leaves[other_role]
    words = (*ours.words, *theirs.words)
    own = [tuple(hole for hole, _ in leaf.holes) for leaf in (left, right)]
    common = [hole for hole in own[0] if hole in own[1]]
    base, other, joins = list(left.shape), list(right.shape), []
    for leaf, mine, source, shape in ((right, own[1], True, base), (left, own[0], False, other)):
        for hole, values in leaf.holes:
            if hole in common:
                continue
            joins.append((hole, len(values), source))
            if hole == STACK:
                if not shape or shape[0] != len(values):
                    return []
                del shape[0]
        if FUSE in mine and FUSE not in common:
            # a fused leaf holds its layers along the outputs: torch's first axis (a Conv1D's last), a kernel's last
            last = ours.kind == "Conv1D" if source else right.last == "kernel"
            spot = len(shape) - 1 if last else 0
            count = len(dict(leaf.holes)[FUSE])
            if not shape or shape[spot] % count:
                return []
            shape[spot] //= count
    found = []
    for layout in layouts(
        ours.kind, role if role == other_role else "value", right.last, words, tuple(base), tuple(other)
    ):
        label = layout.axes if layout.change is None else f"{layout.axes} {layout.change.name}"
        for hole, count, source in sorted(joins, key=lambda join: join[0] == STACK):
            layout = _stack(layout, hole) if hole == STACK else fused(layout, hole, count, source)
        named = {h: v for leaf in (left, right) for h, v in leaf.holes if not all(x.isdigit() for x in v)}
        axes = None if layout.plain and not joins else layout.axes
        found.append((label, Rule(left.template, right.template, axes, layout.change, **named)))
    return found


def _stack(layout: Layout, hole: str) -> Layout:
    left, _, right = layout.axes.partition(" -> ")
    return Layout(f"{hole} {left} -> {hole} {right}", layout.change)


def key_of(rule: Rule) -> tuple[str, str]:
    """What a rule is sorted by."""
    return rule.source or "", rule.target or ""


def ordered(found: Iterable[Rule]) -> list[Rule]:
    """Rules in the natural order of their sources."""
    return sorted(found, key=lambda rule: tuple(map(natural, key_of(rule))))
