"""A thousand right trials raise no alarm: few structures, many values, weights over six decades of scale.

Directly on the comparison and the judge, so that every program is compiled once. Each trial is observed in eval and in
train mode; a part of them takes the five optimizer steps too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("flax")

from equivalence import search
from equivalence.comparison import Comparison
from equivalence.frameworks import adapt
from equivalence.frameworks.subject import Subject
from equivalence.judgement import Decision, Judge
from equivalence.observation import Batch
from equivalence.optimizers import resolve
from equivalence.runs import Example
from equivalence.sources import Parts, SpecSource, compared
from equivalence.spec import load
from tests import pairs

Made = tuple[Comparison, Subject, Batch]
CHECKS = ["outputs", "loss", "input_gradients", "parameter_gradients"]
STEPS_EVERY = 4
"""One trial in so many takes optimizer steps."""


def of_pair(name: str) -> Made:
    pair = pairs.PAIRS[name]()
    reference, port = adapt(pair.reference), adapt(pair.port)
    _, comparison = compared(reference, port, pair.weights, Parts(pair.loss, None, resolve(None)), 0)
    return comparison, reference, Batch(pair.inputs, pair.targets)


def titanic() -> Made:
    spec = load("titanic_mlp")
    made = next(SpecSource(spec, ("linen",), examples=1).structures("linen"))
    return made.comparison, made.reference, made.examples[0].batches[0]


STRUCTURES: dict[str, tuple[int, Callable[[], Made]]] = {
    "titanic": (180, titanic),
    "mlp": (180, lambda: of_pair("mlp")),
    "attention": (180, lambda: of_pair("attention")),
    "batchnorm": (160, lambda: of_pair("batchnorm")),
    "deep": (150, lambda: of_pair("deep")),
    "router": (180, lambda: of_pair("router")),
}
"""How many trials of which structure."""
NEEDS_NOISE = {"attention", "batchnorm", "deep"}
"""Structures of which some trials must reach the second stage: gradients that are zero by algebra, and chaos."""


def trials(reference: Subject, batch: Batch, count: int) -> Iterator[Example]:
    """Weights moved off their initial values at a scale between 1e-3 and 1e3; fresh inputs of one of the kinds."""
    rng = np.random.default_rng(7)
    for index in range(count):
        scale, seed = float(10.0 ** rng.uniform(-3, 3)), int(rng.integers(2**31))
        kind = "ordinary" if index % 3 else str(rng.choice(["ordinary", "large", "tiny", "repeated"]))
        weights = search.moved(reference.params, reference.buffers, reference.layers, scale, seed)
        batches = tuple(search.batch_like(batch, kind, seed + number) for number in range(3))
        yield Example(index, kind, kind == "ordinary", weights, batches, seed, f"{kind}, weights x {scale:.3g}")


def decide(made: Made, examples: list[Example]) -> list[Decision]:
    """Everything that the judge decides on these examples together."""
    comparison, reference, _ = made
    judge = Judge()
    for example in examples:
        for train in (False, True):
            judge.add(comparison.observed(example, train, CHECKS)[0])
        if reference.buffers:
            judge.add(comparison.states(example))
        if example.index % STEPS_EVERY == 0:
            for found in comparison.stepped(example, ["step", "optimizer_state"]):
                judge.add(found)
    return judge.decide(lambda where, paths, size: comparison.noise(examples[where[1]], where, paths, size))


@pytest.mark.parametrize("name", list(STRUCTURES))
def test_right_trials_raise_no_alarm(name: str) -> None:
    count, make = STRUCTURES[name]
    made = make()
    examples = list(trials(made[1], made[2], count))
    decisions = decide(made, examples)
    assert len({decision.finding.where[1] for decision in decisions}) == count
    alarms = {f"{examples[d.finding.where[1]].label}: {d.finding.path} {d.ratio:.3g}" for d in decisions if d.differs}
    assert alarms == set()
    if name in NEEDS_NOISE:
        assert any(decision.second_stage for decision in decisions)


def test_they_are_a_thousand() -> None:
    assert sum(count for count, _ in STRUCTURES.values()) >= 1000
