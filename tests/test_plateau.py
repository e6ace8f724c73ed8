"""ReduceLROnPlateau in the state of an Optax transformation, against torch's own, metric by metric."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim.lr_scheduler import ReduceLROnPlateau

import equivalence as eq
from equivalence.errors import InputError
from equivalence.optimizers.plateau import Plateau, PlateauState, load_state, scale_by_plateau, state_of
from equivalence.runtimes import jax as jax_runtime
from tests.agreement import Arrays, Side, assert_agree, disagreements

METRICS = 120
RATES = (0.5, 0.125)
NUMBERS = ("threshold", "factor", "patience", "cooldown", "floors", "eps")
FIELDS = PlateauState._fields

Options = Mapping[str, Any]
Advance = Callable[[Plateau, PlateauState, Any], PlateauState]


def optimizer_of(rates: tuple[float, ...] = RATES) -> torch.optim.Optimizer:
    return torch.optim.SGD([{"params": [torch.nn.Parameter(torch.ones(1))], "lr": rate} for rate in rates])


def seen(states: list[PlateauState]) -> dict[str, np.ndarray]:
    """A run's states by field, metric by metric; counters as floats, which torch's are compared with."""
    return {name: np.asarray([getattr(state, name) for state in states], float) for name in FIELDS}


def in_torch(options: Options, at: int = 0) -> Side:
    """Torch's run; its scheduler handed over after `at` metrics goes on from a state made and loaded."""

    def run(bits: int, arrays: Arrays) -> Arrays:
        scheduler, states = ReduceLROnPlateau(optimizer_of(), **options), []
        for number, metric in enumerate(arrays["metrics"]):
            if number == at > 0:
                state, scheduler = state_of(scheduler), ReduceLROnPlateau(optimizer_of(), **options)
                load_state(scheduler, state)
            scheduler.step(metric.item())
            states.append(state_of(scheduler))
        return seen(states)

    return run


@functools.cache
def program(better_is_less: bool, relative: bool, advance: Advance) -> Any:
    """All metrics in one program; what is no structure is its argument."""

    def run(plateau_numbers: Any, start: PlateauState, metrics: Any) -> Any:
        plateau = Plateau(start, better_is_less, relative, **plateau_numbers)

        def step(state: PlateauState, metric: Any) -> Any:
            state = advance(plateau, state, metric)
            return state, state

        return jax.lax.scan(step, start, metrics)[1]

    return jax.jit(run)


def in_jax(options: Options, advance: Advance = Plateau.advance, changed: Options | None = None) -> Side:
    def run(bits: int, arrays: Arrays) -> Arrays:
        plateau = Plateau.of(ReduceLROnPlateau(optimizer_of(), **options))
        plateau = dataclasses.replace(plateau, **(changed or {}))
        with jax_runtime.environment(bits):
            numbers = {name: jax.tree.map(jnp.asarray, getattr(plateau, name)) for name in NUMBERS}
            made = program(plateau.better_is_less, plateau.relative, advance)
            states = jax.tree.map(np.asarray, made(numbers, plateau.init(), arrays["metrics"]))
        return seen([PlateauState(*(field[number] for field in states)) for number in range(METRICS)])

    return run


OPTIONS = st.fixed_dictionaries(
    {
        "mode": st.sampled_from(["min", "max"]),
        "threshold_mode": st.sampled_from(["rel", "abs"]),
        # eighths, as the metrics are: ties are ties in both precisions
        "threshold": st.sampled_from([0.0, 1e-4, 0.125, 0.5, 1.0, 1.5]),
        "factor": st.sampled_from([0.0, 0.1, 0.5, 0.75]),
        "patience": st.integers(0, 4),
        "cooldown": st.integers(0, 3),
        "min_lr": st.sampled_from([0.0, 0.0625, [0.25, 0.0], [0.0, 0.125]]),
        "eps": st.sampled_from([0.0, 1e-8, 0.0625]),
    }
)


def metrics_of(seed: int, odd: float = 0.1) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    drawn = np.round(rng.normal(size=METRICS) * 8 + np.linspace(rng.normal() * 20, 0, METRICS)) / 8
    drawn[rng.random(METRICS) < odd] = rng.choice([np.nan, np.inf, -np.inf], p=[0.8, 0.1, 0.1])
    return {"metrics": drawn}


@given(options=OPTIONS, seed=st.integers(0, 2**32 - 1), at=st.integers(1, METRICS - 1))
def test_every_metric_moves_it_as_torch(options: dict[str, Any], seed: int, at: int) -> None:
    arrays = metrics_of(seed)
    assert_agree(in_torch(options), in_jax(options), arrays, [])
    assert_agree(in_torch(options), in_torch(options, at), arrays, [])


REVEALING: dict[str, Any] = {
    **{"factor": 0.5, "patience": 2, "cooldown": 2, "threshold": 0.125, "threshold_mode": "abs"},
    **{"min_lr": [0.0, 0.05], "eps": 0.01},
}
"""Options under which every part of the rule decides something."""


def cooldown_counts_bad(plateau: Plateau, state: PlateauState, metric: Any) -> PlateauState:
    after = plateau.advance(state._replace(cooldown_counter=jnp.zeros_like(state.cooldown_counter)), metric)
    left = jnp.maximum(state.cooldown_counter - 1, 0)
    return after._replace(cooldown_counter=jnp.where(after.cooldown_counter > 0, after.cooldown_counter, left))


def of_the_base_rate(plateau: Plateau, state: PlateauState, metric: Any) -> PlateauState:
    after = plateau.advance(state, metric)
    return after._replace(
        lr=jnp.where(after.lr != state.lr, jnp.asarray(RATES, state.lr.dtype) * plateau.factor, state.lr)
    )


def latest_is_best(plateau: Plateau, state: PlateauState, metric: Any) -> PlateauState:
    return plateau.advance(state, metric)._replace(best=metric)


def nan_improves(plateau: Plateau, state: PlateauState, metric: Any) -> PlateauState:
    return plateau.advance(state, jnp.where(jnp.isnan(metric), state.best - 1, metric))


def keeps_bad(plateau: Plateau, state: PlateauState, metric: Any) -> PlateauState:
    after = plateau.advance(state, metric)
    fell = jnp.any(after.lr != state.lr)
    return after._replace(num_bad_epochs=jnp.where(fell, state.num_bad_epochs, after.num_bad_epochs))


FAULTS: dict[str, Options | Advance] = {
    "eps ignored": {"eps": 0.0},
    "patience one less": {"patience": 1},
    "patience one more": {"patience": 3},
    "cooldown one longer": {"cooldown": 3},
    "one floor for all groups": {"floors": (0.0, 0.0)},
    "threshold relative": {"relative": True},
    "larger is better": {"better_is_less": False},
    "bad metrics counted while cooling": cooldown_counts_bad,
    "factor of the first rate": of_the_base_rate,
    "the latest metric is the best": latest_is_best,
    "NaN improves": nan_improves,
    "bad metrics counted on": keeps_bad,
}


@pytest.mark.parametrize("name", list(FAULTS))
def test_a_planted_fault_is_noticed(name: str) -> None:
    arrays, fault = metrics_of(1, odd=0.05), FAULTS[name]
    port = in_jax(REVEALING, fault) if callable(fault) else in_jax(REVEALING, changed=fault)
    assert not disagreements(in_torch(REVEALING), in_jax(REVEALING), arrays, [])
    assert disagreements(in_torch(REVEALING), port, arrays, [])


def test_a_scheduler_is_read_and_put_anywhere_in_its_course() -> None:
    scheduler = ReduceLROnPlateau(optimizer_of((0.1, 0.3)), patience=0, cooldown=3)
    for metric in (2.0, 2.0, 1.0):
        scheduler.step(metric)
    found = Plateau.of(scheduler).init()
    assert [np.asarray(value).tolist() for value in found[1:]] == [1.0, 0, 2, 3]
    again = ReduceLROnPlateau(optimizer_of((0.1, 0.3)), patience=0, cooldown=3)
    load_state(again, found)
    # float32 holds the rates as near as it can, and hands back what torch's own steps had made of them
    np.testing.assert_array_equal(np.float32(again.optimizer.param_groups[1]["lr"]), np.asarray(found.lr)[1])
    load_state(scheduler, found)
    assert [group["lr"] for group in scheduler.optimizer.param_groups] == [0.1 * 0.1, 0.3 * 0.1]
    for one in (scheduler, again):
        one.step(5.0)
    assert (again.cooldown_counter, again.num_bad_epochs, again.last_epoch) == (1, 0, 4)
    with pytest.raises(InputError, match="the state holds 2 learning rates, the optimizer has 1 groups"):
        load_state(ReduceLROnPlateau(optimizer_of((0.1,))), found)


def test_a_rate_in_a_tensor_stays_one() -> None:
    rate = torch.tensor(0.5)
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.ones(1))], lr=rate)
    scheduler = ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
    state = Plateau.of(scheduler).init()
    load_state(scheduler, state._replace(lr=jnp.asarray([0.25])))
    assert optimizer.param_groups[0]["lr"] is rate
    assert rate.item() == 0.25


def test_the_step_before_the_metric_has_the_rate_before() -> None:
    scheduler = ReduceLROnPlateau(optimizer_of((0.5, 0.25)), patience=0, factor=0.5)
    transform = optax.chain(optax.trace(0.0), scale_by_plateau(scheduler, group=1, every=2))
    state, found = transform.init(jnp.ones(())), []
    for metric in (1.0, 1.0, 9.0, 9.0, 9.0):
        change, state = transform.update(jnp.ones(()), state, jnp.ones(()), value=metric)
        found.append(-float(change))
    assert found == [0.25, 0.25, 0.25, 0.25, 0.125]
    with pytest.raises(InputError, match="looks at a metric"):
        transform.update(jnp.ones(()), state, jnp.ones(()))


def test_its_place_moves_with_any_optax_state() -> None:
    weight = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(weight.parameters(), lr=0.5)
    scheduler = ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
    transform = optax.chain(optax.scale_by_adam(), scale_by_plateau(scheduler))
    for metric in (1.0, 2.0):
        scheduler.step(metric)
    params = {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}
    state = eq.optimizer_state(optimizer, transform, params, model=weight, scheduler=scheduler)
    assert float(state[1].plateau.lr[0]) == 0.25
    _, state = transform.update(params, state, params, value=3.0)
    eq.load_optimizer_state(optimizer, state, params, model=weight, scheduler=scheduler)
    assert (optimizer.param_groups[0]["lr"], scheduler.last_epoch, scheduler.best) == (0.125, 3, 1.0)


def test_a_strangers_scheduler_is_refused() -> None:
    class Mine(ReduceLROnPlateau):
        """Steps of somebody's."""

    optimizer = optimizer_of((0.5,))
    with pytest.raises(InputError, match="Mine is not torch's ReduceLROnPlateau"):
        eq.to_optax(optimizer, scheduler=Mine(optimizer))
