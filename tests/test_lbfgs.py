"""torch.optim.LBFGS against its translation: parameters, losses, counts and the whole state, after every step."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from equivalence.optimizers import lbfgs
from tests.agreement import assert_agree, disagreements
from tests.branches import Path, unreached
from tests.lbfgs_sides import (
    TORCH,
    Case,
    in_jax,
    settled,
    sides,
    training,
    wide,
)
from tests.torch_tables import optimizer_configurations

SHORT = {"history_size": 3}
CASES = {
    **{
        f"optim_db {number}": Case("network", options, 2)
        for number, options in enumerate(optimizer_configurations()["LBFGS"])
    },
    "least squares": Case("squares", {"history_size": 4, "max_iter": 4}, 20, 1),
    "100 steps": Case("valley", {**SHORT, "max_iter": 2, "lr": 0.05}, 100, 8),
    "100 searches": Case("valley", {**SHORT, "max_iter": 2, "line_search_fn": "strong_wolfe"}, 100, 9),
    "search short of evaluations": Case(
        "valley", {**SHORT, "max_iter": 3, "max_eval": 5, "line_search_fn": "strong_wolfe"}, 20, 10
    ),
    "search beyond tolerance_change": Case(
        "valley",
        {**SHORT, "max_iter": 3, "max_eval": 6, "tolerance_change": 0.1, "line_search_fn": "strong_wolfe"},
        4,
        29328,
    ),
    "converges": Case("valley", {**SHORT, "max_iter": 10, "tolerance_grad": 1e-2}, 12, 1),
    "short of evaluations": Case("valley", {**SHORT, "max_iter": 8, "max_eval": 3}, 12, 2),
    "parameters hardly move": Case("valley", {**SHORT, "max_iter": 5, "lr": 1e-11}, 4, 3),
    "loss hardly moves": Case("valley", {**SHORT, "max_iter": 5, "tolerance_change": 0.1}, 6, 17),
    "flat": Case("valley", {**SHORT, "max_iter": 5, "tolerance_change": 10.0, "tolerance_grad": 0.0}, 12, 5),
    "no iterations": Case("valley", {**SHORT, "max_iter": 0}, 2, 6),
    "upwards": Case("valley", {**SHORT, "max_iter": 5, "lr": 0.3}, 6, 19),
}


@functools.cache
def known(name: str) -> tuple[Path, int, int]:
    return settled(CASES[name], twins=4)


def test_there_are_five_configurations_in_optim_db():
    assert sum(name.startswith("optim_db") for name in CASES) == 5


@pytest.mark.parametrize("name", CASES)
def test_every_step_is_torchs(name):
    _, judged, narrow = known(name)
    assert judged == CASES[name].steps, "rounding decides a branch: no case to judge"
    assert_agree(*sides(CASES[name], judged, narrow), CASES[name].arrays)


def test_these_go_through_every_line_of_torchs_step():
    left = unreached([known(name)[0] for name in CASES], TORCH[:1])
    assert [line for line in left if not line.startswith("raise ")] == []


@settings(max_examples=15)
@given(
    st.integers(0, 10**6),
    st.sampled_from([None, "strong_wolfe"]),
    st.sampled_from([1.0, 0.3, 0.03]),
    st.integers(1, 5),
    st.integers(1, 8),
    st.sampled_from([1e-9, 1e-3, 0.1]),
    st.sampled_from([1e-7, 1e-2]),
)
def test_any_options_step_as_in_torch(seed, search, rate, iterations, evals, change, gradient):
    options = {"line_search_fn": search, "lr": rate, "max_iter": iterations, "max_eval": evals}
    limits = {"tolerance_change": change, "tolerance_grad": gradient}
    case = Case("valley", {**SHORT, **options, **limits}, 4, seed)
    _, judged, narrow = settled(case)
    assume(judged)
    # float32 in the first steps only: one ulp of it becomes anything in a few more
    assert_agree(*sides(case, judged, min(narrow, 2)), case.arrays)


def test_torchs_lines_are_jumped_where_nothing_is_to_be_done():
    """No step is taken from an optimum, and the closure is called once."""
    case = dataclasses.replace(CASES["converges"], options={**SHORT, "tolerance_grad": 1e9}, steps=1)
    found = in_jax(case, 64, wide(case.arrays))
    assert {key.split(".")[1] for key in found} == {"loss", "params", "func_evals", "n_iter"}
    assert found["000.func_evals"] == 1
    np.testing.assert_array_equal(found["000.params.w"], wide(case.arrays)["p.w"])


def with_options(**changed: Any) -> Callable[..., Any]:
    real = lbfgs._step
    return lambda options, *given: real({**options, **changed}, *given)


def remembered(change: Callable[[Any], Any]) -> Callable[..., Any]:
    real = lbfgs._remember
    return lambda state, *given: change(real(state, *given))


def reversed_history(state: Any) -> Any:
    rows = jnp.arange(state.ro.shape[0])
    order = jnp.where(rows < state.held, state.held - 1 - rows, rows)
    flip = functools.partial(jax.tree.map, lambda history: history[order])
    return state._replace(old_dirs=flip(state.old_dirs), old_stps=flip(state.old_stps), ro=flip(state.ro))


def forgets_count(options: Any, value: Any, gradient: Any, state: Any, params: Any, real: Any = lbfgs._step) -> Any:
    return real(options, value, gradient, state._replace(n_iter=jnp.zeros_like(state.n_iter)), params)


def newest_replaced(state: Any, *given: Any, real: Any = lbfgs._remember) -> Any:
    full = state.held == state.ro.shape[0]
    return real(state._replace(held=jnp.where(full, state.held - 1, state.held)), *given)


def stops_but_for(part: str) -> Callable[..., Any]:
    real = lbfgs._stops
    nan = {"loss": lambda walk: walk._replace(loss=walk.loss * jnp.nan)}
    nan["gradient"] = lambda walk: walk._replace(gradient=jax.tree.map(lambda g: g * jnp.nan, walk.gradient))
    nan["step"] = lambda walk: walk._replace(state=walk.state._replace(t=walk.state.t * jnp.nan))
    return lambda options, walk: real(options, nan[part](walk))


FAULTS: dict[str, tuple[str, str, Any]] = {
    "tolerance_change in the search": ("search beyond tolerance_change", "SMALLEST_BRACKET", 0.1),
    "first step not shortened": ("converges", "_first_trial", lambda first, gradient, lr: jnp.asarray(lr)),
    "every first trial shortened": ("converges", "_first_trial", lambda f, g, lr, r=lbfgs._first_trial: r(True, g, lr)),
    "history reversed": ("converges", "_remember", remembered(reversed_history)),
    "newest pair replaced": ("upwards", "_remember", newest_replaced),
    "sign of ro": ("converges", "_remember", remembered(lambda state: state._replace(ro=-state.ro))),
    "H_diag 1": ("converges", "_remember", remembered(lambda s: s._replace(H_diag=jnp.ones_like(s.H_diag)))),
    "keeps negative curvature": ("upwards", "LEAST_CURVATURE", -1e30),
    "no exit at an optimum": ("converges", "_step", with_options(tolerance_grad=-1.0)),
    "max_eval ignored": ("short of evaluations", "_step", with_options(max_eval=10**6)),
    "n_iter begins anew": ("converges", "_step", forgets_count),
    "small gradient ignored": ("converges", "_stops", stops_but_for("gradient")),
    "small step ignored": ("parameters hardly move", "_stops", stops_but_for("step")),
    "small gain ignored": ("loss hardly moves", "_stops", stops_but_for("loss")),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen(fault, monkeypatch):
    name, place, wrong = FAULTS[fault]
    real = lbfgs._quasi_newton
    # a function of its own: JAX would reuse what it traced before the fault was planted
    monkeypatch.setattr(lbfgs, "_quasi_newton", lambda *given: real(*given))
    monkeypatch.setattr(lbfgs, place, wrong)
    case = CASES[name]
    reference, port = sides(case, case.steps, 0, training)
    assert disagreements(reference, lambda bits, arrays: (port if bits == 64 else reference)(bits, arrays), case.arrays)
