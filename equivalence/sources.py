"""Where examples come from: a spec's configurations, or the one pair that a user hands in."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from hypothesis import strategies as st

from equivalence import search
from equivalence.comparison import Comparison
from equivalence.errors import EquivalenceError, InputError
from equivalence.frameworks import adapt
from equivalence.frameworks.subject import Subject
from equivalence.observation import Batch, Observation
from equivalence.optimizers import OptimizerPair, resolve
from equivalence.optimizers.pairs import horizon
from equivalence.probing import settle
from equivalence.rearrangements import finding
from equivalence.runs import Example
from equivalence.search import Trial
from equivalence.spec import REFERENCE, BatchPlan, Spec, TrainingData
from equivalence.weights import Mapping
from equivalence.weights.infer import propose
from equivalence.weights.layouts import constants
from equivalence.work import Structure

BATCHES = 3
"""Batches of an example: the first is observed, optimizer steps cycle through all."""
STRUCTURES = 2
"""Configurations drawn beside the default one."""
EXAMPLES = 12
"""Examples a port, unless asked otherwise."""
OWN = "own"
"""The name of the implementations' own pair of optimizers."""
WHOLE = (OWN, "adam")
"""Optimizers with which `training` runs every epoch of a spec's plan."""
OTHER_EPOCHS = 20
"""Epochs that `training` runs with any other."""
SHRINKING = 10
"""Configurations that may be compiled to find a smaller failing one."""


@dataclass(frozen=True)
class Parts:
    """What the two sides are run with beside their weights."""

    losses: tuple[Callable[..., Any], Callable[..., Any]] | None
    steps: tuple[Callable[..., Any], Callable[..., Any]] | None
    optimizer: OptimizerPair
    select: Callable[[Any], Any] = lambda outputs: outputs
    translated: str | None = None
    """The loss of the reference that was translated for the port, by its class."""

    @property
    def notes(self) -> list[str]:
        """What of the port's side is this project's and not the user's."""
        loss = f"{self.translated} was translated to JAX by this project; it is not your own loss that was checked"
        return [note for note in (self.optimizer.note, loss if self.translated else None) if note]


def compared(
    reference: Subject, port: Subject, mapping: Mapping | None, parts: Parts, seed: int, batch: Batch | None = None
) -> tuple[Any, Comparison]:
    """`(bound, comparison)` of two subjects. Without a mapping one is inferred; what names leave open is decided on
    `batch`, the user's example. Raises MappingError where the mapping does not fit, or where that asks for rules."""
    from equivalence.runtimes import jax as on_jax
    from equivalence.runtimes import torch as on_torch
    from equivalence.runtimes.torch_found import Lifting

    if reference.runtime != "torch":
        raise InputError(f"the reference is a torch.nn.Module, not a model of {reference.framework}")
    if port.runtime != "jax":
        raise InputError(f"the port is a JAX model, not one of {port.framework}")
    reference.require_finite()
    port.require_finite()
    mapping = inferred(reference, port, parts, seed, batch) if mapping is None else mapping
    bound = mapping.bind(reference.leaves, port.leaves)
    ours, theirs = parts.losses or (None, None)
    step, port_step = parts.steps or (None, None)
    stepping = ours or on_torch.projection(seed), theirs or on_jax.projection(seed)
    trained = [path for path in reference.params if path not in reference.frozen]
    lifted = Lifting(reference, bound.without_counterpart()[0])
    comparison = Comparison(
        on_torch.TorchRunner(reference, ours, parts.select, lifted=lifted),
        on_jax.JaxRunner(port, bound, theirs, parts.select, frozen=reference.frozen),
        on_torch.TorchRunner(reference, stepping[0], parts.select, step, lifted),
        on_jax.JaxRunner(port, bound, stepping[1], parts.select, port_step, reference.frozen, trained),
        parts.optimizer,
    )
    return bound, comparison


def inferred(reference: Subject, port: Subject, parts: Parts, seed: int, batch: Batch | None) -> Mapping:
    """The mapping that names, types and shapes propose and a probe on `batch` settles; what is open is asked without
    one. Frozen parameters are constants like buffers, unless they are zeros or ones: a port need not hold them."""
    held = {*reference.buffers, *constants({path: reference.params[path] for path in reference.frozen})}
    proposal = propose(reference.leaves, port.leaves, reference.layers, held, port.framework)
    return proposal.mapping() if batch is None else settle(proposal, reference, port, batch, parts.select, seed)


@dataclass
class SpecSource:
    """Examples of a spec: the default configuration on real data first, then configurations that Hypothesis draws.

    `optimizers` are names or pairs to step with; None is the implementations' own. With several of them a port is
    judged once with each and called `port+optimizer`.
    """

    spec: Spec
    frameworks: tuple[str, ...]
    optimizers: tuple[Any, ...] = (None,)
    examples: int = EXAMPLES
    seed: int = 0
    _references: dict[Any, Subject] = field(default_factory=dict)

    @property
    def target(self) -> str:
        """The spec's name."""
        return self.spec.name

    @property
    def reference(self) -> str:
        """torch."""
        return REFERENCE

    @property
    def reproduce(self) -> str:
        """The command line that repeats a port's run."""
        extra = "" if self.examples == EXAMPLES else f" --examples {self.examples}"
        return f"equivalence verify {self.spec.origin or self.spec.name} --port {{port}}{extra} --seed {self.seed}"

    @property
    def ports(self) -> tuple[str, ...]:
        """The ports, once with every optimizer."""
        return tuple(self._parts)

    @property
    def _parts(self) -> dict[str, tuple[str, Any]]:
        if len(self.optimizers) == 1:
            return {framework: (framework, self.optimizers[0]) for framework in self.frameworks}
        return {
            f"{framework}+{resolve(optimizer).name}": (framework, optimizer)
            for framework in self.frameworks
            for optimizer in self.optimizers
        }

    def count(self, port: str) -> int:
        """Examples a port."""
        return self.examples

    def findings(self, port: str) -> list[str]:
        """Nothing: a spec's mapping is given."""
        return []

    def notes(self, port: str) -> list[str]:
        """Nothing: a spec's parts are its own."""
        return []

    def trials(self) -> list[Trial]:
        """The trials after the first example, the default configuration's first."""
        configs = [self.spec.config]
        wanted = STRUCTURES if self.examples > 2 else 0
        if wanted:
            for config in search.draw(self.spec.configurations(), 10 * wanted, self.seed):
                if config not in configs and len(configs) <= wanted:
                    configs.append(config)
        ordinary = Trial(self.spec.config, "ordinary", 1.0, self.seed + 1)
        drawn = search.draw(search.trials(st.sampled_from(configs)), self.examples, self.seed)
        return sorted([ordinary, *drawn][: max(0, self.examples - 1)], key=lambda trial: configs.index(trial.config))

    def structures(self, port: str) -> Iterator[Structure]:
        """One structure a configuration, its examples with it."""
        grouped: dict[Any, list[Trial]] = {self.spec.config: []}
        for trial in self.trials():
            grouped.setdefault(trial.config, []).append(trial)
        index = 0
        for config, trials in grouped.items():
            made = self._structure(port, config)
            if config == self.spec.config:
                made.examples.append(self._first(made))
            for trial in trials:
                index += 1
                made.examples.append(self._example(made, trial, index))
            yield made

    def _structure(self, port: str, config: Any) -> Structure:
        framework, named = self._parts[port]
        ours, theirs = self.spec.implementation(REFERENCE), self.spec.implementation(framework)
        if config not in self._references:
            self._references[config] = adapt(ours.build(config, self.seed))
        reference, ported = self._references[config], adapt(theirs.build(config, self.seed))
        optimizer = resolve(named) if named is not None else _own_pair(ours, theirs, config)
        parts = Parts((ours.loss_fn, theirs.loss_fn), (ours.train_step, theirs.train_step), optimizer)
        bound, comparison = compared(reference, ported, Mapping(self.spec.rules[framework]), parts, self.seed)
        return Structure(reference, ported, bound, comparison, [])

    def _first(self, made: Structure) -> Example:
        """The default configuration at its own initial weights, on real data where the spec has any."""
        trial = Trial(self.spec.config, "ordinary", 1.0, self.seed)
        batches = self._batches(trial)
        if self.spec.first is not None:
            batches = (Batch(*self.spec.first(self.spec.config)), *batches[1:])
        return Example(0, "ordinary", True, _own(made.reference), batches, self.seed, "the real configuration and data")

    def _batches(self, trial: Trial) -> tuple[Batch, ...]:
        seeds = (trial.seed + 104729 * number for number in range(BATCHES))
        return tuple(Batch(*self.spec.example(trial.config, np.random.default_rng(s), trial.kind)) for s in seeds)

    def _example(self, made: Structure, trial: Trial, index: int) -> Example:
        ours = made.reference
        weights = search.moved(ours.params, ours.buffers, ours.layers, trial.scale, trial.seed)
        ordinary = trial.kind in self.spec.ordinary
        return Example(index, trial.kind, ordinary, weights, self._batches(trial), trial.seed, str(trial))

    def training(self, structure: Structure) -> TrainingData | None:
        """The spec's own training run; with an optimizer other than its own or Adam the first epochs of it."""
        if self.spec.training is None:
            return None
        data = self.spec.training(self.spec.config, self.seed)
        if structure.comparison.optimizer.name in WHOLE:
            return data
        return dataclasses.replace(data, plan=data.plan.first(OTHER_EPOCHS))

    def smaller(self, port: str, fails: Callable[[Structure], bool]) -> str | None:
        """The smallest failing trial that few compiled configurations lead to."""
        made: dict[Any, Structure] = {}
        answers: dict[Trial, bool] = {}

        def one(trial: Trial) -> bool:
            if trial not in answers:
                if trial.config not in made:
                    if len(made) >= SHRINKING:
                        return False
                    made[trial.config] = self._structure(port, trial.config)
                structure = made[trial.config]
                structure.examples[:] = [self._example(structure, trial, 0)]
                answers[trial] = fails(structure)
            return answers[trial]

        found = search.smallest(search.trials(self.spec.configurations()), one, self.seed)
        return None if found is None else str(found)


def _own_pair(ours: Any, theirs: Any, config: Any) -> OptimizerPair:
    import torch

    made = ours.make_optimizer(config.learning_rate)([torch.nn.Parameter(torch.zeros(2, 1))])
    return OptimizerPair(
        OWN,
        "the implementations' own",
        config.learning_rate,
        lambda params, learning_rate: ours.make_optimizer(learning_rate)(params),
        theirs.make_optimizer,
        steps=horizon(made),
    )


def _own(subject: Subject) -> Observation:
    return {
        path: value.astype(np.float32) if value.dtype.kind == "f" else value
        for path, value in {**subject.params, **subject.buffers}.items()
    }


@dataclass
class PairSource:
    """Examples of one pair that the user hands in: their own weights and inputs first, exactly; then drawn ones."""

    made: Structure
    inputs: Any
    targets: tuple[np.ndarray, ...]
    parts: Parts
    examples: int = EXAMPLES
    seed: int = 0
    inferred: bool = False
    """Whether the mapping was found here, not given."""

    @property
    def target(self) -> str:
        return self.made.reference.name

    @property
    def reference(self) -> str:
        return self.made.reference.framework

    @property
    def ports(self) -> tuple[str, ...]:
        return (self.made.port.framework,)

    @property
    def reproduce(self) -> str:
        return f"equivalence.verify(..., seed={self.seed})"

    def count(self, port: str) -> int:
        """Examples of the pair."""
        return self.examples

    def findings(self, port: str) -> list[str]:
        """Of a port that diverges under an inferred mapping: the rearrangement of weights under which it would not."""
        if not self.inferred:
            return []
        made, first = self.made, self._drawn(1, self.seed)[0]
        mapping = Mapping(dict.fromkeys(move.rule for move in made.bound.moves))
        try:
            found = finding(mapping, made.reference, made.port, first, self.parts.select, self.seed)
        except EquivalenceError:  # a port that cannot be run for it, or draws otherwise: the checks have said so
            found = None
        return [] if found is None else [f"{found}; pass weights= with them to accept"]

    def notes(self, port: str) -> list[str]:
        """That an optimizer or a loss was translated, if it was."""
        return self.parts.notes

    def _drawn(self, count: int, seed: int) -> list[Batch]:
        """The user's own inputs, or what their strategy gives."""
        if not isinstance(self.inputs, st.SearchStrategy):
            return [Batch(self.inputs, self.targets)] * count
        found = search.draw(self.inputs, count, seed)
        return [Batch(as_inputs(found[number % len(found)]), self.targets) for number in range(count)]

    def structures(self, port: str) -> Iterator[Structure]:
        """The one structure."""
        drawn = self._drawn(self.examples, self.seed)
        ours = self.made.reference
        own = Example(
            0, "ordinary", True, _own(ours), self._batches(drawn[0], "ordinary", self.seed), self.seed, "yours"
        )
        if self.made.keep:
            back = self.made.bound.backward({**self.made.port.params, **self.made.port.buffers})
            own = dataclasses.replace(own, kept={**own.weights, **_floats(back)})
        self.made.examples[:] = [own]
        trials = [Trial(None, "ordinary", 1.0, self.seed + 1)]
        trials += search.draw(search.trials(st.none()), self.examples, self.seed)
        for index, trial in enumerate(trials[: max(0, self.examples - 1)], 1):
            self.made.examples.append(self._example(trial, index, drawn[index % len(drawn)]))
        yield self.made

    def _batches(self, first: Batch, kind: str, seed: int) -> tuple[Batch, ...]:
        others = (search.batch_like(first, kind, seed + 104729 * number) for number in range(1, BATCHES))
        return (first, *others)

    def _example(self, trial: Trial, index: int, drawn: Batch) -> Example:
        ours = self.made.reference
        weights = search.moved(ours.params, ours.buffers, ours.layers, trial.scale, trial.seed)
        # a frozen table that the port computes is a constant: moved here alone it would be another model
        weights |= {p: _own(ours)[p] for p in self.made.bound.without_counterpart()[0] if p in ours.frozen}
        if isinstance(self.inputs, st.SearchStrategy):
            first, ordinary = drawn, True
        else:
            first, ordinary = search.batch_like(drawn, trial.kind, trial.seed), trial.kind == "ordinary"
        kind = "ordinary" if ordinary else trial.kind
        return Example(index, kind, ordinary, weights, self._batches(first, kind, trial.seed), trial.seed, str(trial))

    def training(self, structure: Structure) -> TrainingData | None:
        """Twelve epochs of four batches like the user's, where there is a loss to train on."""
        if self.parts.losses is None and self.parts.steps is None:
            return None
        batches = self._batches(structure.examples[0].batches[0], "ordinary", self.seed + 17)
        batches += (search.batch_like(batches[0], "ordinary", self.seed + 23),)
        names = tuple(batches[0].inputs) if isinstance(batches[0].inputs, dict) else None
        columns = zip(*(batch.arrays().values() for batch in batches), strict=True)
        inputs = tuple(np.stack(column) for column in columns)
        targets = tuple(np.stack(column) for column in zip(*(batch.targets for batch in batches), strict=True))
        rng = np.random.default_rng(self.seed)
        plan = BatchPlan(np.stack([rng.permutation(len(batches)) for _ in range(12)]), 1)
        return TrainingData(inputs, targets, (), (), plan, None, rows_are_batches=True, must_learn=False, names=names)

    def smaller(self, port: str, fails: Callable[[Structure], bool]) -> str | None:
        """The simplest failing trial of the user's structure."""
        answers: dict[Trial, bool] = {}

        def one(trial: Trial) -> bool:
            if trial not in answers:
                if len(answers) >= 4 * SHRINKING:
                    return False
                self.made.examples[:] = [self._example(trial, 0, self._drawn(1, self.seed)[0])]
                answers[trial] = fails(self.made)
            return answers[trial]

        found = search.smallest(search.trials(st.none()), one, self.seed)
        return None if found is None else str(found)


def _floats(leaves: Observation) -> Observation:
    return {
        p: np.asarray(v).astype(np.float32) if np.asarray(v).dtype.kind in "fV" else np.asarray(v)
        for p, v in leaves.items()
    }


def first_batch(inputs: Any, targets: tuple[np.ndarray, ...], seed: int) -> Batch:
    """The user's own example, or the first that their strategy gives: what an inferred mapping is probed on."""
    if isinstance(inputs, st.SearchStrategy):
        inputs = as_inputs(search.draw(inputs, 1, seed)[0])
    return Batch(inputs, targets)


def as_inputs(inputs: Any) -> Any:
    """Inputs as a dict or a tuple of NumPy arrays. Raises InputError for anything else, and for NaN or infinity."""
    if isinstance(inputs, dict):
        made: Any = {str(name): _array(value) for name, value in inputs.items()}
        values: Sequence[np.ndarray] = list(made.values())
    elif isinstance(inputs, (tuple, list)):
        made = tuple(_array(value) for value in inputs)
        values = made
    else:
        raise InputError(
            f"inputs= takes a tuple or a dict of arrays, or a strategy of them, not {type(inputs).__name__}"
        )
    for number, value in enumerate(values):
        if value.dtype.kind == "f" and not np.isfinite(value).all():
            raise InputError(f"input {number} holds NaN or infinity")
    return made


def _array(value: Any) -> np.ndarray:
    plain = np.asarray(value.detach().cpu() if hasattr(value, "detach") else value)
    if plain.dtype.kind not in "fiub":
        raise InputError(f"an input of dtype {plain.dtype} cannot be compared")
    return plain.astype(np.float32) if plain.dtype.kind == "f" else plain
