"""Rules in the fewest that say the same: `h.{i}.attn.weight` for every number of a layer, as a person writes them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from equivalence.weights.rules import Rule, groups, holes, matcher

HOLES = "ijkxyz"
"""Names of the holes that numbers become."""

Place = tuple[int, int]


def general(rules: Iterable[Rule], names: tuple[Sequence[str], Sequence[str]] | None = None) -> list[Rule]:
    """The same rules with holes for the numbers of lists that both sides share, wherever several rules become one.

    `names` are all leaf names of both sides: a hole may match no leaf that none of the joined rules named.

    >>> general([Rule("h.0.w", "b_0.w"), Rule("h.1.w", "b_1.w"), Rule("fc1.w", "fc1.w")])
    [Rule('h.{i}.w', 'b_{i}.w'), Rule('fc1.w', 'fc1.w')]
    """
    grouped: dict[object, list[tuple[Rule, tuple[str, ...], tuple[str | None, str | None]]]] = {}
    for rule in rules:
        numbers, skeleton = _skeleton(rule)
        change = None if rule.change is None else rule.change.name
        key = skeleton, rule.axes, change, rule.values, rule.lengths, len(numbers)
        grouped.setdefault(key, []).append((rule, numbers, skeleton))
    return [rule for members in grouped.values() for rule in _joined(members, names)]


def _joined(
    members: list[tuple[Rule, tuple[str, ...], tuple[str | None, str | None]]],
    names: tuple[Sequence[str], Sequence[str]] | None,
) -> list[Rule]:
    """One rule for members of one skeleton; or one for each value of the first number that varies among them."""
    first, numbers, skeleton = members[0]
    varying = [place for place in range(len(numbers)) if len({n[place] for _, n, _ in members}) > 1]
    if not varying:
        return [rule for rule, _, _ in members]
    used = set(holes(first.source or "")) | set(holes(first.target or "")) | _axes(first)
    free = iter(hole for hole in HOLES if hole not in used)
    texts = [f"{{{next(free)}}}" if place in varying else number for place, number in enumerate(numbers)]
    values: dict[str, Sequence[str] | int] = {**dict(first.values), **dict(first.lengths)}
    filled = [None if side is None else _put(side, texts) for side in skeleton]
    wide = Rule(filled[0], filled[1], first.axes, first.change, **values)
    if names is None or all(_only(wide, [rule for rule, _, _ in members], names, side) for side in (0, 1)):
        return [wide]
    parts: dict[str, list[tuple[Rule, tuple[str, ...], tuple[str | None, str | None]]]] = {}
    for member in members:
        parts.setdefault(member[1][varying[0]], []).append(member)
    return [rule for part in parts.values() for rule in _joined(part, names)]


def _only(wide: Rule, members: list[Rule], names: tuple[Sequence[str], Sequence[str]], side: int) -> bool:
    """Whether a rule matches what its members match on one side, and no other leaf."""

    def found(rule: Rule) -> set[str]:
        template = (rule.source, rule.target)[side]
        pattern = None if template is None else matcher(template, dict(rule.values))
        return set() if pattern is None else {name for name in names[side] if pattern.fullmatch(name)}

    return found(wide) == set().union(*(found(rule) for rule in members))


def _skeleton(rule: Rule) -> tuple[tuple[str, ...], tuple[str | None, str | None]]:
    """The numbers that both templates share, in order, and the templates with `\\0` where those stand."""
    if rule.source is None or rule.target is None:
        template = rule.source or rule.target or ""
        own = [(place, text) for place, text in _numbers(template) if _whole(template, place)]
        cut = _cut(template, [place for place, _ in own])
        return tuple(text for _, text in own), (cut, None) if rule.target is None else (None, cut)
    left, right = _numbers(rule.source), _numbers(rule.target)
    shared: list[tuple[str, Place, Place]] = []
    start = 0
    for place, text in left:
        for offset, (other, found) in enumerate(right[start:]):
            if found == text and (_whole(rule.source, place) or _whole(rule.target, other)):
                shared.append((text, place, other))
                start += offset + 1
                break
    numbers = tuple(text for text, _, _ in shared)
    return numbers, (_cut(rule.source, [p for _, p, _ in shared]), _cut(rule.target, [p for _, _, p in shared]))


def _numbers(template: str) -> list[tuple[Place, str]]:
    return [(found.span(), found[0]) for found in re.finditer(r"\d+", template)]


def _whole(template: str, place: Place) -> bool:
    """Whether a number is a part of the path by itself: a place in a list, not a piece of a name."""
    return f".{template}."[place[0]] == "." and f".{template}."[place[1] + 1] == "."


def _cut(template: str, places: list[Place]) -> str:
    for start, end in reversed(places):
        template = template[:start] + "\0" + template[end:]
    return template


def _put(skeleton: str, texts: list[str]) -> str:
    pieces = skeleton.split("\0")
    return pieces[0] + "".join(text + piece for text, piece in zip(texts, pieces[1:], strict=True))


def _axes(rule: Rule) -> set[str]:
    return set() if rule.axes is None else {axis for side in rule.axes.split("->") for g in groups(side) for axis in g}
