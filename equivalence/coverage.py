"""What a run could see: which elements moved something, and the smallest change of each leaf that would have shown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from equivalence.judgement import Decision
from equivalence.numerics import DIFFERS, U64, Measure, distance, expected
from equivalence.observation import Observation
from equivalence.paths import parent
from equivalence.verdict import Coverage

if TYPE_CHECKING:
    from equivalence.comparison import Comparison
    from equivalence.runs import Example

PLANT = 1e-6
"""The relative change of a leaf that is planted; the smallest noticed one follows from it linearly."""


@dataclass
class Covered:
    """Which elements of each trainable leaf had a gradient that rounding cannot explain, in any example."""

    masks: dict[str, np.ndarray] = field(default_factory=dict)

    def add(self, observation: Observation, measures: Mapping[str, Measure]) -> None:
        """Take in the reference's float64 gradients of one observation."""
        for path, gradient in observation.items():
            head, _, rest = path.partition(".")
            if head != "parameter_gradients" or path not in measures:
                continue
            leaf = rest.partition(".")[2]
            mask = self.masks.get(leaf)
            if mask is not None and mask.all():
                continue
            m = measures[path]
            fresh = np.abs(gradient) > DIFFERS * expected(m, m.scale_reference)
            self.masks[leaf] = fresh if mask is None else mask | fresh

    def fraction(self) -> float:
        """The fraction of elements seen to matter."""
        total = sum(mask.size for mask in self.masks.values())
        return sum(int(mask.sum()) for mask in self.masks.values()) / total if total else 1.0

    def silent(self) -> list[str]:
        """Leaves of which no element was seen to matter."""
        return [leaf for leaf, mask in self.masks.items() if mask.size and not mask.any()]


def coverage(covered: Covered, comparison: Comparison, example: Example) -> Coverage:
    """Sort the silent leaves: inert if a sibling of its module moved something and moving the leaf itself by O(1)
    changes neither side's outputs; uncovered otherwise."""
    silent = covered.silent()
    inert: list[str] = []
    uncovered: list[str] = []
    for leaf in silent:
        siblings = [p for p, mask in covered.masks.items() if parent(p) == parent(leaf) and mask.any()]
        (inert if siblings and _moves_nothing(comparison, example, leaf) else uncovered).append(leaf)
    return Coverage(covered.fraction(), tuple(uncovered), tuple(inert))


def _moves_nothing(comparison: Comparison, example: Example, leaf: str) -> bool:
    from dataclasses import replace

    rng = np.random.default_rng(example.seed)
    value = example.weights[leaf]
    weights = {**example.weights, leaf: value + rng.standard_normal(value.shape).astype(value.dtype)}
    elsewhere = replace(example, weights=weights, kept=None)
    for train in (False, True):
        before, after = (comparison.four(item, train)[0] for item in (replace(example, kept=None), elsewhere))
        measures = before.measures(example.elements)
        for path, m in measures.items():
            if path.startswith("outputs.") and not m.exact:
                limit = DIFFERS * expected(m, m.scale_reference)
                if distance(after.reference64[path], before.reference64[path]) > limit:
                    return False
                if distance(after.port64[path], before.port64[path]) > limit:
                    return False
    return True


def planted(example: Example, leaf: str, change: float = PLANT) -> Observation:
    """The example's weights with one leaf changed by `change` of its size, in a random direction, in float64."""
    value = example.port_weights[leaf].astype(np.float64)
    size = float(np.sqrt(np.mean(np.square(value)))) or 1.0
    direction = np.random.default_rng((example.seed, 5)).standard_normal(value.shape)
    return {**example.port_weights, leaf: value + change * size * direction}


def noticed(base: Observation, moved: Observation, limits: Mapping[str, float], change: float = PLANT) -> float | None:
    """The smallest relative change that would have been noticed at any of the paths of `limits` (path -> the
    expectation that decided), or None when the plant moved none of them."""
    best = 0.0
    for path, limit in limits.items():
        response = distance(moved[path], base[path])
        if response > 0.0:
            best = max(best, response / (DIFFERS * limit) if limit > 0.0 else np.inf)
    return max(change / best, U64) if best > 0.0 else None


def limits(decisions: Iterable[Decision], check: str, where: tuple[object, ...]) -> dict[str, float]:
    """The expectation that decided each path of one check in one run, by the path within the observation."""
    found = {}
    for decision in decisions:
        if decision.finding.check == check and decision.finding.where == where and not decision.finding.measure.exact:
            found[decision.finding.path] = decision.expected
    return found
