"""to_optax over whole models: every optimizer of torch, its groups, mappings, missing gradients and schedulers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import linen, nnx
from flax.core import freeze
from hypothesis import given, settings
from hypothesis import strategies as st

import equivalence as eq
from equivalence.errors import InputError
from equivalence.optimizers.clipping import clip_grad_norm
from equivalence.optimizers.torch_side import to_numpy
from equivalence.optimizers.trees import by_path
from equivalence.runtimes import jax as jax_runtime
from equivalence.runtimes import torch_environment
from equivalence.weights import Mapping, Rule
from tests.agreement import Arrays, Side, assert_agree
from tests.rule_sides import part
from tests.translated_cases import CASES, NETS, SCHEDULED, case_of
from tests.translated_sides import Case, Port, draw, moved, port_side, torch_side

SEEDS = st.integers(0, 2**32 - 1)


@pytest.mark.parametrize("name", list(CASES))
@settings(max_examples=2)
@given(seed=SEEDS)
def test_every_step_of_every_optimizer(name: str, seed: int) -> None:
    case = CASES[name]
    arrays = draw(case, seed)
    assert_agree(torch_side(case), port_side(case), arrays, moved(arrays))


@pytest.mark.parametrize("layout", list(NETS))
@settings(max_examples=2)
@given(seed=SEEDS)
def test_leaves_stacked_fused_split_tied_and_frozen(layout: str, seed: int) -> None:
    case = NETS[layout]
    arrays = draw(case, seed)
    assert_agree(torch_side(case), port_side(case), arrays, moved(arrays))


@pytest.mark.parametrize("what", list(SCHEDULED))
@settings(max_examples=2)
@given(seed=SEEDS)
def test_rates_that_move(what: str, seed: int) -> None:
    case = SCHEDULED[what]
    arrays = draw(case, seed)
    assert_agree(torch_side(case), port_side(case), arrays, moved(arrays))


# --- any options, any shapes ------------------------------------------------------------------------------------------

RATES, SMALL_NUMBERS, PARTS = st.floats(1e-3, 0.3), st.sampled_from([1e-8, 1e-3]), st.floats(0.1, 0.95)
BETAS, DECAYS, FLAGS = st.tuples(PARTS, PARTS), st.sampled_from([0.0, 0.1]), st.booleans()
ANY: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "SGD": {"momentum": st.sampled_from([0.0, 0.5, 0.9]), "dampening": DECAYS, "weight_decay": DECAYS},
    "Adam": {"betas": BETAS, "eps": SMALL_NUMBERS, "weight_decay": DECAYS, "amsgrad": FLAGS, "maximize": FLAGS},
    "AdamW": {"betas": BETAS, "weight_decay": DECAYS, "amsgrad": FLAGS},
    "Adamax": {"betas": BETAS, "weight_decay": DECAYS},
    "NAdam": {"betas": BETAS, "momentum_decay": PARTS, "decoupled_weight_decay": FLAGS, "weight_decay": DECAYS},
    "RAdam": {"betas": BETAS, "decoupled_weight_decay": FLAGS, "weight_decay": DECAYS},
    "Adadelta": {"rho": PARTS, "eps": SMALL_NUMBERS, "weight_decay": DECAYS},
    "Adagrad": {"lr_decay": DECAYS, "eps": SMALL_NUMBERS, "weight_decay": DECAYS},
    "RMSprop": {"alpha": PARTS, "momentum": st.sampled_from([0.0, 0.9]), "centered": FLAGS, "weight_decay": DECAYS},
    "Rprop": {"etas": st.tuples(st.floats(0.2, 0.8), st.floats(1.1, 1.6))},
    "ASGD": {"lambd": DECAYS, "alpha": PARTS, "t0": st.sampled_from([0.0, 1e6]), "weight_decay": DECAYS},
}
LEAF = {(): "", (0, 6): "a b", (5,): "a", (4, 4): "a b", (2, 4, 3): "a b c", (2, 3, 1, 5): "a b c d"}
"""Shapes and their axes; few, for every one is compiled anew."""


@st.composite
def any_case(draw: st.DrawFn) -> Case:
    """Two groups of one class with any options, of leaves of any shape with their axes in any order."""
    name = draw(st.sampled_from(list(ANY)))
    shapes = draw(st.lists(st.sampled_from(list(LEAF)), min_size=2, max_size=3, unique=True))
    held, port, rules = {}, {}, []
    for number, shape in enumerate(shapes):
        axes = LEAF[shape].split()
        order = draw(st.sampled_from([axes, axes[::-1]]))
        held[f"p{number}"] = shape
        port[f"q{number}"] = tuple(shape[axes.index(axis)] for axis in order)
        rules.append(Rule(f"p{number}", f"q{number}", f"{LEAF[shape]} -> {' '.join(order)}" if axes else None))
    options = st.fixed_dictionaries({"lr": RATES, **ANY[name]})
    leaves = tuple(held)
    return Case(name, {}, ((leaves[:1], draw(options)), (leaves[1:], draw(options))), held, port, tuple(rules))


@settings(max_examples=5)
@given(case=any_case(), seed=SEEDS)
def test_any_options_and_shapes(case: Case, seed: int) -> None:
    # every example is a program: one in float64 has to do
    reference, port = (in_float64(side) for side in (torch_side(case), port_side(case, Port)))
    arrays = draw(case, seed)
    assert_agree(reference, port, arrays, moved(arrays))


def in_float64(side: Side) -> Side:
    """Both runs of the statistic in float64."""
    return lambda bits, arrays: side(64, {k: v.astype(float) if v.dtype.kind == "f" else v for k, v in arrays.items()})


# --- one step in any surroundings -------------------------------------------------------------------------------------

SMALL = case_of("AdamW", ("kernel", "bias"))


def port_of_small(**options: Any) -> tuple[Any, Any, Any]:
    """The translation of the small case, its parameters and a gradient, as trees of dicts."""
    rng = np.random.default_rng(0)
    params, gradients = ({n: rng.normal(size=shape) for n, shape in SMALL.shapes.items()} for _ in range(2))
    model = SMALL.model(params)
    transform = eq.to_optax(SMALL.optimizer(model), model=model, mapping=SMALL.mapping, **options)
    return transform, jax.tree.map(jnp.asarray, SMALL.tree(params)), SMALL.tree(gradients, gradient=True)


def two_steps(transform: Any, params: Any, gradients: Any, **extra: Any) -> tuple[Any, Any]:
    state = transform.init(params)
    for _ in range(2):
        changes, state = transform.update(gradients, state, params, **extra)
        params = optax.apply_updates(params, changes)
    return params, state


def assert_same(one: Any, other: Any) -> None:
    """The same leaves, to the bit."""
    ours, theirs = (jax.tree.map(np.asarray, tree) for tree in (one, other))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(a, b)


def as_nnx(tree: Any) -> nnx.State:
    return nnx.State(jax.tree.map(nnx.Param, tree))


def as_boxed(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: linen.Partitioned(leaf, (None,) * np.ndim(leaf)), tree)


@pytest.mark.parametrize("box", [as_nnx, as_boxed, freeze], ids=["nnx.State", "Linen's boxes", "FrozenDict"])
def test_any_tree_of_parameters(box: Any) -> None:
    transform, params, gradients = port_of_small()
    plain, boxed = two_steps(transform, params, gradients), two_steps(transform, box(params), box(gradients))
    assert jax.tree.structure(boxed[0]) == jax.tree.structure(box(params))
    assert_same(boxed, plain)


def test_a_bare_array_and_leaves_named_value() -> None:
    kernel = torch.nn.Parameter(torch.ones(3))
    transform = eq.to_optax(torch.optim.Adam([kernel], lr=0.1))
    alone, _ = two_steps(transform, jnp.ones(3), jnp.arange(3.0))
    within, _ = two_steps(
        transform,
        {"a": {"value": jnp.ones(3), "raw_value": jnp.ones(2)}},
        {"a": {"value": jnp.arange(3.0), "raw_value": jnp.ones(2)}},
    )
    assert_same(within["a"]["value"], alone)


def test_a_gradient_that_is_none_or_not_received_moves_nothing() -> None:
    transform, params, gradients = port_of_small()
    left, state = two_steps(transform, params, {**gradients, "fc": {**gradients["fc"], "bias": None}})
    assert_same(left["fc"]["bias"], params["fc"]["bias"])
    assert_same(state.leaves["fc.bias"], transform.init(params).leaves["fc.bias"])
    received = {"fc": {"bias": False, "kernel": True}}
    assert_same(two_steps(transform, params, gradients, received=received), (left, state))
    everything = jax.tree.map(lambda leaf: True, params)
    assert_same(two_steps(transform, params, gradients, received=everything), two_steps(transform, params, gradients))


def test_numbers_that_torch_holds_in_tensors() -> None:
    held = torch.optim.Adam(
        [torch.nn.Parameter(torch.ones(3))], lr=torch.tensor(0.125), betas=(0.5, 0.75), foreach=False
    )
    plain = torch.optim.Adam([torch.nn.Parameter(torch.ones(3))], lr=0.125, betas=(0.5, 0.75))
    found = [two_steps(eq.to_optax(optimizer), jnp.ones(3), jnp.arange(3.0)) for optimizer in (held, plain)]
    assert_same(*found)


def test_parameters_named_when_the_optimizer_is_made() -> None:
    model = torch.nn.Linear(3, 2)
    transform = eq.to_optax(torch.optim.SGD(model.named_parameters(), lr=0.5), model=model)
    changes, _ = transform.update(
        {"kernel": jnp.ones((3, 2)), "bias": None},
        transform.init(tree := {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}),
        tree,
    )
    assert_same(changes["kernel"], -0.5 * np.ones((3, 2)))


MICRO = 8
"""Micro-batches, two a step."""


def accumulated(bits: int, arrays: Arrays) -> Arrays:
    found = {}
    with torch_environment.environment(bits, threads=1):
        model = SMALL.model(part(arrays, "params"))
        optimizer, named = SMALL.optimizer(model), dict(model.named_parameters())
        for number in range(MICRO):
            for name, parameter in named.items():
                gradient = torch.tensor(arrays[f"gradients.{name}"][number]) / 2
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
            if number % 2:
                torch.nn.utils.clip_grad_norm_(list(named.values()), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            found |= {f"{name}.{number}": to_numpy(parameter) for name, parameter in named.items()}
    return found


def in_multi_steps(bits: int, arrays: Arrays) -> Arrays:
    with torch_environment.environment(bits, threads=1), jax_runtime.environment(bits):
        model = SMALL.model(part(arrays, "params"))
        translated = eq.to_optax(SMALL.optimizer(model), model=model, mapping=SMALL.mapping)
        whole = optax.MultiSteps(optax.chain(clip_grad_norm(1.0), translated), every_k_schedule=2)

        @jax.jit
        def run(params: Any, gradients: Any) -> Any:
            def step(carry: Any, gradient: Any) -> Any:
                changes, state = whole.update(gradient, carry[1], carry[0])
                params = optax.apply_updates(carry[0], changes)
                return (params, state), params

            return jax.lax.scan(step, (params, whole.init(params)), gradients)[1]

        gradients = [SMALL.tree({n: g[i] for n, g in part(arrays, "gradients").items()}, True) for i in range(MICRO)]
        params = jax.tree.map(jnp.asarray, SMALL.tree(part(arrays, "params")))
        seen = by_path(run(params, jax.tree.map(lambda *rows: np.stack(rows), *gradients)))
    steps = [SMALL.layout.backward({leaf: np.asarray(rows[i]) for leaf, rows in seen.items()}) for i in range(MICRO)]
    return {f"{name}.{number}": value for number, of_step in enumerate(steps) for name, value in of_step.items()}


def test_clipped_and_accumulated() -> None:
    # gradients of few bits: optax.MultiSteps adds in float32
    arrays = draw(SMALL, seed=1)
    assert_agree(accumulated, in_multi_steps, arrays, moved(arrays))


def test_two_optimizers_side_by_side() -> None:
    shapes = {"kernel": (3, 2), "square": (4, 4), "bias": (7,)}
    case = case_of("AdamW", tuple(shapes))

    def makes(model: torch.nn.Module) -> dict[str, Any]:
        named = dict(model.named_parameters())
        matrices = [parameter for parameter in named.values() if parameter.dim() == 2]
        return {"muon": torch.optim.Muon(matrices, lr=0.02), "adamw": torch.optim.AdamW([named["bias"]], lr=0.01)}

    def reference(bits: int, arrays: Arrays) -> Arrays:
        with torch_environment.environment(bits, threads=1):
            model = case.model(part(arrays, "params"))
            optimizers = makes(model)
            for number in range(3):
                for name, parameter in model.named_parameters():
                    parameter.grad = torch.tensor(arrays[f"gradients.{name}"][number])
                for optimizer in optimizers.values():
                    optimizer.step()
            return {name: to_numpy(parameter) for name, parameter in model.named_parameters()}

    def port(bits: int, arrays: Arrays) -> Arrays:
        with torch_environment.environment(bits, threads=1), jax_runtime.environment(bits):
            model = case.model(part(arrays, "params"))
            made = {k: eq.to_optax(v, model=model, mapping=case.mapping) for k, v in makes(model).items()}
            params = jax.tree.map(jnp.asarray, case.tree(part(arrays, "params")))
            labels = jax.tree.map(lambda leaf: "muon" if leaf.ndim == 2 else "adamw", params)
            transform = optax.partition(made, labels)
            state, update = jax.jit(transform.init)(params), jax.jit(transform.update)
            for number in range(3):
                gradients = case.tree({n: g[number] for n, g in part(arrays, "gradients").items()}, True)
                changes, state = update(gradients, state, params)
                params = optax.apply_updates(params, changes)
            return case.layout.backward({leaf: np.asarray(value) for leaf, value in by_path(params).items()})

    arrays = draw(case, seed=2)
    assert_agree(reference, port, arrays, moved(arrays))


def test_rows_of_an_embedding_in_any_layout() -> None:
    model = torch.nn.Embedding(4, 3, sparse=True)
    optimizer, rows = torch.optim.SparseAdam(model.parameters(), lr=0.1), np.array([True, False, False, True])
    weight, gradient = model.weight.detach().numpy().copy(), np.arange(12.0, dtype=np.float32).reshape(4, 3)
    turned = Mapping([Rule("weight", "table", "n d -> d n")])
    plain = eq.to_optax(optimizer, model=model, mapping=Mapping([Rule("weight", "table")]))
    ours, _ = two_steps(plain, {"table": jnp.asarray(weight)}, {"table": gradient}, received={"table": rows})
    transposed = eq.to_optax(optimizer, model=model, mapping=turned)
    held = {"table": jnp.asarray(weight.T)}, {"table": gradient.T}
    theirs, _ = two_steps(transposed, *held, received={"table": rows[None]})
    assert_same(theirs["table"].T, ours["table"])
    assert np.array_equal(np.any(np.asarray(ours["table"]) != weight, axis=1), rows)


# --- what is refused --------------------------------------------------------------------------------------------------


class Lion(torch.optim.Adam):
    """A stranger's optimizer."""


def two_groups(kind: str, **options: Any) -> Any:
    groups = [
        {"params": [torch.nn.Parameter(torch.ones(2, 3))], **options},
        {"params": [torch.nn.Parameter(torch.ones(3, 2))]},
    ]
    return getattr(torch.optim, kind)(groups)


def one(kind: str = "Adam", **options: Any) -> Any:
    return getattr(torch.optim, kind)([torch.nn.Parameter(torch.ones(2, 3))], **options)


def hooked() -> Any:
    optimizer = one()

    def clip_everything(*given: Any) -> None: ...

    optimizer.register_step_pre_hook(clip_everything)
    return optimizer


def frozen() -> Any:
    return torch.optim.Adam([torch.nn.Parameter(torch.ones(2), requires_grad=False), torch.nn.Parameter(torch.ones(2))])


class Follower:
    """A scheduler of an optimizer that is not the one translated."""

    optimizer = None


REFUSED: list[tuple[Callable[[], Any], dict[str, Any], str]] = [
    (
        lambda: Lion([torch.nn.Parameter(torch.ones(2))]),
        {},
        r"test_to_optax.Lion is not an optimizer of torch.optim.*write them",
    ),
    (lambda: 3, {}, "takes an optimizer of torch.optim, not int"),
    (lambda: two_groups("Adam"), {}, "Adam has several parameter groups: pass model="),
    (
        lambda: two_groups("Adam", temperature=2),
        {"model": "its"},
        r"options that are not translated: temperature \(group 0\)",
    ),
    (lambda: one("Adafactor"), {}, "Adafactor depends on the order of axes: pass model="),
    (lambda: one("Muon"), {}, "Muon depends on the order of axes: pass model="),
    (one, {"model": torch.nn.Linear(3, 2)}, r"not all the model's: group 0, shape \(2, 3\)"),
    (one, {"model": "network"}, "model= takes the torch module whose parameters are moved, not str"),
    (one, {"model": "its", "mapping": {"a": "b"}}, "mapping= takes an equivalence Mapping, not dict"),
    (one, {"every": 0}, "every= is a number of optimizer steps, not 0"),
    (one, {"every": 2.5}, "every= is a number of optimizer steps, not 2.5"),
    (one, {"scheduler": 0.1}, "scheduler= takes one of torch's or an Optax schedule, not float"),
    (one, {"scheduler": Follower()}, "moves another optimizer"),
    (lambda: one("LBFGS", history_size=0), {}, "LBFGS history_size=0: torch fails on it"),
    (
        lambda: one("LBFGS", lr=torch.tensor(0.1), line_search_fn="strong_wolfe"),
        {},
        r"LBFGS lr as a tensor with strong_wolfe.*give float\(lr\)",
    ),
    (hooked, {}, r"step hooks \(clip_everything\)"),
    (frozen, {}, "holds frozen parameters: pass model="),
]


def holding(optimizer: Any) -> torch.nn.Module:
    """A module that holds an optimizer's parameters as `0`, `1`, ..."""
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return torch.nn.ParameterList(held)


@pytest.mark.parametrize(("make", "options", "message"), REFUSED, ids=[message[:40] for _, _, message in REFUSED])
def test_what_has_no_translation_is_refused(make: Any, options: dict[str, Any], message: str) -> None:
    optimizer = make()
    options = {key: holding(optimizer) if value == "its" else value for key, value in options.items()}
    with pytest.raises(InputError, match=message) as caught:
        eq.to_optax(optimizer, **options)
    assert "\n" not in str(caught.value)
    assert caught.value.status == 2


def plateau(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)


UPDATES: dict[str, tuple[str, dict[str, Any], str]] = {
    "no parameters": ("Adam", {"params": None}, "needs the parameters"),
    "a gradient of another shape": (
        "Adam",
        {"updates": {"w": jnp.ones((3, 2)), "x": jnp.ones(2)}},
        r"x is not a parameter; w has the shape \(3, 2\), the parameter \(2, 3\)",
    ),
    "received for a stranger": ("Adam", {"received": {"w": True, "v": True}}, "there is no v"),
    "no rows": ("SparseAdam", {}, "SparseAdam moves only the rows that a sparse gradient holds"),
    "rows of another length": ("SparseAdam", {"received": {"w": np.ones(5, bool)}}, r"shape \(5,\) for w \(2, 3\)"),
    "no metric": ("SGD", {}, r"looks at a metric: update\(gradients, state, params, value=metric\)"),
    "a metric that is no number": ("SGD", {"value": jnp.ones(2)}, r"one number, not at an array of shape \(2,\)"),
    "no closure": ("LBFGS", {}, "LBFGS needs value_fn"),
    "received for LBFGS": ("LBFGS", {"received": {"w": True}}, "moves all parameters together"),
    "the state of others": ("Adam", {"state": "others"}, "v, w stands on one side only"),
}


@pytest.mark.parametrize("name", list(UPDATES))
def test_a_step_that_lacks_what_it_needs_is_refused(name: str) -> None:
    kind, changed, message = UPDATES[name]
    optimizer = one(kind)
    transform = eq.to_optax(optimizer, scheduler=plateau(optimizer) if kind == "SGD" else None)
    tree = {"w": jnp.ones((2, 3))}
    given = {"updates": tree, "state": transform.init(tree), "params": tree, **changed}
    if given["state"] == "others":
        given["state"] = transform.init({"v": jnp.ones(2)})
    updates, state, params = (given.pop(key) for key in ("updates", "state", "params"))
    with pytest.raises(InputError, match=message):
        transform.update(updates, state, params, **given)


def test_complex_parameters_are_refused() -> None:
    transform = eq.to_optax(torch.optim.SGD([torch.nn.Parameter(torch.ones(2, dtype=torch.complex64))], lr=0.1))
    with pytest.raises(InputError, match=r"complex parameters are not translated: a\.w; hold real and imaginary parts"):
        transform.init({"a": {"w": jnp.ones(2, jnp.complex64)}, "b": jnp.ones(2)})


def test_leaves_that_do_not_fit_the_model_are_all_named() -> None:
    model = torch.nn.Linear(3, 2)
    transform = eq.to_optax(torch.optim.SGD(model.parameters(), lr=0.1), model=model)
    with pytest.raises(InputError, match="no port leaf is named like weight, bias"):
        transform.init({"core": jnp.ones((3, 2))})
