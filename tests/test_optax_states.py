"""State moved to and from Optax's own transformations, wrappers of them, and nnx.Optimizer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx

import equivalence as eq
from equivalence.optimizers.clipping import clip_grad_norm
from equivalence.optimizers.trees import by_path, entries
from equivalence.runtimes import jax as jax_runtime
from equivalence.runtimes import torch_environment
from tests.agreement import Arrays, assert_agree
from tests.rule_sides import part
from tests.translated_cases import case_of
from tests.translated_sides import (
    Case,
    TorchRun,
    draw,
    moved,
    same,
    stepped,
)

RATE = 0.01
BIAS = {"fc": {"kernel": False, "bias": True}}
LABELS = {"fc": {"kernel": "first", "bias": "second"}}


def halved(count: Any) -> Any:
    """The rate of StepLR(step_size=2, gamma=0.5)."""
    return RATE * 0.5 ** (count // 2)


def adam_in_two_groups() -> Any:
    return optax.partition({"first": optax.adam(RATE), "second": optax.adam(2 * RATE)}, LABELS)


@dataclass(frozen=True)
class Own:
    """A torch optimizer by kind, its options and those of the bias, and Optax's own form of it."""

    kind: str
    options: dict[str, Any]
    make: Callable[[], Any]
    bias: dict[str, Any] = field(default_factory=dict)
    scheduler: Callable[[Any], Any] = lambda optimizer: None
    exact: bool = True
    """Whether that form is the same function; else its state is."""


def steps_down(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)


MOMENTUM = {"lr": 0.1, "momentum": 0.9, "nesterov": True}
OWN = {
    "sgd": Own("SGD", {"lr": 0.1}, lambda: optax.sgd(0.1)),
    "momentum": Own("SGD", MOMENTUM, lambda: optax.sgd(0.1, momentum=0.9, nesterov=True)),
    "adam": Own("Adam", {"lr": RATE}, lambda: optax.adam(RATE)),
    "adamw": Own("AdamW", {"lr": RATE, "weight_decay": 0.1}, lambda: optax.adamw(RATE, weight_decay=0.1)),
    "decay chained": Own(
        "Adam", {"lr": RATE, "weight_decay": 0.1}, lambda: optax.chain(optax.add_decayed_weights(0.1), optax.adam(RATE))
    ),
    "decay masked": Own(
        "Adam",
        {"lr": RATE},
        lambda: optax.chain(optax.masked(optax.add_decayed_weights(0.1), BIAS), optax.adam(RATE)),
        {"weight_decay": 0.1},
    ),
    "partition": Own("Adam", {"lr": RATE}, adam_in_two_groups, {"lr": 2 * RATE}),
    "rmsprop": Own("RMSprop", {"lr": RATE}, lambda: optax.rmsprop(RATE, decay=0.99, eps_in_sqrt=False)),
    "centered": Own(
        "RMSprop", {"lr": RATE, "centered": True}, lambda: optax.rmsprop(RATE, 0.99, centered=True, eps_in_sqrt=False)
    ),
    "adamax": Own("Adamax", {"lr": RATE}, lambda: optax.adamax(RATE)),
    "adadelta": Own("Adadelta", {"lr": 1.0}, lambda: optax.adadelta(1.0)),
    "adagrad": Own("Adagrad", {"lr": RATE}, lambda: optax.adagrad(RATE, 0.0), exact=False),
    "schedule": Own("Adam", {"lr": RATE}, lambda: optax.adam(halved), scheduler=steps_down),
    "injected": Own("Adam", {"lr": RATE}, lambda: optax.inject_hyperparams(optax.adam)(learning_rate=RATE)),
    "injected schedule": Own(
        "Adam", {"lr": RATE}, lambda: optax.inject_hyperparams(optax.adam)(halved), scheduler=steps_down
    ),
    "multi-steps": Own("Adam", {"lr": RATE}, lambda: optax.MultiSteps(optax.adam(RATE), 1)),
    "clipped": Own("Adam", {"lr": RATE}, lambda: optax.chain(clip_grad_norm(1e6), optax.adam(RATE))),
}

OWN_AT, OWN_STEPS = 3, 6


def own_case(own: Own) -> Case:
    case = case_of(own.kind, ("kernel", "bias")) if own.kind != "SGD" else case_of("Adam", ("kernel", "bias"))
    groups = ((("kernel",), {}), (("bias",), own.bias))
    return replace(case, name=own.kind, options=own.options, groups=groups, scheduler=own.scheduler)


def own_steps(case: Case, transform: Any, carry: Any, arrays: Arrays, first: int, last: int) -> Any:
    found, update = {}, jax.jit(transform.update)
    for number in range(first, last):
        gradients = case.tree({n: g[number] for n, g in part(arrays, "gradients").items()}, gradient=True)
        changes, state = update(gradients, carry[1], carry[0])
        carry = optax.apply_updates(carry[0], changes), state
        leaves = {leaf: np.asarray(value) for leaf, value in by_path(carry[0]).items()}
        found[number] = {f"{name}.param": v for name, v in case.layout.backward(leaves, gradient=False).items()}
    return carry, found


@pytest.mark.parametrize("name", list(OWN))
def test_optaxs_own_state(name: str) -> None:
    own, case = OWN[name], own_case(OWN[name])
    arrays = draw(case, seed=3, missing=0.0)

    def only_params(found: Any) -> dict[str, np.ndarray]:
        return {f"{k}.{n}": v for n, of_step in found.items() for k, v in of_step.items() if k.endswith("param")}

    def reference(bits: int, arrays: Arrays) -> Arrays:
        with torch_environment.environment(64, threads=1):
            return only_params(stepped(TorchRun(case, wide(arrays)), 0, OWN_STEPS)) if own.exact else {}

    def port(bits: int, arrays: Arrays) -> Arrays:
        arrays, transform = wide(arrays), own.make()
        with torch_environment.environment(64, threads=1), jax_runtime.environment(64):
            run = TorchRun(case, arrays)
            begun = stepped(run, 0, OWN_AT)
            tree = jax.tree.map(jnp.asarray, case.tree(run.values()))
            options = {"model": run.model, "mapping": case.mapping}
            state = eq.optimizer_state(run.optimizer, transform, tree, scheduler=run.scheduler, **options)
            before, again = run.state(), TorchRun(case, arrays)
            options["model"] = again.model
            eq.load_optimizer_state(again.optimizer, state, tree, scheduler=again.scheduler, steps=OWN_AT, **options)
            after = again.state()
            assert [k for n in before for k in before[n] if not same(before[n][k], after[n][k])] == []
            there = own_steps(case, transform, (tree, state), arrays, OWN_AT, OWN_STEPS)[1]
        return only_params(begun | there) if own.exact else {}

    assert_agree(reference, port, arrays, moved(arrays))


def wide(arrays: Arrays) -> Arrays:
    """Both runs of the statistic in float64: in float32 Optax's own bias corrections are less exact than torch's."""
    return {k: v.astype(np.float64) if v.dtype.kind == "f" else v for k, v in arrays.items()}


class Port2(nnx.Module):
    def __init__(self) -> None:
        self.inner = nnx.Linear(3, 2, rngs=nnx.Rngs(0))


class Torch2(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(3, 2)


@pytest.mark.parametrize("translated", [True, False])
def test_an_nnx_optimizer_goes_on(translated: bool) -> None:
    reference, port = Torch2(), Port2()
    optimizer = torch.optim.AdamW(reference.parameters(), lr=RATE, weight_decay=0.1)
    for parameter in reference.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    transform = eq.to_optax(optimizer, model=reference) if translated else optax.adamw(RATE, weight_decay=0.1)
    ours = nnx.Optimizer(port, transform, wrt=nnx.Param)
    params = nnx.as_pure(nnx.state(port, nnx.Param))
    state = eq.optimizer_state(optimizer, transform, params, model=reference)
    nnx.update(ours.opt_state, nnx.state(state))
    gradients = jax.tree.map(jnp.ones_like, nnx.state(port, nnx.Param))
    plain, _ = transform.update(jax.tree.map(jnp.ones_like, params), state, params)
    ours.update(port, gradients)
    for made, wanted in zip(
        jax.tree.leaves(nnx.state(port, nnx.Param)), jax.tree.leaves(optax.apply_updates(params, plain)), strict=True
    ):
        np.testing.assert_array_equal(made, wanted)
    eq.load_optimizer_state(optimizer, ours.opt_state, nnx.state(port, nnx.Param), model=reference)
    assert {float(held["step"]) for held in optimizer.state.values()} == {2.0}
    (mu,) = (held["exp_avg"] for parameter, held in optimizer.state.items() if parameter.dim() == 2)
    moments = [entry.array for entry in entries(ours.opt_state, by_path(params)) if entry.field == "mu"]
    assert any(np.array_equal(np.asarray(value).T, mu) for value in moments)
