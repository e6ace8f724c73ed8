"""The statistic on trial: right ports must raise no alarm, planted faults must be caught. DESIGN section 4.

Everything is judged by the engine's own code: `Comparison` runs each example, `Judge` decides, twelve examples of one
structure together as `verify` does. Exit status 1 if a right trial raises an alarm.

    python benchmarks/detection.py [--seconds N | --trials N] [--seed N] [--out FILE] [--plot FILE] [--write-docs]
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
import zlib
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import _setup  # first: it sets what the frameworks read when they are imported
import numpy as np
from _detection_report import BINS, save_plot, show, write_docs
from _networks import FAULTS, RIGHT, Fault, Network, transformation

from equivalence.checks import REGISTRY
from equivalence.comparison import Comparison
from equivalence.frameworks import adapt
from equivalence.judgement import Decision, Judge, imprecise
from equivalence.numerics import AGREES, DIFFERS, IMPRECISE, expected, ratio
from equivalence.optimizers import resolve
from equivalence.runs import Example
from equivalence.sources import BATCHES, EXAMPLES, Parts, compared

OBSERVED = [name for name, check in REGISTRY.items() if check.run == "observe"]
STEPPED = [name for name, check in REGISTRY.items() if check.run == "steps"]
FAULTY = 4
"""Trials of one fault that are judged together."""
SHARE = 0.3
"""The share of the time that faults are given."""


@dataclass
class Tally:
    """All trials of one network or of one fault. `ratios` are each trial's largest over its leaves: gap over the
    expectation that decided; `firsts` are those over the first expectation alone."""

    name: str
    certain: bool = True
    ratios: list[float] = field(default_factory=list)
    firsts: list[float] = field(default_factory=list)
    worst: list[str] = field(default_factory=list)
    alarms: list[str] = field(default_factory=list)
    imprecise: list[str] = field(default_factory=list)
    second: int = 0
    opened: Counter[str] = field(default_factory=Counter)
    leaves: int = 0
    seconds: float = 0.0
    precisions: dict[str, list[np.ndarray]] = field(default_factory=dict)

    def take(self, decisions: list[Decision]) -> None:
        """One trial, judged."""
        smooth = [d for d in decisions if not d.finding.measure.exact]
        top = max(smooth, key=lambda d: d.ratio)
        self.ratios.append(top.ratio)
        self.worst.append(top.finding.path)
        self.firsts.append(max(ratio(d.finding.measure.gap, expected(d.finding.measure, d.scale)) for d in smooth))
        opening = {d.finding.check for d in decisions if d.second_stage}
        self.second += bool(opening)
        self.opened.update(opening)
        self.leaves += len(decisions)
        differing = [d for d in decisions if d.differs]
        if differing:
            first = differing[0].finding
            self.alarms.append(f"trial {len(self.ratios) - 1}: {first.check} {first.path} ({differing[0].ratio:.3g})")
        by_check: dict[str, list[float]] = {}
        for decision in smooth:
            by_check.setdefault(decision.finding.check, []).append(decision.precision)
        for check, values in by_check.items():
            self.precisions.setdefault(check, []).append(np.array(values))

    def facts(self) -> dict[str, Any]:
        """Everything that is reported of it; figures that are not finite become None."""
        ratios, count = np.array(self.ratios), len(self.ratios)
        median, p99, p999 = np.quantile(ratios, [0.5, 0.99, 0.999])
        spread = {check: np.concatenate(values) for check, values in self.precisions.items()}
        counts = np.histogram(np.log10(np.maximum(ratios, 1e-300)), BINS)[0]
        return {
            "name": self.name,
            "certain": self.certain,
            "trials": count,
            "leaves": self.leaves,
            "second_stage": self.second / count,
            "opened_by": dict(self.opened.most_common()),
            "seconds": round(self.seconds, 2),
            "median": _finite(median),
            "p99": _finite(p99),
            "p99.9": _finite(p999),
            "max": _finite(ratios.max()),
            "min": _finite(ratios.min()),
            "first_stage_max": _finite(max(self.firsts)),
            "worst": self.worst[int(ratios.argmax())],
            "precision": {
                check: [_finite(np.median(values)), _finite(np.quantile(values, 0.99)), _finite(values.max())]
                for check, values in spread.items()
            },
            "alarms": len(self.alarms),
            "alarmed": self.alarms[:5],
            "imprecise": self.imprecise[:5],
            "histogram": counts.tolist(),
        }


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


class Bench:
    """Makes and judges trials; one comparison, compiled once, for each program that differs."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.made: dict[Any, Comparison] = {}

    def comparison(self, network: Network, fault: Fault | None) -> Comparison:
        """Both sides of a network, the port with the fault's change in it."""
        change = (None, 1.0, 1e-8) if fault is None else (fault.port, fault.rate, fault.adam_eps)
        key = (network.port, network.losses, network.learning_rate, *change)
        if key not in self.made:
            adam = replace(resolve("adam"), learning_rate=network.learning_rate, port=transformation(fault))
            parts = Parts(network.losses, network.steps, adam)
            sides = adapt(network.reference()), adapt(network.port(change[0]))
            self.made[key] = compared(*sides, network.mapping, parts, 0)[1]
        return self.made[key]

    def example(self, network: Network, fault: Fault | None, index: int, rng: np.random.Generator) -> Example:
        """Weights, batches and a seed; the scale of a fault, or one between the network's decades."""
        scale = 10.0 ** rng.uniform(*network.decades) if fault is None else fault.scale
        weights = network.weights(rng, scale)
        batches = tuple(network.batch(rng) for _ in range(BATCHES))
        if network.retarget is not None:
            batches = tuple(network.retarget(weights, batch) for batch in batches)
        kept = None
        if fault is not None and fault.weight:
            leaf = sorted(weights)[int(rng.integers(len(weights)))]
            moved = weights[leaf].astype(np.float64)
            moved.flat[rng.integers(moved.size)] *= 1 + fault.weight
            kept = {**weights, leaf: moved}
        seed = int(rng.integers(2**31))
        return Example(index, "ordinary", True, weights, batches, seed, f"weights x {scale:.3g}", kept)

    def group(self, network: Network, fault: Fault | None, tally: Tally) -> None:
        """As many trials as `verify` judges together, judged together. What is drawn follows from the seed, the name
        and the number of the group alone, so that any trial can be repeated."""
        start, size = time.perf_counter(), network.group if fault is None else FAULTY
        number = len(tally.ratios) // size
        comparison, judge = self.comparison(network, fault), Judge()
        rng = np.random.default_rng((self.seed, zlib.crc32(tally.name.encode()), number))
        examples = [self.example(network, fault, index, rng) for index in range(size)]
        for example in examples:
            for train in (False, True):
                judge.add(comparison.observed(example, train, OBSERVED)[0])
            if comparison.reference.subject.buffers:
                judge.add(comparison.states(example))
            for found in comparison.stepped(example, STEPPED):
                judge.add(found)
        decisions = judge.decide(lambda where, *rest: comparison.noise(examples[where[1]], where, *rest))
        by_example: dict[int, list[Decision]] = {}
        for decision in decisions:
            by_example.setdefault(decision.finding.where[1], []).append(decision)
        for index in range(size):
            tally.take(by_example[index])
        tally.seconds += time.perf_counter() - start
        for path, value in imprecise(decisions).items():
            tally.imprecise.append(f"group {number}: precision of {path}: {value:.3g} > {IMPRECISE:g}")


def measure(seed: int, seconds: float, trials: int | None, only: str = "") -> dict[str, Any]:
    """Right trials and faults in turn until the time is spent, or the trials are made; every kind at least once."""
    bench, start, on_faults = Bench(seed), time.perf_counter(), 0.0
    right = [(network, Tally(network.name)) for network in RIGHT if only in network.name]
    faulty = [(fault, Tally(fault.name, fault.certain)) for fault in FAULTS if only in fault.name]
    rounds = max(1, math.ceil((trials or 1) / max(1.0, sum(network.group / network.every for network, _ in right))))
    turn = {"right": 0, "faulty": 0}

    def passed() -> float:
        return time.perf_counter() - start

    while True:
        open_ = trials is None and passed() < seconds
        more_right = bool(right) and (open_ or turn["right"] < rounds * len(right))
        more_faults = bool(faulty) and (open_ or turn["faulty"] < min(rounds, 10) * len(faulty))
        if not more_right and not more_faults:
            break
        before = passed()
        if more_faults and (not more_right or on_faults < SHARE * before):
            fault, tally = faulty[turn["faulty"] % len(faulty)]
            turn["faulty"] += 1
            bench.group(fault.network, fault, tally)
            on_faults += passed() - before
        else:
            (network, tally), number = right[turn["right"] % len(right)], turn["right"] // len(right)
            turn["right"] += 1
            if number % network.every == 0:
                bench.group(network, None, tally)
        _progress(tally.name, right, faulty, passed())
    _setup.progress("")
    return {
        "seed": seed,
        "seconds": round(passed(), 1),
        "group": EXAMPLES,
        "agrees": AGREES,
        "differs": DIFFERS,
        "versions": _setup.versions(),
        "right": [tally.facts() for _, tally in right],
        "faults": [tally.facts() for _, tally in faulty],
    }


def _progress(name: str, right: list[tuple[Network, Tally]], faulty: list[tuple[Fault, Tally]], seconds: float) -> None:
    tried, planted = sum(len(t.ratios) for _, t in right), sum(len(t.ratios) for _, t in faulty)
    alarms = sum(len(t.alarms) for _, t in right)
    _setup.progress(f"{seconds:5.0f} s  {tried} right trials, {alarms} alarms; {planted} faulty trials  [{name}]")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--seconds", type=float, default=40.0, help="how long to try (40), every kind at least once")
    length.add_argument("--trials", type=int, help="how many right trials to make instead")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="the networks and faults whose names hold this")
    parser.add_argument("--out", type=Path, help="write all figures as JSON")
    parser.add_argument("--plot", type=Path, help="save both histograms as a picture")
    parser.add_argument("--write-docs", action="store_true", help="write docs/detection.json, .png and .md")
    chosen = parser.parse_args()
    facts = measure(chosen.seed, chosen.seconds, chosen.trials, chosen.only)
    print(show(facts))
    docs = _setup.ROOT / "docs"
    out, plot = (docs / "detection.json", docs / "detection.png") if chosen.write_docs else (chosen.out, chosen.plot)
    if out is not None:
        out.write_text(json.dumps(facts, indent=1) + "\n")
    if plot is not None:
        save_plot(facts, plot)
    if chosen.write_docs:
        write_docs(facts, docs / "detection.md")
    return 1 if any(row["alarms"] or row["imprecise"] for row in facts["right"]) else 0


if __name__ == "__main__":
    sys.exit(main())
