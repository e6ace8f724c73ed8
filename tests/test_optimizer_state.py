"""Optimizer state moved both ways: bit for bit, onto which a run goes on as if nothing had happened; else refused."""

from __future__ import annotations

import functools
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
from hypothesis import given, settings
from hypothesis import strategies as st

import equivalence as eq
from equivalence.errors import InputError
from equivalence.optimizers.accumulation import accumulate
from equivalence.optimizers.averaging import with_average
from equivalence.optimizers.clipping import clip_grad_norm
from equivalence.optimizers.scaling import scale_gradients
from equivalence.optimizers.torch_side import step_on, to_numpy
from equivalence.optimizers.trees import by_path, entries
from equivalence.runtimes import jax as jax_runtime
from equivalence.runtimes import torch_environment
from equivalence.weights import Rule
from tests.agreement import Arrays, Side, assert_agree
from tests.rule_sides import part
from tests.translated_cases import CASES, NETS, SCHEDULED, case_of
from tests.translated_sides import STEPS, Case, Port, TorchRun, draw, moved, port_of, seen_of

ALL = {**CASES, **NETS, **SCHEDULED}
N = 30
"""Steps of a run that is handed over."""

SEEDS, AT = st.integers(0, 2**32 - 1), st.integers(1, N - 1)
few = settings(max_examples=2)


def to_port(case: Case, port: Port, run: TorchRun, taken: int) -> Any:
    """The port's carry where torch's run is."""
    tree = jax.tree.map(jnp.asarray, case.tree(run.values()))
    options = {"mapping": case.mapping, "scheduler": run.scheduler, "every": case.every, "steps": taken}
    return tree, eq.optimizer_state(run.optimizer, port.transform, tree, model=run.model, **options)


def to_torch(case: Case, arrays: Arrays, carry: Any) -> TorchRun:
    """A new torch run where the port's carry is."""
    params = case.layout.backward({path: np.asarray(v) for path, v in by_path(carry[0]).items()}, gradient=False)
    run = TorchRun(case, arrays, params)
    options = {"mapping": case.mapping, "scheduler": run.scheduler, "every": case.every}
    eq.load_optimizer_state(run.optimizer, carry[1], carry[0], model=run.model, **options)
    return run


def whole(case: Case, at: int) -> Side:
    """Torch's run of all steps, seen from step `at` on, once for each direction."""

    def run(bits: int, arrays: Arrays) -> Arrays:
        with torch_environment.environment(bits, threads=1):
            found = stepped(TorchRun(case, arrays), 0, N)
        seen = seen_of(case, arrays, {number: found[number] for number in range(at, N)})
        return {f"{way}.{path}": value for way in ("to_port", "to_torch") for path, value in seen.items()}

    return run


def stepped(run: TorchRun, first: int, last: int) -> dict[int, dict[str, np.ndarray]]:
    found = {}
    for number in range(first, last):
        run.step(number)
        found[number] = run.seen()
    return found


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


def same(one: Any, other: Any) -> bool:
    """Whether two values of torch's state are the same to the bit, type and dtype included."""
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    if type(one) is not type(other) or getattr(one, "dtype", None) != getattr(other, "dtype", None):
        return False
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


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


# --- Optax's own states -----------------------------------------------------------------------------------------------

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
    found = {}
    for number in range(first, last):
        gradients = case.tree({n: g[number] for n, g in part(arrays, "gradients").items()}, gradient=True)
        changes, state = transform.update(gradients, carry[1], carry[0])
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


# --- what is refused --------------------------------------------------------------------------------------------------


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
    "a stranger": (stranger, optax.adam(0.1), {}, "test_optimizer_state.Stranger is not an optimizer of torch.optim"),
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
    with jax.enable_x64(True):
        return state_after(optax.adam(0.1), params={"w": jnp.ones((3, 2), float), "b": jnp.ones(4, float)})


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
