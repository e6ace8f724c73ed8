"""Probes: what names leave open about a mapping is decided by running both sides, or is asked.

All open choices are decided in one run of both sides. The weights that a choice is about are made *symmetric* under it:
every alternative puts the same values into the port. Both sides then compute the same function whichever alternative is
right, and the gradients tell: moved back by the right one they are the reference's, by a wrong one they are not. So n
choices cost one run, not 2^n, and exactly one alternative of each may agree.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from equivalence import search
from equivalence.errors import EquivalenceError, InputError, MappingError
from equivalence.frameworks.subject import Subject
from equivalence.numerics import AGREES, DIFFERS, distance, expected, finite, measure, ulp_twin
from equivalence.observation import Batch, Observation, Seen
from equivalence.runs import Four
from equivalence.weights import Bound, Leaves, Mapping, Rule
from equivalence.weights.infer import Proposal, refusal

GRADIENT = "parameter_gradients.cotangent."
NOISE_RUNS = 4
"""Further runs of the reference that measure its noise."""
ULP = 2.0**-52
MODELS = 2
"""Sets of random weights on which an alternative must agree."""


def settle(
    proposal: Proposal, reference: Subject, port: Subject, batch: Batch, select: Callable[[Any], Any], seed: int
) -> Mapping:
    """The mapping that a proposal becomes once its choices are decided on the user's example, by the statistic.

    What nothing fits is let go where it is idle: `structure` says so. Raises MappingError with every alternative as
    rules to paste where none or several of a choice agree, and where what is left is used.
    """
    if not (proposal.choices or proposal.problems) or all(proposal.left):
        return proposal.mapping()
    try:
        return _settled(proposal, Probe(reference, port, select), batch, seed)
    except MappingError:
        raise
    except Exception as error:  # whatever a framework raises: gradients that a port does not have, say
        text = str(error).strip().partition("\n")[0]
        told = text if isinstance(error, EquivalenceError) else f"{type(error).__name__}: {text}"
        raise MappingError(f"{proposal.refused}; nor could a run decide: {told}") from error


def _settled(proposal: Proposal, probe: Probe, batch: Batch, seed: int) -> Mapping:
    if not probe.comparable(batch, seed):
        raise MappingError(f"{proposal.refused}; nor could a run decide: the sides return arrays of other shapes")
    extra: list[Rule] = []
    if proposal.problems:
        lost = [Rule(path, None) for path in proposal.left[0]] + [Rule(None, path) for path in proposal.left[1]]
        first = [rule for choice in proposal.choices for rule in choice.alternatives[0]]
        if not probe.idle(proposal.left, [*proposal.rules, *first], batch, seed):
            return proposal.mapping()
        extra = lost
    lists: list[list[tuple[Rule, ...]]] = [[*choice.alternatives] for choice in proposal.choices]
    for number in range(MODELS if lists else 0):
        agreed = probe.decide(
            proposal.rules, [choice.alternatives for choice in proposal.choices], batch, seed + number
        )
        lists = [[a for a in kept if a in found] for kept, found in zip(lists, agreed, strict=True)]
    undecided = [
        f"{choice} ({'several agree' if found else 'none agrees'} with the reference)"
        for choice, found in zip(proposal.choices, lists, strict=True)
        if len(found) != 1
    ]
    if undecided:
        raise MappingError(refusal(undecided, ()))
    return proposal.with_rules(extra).mapping([found[0] for found in lists])


class Probe:
    """Runs both sides with the port's weights in the port's own names: one compiled program for every mapping."""

    def __init__(self, reference: Subject, port: Subject, select: Callable[[Any], Any]) -> None:
        from equivalence.runtimes.jax import JaxRunner
        from equivalence.runtimes.torch import TorchRunner

        own = Leaves(port.leaves.shapes)
        itself = Mapping(Rule(path, path) for path in own.shapes).bind(own, own)
        self.reference, self.port = reference, port
        self.ours = TorchRunner(reference, None, select)
        self.theirs = JaxRunner(port, itself, None, select)

    def reference_runs(self, weights: Observation, batch: Batch, seed: int) -> dict[int, Seen]:
        """The reference in eval mode, in float32 and float64."""
        return {bits: self.ours.observe(bits, weights, batch, False, seed) for bits in (32, 64)}

    def port_run(self, bits: int, weights: Observation, batch: Batch, seed: int, reference: Seen) -> Observation:
        """The port in eval mode, from leaves under its own names and with gradients under them."""
        return self.theirs.observe(bits, weights, batch, False, seed, reference).values

    def four(self, weights: Observation, port_weights: Observation, batch: Batch, seed: int) -> Four:
        """Both sides in eval mode in float32 and float64: outputs, and gradients in each side's own names."""
        ours = self.reference_runs(weights, batch, seed)
        theirs = {bits: self.port_run(bits, port_weights, batch, seed, ours[64]) for bits in (32, 64)}
        return Four(ours[32].values, ours[64].values, theirs[32], theirs[64])

    def comparable(self, batch: Batch, seed: int) -> bool:
        """Whether both sides return arrays of the same paths and shapes. Raises InputError where one fails to run."""
        weights = self.weights(seed)
        try:
            ours = self.ours.observe(64, weights, batch, False, seed, gradients=False).values
            theirs = self.theirs.outputs_of(64, {**self.port.params, **self.port.buffers}, batch)
        except EquivalenceError:
            raise
        except Exception as error:
            text = str(error).strip().partition("\n")[0]
            raise InputError(f"a side fails on these inputs: {type(error).__name__}: {text}") from error
        shapes = {p.removeprefix("outputs."): v.shape for p, v in ours.items() if p.startswith("outputs.")}
        return shapes == {path: shape for path, (shape, _) in theirs.items()}

    def noise(self, weights: Observation, batch: Batch, seed: int, base: Observation) -> dict[str, float]:
        """How far the reference's own noise moves each path: weights moved by one ulp of float64."""
        largest: dict[str, float] = {}
        for number in range(NOISE_RUNS):
            rng = np.random.default_rng((seed, number))
            wide = {
                path: value.astype(np.float64) if value.dtype.kind == "f" else value for path, value in weights.items()
            }
            near = {path: ulp_twin(value, rng, ULP) for path, value in wide.items()}
            run = self.ours.observe(64, near, batch, False, seed).values
            for path, value in base.items():
                if value.dtype.kind == "f" and path in run:
                    largest[path] = max(largest.get(path, 0.0), finite(distance(run[path], value)))
        return largest

    def weights(self, seed: int) -> Observation:
        """The reference's weights, moved off their initial values."""
        ours = self.reference
        return search.moved(ours.params, ours.buffers, ours.layers, 1.0, seed)

    def into_port(self, weights: Observation, rules: Sequence[Rule]) -> Observation:
        """The port's leaves: moved by rules, its own where no rule makes them."""
        return {**self.port.params, **self.port.buffers, **self.bound(rules).forward(weights)}

    def bound(self, rules: Sequence[Rule]) -> Bound:
        """Rules about some leaves, resolved."""
        return Mapping(rules).bind_part(self.reference.leaves, self.port.leaves)

    def decide(
        self,
        rules: Sequence[Rule],
        choices: Sequence[Sequence[tuple[Rule, ...]]],
        batch: Batch,
        seed: int,
    ) -> list[list[tuple[Rule, ...]]]:
        """Of every choice the alternatives whose gradients are the reference's, where all choices are symmetric."""
        weights = self.weights(seed)
        for alternatives in choices:
            weights |= symmetric([self.bound(picked) for picked in alternatives], weights)
        everything = [*rules, *(rule for alternatives in choices for rule in alternatives[0])]
        four = self.four(weights, self.into_port(weights, everything), batch, seed)
        judge = Agreement(self, weights, batch, seed, four)
        return [[picked for picked in alternatives if judge.agrees(self.bound(picked))] for alternatives in choices]

    def idle(self, left: tuple[Sequence[str], Sequence[str]], rules: Sequence[Rule], batch: Batch, seed: int) -> bool:
        """Whether both sides compute the same whatever the leaves that nothing fits hold: they are unused."""
        weights = self.weights(seed)
        port_weights = self.into_port(weights, rules)
        rng = np.random.default_rng(seed)
        runs = []
        for moves in (False, True):
            if moves:
                weights |= {p: _elsewhere(weights[p], rng) for p in left[0]}
                port_weights |= {p: _elsewhere(port_weights[p], rng) for p in left[1]}
            four = self.four(weights, port_weights, batch, seed)
            runs.append((four.reference64, four.port64))
        return all(
            np.array_equal(before[path], after[path], equal_nan=before[path].dtype.kind == "f")
            for before, after in zip(*runs, strict=True)
            for path in before
            if path.startswith("outputs.")
        )


class Agreement:
    """The two-stage statistic over one example of a probe."""

    def __init__(self, probe: Probe, weights: Observation, batch: Batch, seed: int, four: Four) -> None:
        self.probe, self.weights, self.batch, self.seed, self.four = probe, weights, batch, seed, four
        self.elements = max(array.size for array in (*weights.values(), *batch.arrays().values()))
        self._noise: dict[str, float] | None = None

    def agrees(self, bound: Bound) -> bool:
        """Whether the port's gradients, moved back, are the reference's at every parameter that a mapping is about;
        False where it is about none."""
        back = [bound.backward(_gradients(values), gradient=True) for values in (self.four.port32, self.four.port64)]
        paths = [path for path in back[1] if GRADIENT + path in self.four.reference64]
        return bool(paths) and all(self._same(GRADIENT + path, *(found[path] for found in back)) for path in paths)

    def same_outputs(self) -> bool:
        """Whether both sides return the same."""
        return all(
            path in self.four.port64 and self._same(path, self.four.port32[path], self.four.port64[path])
            for path in self.four.reference64
            if path.startswith("outputs.")
        )

    def _same(self, path: str, port32: np.ndarray, port64: np.ndarray) -> bool:
        ours = self.four.reference32[path], self.four.reference64[path]
        if port64.shape != ours[1].shape:
            return False
        m = measure(path, *ours, port32, port64, self.elements)
        if m.exact:
            return m.gap == 0.0
        first = expected(m, m.scale_reference)
        if m.gap <= AGREES * first:
            return True
        if self._noise is None:
            self._noise = self.probe.noise(self.weights, self.batch, self.seed, self.four.reference64)
        return m.gap <= DIFFERS * max(first, self._noise.get(path, 0.0))


def symmetric(alternatives: Sequence[Bound], weights: Observation) -> Observation:
    """The leaves that alternatives are about, with values that all of them put into the port alike.

    Elements are numbered and moved by every alternative; those that land in one place are given one value.
    """
    paths = list(dict.fromkeys(b.source.canonical(p) for b in alternatives for m in b.moves for p in m.sources))
    sizes = np.cumsum([0, *(weights[path].size for path in paths)])
    numbers = {
        path: np.arange(start, start + weights[path].size).reshape(weights[path].shape)
        for path, start in zip(paths, sizes, strict=False)
    }
    landed = [bound.forward(numbers) for bound in alternatives]
    label = np.arange(sizes[-1])
    ends = [(landed[0][path].ravel(), other[path].ravel()) for other in landed[1:] for path in landed[0]]
    while True:
        before = label.copy()
        for a, b in ends:
            least = np.minimum(label[a], label[b])
            np.minimum.at(label, a, least)
            np.minimum.at(label, b, least)
        label = label[label]
        if np.array_equal(label, before):
            break
    values = np.concatenate([weights[path].ravel() for path in paths])
    return {path: values[label[numbers[path]]] for path in paths}


def _gradients(values: Observation) -> Observation:
    return {path.removeprefix(GRADIENT): value for path, value in values.items() if path.startswith(GRADIENT)}


def _elsewhere(value: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return value + rng.standard_normal(value.shape).astype(value.dtype) if value.dtype.kind == "f" else value
