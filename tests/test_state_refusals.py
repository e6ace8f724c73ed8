"""A state that does not fit is refused with all that is wrong with it; what is rare but fits is moved."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

import equivalence as eq
from equivalence.errors import InputError
from equivalence.optimizers.accumulation import accumulate
from equivalence.optimizers.averaging import with_average
from equivalence.optimizers.scaling import scale_gradients
from equivalence.optimizers.torch_side import step_on
from equivalence.optimizers.trees import by_path, entries
from equivalence.runtimes import jax as jax_runtime
from equivalence.runtimes import torch_environment
from tests.translated_cases import NETS
from tests.translated_sides import (
    STEPS,
    TorchRun,
    draw,
    port_of,
    same,
    stepped,
    to_port,
)


class Pair(torch.nn.Module):
    """Two parameters of the port's shapes and names."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.ones(3, 2, dtype=dtype))
        self.b = torch.nn.Parameter(torch.ones(4, dtype=dtype))


TREE = {"w": jnp.ones((3, 2)), "b": jnp.ones(4)}


def trained(kind: str, steps: int = 2, model: Any = None, late: int = 0, **options: Any) -> tuple[Any, Any]:
    """A model and its optimizer after some steps; `b` has no gradient in the first `late` ones."""
    model = model or Pair()
    optimizer = getattr(torch.optim, kind)(model.parameters(), **options)
    for number in range(steps):
        for name, parameter in model.named_parameters():
            parameter.grad = torch.full_like(parameter, 0.1) if number >= late or name != "b" else None
        optimizer.step()
    return model, optimizer


class Stranger(torch.optim.AdamW):
    """An optimizer of somebody's."""


def mangled() -> tuple[Any, Any]:
    model, optimizer = trained("Adam")
    optimizer.state[model.w]["exp_avg"] = torch.ones(5)
    optimizer.state[model.b]["exp_avg_sq"] = torch.ones(())
    return model, optimizer


def with_more() -> tuple[Any, Any]:
    model, optimizer = trained("Adam")
    optimizer.state[model.w]["previous"] = torch.ones(5)
    return model, optimizer


def stranger() -> tuple[Any, Any]:
    return (model := Pair()), Stranger(model.parameters())


def another() -> tuple[Any, Any]:
    return Pair(), trained("Adam")[1]


SCHEDULE = optax.sgd(lambda count: 0.1 / (1 + count), momentum=0.9)
FROM_TORCH: dict[str, tuple[Callable[[], Any], Any, dict[str, Any], str]] = {
    "no place": (
        lambda: trained("SGD", lr=0.1, momentum=0.9),
        optax.sgd(0.1),
        {},
        "torch's momentum_buffer of w has no counterpart in the Optax state; torch's momentum_buffer of b has",
    ),
    "nothing to move": (
        lambda: trained("Adam"),
        optax.lion(0.1),
        {},
        "torch's exp_avg_sq of w has no counterpart in the Optax state; torch's exp_avg_sq of b has",
    ),
    "no counterpart": (
        lambda: trained("SGD", lr=0.1),
        optax.adam(0.1),
        {},
        "ScaleByAdamState.count has no counterpart in torch's SGD; ScaleByAdamState.mu of b has no .*nu of w has no",
    ),
    "other shapes": (
        mangled,
        optax.adam(0.1),
        {},
        r"w: exp_avg has the shape \(5,\) in torch, \(3, 2\) here; b: exp_avg_sq has the",
    ),
    "unknown slots": (with_more, optax.adam(0.1), {}, "torch keeps w: previous, which is not known"),
    "counters apart": (
        lambda: trained("Adam", late=1),
        optax.adam(0.1),
        {},
        "ScaleByAdamState holds one step where torch's differ: b 1.0, w 2.0",
    ),
    "no steps": (
        lambda: trained("SGD", lr=0.1, momentum=0.9),
        SCHEDULE,
        {},
        "torch's SGD counts no steps.*: pass steps=",
    ),
    "different steps": (
        lambda: trained("Adam", late=1),
        "translated",
        {"schedule": lambda count: 0.1},
        "torch's Adam has different step counters.*: pass steps=",
    ),
    "odd steps": (
        lambda: trained("SGD", lr=0.1),
        SCHEDULE,
        {"steps": -1},
        "steps= is a number of optimizer steps, not -1",
    ),
    "wide": (
        lambda: trained("Adam", model=Pair(torch.float64)),
        optax.adam(0.1),
        {},
        "b: exp_avg is float64, which float32 cannot",
    ),
    "wide LBFGS": ("LBFGS", "translated", {}, "b: d is float64, which float32 cannot hold"),
    "amsgrad": (
        lambda: trained("Adam", amsgrad=True),
        optax.amsgrad(0.1),
        {},
        "largest moment after its bias is corrected",
    ),
    "rmsprop's momentum": (
        lambda: trained("RMSprop", momentum=0.9),
        optax.rmsprop(0.1, momentum=0.9),
        {},
        "-lr times torch's",
    ),
    "another rate": (
        lambda: trained("Adam", lr=0.25),
        optax.inject_hyperparams(optax.adam)(learning_rate=0.5),
        {},
        r"State.learning_rate is 0.5 and torch's lr 0.25: make them the same",
    ),
    "an average": (lambda: trained("Adam"), with_average(optax.adam(0.1)), {}, "move it with average_state"),
    "a scaler": (lambda: trained("Adam"), scale_gradients(optax.adam(0.1)), {}, "move it with scaler_state"),
    "a stranger": (stranger, optax.adam(0.1), {}, "test_state_refusals.Stranger is not an optimizer of torch.optim"),
    "no model's": (
        another,
        optax.adam(0.1),
        {},
        r"not all the model's: group 0, shape \(3, 2\); group 0, shape \(4,\)",
    ),
    "no transformation": (lambda: trained("Adam"), "adam", {}, "transform= takes an Optax transformation, not str"),
    "complex": (
        lambda: trained("Adam"),
        optax.adam(0.1),
        {"params": {"w": jnp.ones((3, 2)), "b": jnp.ones(4) * 1j}},
        "complex.*: b;",
    ),
    "no metric's place": (
        lambda: trained("SGD", lr=0.1),
        "plateau",
        {},
        "follows a ReduceLROnPlateau: pass scheduler=",
    ),
}


def wide_lbfgs() -> tuple[Any, Any]:
    model = Pair(torch.float64)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=1)

    def closure() -> Any:
        optimizer.zero_grad()
        loss = (model.w.sum() * 0.3 - 1) ** 2 + (model.b * 0.7).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return model, optimizer


@pytest.mark.parametrize("name", list(FROM_TORCH))
def test_a_state_of_torchs_that_does_not_fit_is_refused(name: str) -> None:
    make, transform, options, message = FROM_TORCH[name]
    model, optimizer = wide_lbfgs() if make == "LBFGS" else make()
    options = dict(options)
    if transform in ("translated", "plateau"):
        plateau = transform == "plateau"
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer) if plateau else options.pop("schedule", None)
        transform = eq.to_optax(optimizer, model=model, scheduler=scheduler)
    params = options.pop("params", TREE)
    with pytest.raises(InputError, match=message) as caught:
        eq.optimizer_state(optimizer, transform, params, model=model, **options)
    assert "\n" not in str(caught.value)


def state_after(transform: Any, steps: int = 1, params: Any = TREE, **extra: Any) -> Any:
    state = transform.init(params)
    for _ in range(steps):
        _, state = transform.update(jax.tree.map(lambda leaf: leaf * 0.3, params), state, params, **extra)
    return state


def wide_state() -> Any:
    held = optax.adam(0.1).init(TREE)[0]
    mu, nu = ({"w": np.full((3, 2), 0.1), "b": np.full(4, 0.3)} for _ in range(2))
    return held._replace(mu=mu, nu=nu)


def adam() -> tuple[Any, Any]:
    return trained("Adam")


INTO_TORCH: dict[str, tuple[Callable[[], Any], Callable[[], Any], str]] = {
    "no slots": (
        adam,
        lambda: state_after(optax.sgd(0.1)),
        "w: the state has no step: pass steps=; w: the state has no exp_avg.*b: the",
    ),
    "a slot too many": (
        lambda: trained("SGD", lr=0.1),
        lambda: state_after(optax.sgd(0.1, 0.9)),
        "TraceState.trace of b has no count.*of w has no",
    ),
    "other shapes": (
        adam,
        lambda: state_after(optax.adam(0.1), params={"w": jnp.ones((2, 3)), "b": jnp.ones(5)}),
        r"w: exp_avg has the shape \(2, 3\), in torch \(3, 2\).*b: exp_avg_sq has the shape \(5,\), in torch \(4,\)",
    ),
    "other leaves": (
        adam,
        lambda: state_after(optax.adam(0.1), params={"w": jnp.ones((3, 2)), "c": jnp.ones(4)}),
        "b: the state has no exp_avg",
    ),
    "wide": (adam, wide_state, "w: exp_avg is float64, which torch's float32 cannot hold; .*b: exp_avg_sq is"),
    "not counted": (
        lambda: trained("RMSprop"),
        lambda: state_after(optax.rmsprop(0.1)),
        "w: the state has no step: pass steps=",
    ),
    "in the middle": (
        adam,
        lambda: state_after(optax.MultiSteps(optax.adam(0.1), 2)),
        "mini_step is 1: hand over when a step has just",
    ),
    "accumulating": (adam, lambda: state_after(accumulate(optax.adam(0.1), 2)), "AccumulateState.micro is 1"),
    "no state": (adam, lambda: jnp.ones(3), "w: the state has no step"),
    "optax.lbfgs": (wide_lbfgs, lambda: optax.lbfgs().init(TREE), "goes on from the state of"),
    "not held": (
        lambda: ((m := Pair()), torch.optim.Adam([m.w])),
        lambda: state_after(optax.adam(0.1)),
        "mu of b: torch's optimizer does not hold that",
    ),
}


@pytest.mark.parametrize("name", list(INTO_TORCH))
def test_a_state_of_optaxs_that_does_not_fit_is_refused(name: str) -> None:
    make, state, message = INTO_TORCH[name]
    model, optimizer = make()
    before = str(optimizer.state_dict())
    with pytest.raises(InputError, match=message) as caught:
        eq.load_optimizer_state(optimizer, state(), TREE, model=model)
    assert "\n" not in str(caught.value)
    assert str(optimizer.state_dict()) == before


def test_a_scheduler_that_is_further_on_is_refused_and_nothing_changes() -> None:
    model, optimizer = trained("Adam", lr=0.5)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    transform = eq.to_optax(optimizer, scheduler=scheduler, model=model)
    state = state_after(transform, 2)
    step_on(scheduler, 3)
    before = str(optimizer.state_dict())
    with pytest.raises(InputError, match="has taken 3 steps and the state 2: make a new scheduler"):
        eq.load_optimizer_state(optimizer, state, TREE, model=model, scheduler=scheduler)
    with pytest.raises(InputError, match=r"2 steps are 2 of the scheduler's \(every=1\); it has taken 3"):
        eq.optimizer_state(optimizer, transform, TREE, model=model, scheduler=scheduler, steps=2)
    with pytest.raises(InputError, match="counts no steps, so that the scheduler's position is not known: pass steps="):
        eq.load_optimizer_state(optimizer, state_after(optax.adam(0.1)), TREE, model=model, scheduler=scheduler)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
    with pytest.raises(InputError, match="follows no ReduceLROnPlateau"):
        eq.load_optimizer_state(optimizer, state, TREE, model=model, scheduler=plateau)
    assert str(optimizer.state_dict()) == before


def test_steps_inside_an_epoch_are_counted_or_asked_for() -> None:
    model, optimizer = trained("Adam", steps=5, lr=0.5)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    step_on(scheduler, 1)
    options = {"model": model, "scheduler": scheduler, "every": 3}
    transform = eq.to_optax(optimizer, **options)
    assert int(eq.optimizer_state(optimizer, transform, TREE, **options).count) == 5
    optimizer.state[model.b]["step"] -= 1
    with pytest.raises(InputError, match="does not tell its steps, and the scheduler one in 3: pass steps="):
        eq.optimizer_state(optimizer, transform, TREE, **options)
    assert int(eq.optimizer_state(optimizer, transform, TREE, steps=4, **options).count) == 4


def test_parts_of_one_leaf_that_were_stepped_apart_are_refused() -> None:
    case = NETS["leaves of the port"]
    arrays = draw(case, seed=0, missing=0.0)
    arrays["received.k"] = np.arange(STEPS) != 1
    with torch_environment.environment(64), jax_runtime.environment(64):
        run = TorchRun(case, arrays)
        stepped(run, 0, 3)
        with pytest.raises(
            InputError, match=r"qkv holds one step where torch's differ: q 3\.0, k 2\.0, v 3\.0; .*mu_product"
        ):
            to_port(case, port_of(case, 64), run, 3)


def test_low_precision_is_moved_to_the_bit() -> None:
    model, optimizer = trained("Adam", model=Pair(torch.bfloat16), amsgrad=True)
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), TREE)
    before = {name: dict(optimizer.state[p]) for name, p in model.named_parameters()}
    transform = eq.to_optax(optimizer, model=model)
    state = eq.optimizer_state(optimizer, transform, params, model=model)
    assert state.leaves["w"][-1] is not None
    eq.load_optimizer_state(optimizer, state, params, model=model)
    after = {name: optimizer.state[p] for name, p in model.named_parameters()}
    assert [slot for name in before for slot in before[name] if not same(before[name][slot], after[name][slot])] == []


@pytest.mark.parametrize("kind", ["NAdam", "ASGD"])
def test_numbers_that_torch_holds_in_float32_lose_nothing(kind: str) -> None:
    # a float64 model in a process whose default dtype is float32
    model, optimizer = trained(kind, model=Pair(torch.float64))
    with jax.enable_x64(True):
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), TREE)
        transform = eq.to_optax(optimizer, model=model)
        slot = {"NAdam": "mu_product", "ASGD": "eta"}[kind]
        for expected in (torch.float32, torch.float64):
            state = eq.optimizer_state(optimizer, transform, params, model=model)
            if expected is torch.float64:
                state = transform.update(jax.tree.map(jnp.ones_like, params), state, params)[1]
            held = [np.asarray(e.array) for e in entries(state, by_path(params)) if e.field == slot]
            eq.load_optimizer_state(optimizer, state, params, model=model)
            assert {optimizer.state[p][slot].dtype for p in model.parameters()} == {expected}
            assert {optimizer.state[p][slot].item() for p in model.parameters()} == {float(value) for value in held}


def test_the_state_of_a_frozen_parameter_stays_with_torch() -> None:
    model, optimizer = trained("Adam")
    model.b.requires_grad_(False)
    kept = optimizer.state[model.b]["exp_avg"].clone()
    transform = eq.to_optax(optimizer, model=model)
    state = eq.optimizer_state(optimizer, transform, TREE, model=model)
    assert list(state.leaves) == ["w"]
    eq.load_optimizer_state(optimizer, state_after(transform), TREE, model=model)
    assert optimizer.state[model.w]["step"].item() == 1
    assert torch.equal(optimizer.state[model.b]["exp_avg"], kept)
