"""The losses of torch.nn in JAX: values and gradients over options, shapes, ties, infinities and empty batches."""

from __future__ import annotations

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import equivalence as eq
from equivalence import losses
from equivalence.errors import InputError
from equivalence.losses.modules import OPTIONS, TRAINED
from equivalence.runtimes.jax import environment
from tests.agreement import assert_agree, disagreements
from tests.loss_arrays import KINDS, clusters
from tests.loss_cases import CASES, drawn, sides, value_of
from tests.loss_samples import outcome
from tests.pairings import NnxMLP, rows, torch_mlp

LOSS_CLASSES = {n for n in dir(torch.nn) if n.endswith("Loss")}
VALUES_AGREE = {"l1", "huber", "linear_cross_entropy"}


@pytest.mark.parametrize("name", CASES)
@given(seed=st.integers(0, 2**32 - 1), kind=st.sampled_from(KINDS))
@example(seed=0, kind="ordinary")
@example(seed=1, kind="ties")
@example(seed=2, kind="extremes")
def test_values_and_gradients_are_torchs(name, seed, kind):
    moved = None if kind == "ordinary" else ()  # noise would leave a tie
    assert_agree(*sides(name), drawn(name, kind, seed), moved, CASES[name].scale)


LEAVES = {"head.weight": "head", "head.bias": "hb"} | {
    f"tail.{i}.{layer}.weight": f"{'ab'[layer]}{i}" for i in (0, 1) for layer in (0, 1)
}


@functools.partial(jax.jit, static_argnames="batched")
def adaptive_program(arrays, batched):
    def scalar(moving):
        x, y = moving["x"], arrays["y"]
        output, loss = losses.adaptive_log_softmax(
            x if batched else x[0], y if batched else y[0], {leaf: moving[k] for leaf, k in LEAVES.items()}
        )
        return loss + (output**2).sum(), (output, loss)

    return jax.grad(scalar, has_aux=True)({k: v for k, v in arrays.items() if k != "y"})


@pytest.mark.parametrize("batched", [True, False])
@given(seed=st.integers(0, 2**32 - 1))
def test_adaptive_log_softmax_is_torchs(batched, seed):
    module = torch.nn.AdaptiveLogSoftmaxWithLoss(8, 10, [2, 5], div_value=2.0, head_bias=True)

    def reference(bits, arrays):
        tensors = {k: torch.tensor(v, requires_grad=k != "y") for k, v in arrays.items()}
        given = [tensors[k] if batched else tensors[k][0] for k in ("x", "y")]
        leaves = {leaf: tensors[k] for leaf, k in LEAVES.items()}
        output, loss = torch.func.functional_call(module, leaves, tuple(given))
        (loss + (output**2).sum()).backward()
        found = {"output": output.detach().numpy(), "loss": loss.detach().numpy()}
        for name in set(arrays) - {"y"}:
            slope = tensors[name].grad  # none where no label fell into the cluster
            found[name] = np.zeros_like(arrays[name]) if slope is None else slope.numpy()
        return found

    def port(bits, arrays):
        with environment(bits):
            slopes, (output, loss) = adaptive_program({k: jnp.asarray(v) for k, v in arrays.items()}, batched=batched)
            return {k: np.asarray(v) for k, v in {"output": output, "loss": loss, **slopes}.items()}

    assert_agree(reference, port, clusters(np.random.default_rng(seed), "ordinary"), scale=1.0)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    "call",
    [
        *(f"F.{case.functional}(x, x, reduction=R)" for n, case in CASES.items() if n in ("l1", "mse", "huber", "bce")),
        "F.cross_entropy(x, y, reduction=R)",
        "F.cross_entropy(x, y, label_smoothing=0.1, reduction=R)",
        "F.cross_entropy(x, x, reduction=R)",
        "F.multilabel_soft_margin_loss(x, x, reduction=R)",
        "F.cosine_embedding_loss(x, x, x[:, 0], reduction=R)",
        "F.triplet_margin_loss(x, x, x, reduction=R)",
    ],
)
def test_an_empty_batch_means_nan_and_sums_to_zero(call, reduction):
    class Port:
        def __getattr__(self, functional):
            return getattr(losses, next(n for n, case in CASES.items() if case.functional == functional))

    x, y = np.zeros((0, 3)), np.zeros(0, int)
    theirs = eval(call, {"F": torch.nn.functional, "R": reduction, "x": torch.tensor(x), "y": torch.tensor(y)})
    ours = eval(call, {"F": Port(), "R": reduction, "x": jnp.asarray(x), "y": jnp.asarray(y)})
    np.testing.assert_array_equal(np.asarray(ours), theirs.numpy())


@pytest.mark.parametrize("name", ["multi_margin", "multi_label_margin"])
def test_an_empty_batch_of_margins_is_not_uninitialised_memory(name):
    x, y = jnp.zeros((0, 3)), jnp.zeros((0,) if name == "multi_margin" else (0, 3), int)
    loss = getattr(losses, name)
    assert np.isnan(loss(x, y))
    assert loss(x, y, reduction="sum") == 0
    assert loss(x, y, reduction="none").shape == (0,)


X = jnp.array([[0.1, 0.2, 0.3], [0.5, 0.4, 0.2]])


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("F.nll_loss(x, i(0, 3))", "L.nll(x, i(0, 3))"),
        ("F.nll_loss(x, i(0, -1))", "L.nll(x, i(0, -1))"),
        ("F.cross_entropy(x, i(0, -1), label_smoothing=0.1)", "L.cross_entropy(x, i(0, -1), label_smoothing=0.1)"),
        ("F.multi_margin_loss(x, i(0, 3))", "L.multi_margin(x, i(0, 3))"),
        ("F.multilabel_margin_loss(x[0], i(0, -2, 1))", "L.multi_label_margin(x[0], i(0, -2, 1))"),
        ("F.binary_cross_entropy(x - 0.3, x)", "L.bce(x - 0.3, x)"),
        ("F.binary_cross_entropy(x, x + 0.8)", "L.bce(x, x + 0.8)"),
        ("F.gaussian_nll_loss(x, x, x - 0.3)", "L.gaussian_nll(x, x, x - 0.3)"),
    ],
)
def test_values_that_torch_raises_at_make_nan(theirs, ours):
    with pytest.raises((RuntimeError, IndexError, ValueError)):
        eval(theirs, {"F": torch.nn.functional, "x": torch.tensor(X.tolist()), "i": lambda *v: torch.tensor(v)})
    assert np.isnan(jax.jit(lambda x: eval(ours, {"L": losses, "x": x, "i": lambda *v: jnp.array(v)}))(X))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("L.mse(x, x, reduction='average')", "unknown reduction 'average'"),
        ("L.mse(i(1), i(2))", "needs a floating input"),
        ("L.l1(x + 1j, x)", "complex"),
        ("L.smooth_l1(x, x, beta=-1)", "beta >= 0"),
        ("L.huber(x, x, delta=0)", "delta > 0"),
        ("L.gaussian_nll(x, x, x[0])", r"var of shape \(3,\)"),
        ("L.bce(x, x[0])", "one shape"),
        ("L.bce_with_logits(x, x[0])", "one shape"),
        ("L.multi_label_soft_margin(x[0, 0], 1)", "class axis"),
        ("L.nll(x, x[:, 0])", "labels must be integers"),
        ("L.nll(x, i(1, 2, 0))", r"takes labels of shape \(2,\)"),
        ("L.nll(x, i(1, 2), weight=x[0, :2])", r"weight must have shape \(3,\)"),
        ("L.cross_entropy(x, i(1, 2), label_smoothing=1.5)", "from 0 to 1"),
        ("L.cross_entropy(x[0, 0], i(1))", "class axis"),
        ("L.cross_entropy(x, x, ignore_index=1)", "these are probabilities"),
        ("L.cross_entropy(x[0], i(1, 2, 0))", "holds probabilities"),
        ("L.cross_entropy(x, x, weight=x)", "weight must have shape"),
        ("L.linear_cross_entropy(x, x[:, :2], i(1, 2))", "differ in features"),
        ("L.linear_cross_entropy(x[0], x[None], i(1))", "needs a batched input"),
        ("L.linear_cross_entropy(x, x, i(1, 0), linear_bias=x[0])", r"linear_bias must have shape \(2,\)"),
        ("L.linear_cross_entropy(x, x, x[:, :2], ignore_index=-100)", "these are probabilities"),
        ("L.adaptive_log_softmax(x, i(1, 2), {'head.weight': x})", "params must hold"),
        ("L.margin_ranking(x, x, x[0])", "as many axes"),
        ("L.multi_margin(x, i(1, 2), p=3)", "p 1 or 2"),
        ("L.multi_margin(x[None], i(1))", "takes an input"),
        ("L.multi_label_margin(x, i(1, 2))", r"must have the input's shape"),
        ("L.cosine_embedding(x, x, x)", "do not take a target"),
        ("L.triplet_margin(x, x, x, margin=0)", "margin > 0"),
        ("L.triplet_margin_with_distance(x, x, x[0])", "as many axes"),
        ("L.ctc(x, i(1), i(2), i(1), blank=3)", "blank must be one of 3"),
        ("L.ctc(x, i(1, 2, 1), (2,), (1,))", "3 targets do not fit lengths whose sum is 1"),
        ("L.ctc(x[:, None], i(1), (2, 2), (1, 1))", "takes 1 lengths each"),
    ],
)
def test_what_cannot_be_computed_is_named(call, message):
    with pytest.raises(InputError, match=message):
        eval(call, {"L": losses, "x": X, "i": lambda *v: jnp.array(v)})


@pytest.mark.parametrize("name", CASES)
def test_the_dtype_is_that_of_the_input(name):
    dtype = jnp.bfloat16
    arrays = {k: jnp.asarray(v, dtype if v.dtype.kind == "f" else None) for k, v in drawn(name, "ordinary", 0).items()}
    ours = getattr(losses, name.partition(",")[0])
    for call in CASES[name].calls:
        assert jax.eval_shape(lambda arrays, call=call: value_of(call, ours, arrays), arrays).dtype == dtype


def test_ctc_takes_traced_lengths_of_targets_one_after_another():
    arrays = drawn("ctc", "ordinary", 5)
    rows = jnp.asarray(arrays["y"][:, :2].reshape(-1))
    known = losses.ctc(jnp.asarray(arrays["x"]), rows, (7, 5, 6), (2, 3, 1), reduction="none")
    traced = jax.jit(lambda n: losses.ctc(jnp.asarray(arrays["x"]), rows, (7, 5, 6), n, reduction="none"))
    np.testing.assert_array_equal(known, traced(jnp.array([2, 3, 1])))


def test_the_table_names_every_loss_of_torch():
    rows = losses.LOSSES
    assert {row.torch for row in rows} == LOSS_CLASSES
    assert {row.torch for row in rows} == {*OPTIONS, *TRAINED}
    assert {row.torch: row.name for row in rows} == {**{k: v[0] for k, v in OPTIONS.items()}, **TRAINED}
    assert {row.name for row in rows} == {n for n in losses.__all__ if callable(getattr(losses, n)) and n.islower()} - {
        "resolve",
        "translate",
    }
    assert {name.partition(",")[0] for name in CASES} | {"adaptive_log_softmax"} == {row.name for row in rows}


def jitted(call):
    program = jax.jit(lambda arrays, bits: call(arrays), static_argnames="bits")

    def run(bits, arrays):
        with environment(bits):
            return {"loss": np.asarray(program(arrays, bits))}

    return run


@pytest.mark.parametrize("row", losses.LOSSES, ids=lambda row: row.name)
def test_the_tables_rows_are_measured(row):
    def reference(bits, arrays):
        return {"loss": row.torch_call(arrays).numpy()}

    arrays = row.example(np.random.default_rng(0))
    assert_agree(reference, jitted(row.ours_call), arrays, moved=())  # a label that noise moves is another label
    if row.form is not None:
        differs = bool(disagreements(reference, jitted(row.form_call), arrays, moved=()))
        assert differs == (row.name not in VALUES_AGREE)


@pytest.mark.parametrize("name", losses.PAIRS)
def test_a_pair_is_the_two_functions_of_its_name(name):
    reference, port = losses.resolve(name)
    assert losses.PAIRS[name].__doc__
    assert reference.func is getattr(torch.nn.functional, CASES[name].functional)
    assert port.func is getattr(losses, name)
    assert reference.keywords == port.keywords == ({"reduction": "batchmean"} if name == "kl_div" else {})


MODULES = {
    "SmoothL1Loss": {"beta": 0.5},
    "HuberLoss": {"delta": 0.5},
    "PoissonNLLLoss": {"log_input": False, "full": True, "eps": 0.1},
    "KLDivLoss": {"log_target": True, "reduction": "batchmean"},
    "BCEWithLogitsLoss": {"weight": [0.5, 2.0, 3.0], "pos_weight": [2.0, 3.0, 4.0], "reduction": "sum"},
    "MultiLabelSoftMarginLoss": {"weight": [0.5, 2.0, 3.0]},
    "CrossEntropyLoss": {"weight": [0.5, 2.0, 3.0], "label_smoothing": 0.1},
    "HingeEmbeddingLoss": {"margin": 0.4},
}


@pytest.mark.parametrize("name", MODULES)
def test_a_module_is_translated_with_its_options(name):
    options = {k: torch.tensor(v) if isinstance(v, list) else v for k, v in MODULES[name].items()}
    reference, port = losses.resolve(getattr(torch.nn, name)(**options))
    arrays = {"x": np.array([[0.1, 0.2, 0.7], [0.5, 0.4, 0.1]]), "y": np.array([[0.2, 0.5, 0.3], [0.1, 0.8, 0.1]])}

    def theirs(bits, arrays):
        return {"loss": reference(torch.tensor(arrays["x"]), torch.tensor(arrays["y"])).numpy()}

    assert_agree(theirs, jitted(lambda arrays: port(arrays["x"], arrays["y"])), arrays)


def test_verify_takes_a_torch_loss_module():
    loss, x, y = torch.nn.HuberLoss(delta=0.5), rows(0, 6, 5), rows(1, 6, 3)
    eq.verify(torch_mlp(), NnxMLP(), (x,), loss=loss, targets=(y,), examples=2, checks=["loss"]).assert_equivalent()


class Focal(torch.nn.CrossEntropyLoss):
    """A stranger's subclass, which may compute anything."""


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Focal(), r"Focal is no loss of torch.nn itself.*give loss=\(torch_loss, jax_loss\)"),
        (torch.nn.Linear(2, 3), "Linear is no loss"),
        (torch.nn.LinearCrossEntropyLoss(2, 3), "has weights that are trained.*linear_cross_entropy"),
        (torch.nn.TripletMarginWithDistanceLoss(distance_function=torch.nn.CosineSimilarity()), "distance_function"),
        (
            torch.nn.TripletMarginWithDistanceLoss(distance_function=torch.nn.PairwiseDistance(p=1.0)),
            "distance_function",
        ),
    ],
)
def test_a_module_that_is_not_known_exactly_is_refused(module, message):
    with pytest.raises(InputError, match=message):
        losses.resolve(module)


def test_a_default_distance_is_translated():
    given = torch.nn.TripletMarginWithDistanceLoss(distance_function=torch.nn.PairwiseDistance(), swap=True)
    assert losses.translate(given).keywords == {"margin": 1.0, "swap": True, "reduction": "mean"}


def test_what_names_no_pair_is_refused():
    pair = (abs, abs)
    assert losses.resolve(None) is None
    assert losses.resolve(pair) is pair
    for wrong in ("mae", 3, (abs,), (abs, 3)):
        with pytest.raises(InputError, match=r"loss"):
            losses.resolve(wrong)
    with pytest.raises(AttributeError, match="no attribute 'mae'"):
        losses.mae  # noqa: B018 - the attribute access is what is tested


GAPS: dict[str, str] = {}
"""Class and number of a sample of torch's own that differs -> why. One that does not differ fails too."""


def test_every_kind_of_torchs_own_samples_agrees():
    found = outcome()
    assert len(found) == 20
    assert {*OPTIONS, "LinearCrossEntropyLoss"} - set(found) == {"TripletMarginLoss", "TripletMarginWithDistanceLoss"}
    differing = {sample for samples in found.values() for sample in samples["differing"]}
    assert differing == set(GAPS), {name: samples for name, samples in found.items() if samples["differing"]}
    assert sum(samples["run"] for samples in found.values()) >= 400


def test_the_package_loads_no_framework():
    code = (
        "import sys; from equivalence import losses; dir(losses); losses.resolve(None); losses.LOSSES;"
        "print(sorted({'torch', 'jax', 'optax'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "[]"
