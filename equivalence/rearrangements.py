"""Rearrangements that no name or type allows, tried on a port that diverges: to be shown, never to be used unasked.

A port that keeps its heads minor, its gates in another order or queries where keys belong is another model under the
mapping that names say. That some permutation makes it the same one is worth knowing, and is the user's to accept.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from equivalence.frameworks.subject import Subject
from equivalence.observation import Batch
from equivalence.probing import Agreement, Probe
from equivalence.runs import Four
from equivalence.weights import Leaves, Mapping, Rule
from equivalence.weights.naming import PLACES, concepts, read
from equivalence.weights.rules import groups, matcher

TRIED = 100
"""Rearrangements tried at most."""

Found = tuple[str, list[Rule]]


def finding(
    mapping: Mapping, reference: Subject, port: Subject, batch: Batch, select: Callable[[Any], Any], seed: int
) -> str | None:
    """In words and as rules to paste, the rearrangement under which a port computes what the reference does.

    None where it does so already by its mapping, or by no rearrangement that is tried.
    """
    probe = Probe(reference, port, select)
    if not probe.comparable(batch, seed):
        return None
    rules, weights = list(mapping.rules), probe.weights(seed)
    ours = probe.reference_runs(weights, batch, seed)
    for text, tried in itertools.chain([("", rules)], itertools.islice(_all(rules, reference.leaves), TRIED)):
        # a suggestion needs no float32 run of the port: what rounding explains follows from the reference's
        theirs = probe.port_run(64, probe.into_port(weights, tried), batch, seed, ours[64])
        four = Four(ours[32].values, ours[64].values, theirs, theirs)
        judge = Agreement(probe, weights, batch, seed, four)
        if judge.same_outputs() and judge.agrees(probe.bound(tried)):
            changed = [rule for rule in tried if rule not in rules]
            return f"agrees when {text}: {', '.join(map(repr, changed))}; names do not say so" if text else None
    return None


def _all(rules: Sequence[Rule], leaves: Leaves) -> Iterator[Found]:
    yield from _heads(rules, leaves)
    yield from _orders(rules)
    yield from _interleaved(rules, leaves)
    yield from _swaps(rules, leaves)
    yield from _turned(rules, leaves)


def _put(rules: Sequence[Rule], new: dict[Rule, Rule]) -> list[Rule]:
    return [new.get(rule, rule) for rule in rules]


def _means(rule: Rule) -> frozenset[str]:
    """What the last word of a rule's source may mean."""
    words = [word for word in read(rule.source or "").words if word not in PLACES]
    return concepts(words[-1]) if words else frozenset()


def _shape(rule: Rule, leaves: Leaves) -> tuple[int, ...]:
    """The shape of the first leaf that a rule's source names."""
    pattern = matcher(rule.source or "", dict(rule.values))
    return next((leaves.shape(path) for path in leaves.names() if pattern.fullmatch(path)), ())


def _sides(rule: Rule, leaves: Leaves) -> tuple[str, str]:
    """Both sides of a rule's pattern, written out where it has none; empty for more axes than a linear layer has."""
    plain = {1: "o -> o", 2: "o k -> o k"}.get(len(_shape(rule, leaves)), " -> ")
    left, _, right = (rule.axes or plain).partition(" -> ")
    return left, right


def _sizes(length: int) -> list[int]:
    return [size for size in range(2, length) if length % size == 0]


def _spread(side: str, axis: str, parts: str) -> str:
    """One side of a pattern with an axis, alone or in a group, in parts.

    >>> _spread("(s o) k", "o", "h d")
    '(s h d) k'
    """
    found = [" ".join(parts if name == axis else name for name in group) for group in groups(side)]
    return " ".join(f"({group})" if " " in group else group for group in found)


def _heads(rules: Sequence[Rule], leaves: Leaves) -> Iterator[Found]:
    """Heads minor, what is in each major: in the projections into heads, out of them, or both."""
    into = [r for r in rules if r.target and _means(r) & {"query", "key", "value", "qkv"}]
    out = [r for r in rules if r.target and "out" in _means(r) and read(r.source or "").role == "weight"]
    for size in _sizes(math.gcd(*(_shape(r, leaves)[-1 if r in out else 0] for r in (*into, *out)))):
        where = ((into + out, ""), (into, " in query, key and value"), (out, " in the output projection"))
        for picked, text in where:
            new = {r: made for r in picked if (made := _minor(r, leaves, "k" if r in out else "o", size)) is not None}
            if new:
                yield f"heads of size {size} are stored minor{text}", _put(rules, new)


def _minor(rule: Rule, leaves: Leaves, axis: str, size: int) -> Rule | None:
    left, right = _sides(rule, leaves)
    sizes: dict[str, Any] = {**dict(rule.values), **dict(rule.lengths)}
    if "h d" in left:
        return Rule(rule.source, rule.target, f"{left.replace('h d', 'd h')} -> {right}", rule.change, **sizes)
    if axis not in itertools.chain(*groups(left)):
        return None
    fused = "s " if _whole(rule, left, right) else ""
    if fused:
        sizes["s"] = 3
    axes = f"{_spread(left, axis, f'{fused}h d')} -> {_spread(right, axis, f'{fused}d h')}"
    return Rule(rule.source, rule.target, axes, rule.change, **{**sizes, "d": size})


def _whole(rule: Rule, left: str, right: str) -> bool:
    """Whether both sides keep query, key and value in one leaf."""
    return "qkv" in _means(rule) and not any("s" in group for side in (left, right) for group in groups(side))


def _orders(rules: Sequence[Rule]) -> Iterator[Found]:
    """Parts of fused leaves (projections, gates) in another order."""
    fused = [rule for rule in rules if rule.values]
    for values in dict.fromkeys(choice for rule in fused for _, choice in rule.values):
        for order in itertools.permutations(range(len(values))):
            new = {}
            for rule in fused:
                (hole, choice), *_ = rule.values
                if len(choice) == len(values):
                    chosen = tuple(choice[place] for place in order)
                    new[rule] = Rule(
                        rule.source, rule.target, rule.axes, rule.change, **{hole: chosen}, **dict(rule.lengths)
                    )
            if list(order) != sorted(order):
                yield f"fused parts are in the order {', '.join(values[place] for place in order)}", _put(rules, new)


def _interleaved(rules: Sequence[Rule], leaves: Leaves) -> Iterator[Found]:
    """Query, key and value of one head beside each other in a fused leaf."""
    fused = [rule for rule in rules if rule.target and "qkv" in _means(rule)]
    for size in _sizes(math.gcd(*(_shape(rule, leaves)[0] for rule in fused)) // 3):
        for kept in ("h s d", "h d s"):
            new = {}
            for rule in fused:
                left, right = _sides(rule, leaves)
                sizes: dict[str, Any] = {**dict(rule.values), **dict(rule.lengths)}
                if "s h d" in left:
                    axes = f"{left.replace('s h d', kept)} -> {right}"
                elif "s o" in left:
                    axes, sizes["d"] = f"{left.replace('s o', kept)} -> {_spread(right, 'o', 'h d')}", size
                elif _whole(rule, left, right) and "o" in itertools.chain(*groups(left)):
                    axes = f"{_spread(left, 'o', 's h d')} -> {_spread(right, 'o', kept)}"
                    sizes |= {"s": 3, "d": size}
                else:
                    continue
                new[rule] = Rule(rule.source, rule.target, axes, rule.change, **sizes)
            if new:
                yield f"query, key and value are interleaved by heads of size {size}, ({kept})", _put(rules, new)


def _swaps(rules: Sequence[Rule], leaves: Leaves) -> Iterator[Found]:
    """Two modules of equal shapes in each other's place."""
    held: dict[str, list[Rule]] = {}
    for rule in rules:
        if rule.source and rule.target:
            held.setdefault(rule.source.rpartition(".")[0], []).append(rule)
    for (one, mine), (other, its) in itertools.combinations(held.items(), 2):
        alike = [[(rule.axes, _shape(rule, leaves), rule.values) for rule in side] for side in (mine, its)]
        if alike[0] == alike[1] and one.rpartition(".")[0] == other.rpartition(".")[0]:
            pairs = list(zip(mine, its, strict=True))
            new = {a: Rule(a.source, b.target, a.axes, a.change, **dict(a.values), **dict(a.lengths)) for a, b in pairs}
            new |= {
                b: Rule(b.source, a.target, b.axes, b.change, **dict(b.values), **dict(b.lengths)) for a, b in pairs
            }
            yield f"{one} and {other} are swapped", _put(rules, new)


def _turned(rules: Sequence[Rule], leaves: Leaves) -> Iterator[Found]:
    """A square kernel the other way round."""
    for rule in rules:
        shape = _shape(rule, leaves)
        if rule.target and rule.axes in (None, "o k -> k o") and len(shape) == 2 and shape[0] == shape[1]:
            axes = "o k -> k o" if rule.axes is None else None
            yield f"{rule.source} is stored transposed", _put(rules, {rule: Rule(rule.source, rule.target, axes)})
