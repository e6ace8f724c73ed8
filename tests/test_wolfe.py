"""The strong Wolfe line search against torch's own, on losses that take it through every line."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.optim import lbfgs as source

from equivalence.optimizers import wolfe
from equivalence.runtimes.jax import environment
from tests.agreement import Arrays, Side, assert_agree, disagreements
from tests.branches import FLOAT32, Jitter, Path, shared, still, unreached

SIZE, WAVES = 3, 4
COVERING = (0, 1, 2, 9, 10, 19, 27, 28, 122, 181, 656, 1417, 15041)
"""Problems that take torch through every line, and hang on both of its constants."""

TORCH = (source._strong_wolfe, source._cubic_interpolate)
KINDS = {32: torch.float32, 64: torch.float64}


def problem(seed: int) -> dict[str, np.ndarray]:
    """Waves, kinks, a bowl, a plane, a wall with NaN behind, each large or small; a start and a descent direction."""
    rng = np.random.default_rng(seed)

    def size() -> float:
        return float(10 ** rng.uniform(-3, 1))

    return {
        "waves": rng.normal(size=WAVES) * size(),
        "often": rng.normal(size=(WAVES, SIZE)) * 10 ** rng.uniform(-1, 1.5, size=(WAVES, 1)),
        "phase": rng.normal(size=WAVES),
        "kinks": rng.normal(size=WAVES) * size(),
        "across": rng.normal(size=(WAVES, SIZE)),
        "round": np.array(10 ** rng.uniform(-3, -1)),
        "bowl": np.array(size()),
        "plane": rng.normal(size=SIZE) * size(),
        "wall": np.array(rng.choice([0.0, 0.0, 0.5])),
        "x": rng.normal(size=SIZE),
        "tilt": rng.uniform(0.3, 1.0, size=SIZE),
        "t": np.array(10 ** rng.uniform(-1.3, 1.5)),
        "tolerance": np.array(rng.choice([1e-9, 1.0])),
        "most": np.array(int(rng.choice([0, 1, 2, 4, 25, 25]))),
    }


def loss(cos: Any, sqrt: Any, p: Any, x: Any) -> Any:
    away = x - p["x"]
    waves = (p["waves"] * cos(p["often"] @ x + p["phase"])).sum()
    kinks = (p["kinks"] * sqrt((p["across"] @ x + p["phase"]) ** 2 + p["round"])).sum()
    return waves + kinks + p["bowl"] * (x * x).sum() + p["plane"] @ x - sqrt(1 - p["wall"] * away @ away)


def wide(arrays: Arrays) -> Arrays:
    """The float64 run's arrays, as tests/agreement.py hands them over."""
    return {k: v.astype(np.float32).astype(np.float64) if v.dtype.kind == "f" else v for k, v in arrays.items()}


def reference(bits: int, arrays: Arrays, jitter: Jitter = still) -> Arrays:
    p = {k: torch.tensor(v, dtype=KINDS[bits] if v.dtype.kind == "f" else None) for k, v in arrays.items()}

    def evaluate(x: Any, t: Any, d: Any) -> tuple[float, Any]:
        at = torch.from_numpy(jitter((x + t * d).numpy())).requires_grad_()
        value = loss(torch.cos, torch.sqrt, p, at)
        gradient = torch.autograd.grad(value, at)[0]
        return float(jitter(np.array(value.item()))), torch.from_numpy(jitter(gradient.numpy()))

    start, gradient = evaluate(p["x"], 0.0, p["tilt"])
    d = -gradient * p["tilt"]
    given = start, gradient, gradient.dot(d)
    limits = {"tolerance_change": p["tolerance"].item(), "max_ls": int(p["most"])}
    found = source._strong_wolfe(evaluate, p["x"], p["t"].item(), d, *given, **limits)
    return {k: np.asarray(v) for k, v in zip(("loss", "gradient", "t", "evals"), found, strict=True)}


def way(arrays: Arrays) -> Path | None:
    """The lines of torch's search that a problem goes through; None where rounding in float32 decides them."""
    whole, common = shared(lambda jitter: reference(64, wide(arrays), jitter), TORCH, FLOAT32)
    return whole if whole == common else None


def search(p: Any) -> Any:
    def at(x: Any) -> Any:
        return loss(jnp.cos, jnp.sqrt, p, x)

    start, gradient = jax.value_and_grad(at)(p["x"])
    d = -gradient * p["tilt"]

    def evaluate(t: Any) -> wolfe.Point:
        value, gradient = jax.value_and_grad(at)(p["x"] + t * d)
        return wolfe.Point(t, value, gradient, gradient @ d)

    first = wolfe.Point(jnp.zeros_like(p["t"]), start, gradient, gradient @ d)
    reach = jnp.max(jnp.abs(d))
    found, evals = wolfe.strong_wolfe(evaluate, first, p["t"], reach, p["tolerance"], p["most"])
    return {"loss": found.loss, "gradient": found.gradient, "t": found.t, "evals": evals}


def port() -> Side:
    program = jax.jit(lambda p: search(p))

    def run(bits: int, arrays: Arrays) -> Arrays:
        with environment(bits):
            return {k: np.asarray(v) for k, v in program(dict(arrays)).items()}

    return run


PORT = port()


@pytest.mark.parametrize("seed", COVERING)
def test_each_line_of_torchs_search_is_followed(seed):
    assert way(problem(seed)) is not None
    assert_agree(reference, PORT, problem(seed))


def test_these_are_all_the_lines():
    assert unreached([way(problem(seed)) or () for seed in COVERING], TORCH) == []


@given(st.integers(0, 10**6))
def test_any_search_ends_where_torchs_does(seed):
    assume(way(problem(seed)))
    assert_agree(reference, PORT, problem(seed))


def widest(a: Any, b: Any, bounds: Any = None) -> Any:
    return unbounded(a, b, None if bounds is None else (bounds[0], bounds[1] * 10))


unbounded = wolfe.interpolate

FAULTS: dict[str, tuple[str, Any]] = {
    "c1 1e-3": ("SUFFICIENT_DECREASE", 1e-3),
    "c2 0.8": ("CURVATURE", 0.8),
    "extrapolates further": ("interpolate", widest),
    "never moves off an end": ("_trial", lambda bracket, close: (unbounded(*ends(bracket)), close)),
    "takes the higher end": ("_lower", lambda bracket: jnp.where(bracket.loss[0] <= bracket.loss[1], 1, 0)),
    "weak Wolfe": ("_flat", lambda here, start: here.slope >= wolfe.CURVATURE * start.slope),
}


def ends(bracket: Any) -> tuple[Any, Any]:
    return wolfe._row(bracket, 0), wolfe._row(bracket, 1)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen(fault, monkeypatch):
    monkeypatch.setattr(wolfe, *FAULTS[fault])
    wrong = port()

    def side(bits: int, arrays: Arrays) -> Arrays:
        return (wrong if bits == 64 else reference)(bits, arrays)

    assert any(disagreements(reference, side, problem(seed)) for seed in COVERING)
