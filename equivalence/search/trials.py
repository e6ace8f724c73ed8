"""Trials: what one example is made of, in a few small values that Hypothesis draws and shrinks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from hypothesis import HealthCheck, Phase, find, given, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st
from hypothesis.errors import Flaky, NoSuchExample

from equivalence.search.arrays import KINDS

SCALES = (1.0, 0.3, 3.0, 0.03, 30.0, 1e-3, 1e3)
"""Weight scales, the simplest first: six decades."""


@dataclass(frozen=True)
class Trial:
    """One example to try: a structure, how large the weights are, what the inputs are like, and a NumPy seed."""

    config: Any
    kind: str
    scale: float
    seed: int

    def __str__(self) -> str:
        where = "" if self.config is None else f"{self.config}, "
        return f"{where}{self.kind} inputs, weights x {self.scale:g}, seed {self.seed}"


def trials(configs: Any) -> st.SearchStrategy[Trial]:
    """A strategy of trials over `configs`, itself a strategy; half of the inputs and of the scales are plain."""
    kinds = st.one_of(st.just("ordinary"), st.sampled_from(KINDS))
    scales = st.one_of(st.just(1.0), st.sampled_from(SCALES))
    return st.builds(Trial, configs, kinds, scales, st.integers(0, 2**31 - 1))


def draw(strategy: st.SearchStrategy[Any], count: int, seed: int) -> list[Any]:
    """`count` values of a strategy, the same for the same seed; fewer when it has fewer."""
    found: list[Any] = []

    @seeded(seed)
    @settings(
        max_examples=count,
        database=None,
        derandomize=False,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def collect(value: Any) -> None:
        found.append(value)

    collect()
    return found[:count]


def smallest(strategy: st.SearchStrategy[Any], fails: Callable[[Any], bool], seed: int, tries: int = 60) -> Any | None:
    """The smallest value of a strategy that `fails`, or None when none of `tries` does."""
    limits = settings(
        max_examples=tries,
        database=None,
        derandomize=False,
        deadline=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    try:
        return find(strategy, fails, settings=limits, random=Random(seed))
    except (NoSuchExample, Flaky):
        return None
