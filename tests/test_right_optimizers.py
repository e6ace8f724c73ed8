"""A thousand right trials of translated optimizers raise no alarm: each is a leaf with its own size and gradients.

Three sets of options for each of the fourteen classes that move leaves, each on 24 leaves for 30 steps: weights and
gradients of sizes from 1e-6 to 1e3, gradients that vanish, grow or are missing, a learning rate that moves.
"""

from __future__ import annotations

from typing import Any

import pytest

jax = pytest.importorskip("jax")
torch = pytest.importorskip("torch")

import jax.numpy as jnp  # noqa: E402 - they need the frameworks
import numpy as np  # noqa: E402

import equivalence as eq  # noqa: E402
from equivalence.optimizers.pairs import schedule  # noqa: E402
from equivalence.optimizers.rules import HOMES  # noqa: E402
from equivalence.runtimes import jax as on_jax  # noqa: E402
from equivalence.runtimes import torch_environment as on_torch  # noqa: E402
from tests.agreement import Arrays, disagreements  # noqa: E402

TRIALS, STEPS = 8, 30
SHAPES = {"matrix": (3, 5), "vector": (7,), "scalar": ()}

OPTIONS: dict[str, tuple[dict[str, Any], ...]] = {
    "SGD": ({}, {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1}, {"momentum": 0.7, "nesterov": True}),
    "Adam": ({}, {"amsgrad": True, "weight_decay": 0.1}, {"betas": (0.5, 0.6), "eps": 1e-3, "maximize": True}),
    "AdamW": ({}, {"amsgrad": True}, {"weight_decay": 0.3, "betas": (0.8, 0.95)}),
    "Adamax": ({}, {"weight_decay": 0.1}, {"betas": (0.5, 0.9), "eps": 1e-4}),
    "NAdam": ({}, {"weight_decay": 0.1, "decoupled_weight_decay": True}, {"momentum_decay": 0.1}),
    "RAdam": ({}, {"weight_decay": 0.1, "decoupled_weight_decay": True}, {"betas": (0.8, 0.9)}),
    "RMSprop": ({}, {"centered": True, "momentum": 0.5}, {"alpha": 0.5, "eps": 1e-2, "weight_decay": 0.1}),
    "Adagrad": ({}, {"lr_decay": 0.1, "initial_accumulator_value": 0.1}, {"weight_decay": 0.1, "eps": 1e-4}),
    "Adadelta": ({}, {"rho": 0.5, "eps": 1e-3}, {"weight_decay": 0.1, "maximize": True}),
    "ASGD": ({}, {"lambd": 0.1, "t0": 5}, {"alpha": 0.5, "weight_decay": 0.1}),
    "Rprop": ({}, {"etas": (0.3, 1.7)}, {"step_sizes": (1e-3, 0.1)}),
    "SparseAdam": ({}, {"betas": (0.5, 0.9)}, {"eps": 1e-3, "maximize": True}),
    "Adafactor": ({}, {"weight_decay": 0.1, "d": 1.5}, {"beta2_decay": -0.5, "eps": (1e-20, 1e-2)}),
    "Muon": ({}, {"weight_decay": 0.2, "momentum": 0.7}, {"ns_steps": 3, "nesterov": False}),
}
"""Options by torch's class; sizes and rates come from the trials."""


def drawn(name: str, seed: int) -> dict[str, np.ndarray]:
    """Weights (trials, *shape), gradients (trials, steps, *shape), whether there are any (trials, steps), and rates."""
    rng = np.random.default_rng((seed, len(name)))
    found: dict[str, np.ndarray] = {"rates": 0.01 * 2.0 ** rng.integers(-4, 3, STEPS)}
    for leaf, shape in shapes(name).items():
        size = 10.0 ** rng.uniform(-6, 3, (TRIALS, 1, *(1 for _ in shape)))
        # Muon rounds to bfloat16: few bits in, so that float32 and float64 do not fall on two sides of a tie
        values = rng.standard_normal((TRIALS, STEPS, *shape))
        values = np.round(values * 8 + 0.5) / 8 - 1 / 16 if name == "Muon" else values * size
        fades = rng.random((TRIALS, STEPS, *(1 for _ in shape))) < 0.2
        found[f"gradients.{leaf}"] = np.where(fades, 0.0, values)
        found[f"received.{leaf}"] = rng.random((TRIALS, STEPS)) < 0.85
        if name == "SparseAdam":
            found[f"received.{leaf}"] = rng.random((TRIALS, STEPS, shape[0])) < 0.6
        found[f"params.{leaf}"] = rng.standard_normal((TRIALS, *shape)) * 10.0 ** rng.uniform(-2, 1)
    return found


def shapes(name: str) -> dict[str, tuple[int, ...]]:
    return {n: s for n, s in SHAPES.items() if {"Muon": len(s) == 2, "SparseAdam": len(s) > 0}.get(name, True)}


def made(name: str, options: dict[str, Any], params: list[Any]) -> Any:
    return getattr(torch.optim, name)(params, lr=0.01, **options)


def reference(name: str, options: dict[str, Any]) -> Any:
    def run(bits: int, arrays: Arrays) -> Arrays:
        seen: dict[str, np.ndarray] = {}
        with on_torch.environment(bits, threads=1):
            leaves = {
                (leaf, trial): torch.nn.Parameter(torch.tensor(arrays[f"params.{leaf}"][trial]))
                for leaf in shapes(name)
                for trial in range(TRIALS)
            }
            optimizer = made(name, options, list(leaves.values()))
            for step in range(STEPS):
                optimizer.param_groups[0]["lr"] = float(arrays["rates"][step])
                for (leaf, trial), parameter in leaves.items():
                    gradient = torch.tensor(arrays[f"gradients.{leaf}"][trial, step])
                    received = arrays[f"received.{leaf}"][trial, step]
                    if name == "SparseAdam":
                        rows = torch.tensor(np.flatnonzero(received))
                        size = tuple(gradient.shape)
                        parameter.grad = torch.sparse_coo_tensor(
                            rows[None], gradient[rows], size, check_invariants=True
                        )
                    else:
                        parameter.grad = gradient if received else None
                optimizer.step()
                for (leaf, trial), parameter in leaves.items():
                    seen[f"{leaf}.{trial}.{step}"] = parameter.detach().numpy().copy()
        return seen

    return run


def port(name: str, options: dict[str, Any]) -> Any:
    def run(bits: int, arrays: Arrays) -> Arrays:
        leaves = shapes(name)
        model = torch.nn.ParameterDict({n: torch.nn.Parameter(torch.zeros(s)) for n, s in leaves.items()})
        optimizer = made(name, options, list(model.parameters()))
        rates = schedule([float(rate) for rate in arrays["rates"]])
        translated = eq.to_optax(optimizer, scheduler=rates, model=model)

        def trial(params: Any, gradients: Any, received: Any) -> Any:
            def step(carry: Any, given: Any) -> Any:
                params, state = carry
                changes, state = translated.update(given[0], state, params, received=given[1])
                params = jax.tree.map(jnp.add, params, changes)
                return (params, state), params

            return jax.lax.scan(step, (params, translated.init(params)), (gradients, received))[1]

        with on_jax.environment(bits):
            given = [
                {n: jnp.asarray(arrays[f"{part}.{n}"]) for n in leaves} for part in ("params", "gradients", "received")
            ]
            found = jax.jit(jax.vmap(trial))(*given)
        return {
            f"{leaf}.{number}.{step}": np.asarray(values[number, step])
            for leaf, values in found.items()
            for number in range(TRIALS)
            for step in range(STEPS)
        }

    return run


@pytest.mark.parametrize("name", sorted(OPTIONS))
def test_right_trials_raise_no_alarm(name: str) -> None:
    for number, options in enumerate(OPTIONS[name]):
        arrays = drawn(name, number)
        moved = [path for path in arrays if path.startswith(("params", "gradients"))]
        assert disagreements(reference(name, options), port(name, options), arrays, moved) == {}


def test_there_are_a_thousand_trials() -> None:
    assert set(OPTIONS) == set(HOMES) - {"LBFGS"}
    assert sum(TRIALS * len(SHAPES) * len(sets) for sets in OPTIONS.values()) >= 1000


def test_a_rate_that_is_off_by_a_millionth_is_an_alarm() -> None:
    arrays = drawn("Adam", 0)
    right = port("Adam", {})

    def wrong(bits: int, given: Arrays) -> Arrays:
        return right(bits, {**given, "rates": given["rates"] * (1 + 1e-6)})

    assert disagreements(reference("Adam", {}), wrong, arrays, ["params.matrix"])
