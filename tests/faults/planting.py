"""Planting a fault: the Titanic implementations as they are, with one thing changed on the port's side.

A `Fault` says what is changed and which check, in the order of `equivalence.verdict.CHECKS`, is the first that can
see it. `judged` runs every check up to that one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import jax
import pytest
from flax import nnx
from hypothesis import strategies as st
from jax import Array

import impls.titanic_mlp.linen as linen_titanic
import impls.titanic_mlp.nnx as nnx_titanic
from equivalence.api import verify, verify_spec
from equivalence.events import Finished
from equivalence.frameworks.linen import LinenModel, linen
from equivalence.optimizers import OptimizerPair
from equivalence.sources import PairSource
from equivalence.spec import REFERENCE, Spec, TrainingData
from equivalence.verdict import CHECKS, PortReport
from equivalence.weights import Rule
from impls.titanic_mlp.config import Config
from impls.titanic_mlp.spec import SPEC, training
from tests.pairs import Pair

EPOCHS = 2
"""Epochs of a training run here: 34 steps, two of them on the short last batch."""
SHORT = Config(epochs=EPOCHS)
"""The default configuration, trained that long."""


# --- one body for both frameworks ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Parts:
    """The layers of a Titanic port in the middle of a call, named alike for NNX and Linen."""

    module: Any
    train: bool
    drop: Callable[..., Array]
    """`drop(number, h, deterministic=None)`: dropout layer `number` on `h`."""
    leaf: Callable[[str], Array]
    """`leaf("linear1.kernel")`: the array itself."""

    def linear(self, number: int, x: Array) -> Array:
        """Linear layer `number` as it stands."""
        return getattr(self.module, f"linear{number}")(x)


Body = Callable[[Parts, Array], Any]
"""A forward pass written on parts: `body(parts, x) -> outputs`."""


def right(parts: Parts, x: Array) -> Array:
    """The forward pass of the Titanic network, unchanged."""
    return finish(parts, parts.drop(1, parts.linear(1, x)))


def finish(parts: Parts, h: Array) -> Array:
    """All that follows the first dropout."""
    h = jax.nn.leaky_relu(h, parts.module.slope)
    h = parts.drop(2, parts.linear(2, h))
    return parts.linear(3, jax.nn.leaky_relu(h, parts.module.slope)).squeeze(-1)


def nnx_build(body: Body) -> Callable[[Config, int], nnx.Module]:
    """The NNX port with another forward pass."""

    class Planted(nnx_titanic.TitanicMLP):
        def __call__(self, x: Array) -> Any:
            def drop(number: int, h: Array, deterministic: bool | None = None) -> Array:
                return getattr(self, f"dropout{number}")(h, deterministic=deterministic)

            def leaf(path: str) -> Array:
                layer, _, name = path.partition(".")
                return getattr(getattr(self, layer), name)[...]

            return body(Parts(self, not self.dropout1.deterministic, drop, leaf), x)

    return lambda config, seed: Planted(config, rngs=nnx.Rngs(seed))


def linen_build(body: Body) -> Callable[[Config, int], LinenModel]:
    """The Linen port with another forward pass."""

    class Planted(linen_titanic.TitanicMLP):
        def __call__(self, x: Array, train: bool = False) -> Any:
            def drop(number: int, h: Array, deterministic: bool | None = None) -> Array:
                off = not train if deterministic is None else deterministic
                return getattr(self, f"dropout{number}")(h, deterministic=off)

            def leaf(path: str) -> Array:
                layer, _, name = path.partition(".")
                return getattr(self, layer).variables["params"][name]

            return body(Parts(self, train, drop, leaf), x)

    def build(config: Config, seed: int) -> LinenModel:
        made = linen_titanic.build(config, seed)  # the variables of the right port: a body may not touch every leaf
        return linen(Planted(config), made.variables, create_state=linen_titanic.create_state)

    return build


# --- faults ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fault:
    """One planted fault: `check` is the first that can see it.

    `body` replaces the forward pass, `changes` single functions of the implementation, `rules` the weight rules,
    `optimizer` the pair of optimizers, `data` what the port is trained on. `kinds` inputs beyond the ordinary need
    more than two examples.
    """

    name: str
    port: str
    check: str
    body: Body | None = None
    changes: Mapping[str, Any] = field(default_factory=dict)
    rules: Sequence[Rule] | None = None
    config: Config = SHORT
    optimizer: OptimizerPair | None = None
    data: Callable[[TrainingData], TrainingData] | None = None
    examples: int = 2


@dataclass(frozen=True)
class PlantedSpec(Spec):
    """The Titanic spec with some functions of its port replaced."""

    changes: Mapping[str, Any] = field(default_factory=dict)

    def implementation(self, framework: str) -> ModuleType:
        """The true implementation; the port's with the changes laid over it."""
        module = super().implementation(framework)
        if framework == REFERENCE or not self.changes:
            return module
        return SimpleNamespace(**{**vars(module), **self.changes})  # type: ignore[return-value]


def planted(fault: Fault) -> PlantedSpec:
    """The spec in which a fault is planted."""
    changes = dict(fault.changes)
    if fault.body is not None:
        changes["build"] = {"nnx": nnx_build, "linen": linen_build}[fault.port](fault.body)
    given = {f.name: getattr(SPEC, f.name) for f in dataclasses.fields(Spec)}
    config, rules = fault.config, SPEC.rules[fault.port] if fault.rules is None else fault.rules
    given |= {"config": config, "configurations": lambda: st.just(config), "rules": {fault.port: rules}}
    given |= {"training": lambda config, seed: _first_epochs(training(config, seed))}
    return PlantedSpec(**given, changes=changes)


def _first_epochs(data: TrainingData) -> TrainingData:
    return dataclasses.replace(data, plan=data.plan.first(EPOCHS))


def up_to(check: str) -> tuple[str, ...]:
    """Every check up to and including this one."""
    return CHECKS[: CHECKS.index(check) + 1]


def judged(fault: Fault, monkeypatch: pytest.MonkeyPatch, checks: Sequence[str] | None = None) -> PortReport:
    """The report on the port with its fault, by every check up to the fault's."""
    if fault.data is not None:
        from equivalence.runtimes import jax_training

        plain, change = jax_training.WholeTraining, fault.data

        class Planted(plain):  # type: ignore[misc, valid-type]
            def __init__(self, runner: Any, optimizer: OptimizerPair, bits: int, data: TrainingData) -> None:
                super().__init__(runner, optimizer, bits, change(data))

        monkeypatch.setattr(jax_training, "WholeTraining", Planted)
    events = verify_spec(
        planted(fault),
        ports=[fault.port],
        checks=up_to(fault.check) if checks is None else checks,
        optimizer=fault.optimizer,
        examples=fault.examples,
        shrink=False,
    )
    last = list(events)[-1]
    assert isinstance(last, Finished)
    return last.report.reports[0]


def judged_pair(pair: Pair, check: str, monkeypatch: pytest.MonkeyPatch, **options: Any) -> PortReport:
    """The report of `equivalence.verify` on a pair, by every check up to `check`; a failing example is not shrunk."""
    monkeypatch.setattr(PairSource, "smaller", lambda *_: None)
    given = {"loss": pair.loss, "weights": pair.weights, "examples": 2, "checks": up_to(check), **options}
    return verify(pair.reference, pair.port, pair.inputs, pair.targets, **given).reports[0]


def first_divergent(report: PortReport) -> str | None:
    """The first check that diverged."""
    return next((check.name for check in report.checks if check.verdict == "divergent"), None)


def assert_caught(report: PortReport, check: str) -> None:
    """The report is divergent, first in `check`, and every check before it is equivalent."""
    verdicts = {c.name: c.verdict for c in report.checks}
    expected = {name: "divergent" if name == check else "equivalent" for name in up_to(check)}
    assert report.verdict == "divergent"
    assert {name: verdicts[name] for name in expected} == expected
