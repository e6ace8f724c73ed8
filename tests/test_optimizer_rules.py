"""Each rule takes torch's steps: parameters and every entry of torch's state, at every step, in both precisions."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from equivalence.errors import InputError
from equivalence.numerics import AGREES, distance, rms
from equivalence.optimizers import rules
from equivalence.optimizers.rules import adam, adam_corrections, common, matrix
from equivalence.optimizers.rules.table import ROWS, OptimizerRow
from equivalence.runtimes import jax as jax_runtime
from tests.agreement import Arrays, assert_agree, disagreements
from tests.rule_sides import Case, overflows, port_side, remembered, torch_side
from tests.torch_tables import optimizer_configurations

NAMES = sorted(set(rules.HOMES) - {"LBFGS"})  # which moves all parameters together, and has tests of its own
SHAPE = (3, 5)

KINDS = ("normal", "zero", "huge", "large", "tiny", "mixed", "infinite", "nan")
"""Kinds of gradients: `large` ones overflow float32 when squared, but not always when first multiplied by 1 - beta2."""


def gradients(kind: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    # of few bits, so that what Muon rounds to bfloat16 is exact in float32 and cannot fall on both sides of a tie
    drawn = np.round(rng.normal(size=shape) * 8 + 0.5) / 8 - 1 / 16
    powers = {"huge": 100, "large": 65, "tiny": -100}
    if kind == "mixed":
        return drawn * 2.0 ** rng.choice([-100, -33, 0, 33, 100], size=shape)
    odd = {"zero": 0.0, "infinite": np.inf, "nan": np.nan}.get(kind)
    return np.where(rng.random(shape) < 0.2, odd, drawn) if odd is not None else drawn * 2.0 ** powers.get(kind, 0)


def draw(
    name: str, steps: int, shapes: dict[str, tuple[int, ...]], seed: int, kind: str = "normal", moving: Any = ()
) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    arrays = {f"params.{leaf}": rng.normal(size=shape) for leaf, shape in shapes.items()}
    arrays |= {f"gradients.{leaf}": gradients(kind, (steps, *shape), rng) for leaf, shape in shapes.items()}
    if name == "SparseAdam":
        arrays |= {f"rows.{leaf}": rng.random((steps, *shape[:1])) < 0.6 for leaf, shape in shapes.items()}
    ranges = {"lr": [1e-3, 0.01, 0.2], "beta1": [0.8, 0.85, 0.95], "momentum": [0.5, 0.75]}
    return arrays | {f"moving.{value}": rng.choice(ranges[value], size=steps) for value in moving}


def fixed(arrays: Arrays) -> list[str]:
    """What the reference's noise may move: not the options."""
    return [path for path in arrays if not path.startswith(("moving", "rows"))]


@pytest.fixture(scope="module")
def configurations() -> dict[str, list[Case]]:
    """torch's own table of optimizer configurations, those with a tensor for a number counted once."""
    found: dict[str, list[Case]] = {name: [] for name in NAMES}
    for name, configs in optimizer_configurations().items():
        for options in configs:
            case = Case(name, options)
            if name in found and case not in found[name]:
                found[name].append(case)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_100_steps_of_every_configuration_torch_tests_with(name: str, configurations: dict[str, list[Case]]) -> None:
    cases = configurations[name]
    shapes = {"matrix": SHAPE} | ({"vector": (7,)} if name == "Adafactor" else {})
    # Muon's roundings to bfloat16 may fall on the other side of a tie, once in some thousand steps of this size
    arrays = draw(name, 12 if name == "Muon" else 100, shapes, seed=0)
    assert len(cases) >= 4
    assert_agree(torch_side(cases), port_side(cases), arrays, fixed(arrays))


MOVING = {"Adafactor": ("lr",), "Muon": ("lr", "momentum"), "SGD": ("lr", "momentum")}
MOVING |= dict.fromkeys(("ASGD", "Adadelta", "Adagrad", "RMSprop", "Rprop"), ("lr",))

OPTIONS: dict[str, dict[str, list[Any]]] = {
    "SGD": {"momentum": [0, 0.5, 0.9], "dampening": [0, 0.3, 0.9], "weight_decay": [0, 0.1]},
    "Adam": {"amsgrad": [False, True], "decoupled_weight_decay": [False, True], "weight_decay": [0, 0.1]},
    "AdamW": {"amsgrad": [False, True], "weight_decay": [0, 0.3]},
    "Adamax": {"weight_decay": [0, 0.1]},
    "NAdam": {
        "weight_decay": [0, 0.1],
        "decoupled_weight_decay": [False, True],
        "momentum_decay": [0, 0.004, 1.0],
    },
    "RAdam": {"weight_decay": [0, 0.1], "decoupled_weight_decay": [False, True]},
    "SparseAdam": {},
    "Adadelta": {"rho": [0.3, 0.9], "eps": [1e-6, 1e-3], "weight_decay": [0, 0.1]},
    "Adagrad": {
        "lr_decay": [0, 0.3],
        "weight_decay": [0, 0.1],
        "initial_accumulator_value": [0, 0.5],
        "eps": [1e-10, 1e-3],
    },
    "RMSprop": {
        "alpha": [0.3, 0.99],
        "momentum": [0, 0.9],
        "centered": [False, True],
        "eps": [1e-8, 1e-3],
        "weight_decay": [0, 0.1],
    },
    "ASGD": {"lambd": [1e-4, 0.5], "alpha": [0.75, 1.0], "t0": [1e6, 2], "weight_decay": [0, 0.1]},
    "Rprop": {"etas": [(0.5, 1.2), (0.3, 1.7)], "step_sizes": [(1e-6, 50), (1e-3, 0.02)]},
    "Adafactor": {
        "beta2_decay": [-0.8, -0.3, 0],
        "eps": [(None, 1e-3), (1e-2, 2.0)],
        "d": [1.0, 1.5],
        "weight_decay": [0, 0.1],
    },
    "Muon": {
        "momentum": [0.25, 0.75],
        "ns_coefficients": [(3.5, -4.75, 2.0), (1.5, -0.5, 0.0)],
        "nesterov": [False, True],
        "ns_steps": [0, 1, 5],
        "eps": [1e-7, 16.0],
        "weight_decay": [0, 0.2],
        "adjust_lr_fn": [None, "original", "match_rms_adamw"],
    },
}
ADAMS = {"betas": [(0.9, 0.999), (0.3, 0.5), (0.0, 0.7), (0.95, 0.9999)], "eps": [1e-8, 1e-3]}
EVERY = {"lr": [1e-3, 0.1, 1.0], "maximize": [False, True]}


@st.composite
def cases(draw: st.DrawFn, name: str) -> Case:
    known = EVERY | (ADAMS if "betas" in Case(name).group() else {}) | OPTIONS[name]
    options = {key: draw(st.sampled_from(values), label=key) for key, values in known.items()}
    if name == "Muon":
        del options["maximize"]
    if name == "SGD" and options["momentum"] and not options["dampening"]:
        options["nesterov"] = draw(st.booleans(), label="nesterov")
    return Case(name, options)


@pytest.mark.parametrize("name", NAMES)
@given(data=st.data())
def test_any_options_on_any_gradients(name: str, data: st.DataObject) -> None:
    case = data.draw(cases(name))
    moves = data.draw(st.sampled_from([(), MOVING.get(name, ("lr", "beta1"))]), label="moving")
    if not case.options.get("momentum", 1):
        moves = tuple(value for value in moves if value != "momentum")
    kind = data.draw(st.sampled_from(KINDS), label="kind")
    steps = 8 if name == "RAdam" else 4  # which is rectified from step 6 on
    arrays = draw(name, steps, {"leaf": SHAPE}, data.draw(st.integers(0, 999), label="seed"), kind, moves)
    reference, port = remembered(torch_side([case])), remembered(port_side([case], compiled=False))
    assert_agree(reference, port, arrays, fixed(arrays))
    assert not overflows(reference, port, arrays)


SHAPES = {"scalar": (), "vector": (4,), "kernel": (2, 1, 3, 4), "empty": (0, 3)}


@pytest.mark.parametrize("name", NAMES)
def test_any_shape(name: str) -> None:
    keep = {"SparseAdam": ("vector", "kernel", "empty"), "Adafactor": ("scalar", "vector", "kernel")}
    shapes = {leaf: SHAPES[leaf] for leaf in keep.get(name, SHAPES)}
    if name == "Muon":
        shapes = {"tall": (6, 2), "wide": (2, 6), "row": (1, 3), "no rows": (0, 3)}
    case = Case(name)
    arrays = draw(name, 3, shapes, seed=1)
    assert_agree(torch_side([case]), port_side([case]), arrays, fixed(arrays))


@pytest.mark.parametrize("name", ["Adam", "AdamW", "Adamax", "NAdam", "RAdam", "Adagrad", "RMSprop"])
def test_without_eps(name: str) -> None:
    case = Case(name, {"eps": 0.0})
    for kind in ("normal", "zero", "huge", "tiny"):
        arrays = draw(name, 5, {"leaf": SHAPE}, 2, kind)
        reference, port = torch_side([case]), port_side([case], compiled=False)
        assert_agree(reference, port, arrays, fixed(arrays))
        assert not overflows(reference, port, arrays)


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("name", NAMES)
def test_a_float32_leaf_stays_float32_whatever_the_rate_is(name: str, bits: int) -> None:
    case = Case(name)

    def step(rate: jax.Array, leaf: jax.Array) -> Any:
        rule = case.rule.make({**case.group(), "lr": rate})
        extra = {"rows": jnp.ones(3, bool)} if case.rule.needs_rows else {}
        return rule.update(leaf, rule.init(leaf), leaf, **extra), rule.init(leaf)

    with jax_runtime.environment(bits):
        (change, after), before = jax.eval_shape(step, jnp.ones([]), jnp.ones(SHAPE, jnp.float32))
    assert change.dtype == jnp.float32
    assert jax.tree.map(lambda leaf: leaf.dtype, after) == jax.tree.map(lambda leaf: leaf.dtype, before)


@pytest.mark.parametrize("name", NAMES)
def test_a_tree_is_moved_leaf_by_leaf(name: str) -> None:
    rng = np.random.default_rng(3)
    case, tree = Case(name), {leaf: jnp.asarray(rng.normal(size=SHAPE), jnp.float32) for leaf in "ab"}
    rule, rows = case.rule.make(case.group()), {"a": jnp.ones(3, bool), "b": jnp.arange(3) > 0}

    def change(leaves: Any, held: Any) -> Any:
        extra = {"rows": held} if case.rule.needs_rows else {}
        return rule.update(leaves, rule.init(leaves), leaves, **extra)[0]

    whole = change(tree, rows)
    for leaf in tree:
        np.testing.assert_array_equal(whole[leaf], change(tree[leaf], rows[leaf]))


LEAFWISE = [row for row in ROWS if ".LBFGS(" not in row.torch]  # which has tests of its own


@pytest.mark.parametrize("row", LEAFWISE, ids=lambda row: row.torch.removeprefix("torch.optim."))
def test_the_table_says_which_plain_forms_are_exact(row: OptimizerRow) -> None:
    name = row.torch.removeprefix("torch.optim.").partition("(")[0]
    options = row.make([torch.nn.Parameter(torch.zeros(1, 1))]).param_groups[0]
    case = Case(name, {key: value for key, value in options.items() if f"{key}=" in row.torch})
    arrays = draw(name, 12, {"leaf": SHAPE}, seed=4)

    def found(form: str) -> dict[str, float]:
        plain = optax.with_extra_args_support(eval(form, {"optax": optax}))
        port = port_side([Case(name, case.options, lambda _: plain, with_state=False)], compiled=name == "Muon")
        found = disagreements(torch_side([case]), port, arrays, fixed(arrays))
        return {path: ratio for path, ratio in found.items() if ".param." in path}

    assert bool(found(row.form)) == (row.form != row.exact)
    assert row.exact is None or not found(row.exact)


def test_every_optimizer_of_torch_is_in_the_table() -> None:
    known = {row.torch.removeprefix("torch.optim.").partition("(")[0] for row in ROWS}
    kinds = {name for name, kind in vars(torch.optim).items() if isinstance(kind, type) and name != "Optimizer"}
    assert known == kinds
    assert set(rules.RULES) == kinds


@pytest.mark.parametrize("form", ["ours", "plain"])
def test_bias_corrections_keep_their_precision_in_float32(form: str) -> None:
    counts = np.array([1, 2, 3, 10, 100, 1000, 100_000])

    def exact(bits: int, _: Arrays) -> Arrays:
        kind = np.float32 if bits == 32 else np.float64
        return {str(t): kind(1 - 0.9999 ** float(t)) for t in counts}

    def port(bits: int, _: Arrays) -> Arrays:
        with jax_runtime.environment(bits):
            one = common.one_minus_power if form == "ours" else lambda b, t: 1 - b**t
            return {str(t): np.asarray(one(0.9999, jnp.asarray(t))) for t in counts}

    assert bool(disagreements(exact, port, {})) == (form == "plain")


@pytest.mark.parametrize("b2", [0.67, 0.7, 0.9, 0.999, 0.99999])
def test_the_length_of_radams_average_does_not_cancel_in_float32(b2: float) -> None:
    counts = [t for t in (6, 7, 10, 50, 900, 1100, 100_000) if t >= (adam_corrections.first_rectified(b2) or 0)]

    def exact(bits: int, _: Arrays) -> Arrays:
        kind = np.float32 if bits == 32 else np.float64
        return {str(t): kind(2 / (1 - b2) - 1 - 2 * t * b2 ** float(t) / (1 - b2 ** float(t)) - 4) for t in counts}

    def port(bits: int, _: Arrays) -> Arrays:
        with jax_runtime.environment(bits):
            return {str(t): np.asarray(adam_corrections._average_length(b2, jnp.asarray(t)) - 4) for t in counts}

    assert_agree(exact, port, {})


COEFFICIENTS = (3.4445, -4.7750, 2.0315)


@pytest.mark.parametrize("shape", [(2, 3), (5, 3), (7, 11), (48, 80)], ids=str)
def test_muon_rounds_to_bfloat16_where_torch_does(shape: tuple[int, ...]) -> None:
    from torch.optim._muon import _zeropower_via_newtonschulz

    plain = np.random.default_rng(6).normal(size=shape).astype(np.float32)
    for steps in (0, 1, 5):
        theirs = _zeropower_via_newtonschulz(torch.tensor(plain), COEFFICIENTS, steps, 1e-7).float().numpy()
        with jax_runtime.environment(32):
            ours = np.asarray(matrix.orthogonalized(jnp.asarray(plain), COEFFICIENTS, steps, 1e-7))
        if shape == (48, 80):  # sums of 80 products depend on their order: some elements are a unit of bfloat16 apart
            assert distance(ours, theirs) <= AGREES * 2.0**-9 * rms(theirs)
        else:
            np.testing.assert_array_equal(ours, theirs)


def test_sparse_adam_wants_the_rows_that_were_held() -> None:
    rule, leaf = adam.scale_by_torch_sparse_adam(), jnp.ones((3, 2))
    with pytest.raises(InputError, match="which rows"):
        rule.update(leaf, rule.init(leaf), leaf)
    for rows in (jnp.ones((3, 2), bool), jnp.ones(2, bool)):
        with pytest.raises(InputError, match="first axis"):
            rule.update(leaf, rule.init(leaf), leaf, rows=rows)
    change, state = rule.update(leaf, rule.init(leaf), leaf, rows=jnp.zeros(3, bool))
    assert not change.any()
    assert int(state.count) == 1


def test_muon_refuses_what_it_cannot_move() -> None:
    with pytest.raises(InputError, match="matrices only"):
        matrix.scale_by_torch_muon().init(jnp.ones(3))
    with pytest.raises(InputError, match="match_rms_adamw"):
        matrix.scale_by_torch_muon(adjust_lr_fn="match_rms_adam")


def test_an_unknown_optimizer_is_named_with_its_nearest() -> None:
    with pytest.raises(InputError, match="did you mean RAdam"):
        rules.rule_for("Radam")
    with pytest.raises(AttributeError):
        _ = rules.nothing  # type: ignore[attr-defined]
