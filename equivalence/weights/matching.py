"""Which module of the reference is which of the port: the best of what names say, where it is clearly the best.

Names are scored (`naming.Likeness`), numbers must correspond, and a pair counts only where every leaf fits by a layout
that the layer type allows. Pairs are settled from the clearest down; what is as good one way as the other stays open.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from equivalence.weights.candidates import Module, partners, rules
from equivalence.weights.naming import Likeness

LIKE = 0.2
"""The least likeness that is a name's word for it."""
CLEAR = 0.02
"""By how much the best must be ahead of the next."""
ALTERNATIVES = 24
"""How many alternatives a choice may have: four siblings, any of which could be any."""
FITS = 1e-6
"""The likeness of modules that fit and have nothing of a name in common."""

Pair = tuple[Module, Module]


@dataclass(frozen=True)
class Matching:
    """Pairs of modules that names settle, and what is left on either side."""

    pairs: list[Pair]
    ours: list[Module]
    theirs: list[Module]


class Matcher:
    """Matches modules of two models; remembers what it has compared."""

    def __init__(self, ours: Sequence[Module], theirs: Sequence[Module]) -> None:
        self._like = Likeness([m.words for m in ours], [m.words for m in theirs])
        self._numbers = tuple(_number_sets(side) for side in (ours, theirs))
        self._known: dict[object, tuple[float, tuple[tuple[int, int], ...]] | None] = {}
        self._ids: dict[object, int] = {}

    def match(self, ours: Sequence[Module], theirs: Sequence[Module]) -> Matching:
        """The pairs that names settle: each the best of its row and of its column, and clearly so."""
        table = self.scores(ours, theirs)
        rows, columns = list(range(len(ours))), list(range(len(theirs)))
        pairs: list[Pair] = []
        while found := _clear(table[np.ix_(rows, columns)]):
            taken = [(rows[i], columns[j]) for i, j in found]
            pairs += [(ours[i], theirs[j]) for i, j in taken]
            rows = [i for i in rows if i not in {i for i, _ in taken}]
            columns = [j for j in columns if j not in {j for _, j in taken}]
        return Matching(pairs, [ours[i] for i in rows], [theirs[j] for j in columns])

    def scores(self, ours: Sequence[Module], theirs: Sequence[Module], strict: bool = True) -> np.ndarray:
        """How alike the names of every two modules are; 0 where their leaves or their numbers cannot correspond. Not
        `strict` lets pass what only one side numbers."""
        for known, side in zip(self._numbers, (ours, theirs), strict=True):
            known |= {key: found for key, found in _number_sets(side).items() if key not in known}
        first, second = ([self._id(m) for m in side] for side in (ours, theirs))
        table = np.zeros((len(ours), len(theirs)))
        for i, a in enumerate(ours):
            for j, b in enumerate(theirs):
                table[i, j] = self._score(a, b, (first[i], second[j]), strict)
        return table

    def likeness(self, a: Module, b: Module) -> float:
        """How alike the names of two modules are, whatever their leaves."""
        return self._like.of(a.words, b.words)[0]

    def _score(self, a: Module, b: Module, ids: tuple[int, int], strict: bool) -> float:
        if ids not in self._known:
            self._known[ids] = self._like.of(a.words, b.words) if fit(a, b) else None
        known = self._known[ids]
        if known is None or not self._same_numbers(a, b, known[1], strict):
            return 0.0
        return max(known[0], FITS)

    def _id(self, module: Module) -> int:
        """Modules of one id differ in their numbers only."""
        leaves = tuple((role, leaf.shape, leaf.last, leaf.holes) for role, leaf in module.leaves.items())
        return self._ids.setdefault((module.words, module.kind, leaves), len(self._ids))

    def _same_numbers(self, a: Module, b: Module, aligned: tuple[tuple[int, int], ...], strict: bool) -> bool:
        """Whether the numbers that stand for each other do: by value where one side's are among the other's, by place
        in the order where there are as many (`net.0`, `net.2` and `Dense_0`, `Dense_1`), else nothing tells (`w1`,
        `w2`, `w3` and `wi_0`, `wi_1`). `strict` asks to be told, and that numbers of one side alone say nothing."""
        sets = tuple(numbers[_family(m)] for numbers, m in zip(self._numbers, (a, b), strict=True))
        for number, m in enumerate((a, b)):
            alone = set(range(len(m.numbers))) - {pair[number] for pair in aligned}
            if strict and any(len(sets[number][place]) > 1 for place in alone):
                return False
        for i, j in aligned:
            left, right = sets[0][i], sets[1][j]
            here, there = a.numbers[i], b.numbers[j]
            if not (set(left) <= set(right) or set(right) <= set(left)):
                if len(left) != len(right):
                    if strict:
                        return False
                    continue
                here, there = left.index(here), right.index(there)
            if here != there:
                return False
        return True


def fit(a: Module, b: Module) -> bool:
    """Whether every leaf of either has a partner by role and layout in the other."""
    found = partners(a, b)
    return bool(found) and all(rules(a, b, *roles) for roles in found)


def _family(module: Module) -> object:
    return module.words, module.sort


def _number_sets(side: Iterable[Module]) -> dict[object, list[list[int]]]:
    """For every sort of module the values that each of its numbers takes, in order."""
    seen: dict[object, list[set[int]]] = {}
    for module in side:
        places = seen.setdefault(_family(module), [set() for _ in module.numbers])
        for place, number in zip(places, module.numbers, strict=True):
            place.add(number)
    return {key: [sorted(place) for place in places] for key, places in seen.items()}


def _clear(table: np.ndarray) -> list[tuple[int, int]]:
    """Cells that are at least `LIKE` and ahead of everything else in their row and column."""
    if not table.size:
        return []
    rows, columns = np.sort(table, axis=1), np.sort(table, axis=0)
    second_row = rows[:, -2] if table.shape[1] > 1 else np.zeros(len(table))
    second_column = columns[-2] if table.shape[0] > 1 else np.zeros(table.shape[1])
    found = []
    for i, j in enumerate(table.argmax(axis=1)):
        value = table[i, j]
        if value >= LIKE and value >= second_row[i] + CLEAR and value >= second_column[j] + CLEAR:
            found.append((i, int(j)))
    return found


def without(left: list[Module], right: list[Module], pairs: Sequence[Pair]) -> tuple[list[Module], list[Module]]:
    """The modules of both sides that no pair has taken a leaf of."""
    ours, theirs = ({path for pair in pairs for path in pair[side].paths} for side in (0, 1))
    return [m for m in left if not m.paths & ours], [m for m in right if not m.paths & theirs]


def assignments(matcher: Matcher, left: list[Module], right: list[Module]) -> list[list[list[Pair]]]:
    """Modules that names do not tell apart: for every group that fits only among itself, each way to pair it up."""
    found = []
    for widely in (False, True):
        scores = matcher.scores(left, right, strict=False)
        if not scores.size:
            break
        best = scores.max(axis=1, keepdims=True)
        close = (scores > 0) & ((scores >= best - CLEAR) | widely)
        for rows, columns in _components(close):
            ways = _ways(np.where(close, scores, 0.0), rows, columns)
            if ways:
                found.append([[(left[i], right[j]) for i, j in way] for way in ways])
        taken = [pair for ways in found for pair in ways[0]]
        left, right = without(left, right, taken)
    return found


def _ways(scores: np.ndarray, rows: list[int], columns: list[int]) -> list[list[tuple[int, int]]]:
    """The ways to pair up rows and columns that names speak for as much as for any other: what they say of one pair,
    however little, holds against a run that would have it otherwise (a query that acts as a key)."""
    if len(rows) != len(columns) or math.factorial(len(rows)) > ALTERNATIVES:
        return []
    ways = [list(zip(rows, order, strict=True)) for order in itertools.permutations(columns)]
    totals = [sum(scores[pair] for pair in way) if all(scores[pair] > 0 for pair in way) else 0.0 for way in ways]
    return [way for way, total in zip(ways, totals, strict=True) if total > 0 and total >= max(totals) - CLEAR]


def _components(close: np.ndarray) -> list[tuple[list[int], list[int]]]:
    """Rows and columns of a table that are joined by its true cells."""
    found, rest = [], set(range(len(close)))
    while rest:
        rows, columns = {rest.pop()}, set[int]()
        while True:
            wider = {j for i in rows for j in range(close.shape[1]) if close[i, j]}
            more = {i for j in wider for i in range(len(close)) if close[i, j]} | rows
            if more == rows and wider == columns:
                break
            rows, columns = more, wider
        rest -= rows
        found.append((sorted(rows), sorted(columns)))
    return found
