"""Mistakes in moving an optimizer's state, each planted in one that was moved right, and seen in the steps after."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import equivalence as eq
from equivalence.optimizers.trees import Entry, by_path, entries
from equivalence.runtimes import jax as jax_runtime
from equivalence.runtimes import torch_environment
from tests.agreement import Arrays, disagreements
from tests.rule_sides import part
from tests.translated_cases import CASES, NETS, SCHEDULED, case_of
from tests.translated_sides import STEPS, Case, TorchRun, draw, port_of, seen_of

AT, N = 7, 16
"""The step before which the state is moved, and how many there are."""

Change = Callable[[Any], Any]
"""Of one array of the state."""


def changed(state: Any, params: Any, fields: tuple[str, ...], change: Change, leaf: str = "") -> Any:
    """An Optax state with a field changed, of one leaf or of all."""

    def one(entry: Entry) -> Any:
        return change(entry.array) if entry.field in fields and leaf in ("", entry.leaf) else entry.array

    structure = jax.tree.structure(state)
    return jax.tree.unflatten(structure, [one(entry) for entry in entries(state, by_path(params))])


def swapped(state: Any, params: Any, one: str, other: str) -> Any:
    """An Optax state with two fields exchanged."""
    held = {(entry.field, entry.leaf): entry.array for entry in entries(state, by_path(params))}
    names = {one: other, other: one}
    found = [held[names.get(entry.field, entry.field), entry.leaf] for entry in entries(state, by_path(params))]
    return jax.tree.unflatten(jax.tree.structure(state), found)


@dataclass(frozen=True)
class Fault:
    """A case, what is done wrong with the state moved to the port, and the translation that goes on if another."""

    case: Case
    plant: Callable[[Any, Any], Any] = lambda state, params: state
    other: Case | None = None


def field(case: Case, fields: str, change: Change, leaf: str = "") -> Fault:
    return Fault(case, lambda state, params: changed(state, params, tuple(fields.split()), change, leaf))


ADAM, NADAM, SGD, RPROP, ASGD = (CASES[name] for name in ("Adam", "NAdam", "SGD", "Rprop", "ASGD"))
STEPPED, METRIC, STACKED = SCHEDULED["every third step"], SCHEDULED["a metric"], NETS["leaves of the port"]
EXCHANGED = replace(ADAM, groups=((ADAM.groups[0][0], {**ADAM.groups[1][1], "amsgrad": True}), (ADAM.groups[1][0], {})))
DECAYED = replace(ADAM, groups=(ADAM.groups[0], (ADAM.groups[1][0], {**ADAM.groups[1][1], "weight_decay": 0.0})))
AXES = case_of("Adafactor", ("square", "bias"))

none = jnp.zeros_like
FAULTS: dict[str, Fault] = {
    "moments not moved": field(ADAM, "mu nu nu_max", none),
    "first moment of one leaf not moved": field(ADAM, "mu", none, "conv.kernel"),
    "first moment not transposed": field(ADAM, "mu", jnp.transpose, "fc.square"),
    "second moment not transposed": field(ADAM, "nu", jnp.transpose, "fc.square"),
    "second moment moved as its root": field(ADAM, "nu", jnp.sqrt),
    "first and second moment exchanged": Fault(ADAM, lambda state, params: swapped(state, params, "mu", "nu")),
    "largest second moment left behind": field(ADAM, "nu_max", none),
    "counter one too high": field(ADAM, "count", lambda count: count + 1),
    "counter one too low": field(ADAM, "count", lambda count: count - 1),
    "counter not moved": field(ADAM, "count", none),
    "counter of one leaf not moved": field(ADAM, "count", none, "gain"),
    "options of the groups exchanged": Fault(ADAM, other=EXCHANGED),
    "a masked leaf not decayed": Fault(ADAM, other=DECAYED),
    "product of the momenta left at one": field(NADAM, "mu_product", jnp.ones_like),
    "momentum of one leaf zeroed": field(SGD, "trace", none, "fc.bias"),
    "first gradient taken whole again": field(SGD, "count", none, "conv.kernel"),
    "steps of Rprop not moved": field(RPROP, "step_size", lambda size: jnp.full_like(size, 0.01)),
    "gradient before forgotten": field(RPROP, "prev", none),
    "rate of the next step forgotten": field(ASGD, "eta", lambda rate: jnp.full_like(rate, 0.05)),
    "averaged parameters not moved": field(ASGD, "ax", none),
    "sum of squares begun anew": field(CASES["Adagrad"], "sum_of_squares", lambda total: jnp.full_like(total, 0.5)),
    "mean gradient not moved": field(CASES["RMSprop"], "mu", none, "fc.bias"),
    "rows and columns exchanged": Fault(
        AXES,
        lambda state, params: swapped(
            changed(state, params, ("row_var", "col_var"), jnp.transpose), params, "row_var", "col_var"
        ),
    ),
    "position of the schedule one too high": Fault(
        STEPPED, lambda state, params: state._replace(count=state.count + 1)
    ),
    "position of the schedule not moved": Fault(STEPPED, lambda state, params: state._replace(count=none(state.count))),
    "bad metrics forgotten": field(METRIC, "num_bad_epochs", none),
    "best metric forgotten": field(METRIC, "best", lambda best: jnp.full_like(best, jnp.inf)),
    "rate not moved": field(METRIC, "lr", lambda rate: rate / 2),
    "stacked layers the other way round": field(STACKED, "mu", lambda moment: moment[::-1], "h.kernel"),
    "fused parts the other way round": field(STACKED, "nu", lambda moment: moment[:, ::-1], "qkv"),
}


@functools.cache
def whole(case: Case) -> dict[str, np.ndarray]:
    """Torch's run from the handover on."""
    arrays = data(case)
    with torch_environment.environment(64, threads=1):
        run, found = TorchRun(case, arrays), {}
        for number in range(N):
            run.step(number)
            found[number] = run.seen()
    return seen_of(case, arrays, {number: found[number] for number in range(AT, N)})


def data(case: Case) -> Arrays:
    """Gradients at every step, larger ones before the handover; metrics whose next one reduces the rate."""
    found, steps = draw(case, seed=1, missing=0.0), np.arange(STEPS)
    for name, gradients in part(found, "gradients").items():
        scale = np.where(steps < AT, 4.0, 1.0).reshape(-1, *(1 for _ in gradients.shape[1:]))
        found[f"gradients.{name}"] = gradients * scale
    found |= {k: v.astype(np.float32).astype(float) for k, v in found.items() if v.dtype.kind == "f"}
    return found | {"metric": np.where(steps < 4, 1 / (1 + steps), 2.0)}


def gone_on(case: Case, plant: Callable[[Any, Any], Any], other: Case | None = None) -> dict[str, np.ndarray]:
    """The port's run from a state moved to it with a fault."""
    arrays, port = data(case), port_of(other or case, 64)
    with torch_environment.environment(64, threads=1), jax_runtime.environment(64):
        run = TorchRun(case, arrays)
        for number in range(AT):
            run.step(number)
        tree = jax.tree.map(jnp.asarray, case.tree(run.values()))
        options = {"mapping": case.mapping, "scheduler": run.scheduler, "every": case.every, "steps": AT}
        state = eq.optimizer_state(run.optimizer, port.transform, tree, model=run.model, **options)
        return seen_of(case, arrays, port.run(arrays, (tree, plant(state, tree)), AT, N)[1])


def differs(case: Case, plant: Callable[[Any, Any], Any], other: Case | None = None) -> dict[str, float]:
    return disagreements(lambda *_: whole(case), lambda *_: gone_on(case, plant, other), data(case), [])


@pytest.mark.parametrize("case", dict.fromkeys(fault.case for fault in FAULTS.values()), ids=lambda case: case.name)
def test_without_a_fault_nothing_differs(case: Case) -> None:
    assert not differs(case, lambda state, params: state)


@pytest.mark.parametrize("name", list(FAULTS))
def test_a_fault_in_the_moved_state_is_seen(name: str) -> None:
    fault = FAULTS[name]
    assert differs(fault.case, fault.plant, fault.other)
