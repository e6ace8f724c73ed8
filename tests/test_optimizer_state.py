"""Optimizer state moved both ways: to the bit, and a run goes on from it as if nothing had happened."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import equivalence as eq
from equivalence.optimizers.torch_side import to_numpy
from equivalence.optimizers.trees import by_path
from equivalence.runtimes import jax as jax_runtime
from equivalence.runtimes import torch_environment
from equivalence.weights import Rule
from tests.agreement import Arrays, Side, assert_agree
from tests.rule_sides import part
from tests.translated_cases import CASES, NETS, SCHEDULED
from tests.translated_sides import (
    Case,
    TorchRun,
    draw,
    moved,
    port_of,
    same,
    seen_of,
    stepped,
    to_port,
    to_torch,
)

ALL = {**CASES, **NETS, **SCHEDULED}
N = 30
"""Steps of a run that is handed over."""

SEEDS, AT = st.integers(0, 2**32 - 1), st.integers(1, N - 1)
few = settings(max_examples=2)


def whole(case: Case, at: int) -> Side:
    """Torch's run of all steps, seen from step `at` on, once for each direction."""

    def run(bits: int, arrays: Arrays) -> Arrays:
        with torch_environment.environment(bits, threads=1):
            found = stepped(TorchRun(case, arrays), 0, N)
        seen = seen_of(case, arrays, {number: found[number] for number in range(at, N)})
        return {f"{way}.{path}": value for way in ("to_port", "to_torch") for path, value in seen.items()}

    return run


def handed_over(case: Case, at: int) -> Side:
    """A run begun on one side and gone on with on the other from step `at`, in both directions."""

    def run(bits: int, arrays: Arrays) -> Arrays:
        port = port_of(case, bits)
        with torch_environment.environment(bits, threads=1), jax_runtime.environment(bits):
            begun = TorchRun(case, arrays)
            stepped(begun, 0, at)
            there = port.run(arrays, to_port(case, port, begun, at), at, N)[1]
            carry, _ = port.run(arrays, port.start(part(arrays, "params")), 0, at)
            back = stepped(to_torch(case, arrays, carry), at, N)
        found = {"to_port": seen_of(case, arrays, there), "to_torch": seen_of(case, arrays, back)}
        return {f"{way}.{path}": value for way, seen in found.items() for path, value in seen.items()}

    return run


@pytest.mark.parametrize("name", list(ALL))
@few
@given(seed=SEEDS, at=AT)
def test_a_run_handed_over_lands_where_the_whole_run_does(name: str, seed: int, at: int) -> None:
    case = ALL[name]
    arrays = draw(case, seed)
    assert_agree(whole(case, at), handed_over(case, at), arrays, moved(arrays))


@pytest.mark.parametrize("name", list(ALL))
@pytest.mark.parametrize("bits", [32, 64])
@few
@given(seed=SEEDS, at=st.integers(0, 5))
def test_there_and_back_nothing_has_changed(name: str, bits: int, seed: int, at: int) -> None:
    case = ALL[name]
    arrays = draw(case, seed, missing=0.5)
    arrays = {k: v.astype(f"float{bits}") if v.dtype.kind == "f" else v for k, v in arrays.items()}
    port = port_of(case, bits)
    with torch_environment.environment(bits, threads=1), jax_runtime.environment(bits):
        run = TorchRun(case, arrays)
        stepped(run, 0, at)
        back = to_torch(case, arrays, to_port(case, port, run, at))
        assert type(back.optimizer.param_groups[0]["lr"]) is type(run.optimizer.param_groups[0]["lr"])
        ours, theirs = run.state(), back.state()
        assert {k: v.keys() for k, v in ours.items()} == {k: v.keys() for k, v in theirs.items()}
        odd = [f"{n}.{k}" for n, held in ours.items() for k in held if not same(held[k], theirs[n][k])]
        assert not odd
        if hasattr(run.scheduler, "step"):
            rates = [[group["lr"] for group in one.optimizer.param_groups] for one in (run, back)]
            assert rates[0] == rates[1]


# --- LBFGS ------------------------------------------------------------------------------------------------------------

QUADRATIC = Case(
    "LBFGS",
    {"lr": 0.3, "max_iter": 3, "history_size": 2},
    ((("kernel", "bias", "ice"), {}),),
    {"kernel": (3, 2), "bias": (3,), "ice": (2,)},
    {"fc.kernel": (2, 3), "fc.bias": (3,), "ice": (2,)},
    (Rule("kernel", "fc.kernel", "o i -> i o"), Rule("bias", "fc.bias"), Rule("ice", "ice")),
    ("ice",),
)


def torch_closure(model: torch.nn.Module, arrays: Arrays) -> Any:
    x, named = torch.tensor(arrays["x"]), dict(model.named_parameters())

    def closure() -> Any:
        for parameter in named.values():
            parameter.grad = None
        loss = ((x * named["ice"]) @ named["kernel"].T + named["bias"]).square().mean()
        loss.backward()
        return loss

    return closure


def loss_of(x: Any, params: Any) -> Any:
    return jnp.mean(((x * params["ice"]) @ params["fc"]["kernel"] + params["fc"]["bias"]) ** 2)


@functools.cache
def lbfgs_step(bits: int) -> tuple[Any, Any]:
    with torch_environment.environment(bits), jax_runtime.environment(bits):
        model = QUADRATIC.model({name: np.zeros(shape) for name, shape in QUADRATIC.shapes.items()})
        transform = eq.to_optax(QUADRATIC.optimizer(model), model=model, mapping=QUADRATIC.mapping)

    def step(params: Any, state: Any, x: Any) -> Any:
        value = functools.partial(loss_of, x)
        changes, state = transform.update(jax.grad(value)(params), state, params, value_fn=value)
        return jax.tree.map(jnp.add, params, changes), state

    return transform, jax.jit(step)


LBFGS_STEPS, LBFGS_AT = 4, 2


def lbfgs_of(arrays: Arrays, params: Arrays) -> tuple[torch.nn.Module, Any]:
    model = QUADRATIC.model(params)
    return model, QUADRATIC.optimizer(model)


def lbfgs_steps(model: Any, optimizer: Any, arrays: Arrays, first: int, last: int) -> dict[str, np.ndarray]:
    found = {}
    for number in range(first, last):
        optimizer.step(torch_closure(model, arrays))
        found |= {f"{name}.{number}": to_numpy(value) for name, value in model.named_parameters()}
    return found


def lbfgs_whole(bits: int, arrays: Arrays) -> Arrays:
    with torch_environment.environment(bits, threads=1):
        found = lbfgs_steps(*lbfgs_of(arrays, part(arrays, "params")), arrays, 0, LBFGS_STEPS)
    late = {path: value for path, value in found.items() if int(path[-1]) >= LBFGS_AT}
    return {f"to_port.{k}": v for k, v in late.items()} | {f"to_torch.{k}": v for k, v in found.items()}


def lbfgs_handed_over(bits: int, arrays: Arrays) -> Arrays:
    transform, step = lbfgs_step(bits)

    def back(tree: Any) -> dict[str, np.ndarray]:
        leaves = {leaf: np.asarray(value) for leaf, value in by_path(tree).items()}
        return QUADRATIC.layout.backward(leaves, gradient=False)

    def run(carry: Any, first: int, last: int) -> tuple[Any, dict[str, np.ndarray]]:
        found = {}
        for number in range(first, last):
            carry = step(*carry, arrays["x"])
            found |= {f"{name}.{number}": value for name, value in back(carry[0]).items()}
        return carry, found

    with torch_environment.environment(bits, threads=1), jax_runtime.environment(bits):
        model, optimizer = lbfgs_of(arrays, part(arrays, "params"))
        lbfgs_steps(model, optimizer, arrays, 0, LBFGS_AT)
        values = {name: to_numpy(value) for name, value in model.named_parameters()}
        tree = jax.tree.map(jnp.asarray, QUADRATIC.tree(values))
        options = {"mapping": QUADRATIC.mapping}
        state = eq.optimizer_state(optimizer, transform, tree, model=model, **options)
        # there and back, nothing has changed
        before = dict(optimizer.state[next(iter(model.parameters()))])
        eq.load_optimizer_state(optimizer, state, tree, model=model, **options)
        after = optimizer.state[next(iter(model.parameters()))]
        assert before.keys() == after.keys()
        assert not [slot for slot, value in before.items() if not same(value, after[slot])]
        _, there = run((tree, state), LBFGS_AT, LBFGS_STEPS)
        start = jax.tree.map(jnp.asarray, QUADRATIC.tree(part(arrays, "params")))
        carry, begun = run((start, transform.init(start)), 0, LBFGS_AT)
        model, optimizer = lbfgs_of(arrays, back(carry[0]))
        eq.load_optimizer_state(optimizer, carry[1], carry[0], model=model, **options)
        found = begun | lbfgs_steps(model, optimizer, arrays, LBFGS_AT, LBFGS_STEPS)
    return {f"to_port.{k}": v for k, v in there.items()} | {f"to_torch.{k}": v for k, v in found.items()}


@few
@given(seed=SEEDS)
def test_lbfgs_handed_over(seed: int) -> None:
    rng = np.random.default_rng(seed)
    arrays = {f"params.{name}": rng.normal(size=shape) for name, shape in QUADRATIC.shapes.items()}
    assert_agree(lbfgs_whole, lbfgs_handed_over, arrays | {"x": rng.normal(size=(5, 2))})
