"""Examples a second with programs compiled once a structure, against the same property compiled anew each time.

The property is what `verify` observes of an example: both modes and five optimizer steps, at both precisions, judged.
At least 20 times as many are demanded.

    python benchmarks/search.py [--examples N] [--repeats N]
"""

from __future__ import annotations

import argparse
import os

# Programs compiled anew must be: not read from the cache of an earlier run.
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"

import _setup  # noqa: F401  before the frameworks: it sets what they read when they are imported
import numpy as np
from _setup import interleaved, line

from equivalence.checks import REGISTRY
from equivalence.comparison import Comparison
from equivalence.frameworks import adapt
from equivalence.judgement import Judge
from equivalence.observation import Batch
from equivalence.optimizers import resolve
from equivalence.runs import Example
from equivalence.search import moved
from equivalence.sources import BATCHES, Parts, compared
from equivalence.spec import REFERENCE, Spec, load
from equivalence.weights import Mapping

BOUND = 20.0
PORT = "nnx"
OBSERVED = [name for name, check in REGISTRY.items() if check.run == "observe"]
STEPPED = [name for name, check in REGISTRY.items() if check.run == "steps"]


def comparison(spec: Spec) -> Comparison:
    """Both sides of the default configuration; nothing of it is compiled yet."""
    ours, theirs = spec.implementation(REFERENCE), spec.implementation(PORT)
    sides = adapt(ours.build(spec.config, 0)), adapt(theirs.build(spec.config, 0))
    parts = Parts((ours.loss_fn, theirs.loss_fn), (ours.train_step, theirs.train_step), resolve("adam"))
    return compared(*sides, Mapping(spec.rules[PORT]), parts, 0)[1]


def holds(made: Comparison, spec: Spec, seed: int) -> bool:
    """The property, of one example."""
    subject = made.reference.subject
    weights = moved(subject.params, subject.buffers, subject.layers, 1.0, seed)
    batches = tuple(
        Batch(*spec.example(spec.config, np.random.default_rng((seed, number)), "ordinary"))
        for number in range(BATCHES)
    )
    example, judge = Example(0, "ordinary", True, weights, batches, seed, ""), Judge()
    for train in (False, True):
        judge.add(made.observed(example, train, OBSERVED)[0])
    for found in made.stepped(example, STEPPED):
        judge.add(found)
    decisions = judge.decide(lambda where, *rest: made.noise(example, where, *rest))
    return not any(decision.differs for decision in decisions)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=25, help="examples of one turn, compiled once (25)")
    parser.add_argument("--repeats", type=int, default=5, help="how often both take their turn (5)")
    chosen = parser.parse_args()
    spec = load("titanic_mlp")
    kept, seeds = comparison(spec), iter(range(1_000_000))
    assert holds(kept, spec, next(seeds))

    def once() -> None:
        assert all(holds(kept, spec, next(seeds)) for _ in range(chosen.examples))

    def anew() -> None:
        # What JAX compiled for single operations is kept: only the programs of the structure are made again.
        assert holds(comparison(spec), spec, next(seeds))

    anew()
    seconds = interleaved({"compiled once": once, "compiled anew": anew}, chosen.repeats)
    fast, slow = seconds["compiled once"] / chosen.examples, seconds["compiled anew"]
    print(f"{spec.name}, {PORT}: {1 / fast:.1f} examples a second compiled once, {1 / slow:.2f} compiled anew")
    print(line("examples a second, compiled once against anew", slow / fast, BOUND, at_least=True))


if __name__ == "__main__":
    main()
