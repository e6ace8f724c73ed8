"""The tape: the random numbers a model asks for, served from one seeded generator so that both sides read the same.

A draw is named by kind, shape and parameters. The tape serves standard variates: a boolean mask for `bernoulli`
(true with the probability asked for), [0, 1) for `uniform`, and standard `normal` and `exponential`; whoever asked
scales and shifts them. The reference's run records its draws; the port must ask for the same ones in the same order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from equivalence.errors import DrawsDiffer, UnsupportedDraw

KINDS = ("bernoulli", "uniform", "normal", "exponential")


@dataclass(frozen=True)
class Draw:
    """One request for random numbers. `probability` belongs to `bernoulli` alone."""

    kind: str
    shape: tuple[int, ...]
    probability: float | None = None

    def __str__(self) -> str:
        odds = "" if self.probability is None else f"({self.probability:.9g})"
        return f"{self.kind}{odds} {self.shape}"

    def agrees(self, other: Draw) -> bool:
        """Same kind and shape, and the same probability up to its rounding in float32."""
        if (self.kind, self.shape) != (other.kind, other.shape):
            return False
        if self.probability is None or other.probability is None:
            return self.probability is other.probability
        return abs(self.probability - other.probability) <= 2.0**-23 * abs(self.probability)


@dataclass
class Tape:
    """Serves draws in order from `seed` and records them. Two tapes of one seed serve equal requests equally.

    >>> first, second = Tape((0, 1)), Tape((0, 1))
    >>> bool((first.take(Draw("normal", (3,))) == second.take(Draw("normal", (3,)))).all())
    True
    """

    seed: tuple[int, ...]
    draws: list[Draw] = field(default_factory=list)
    values: list[np.ndarray] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._rng = np.random.Generator(np.random.Philox(np.random.SeedSequence(self.seed)))

    def take(self, draw: Draw) -> np.ndarray:
        """The next array: bool for `bernoulli`, float64 for the others."""
        value = variate(self._rng, draw)
        self.draws.append(draw)
        self.values.append(value)
        return value


def variate(rng: np.random.Generator, draw: Draw) -> np.ndarray:
    """One standard variate of the kind and shape of `draw`."""
    if draw.kind == "bernoulli":
        assert draw.probability is not None
        return np.asarray(rng.random(draw.shape) < draw.probability)
    if draw.kind == "uniform":
        return np.asarray(rng.random(draw.shape))
    if draw.kind == "normal":
        return np.asarray(rng.standard_normal(draw.shape))
    if draw.kind == "exponential":
        return np.asarray(rng.standard_exponential(draw.shape))
    raise UnsupportedDraw(f"the tape cannot serve {draw.kind!r} (it serves {', '.join(KINDS)})")


def assert_same_draws(reference: Sequence[Draw], port: Sequence[Draw], where: str) -> None:
    """Raise DrawsDiffer, naming the first difference, unless both sides ask for the same draws in the same order."""
    for number, (ours, theirs) in enumerate(zip(reference, port, strict=False)):
        if not ours.agrees(theirs):
            raise DrawsDiffer(f"{where}: draw {number} differs: the reference asks for {ours}, the port for {theirs}")
    if len(reference) != len(port):
        more, side = (port, "port") if len(port) > len(reference) else (reference, "reference")
        extra = more[min(len(reference), len(port))]
        raise DrawsDiffer(
            f"{where}: the reference asks for {len(reference)} draws, the port for {len(port)};"
            f" the first that only the {side} asks for is {extra}"
        )
