"""Gates that passed wrong models elsewhere: each trap beside a wrong model that it passes, and that ours does not.

A naive gate here is a few lines as they are found in public conversion scripts; `passes` says what it would print.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from jax import Array
from torch import Tensor, nn

import equivalence as eq
import impls.titanic_mlp.nnx as nnx_titanic
from equivalence import losses
from equivalence.api import verify_spec
from equivalence.comparison import Comparison
from equivalence.coverage import planted as moved_leaf
from equivalence.errors import DivergenceError
from equivalence.judgement import Judge
from equivalence.observation import Observation
from equivalence.pipeline import Structure
from equivalence.runs import Example
from equivalence.runtimes.jax_steps import JaxStepper
from equivalence.sources import SpecSource
from equivalence.verdict import EXIT_STATUS
from equivalence.weights import Mapping, Rule
from tests import pairs
from tests.faults.faults import after
from tests.faults.planting import Fault, first_divergent, judged, judged_pair, planted, right, up_to
from tests.pairs import LINEAR, Pair, linear, normal, seeded


def structure(fault: Fault) -> Structure:
    """Both sides of the Titanic network, ready to run, with one example."""
    return next(SpecSource(planted(fault), (fault.port,), examples=1).structures(fault.port))


def run(pair: Pair, inputs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What a script compares: both sides' float32 outputs on one input, weights copied by the mapping."""
    bound = pair.weights.bind(*(eq.frameworks.adapt(side).leaves for side in (pair.reference, pair.port)))
    weights = {path: value.detach().numpy() for path, value in pair.reference.named_parameters()}
    params = eq.frameworks.adapt(pair.port).native(bound.forward(weights))
    with torch.no_grad():
        ours = pair.reference(torch.from_numpy(inputs)).numpy()
    return ours, np.asarray(pair.port.apply(params, jnp.asarray(inputs)))


def function_pair(
    reference: nn.Module, apply: Callable[..., Any], inputs: np.ndarray, outputs: tuple[int, ...], rules: Any = LINEAR
) -> Pair:
    """A pair of a small module and a function on its weights."""
    port = eq.function(apply, pairs.placeholders(reference))
    return Pair(reference, port, (inputs,), (normal(*outputs, seed=2),), losses.resolve("mse"), Mapping(rules))


# --- a tolerance on parameters after one Adam step that is wider than the learning rate ------------------------------


def one_step(made: Structure) -> tuple[Observation, Observation]:
    """Parameters of both sides after one float32 step from the same weights on the same batch."""
    example, comparison = made.examples[0], made.comparison
    rates = comparison.optimizer.rates(1)
    ours = comparison.stepping_reference.stepper(32, example.weights, comparison.optimizer, rates)
    theirs = JaxStepper(comparison.program(32), example.weights)
    theirs.step(example.batches[0], ours.step(example.batches[0], example.seed))
    return ours.parameters(), theirs.parameters()


@pytest.mark.parametrize("factor", [-1.0, 0.0], ids=["negated", "zero"])
def test_a_tolerance_wider_than_an_adam_step(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    fault = Fault("gradient times a factor", "nnx", "step", changes=after(optax.scale(factor)))
    ours, theirs = one_step(structure(fault))
    assert all(np.allclose(theirs[path], ours[path], rtol=0, atol=0.025) for path in ours), "the naive gate passes"
    assert first_divergent(judged(fault, monkeypatch)) == "step"


# --- the mean of signed differences, a mean over a whole tensor ------------------------------------------------------


def rolled(params: Any, x: Array) -> Array:
    return jnp.roll(pairs.mlp_apply(params, x), 1, axis=-1)


def test_a_mean_over_the_whole_output(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = pairs.mlp()._replace(port=eq.function(rolled, pairs.placeholders(pairs.mlp().reference)))
    ours, theirs = run(pair, pair.inputs[0])
    assert abs(ours.mean() - theirs.mean()) < 1e-6, "the naive gate passes"
    assert abs((ours - theirs).mean()) < 1e-6, "so does the mean of signed differences"
    assert first_divergent(judged_pair(pair, "outputs", monkeypatch)) == "outputs"


class Square(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(9, 9)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(x))


def test_a_mean_over_a_transposed_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    reference = seeded(Square)
    rules = (Rule("linear.weight", "linear.kernel", "o i -> o i"), Rule("linear.bias", "linear.bias"))
    pair = function_pair(reference, lambda p, x: jnp.tanh(linear(p["linear"], x)), normal(7, 9), (7, 9), rules)
    bound = pair.weights.bind(eq.frameworks.adapt(reference).leaves, eq.frameworks.adapt(pair.port).leaves)
    weights = {path: value.detach().numpy() for path, value in reference.named_parameters()}
    ours, theirs = weights["linear.weight"].T, bound.forward(weights)["linear.kernel"]
    assert abs(ours.mean() - theirs.mean()) < 1e-7, "the naive gate passes"
    assert ours.shape == theirs.shape, "and so does a comparison of shapes"
    assert first_divergent(judged_pair(pair, "outputs", monkeypatch)) == "outputs"


# --- a comparison that is never called, a boolean that nobody asserts ------------------------------------------------


def test_a_boolean_that_nobody_asserts(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = pairs.mlp(approximate=True)
    ours, theirs = run(pair, pair.inputs[0])
    np.allclose(ours, theirs, rtol=0, atol=1e-9)  # False, and the naive script goes on to say "converted"
    report = judged_pair(pair, "outputs", monkeypatch)
    assert report.verdict == "divergent"
    with pytest.raises(DivergenceError):
        eq.verify(*pair[:4], weights=pair.weights, examples=1, checks=["outputs"]).assert_equivalent()


def test_a_check_that_compared_nothing_does_not_pass() -> None:
    pair = pairs.mlp()
    report = eq.verify(*pair[:4], weights=pair.weights, examples=1, checks=["training"])
    assert report.verdict == "inconclusive"
    assert report.check("training").examples == 0


def test_every_check_asked_for_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    report = judged(Fault("nothing", "nnx", "optimizer_state"), monkeypatch)
    assert tuple(check.name for check in report.checks) == up_to("optimizer_state")
    assert all(check.examples or check.name == "state" for check in report.checks)


# --- one sublayer tested twice, its sibling never --------------------------------------------------------------------


def seen(comparison: Comparison, example: Example) -> set[str]:
    """The checks by which an example differs."""
    judge = Judge()
    for train in (False, True):
        judge.add(comparison.observed(example, train, ["outputs", "input_gradients"])[0])
    decisions = judge.decide(lambda where, paths, size: comparison.noise(example, where, paths, size))
    return {decision.finding.check for decision in decisions if decision.differs}


def test_one_sublayer_twice_and_its_sibling_never() -> None:
    """A part in a million in any one leaf of the port shows, whichever leaf it is."""
    made = structure(Fault("nothing", "linen", "outputs", right))
    example = made.examples[0]
    assert seen(made.comparison, example) == set()
    leaves = list(made.reference.params)
    assert len(leaves) == 5
    for leaf in leaves:
        weights = moved_leaf(example, leaf)
        for twice in ("linear1.weight", "linear1.weight"):
            if twice != leaf:
                assert np.array_equal(weights[twice], example.weights[twice]), "the naive gate passes"
        assert "outputs" in seen(made.comparison, dataclasses.replace(example, kept=weights)), leaf


# --- an AssertionError caught and printed ----------------------------------------------------------------------------


def test_an_assertion_error_caught_and_printed(capsys: pytest.CaptureFixture[str]) -> None:
    pair = pairs.mlp(approximate=True)
    ours, theirs = run(pair, pair.inputs[0])
    try:
        np.testing.assert_allclose(theirs, ours, rtol=0, atol=1e-9)
    except AssertionError as error:
        print(error)
    print("passed")
    assert capsys.readouterr().out.endswith("passed\n"), "the naive gate passes"
    report = eq.verify(*pair[:4], weights=pair.weights, examples=1, checks=["outputs"])
    try:
        report.assert_equivalent()
    except AssertionError:
        print("passed")
    assert report.verdict == "divergent", "the verdict is a fact of the report, not of who listens"
    assert report.exit_status == EXIT_STATUS["divergent"] == 1


# --- a reference silently loaded in bfloat16 -------------------------------------------------------------------------


def test_a_reference_silently_loaded_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = pairs.mlp()
    params = pairs.placeholders(whole.reference)
    rounded = seeded(lambda: pairs.TorchMLP(7, 13, 3)).bfloat16().float()
    with torch.no_grad():
        ours = rounded(torch.from_numpy(whole.inputs[0])).numpy()
    theirs = np.asarray(pairs.mlp_apply(params, jnp.asarray(whole.inputs[0])))
    assert np.allclose(theirs, ours, rtol=0, atol=1e-2), "the naive gate passes"
    pair = whole._replace(reference=rounded, port=eq.function(pairs.mlp_apply, params))
    report = judged_pair(pair, "roundtrip", monkeypatch, port_weights="keep")
    assert first_divergent(report) == "roundtrip"
    still_low = whole._replace(reference=rounded.bfloat16(), port=eq.function(pairs.mlp_apply, params))
    report = judged_pair(still_low, "roundtrip", monkeypatch, port_weights="keep")
    assert first_divergent(report) == "roundtrip"


# --- NaN replaced by zero on both sides ------------------------------------------------------------------------------


class Unit(nn.Module):
    """Rows on the unit sphere: 0 / 0 where a row is zero."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.linear(x)
        return h / (h * h).sum(-1, keepdim=True).sqrt()


def unit(params: Any, x: Array) -> Array:
    h = x @ params["linear"]["kernel"]
    return h / jnp.sqrt((h * h).sum(-1, keepdims=True))


def unit_or_zero(params: Any, x: Array) -> Array:
    h = x @ params["linear"]["kernel"]
    return jnp.where((h == 0).all(-1, keepdims=True), 0.0, unit(params, x))


def with_a_zero_row(apply: Callable[..., Any]) -> Pair:
    inputs = normal(7, 5)
    inputs[3] = 0.0
    rules = (Rule("linear.weight", "linear.kernel", "o i -> i o"),)
    return function_pair(seeded(Unit), apply, inputs, (7, 3), rules)


def test_nan_replaced_by_zero_on_both_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong, same = with_a_zero_row(unit_or_zero), with_a_zero_row(unit)
    ours, theirs = run(wrong, wrong.inputs[0])
    assert np.isnan(ours[3]).all()
    assert np.allclose(np.nan_to_num(theirs), np.nan_to_num(ours), atol=1e-6), "the naive gate passes"
    report = judged_pair(wrong, "outputs", monkeypatch)
    assert first_divergent(report) == "outputs"
    assert "one side only" in (report.check("outputs").message or "")
    report = judged_pair(same, "outputs", monkeypatch)
    assert report.check("outputs").verdict == "inconclusive", "NaN on both sides proves nothing either"


# --- inputs of ones, weights at their initial zeros and ones ---------------------------------------------------------


class Fresh(nn.Module):
    """Biases 0 and scales 1, as many initialisers leave them."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(7)
        self.linear = nn.Linear(7, 3)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.norm(x)[..., :3]


def bias_dropped(params: Any, x: Array) -> Array:
    return x @ params["linear"]["kernel"] + pairs.layer_norm(params["norm"], x, 1e-5)[..., :3]


def inputs_permuted(params: Any, x: Array) -> Array:
    return linear(params["linear"], x[..., ::-1]) + pairs.layer_norm(params["norm"], x, 1e-5)[..., :3]


def scale_dropped(params: Any, x: Array) -> Array:
    norm = {"weight": jnp.ones(7, x.dtype), "bias": params["norm"]["bias"]}
    return linear(params["linear"], x) + pairs.layer_norm(norm, x, 1e-5)[..., :3]


@pytest.mark.parametrize("apply", [bias_dropped, inputs_permuted, scale_dropped])
def test_ones_in_and_initial_weights(apply: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    rules = (
        Rule("linear.weight", "linear.kernel", "o i -> i o"),
        Rule("linear.bias", "linear.bias"),
        Rule("norm.{leaf}", "norm.{leaf}"),
    )
    pair = function_pair(seeded(Fresh), apply, np.ones((5, 7), np.float32), (5, 3), rules)
    ours, theirs = run(pair, pair.inputs[0])
    assert np.allclose(theirs, ours, rtol=0, atol=1e-6), "the naive gate passes"
    checks = up_to("parameter_gradients")
    report = judged_pair(pair, "parameter_gradients", monkeypatch, checks=checks)
    assert report.verdict == "divergent"


# --- prompts of three tokens -----------------------------------------------------------------------------------------


class Rotary(nn.Module):
    """Pairs of channels turned by position times a frequency."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.linear(x)
        angles = torch.arange(x.shape[1], dtype=x.dtype)[:, None] * 1e4 ** -(torch.arange(4, dtype=x.dtype) / 4)
        one, two = h[..., :4], h[..., 4:]
        return torch.cat((one * angles.cos() - two * angles.sin(), two * angles.cos() + one * angles.sin()), -1)


def rotary(base: float) -> Callable[..., Array]:
    def apply(params: Any, x: Array) -> Array:
        h = linear(params["linear"], x)
        angles = jnp.arange(x.shape[1], dtype=x.dtype)[:, None] * base ** -(jnp.arange(4, dtype=x.dtype) / 4)
        one, two = h[..., :4], h[..., 4:]
        return jnp.concatenate(
            (one * jnp.cos(angles) - two * jnp.sin(angles), two * jnp.cos(angles) + one * jnp.sin(angles)), -1
        )

    return apply


def test_prompts_of_three_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """A base off by 1 % needs hundreds of tokens to leave a tolerance of 1e-3; it shows in three without one."""

    def prompt(tokens: int, base: float) -> Pair:
        return function_pair(seeded(Rotary), rotary(base), normal(2, tokens, 6), (2, tokens, 8))

    short, long = prompt(3, 1.01e4), prompt(300, 1.01e4)
    assert np.allclose(*run(short, short.inputs[0]), rtol=0, atol=1e-3), "the naive gate passes"
    assert not np.allclose(*run(long, long.inputs[0]), rtol=0, atol=1e-2), "and the model is wrong"
    assert first_divergent(judged_pair(short, "outputs", monkeypatch)) == "outputs"
    assert first_divergent(judged_pair(prompt(3, 1e4), "outputs", monkeypatch)) is None


# --- loosening the tolerance until the case passes -------------------------------------------------------------------


def test_loosening_the_tolerance_until_it_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = pairs.attention(eps=1e-6)
    ours, theirs = run(pair, pair.inputs[0])
    passed = next(atol for atol in (1e-8, 1e-6, 1e-5, 1e-4) if np.allclose(theirs, ours, rtol=0, atol=atol))
    assert passed > 1e-8, "the naive gate passes, once loosened"
    for options in (inspect.signature(eq.verify).parameters, inspect.signature(verify_spec).parameters):
        assert not {name for name in options if name in ("atol", "rtol", "tolerance", "tol", "delta", "eps")}
    report = judged_pair(pair, "outputs", monkeypatch, resolution=1.0)
    assert first_divergent(report) == "outputs", "a coarse resolution is no tolerance"


def test_a_resolution_too_coarse_is_not_equivalent(monkeypatch: pytest.MonkeyPatch) -> None:
    report = judged_pair(pairs.mlp(), "outputs", monkeypatch, resolution=1e-18)
    assert report.check("outputs").verdict == "inconclusive"


def test_the_titanic_step_is_what_the_gates_ran() -> None:
    """The naive gates above ran on the implementation that is judged, not on a copy of it."""
    made = structure(Fault("nothing", "nnx", "step"))
    assert made.comparison.stepping_port.own_step is nnx_titanic.train_step
    assert isinstance(jax.tree_util.tree_leaves(made.port.params)[0], np.ndarray)
