"""Faults in pairs that a user would hand to `equivalence.verify`: weights kept, norms, buffers, ties, activations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from jax import Array
from torch import Tensor, nn

import equivalence as eq
import impls.titanic_mlp.linen as linen_titanic
import impls.titanic_mlp.nnx as nnx_titanic
import impls.titanic_mlp.pytorch as torch_titanic
from equivalence import losses
from equivalence.weights import Mapping, Rule
from impls.titanic_mlp.config import Config
from impls.titanic_mlp.spec import RULES
from tests import pairs
from tests.faults.planting import assert_caught, first_divergent, judged_pair
from tests.pairs import Pair, normal

CAUGHT = {"roundtrip", "state", "structure", "outputs"}
"""The checks that the faults below are caught by."""


# --- what stands in the port's weights -------------------------------------------------------------------------------


def converted(port: str, change: Callable[[str, np.ndarray], np.ndarray]) -> Pair:
    """The Titanic network and a port that holds its weights already, each leaf through `change(path, array)`."""
    reference = torch_titanic.build(Config(), 0)
    leaves: dict[str, dict[str, np.ndarray]] = {}
    for path, value in reference.named_parameters():
        layer, _, leaf = path.partition(".")
        name, array = ("kernel", value.detach().numpy().T) if leaf == "weight" else ("bias", value.detach().numpy())
        leaves.setdefault(layer, {})[name] = change(f"{layer}.{name}", array.copy())
    model: Any
    if port == "nnx":
        model = nnx_titanic.build(Config(), 1)
        for layer, arrays in leaves.items():
            for name, array in arrays.items():
                getattr(getattr(model, layer), name)[...] = jnp.asarray(array)
    else:
        made = linen_titanic.build(Config(), 1)
        model = eq.linen(made.module, {"params": {k: dict(v) for k, v in leaves.items()}})
    survived = np.random.default_rng(2).integers(0, 2, 17).astype(np.float32)
    loss = (torch_titanic.loss_fn, nnx_titanic.loss_fn)
    return Pair(reference, model, (normal(17, 8),), (survived,), loss, Mapping(RULES))


def one_ulp(leaf: str, place: tuple[int, ...]) -> Callable[[str, np.ndarray], np.ndarray]:
    def change(path: str, array: np.ndarray) -> np.ndarray:
        if path == leaf:
            array[place] = np.nextafter(array[place], np.float32(np.inf))
        return array

    return change


def unchanged(path: str, array: np.ndarray) -> np.ndarray:
    return array


def zero_turned(path: str, array: np.ndarray) -> np.ndarray:
    return -array if path == "linear3.kernel" else array


def in_bfloat16(path: str, array: np.ndarray) -> np.ndarray:
    return np.asarray(jnp.asarray(array).astype(jnp.bfloat16).astype(jnp.float32))


@pytest.mark.parametrize(
    ("port", "change"),
    [
        pytest.param("nnx", one_ulp("linear2.kernel", (3, 5)), id="nnx-one_kernel_element_off_by_an_ulp"),
        pytest.param("linen", one_ulp("linear1.bias", (31,)), id="linen-one_bias_off_by_an_ulp"),
        pytest.param("nnx", zero_turned, id="nnx-last_kernel_negated"),
        pytest.param("linen", in_bfloat16, id="linen-converted_through_bfloat16"),
    ],
)
def test_kept_weights_are_compared_bit_for_bit(
    port: str, change: Callable[[str, np.ndarray], np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_caught(judged_pair(converted(port, change), "roundtrip", monkeypatch, port_weights="keep"), "roundtrip")


def test_an_ulp_shows_in_the_outputs_too(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = converted("nnx", one_ulp("linear2.kernel", (3, 5)))
    report = judged_pair(pair, "outputs", monkeypatch, port_weights="keep", checks=["outputs"])
    assert first_divergent(report) == "outputs"
    assert "below float32 rounding" in (report.check("outputs").message or "")


@pytest.mark.parametrize("port", ["nnx", "linen"])
def test_kept_weights_that_are_right_are_equivalent(port: str, monkeypatch: pytest.MonkeyPatch) -> None:
    report = judged_pair(converted(port, unchanged), "step", monkeypatch, port_weights="keep")
    assert report.verdict == "equivalent"


# --- layers that the Titanic network does not have -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "options", "check"),
    [
        pytest.param(pairs.mlp, {"approximate": True}, "outputs", id="tanh_gelu"),
        pytest.param(pairs.attention, {"approximate": True}, "outputs", id="tanh_gelu_in_attention"),
        pytest.param(pairs.attention, {"eps": 1e-6}, "outputs", id="layer_norm_eps_1e-6"),
        pytest.param(pairs.attention, {"heads": 5}, "outputs", id="five_heads_for_three"),
        pytest.param(pairs.batchnorm, {"eps": 1e-3}, "outputs", id="batch_norm_eps_1e-3"),
        pytest.param(pairs.batchnorm, {"momentum": 0.99}, "state", id="batch_norm_momentum_0.99"),
        pytest.param(pairs.batchnorm, {"momentum": 0.1}, "state", id="batch_norm_momentum_the_other_way"),
        pytest.param(pairs.batchnorm, {"unbiased": False}, "state", id="batch_norm_biased_running_variance"),
        pytest.param(pairs.batchnorm, {"updates": False}, "state", id="batch_norm_never_updated"),
        pytest.param(pairs.deep, {"error": 1e-9}, "outputs", id="deep_bias_off_by_1e-9"),
        pytest.param(pairs.router, {"chosen": 3}, "outputs", id="three_experts_for_two"),
        pytest.param(pairs.router, {"error": 1e-9}, "outputs", id="routed_output_off_by_1e-9"),
    ],
)
def test_other_layers(
    make: Callable[..., Pair], options: dict[str, Any], check: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_caught(judged_pair(make(**options), check, monkeypatch), check)


@pytest.mark.parametrize("name", list(pairs.PAIRS))
def test_the_same_pairs_without_a_fault(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    report = judged_pair(pairs.PAIRS[name](), "optimizer_state", monkeypatch)
    assert {check.name: check.verdict for check in report.checks if check.verdict != "equivalent"} == {}


# --- tied leaves -----------------------------------------------------------------------------------------------------


class TorchTied(nn.Module):
    """The last layer reads the kernel of the first."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(7, 7)
        self.last = nn.Linear(7, 7)
        self.last.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x)))


class Tied(nnx.Module):
    def __init__(self, tied: bool) -> None:
        self.first = nnx.Linear(7, 7, rngs=nnx.Rngs(0))
        self.last = nnx.Linear(7, 7, rngs=nnx.Rngs(1))
        if tied:
            self.last.kernel = self.first.kernel

    def __call__(self, x: Array) -> Array:
        return self.last(jnp.tanh(self.first(x)))


def tied(port_is: bool) -> Pair:
    rules = (Rule("{layer}.weight", "{layer}.kernel", "o i -> i o"), Rule("{layer}.bias", "{layer}.bias"))
    reference = pairs.seeded(TorchTied)
    targets = (normal(5, 7, seed=2),)
    return Pair(reference, Tied(port_is), (normal(5, 7),), targets, losses.resolve("mse"), Mapping(rules))


def test_a_tied_leaf_untied(monkeypatch: pytest.MonkeyPatch) -> None:
    assert_caught(judged_pair(tied(False), "structure", monkeypatch), "structure")


def test_tied_leaves_on_both_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    report = judged_pair(tied(True), "optimizer_state", monkeypatch)
    assert {check.name: check.verdict for check in report.checks if check.verdict != "equivalent"} == {}
