"""What names leave open is decided by one run of both sides, or is asked: where none agrees, and where several do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("torch")
pytest.importorskip("flax")

import jax
import jax.numpy as jnp
import torch

import equivalence as eq
from equivalence.errors import MappingError
from equivalence.frameworks import adapt
from equivalence.observation import Batch
from equivalence.probing import settle, symmetric
from equivalence.weights import Leaves, Mapping, Rule
from equivalence.weights.infer import propose

WIDTH = 6
X = np.random.default_rng(0).standard_normal((4, WIDTH)).astype(np.float32)
Apply = Callable[[Any, Any], Any]


class Chain(torch.nn.Module):
    """Square layers one after another."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        for name in names:
            self.add_module(name, torch.nn.Linear(WIDTH, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.children():
            x = torch.tanh(layer(x))
        return x


def chain(order: list[str], turned: bool, scale: float = 1.0) -> Apply:
    """The port: layers in an order, their matrices used as (in, out) or as torch's (out, in)."""

    def apply(params: Any, x: Any) -> Any:
        for name in order:
            w = params[name]["w"]
            x = jnp.tanh(scale * (x @ (w.T if turned else w)) + params[name]["b"])
        return x

    return apply


def params(*names: str) -> dict[str, Any]:
    return {n: {"w": np.zeros((WIDTH, WIDTH), np.float32), "b": np.zeros(WIDTH, np.float32)} for n in names}


def settled(reference: torch.nn.Module, apply: Apply, leaves: Any, x: np.ndarray = X) -> Mapping:
    ours, theirs = adapt(reference), adapt(eq.function(apply, leaves))
    proposal = propose(ours.leaves, theirs.leaves, ours.layers, ours.buffers)
    return settle(proposal, ours, theirs, Batch((x,)), lambda outputs: outputs, seed=3)


@pytest.mark.parametrize("turned", [False, True])
def test_a_square_matrix_is_turned_as_the_port_uses_it(turned: bool) -> None:
    mapping = settled(Chain("a", "b"), chain(["a", "b"], turned), params("a", "b"))
    axes = {rule.axes for rule in mapping.rules if rule.source and "weight" in rule.source}
    assert axes == {None if turned else "o k -> k o"}


@pytest.mark.parametrize("order", [["x", "y", "z"], ["z", "x", "y"], ["y", "x", "z"]])
def test_siblings_without_names_are_told_apart_three_of_them_at_once(order: list[str]) -> None:
    mapping = settled(Chain("alpha", "mu", "omega"), chain(order, False), params("x", "y", "z"))
    ends = {rule.source: rule.target for rule in mapping.rules}
    assert [ends[f"{name}.weight"] for name in ("alpha", "mu", "omega")] == [f"{name}.w" for name in order]


def test_the_one_leaf_left_is_taken_only_where_a_run_proves_it() -> None:
    assert len(settled(Chain("alpha"), chain(["x"], False), params("x")).rules) == 2
    with pytest.raises(MappingError, match=r"alpha.weight.* \(none agrees with the reference\)"):
        settled(Chain("alpha"), chain(["x"], False, scale=1 + 1e-6), params("x"))


def test_a_port_that_is_wrong_otherwise_is_asked_and_both_choices_are_printed() -> None:
    """A factor of 1 + 1e-6: no alternative agrees, so none is taken."""
    with pytest.raises(MappingError) as caught:
        settled(Chain("a", "b"), chain(["a", "b"], False, scale=1 + 1e-6), params("a", "b"))
    for rule in (Rule("a.weight", "a.w"), Rule("a.weight", "a.w", "o k -> k o")):
        assert repr(rule) in str(caught.value)
    assert "none agrees" in str(caught.value)


def test_one_layer_kept_another_way_than_its_siblings_is_no_convention() -> None:
    def mixed(p: Any, x: Any) -> Any:
        x = jnp.tanh(x @ p["a"]["w"] + p["a"]["b"])
        return jnp.tanh(x @ p["b"]["w"].T + p["b"]["b"])

    with pytest.raises(MappingError, match="none agrees"):
        settled(Chain("a", "b"), mixed, params("a", "b"))


def test_a_port_that_cannot_run_is_asked_for_rules_and_told_why() -> None:
    def broken(p: Any, x: Any) -> Any:
        raise TypeError("no such thing")

    with pytest.raises(MappingError, match=r"could be any of.*nor could a run decide.*TypeError: no such thing"):
        settled(Chain("a", "b"), broken, params("a", "b"))


def test_a_port_without_gradients_or_with_other_outputs_is_told_so() -> None:
    def looped(p: Any, x: Any) -> Any:
        return jax.lax.while_loop(lambda c: c[0] < 1, lambda c: (c[0] + 1, chain(["a", "b"], False)(p, c[1])), (0, x))[
            1
        ]

    with pytest.raises(MappingError, match=r"nor could a run decide: ValueError: Reverse-mode differentiation"):
        settled(Chain("a", "b"), looped, params("a", "b"))
    with pytest.raises(MappingError, match=r"nor could a run decide: the sides return arrays of other shapes"):
        settled(Chain("a", "b"), lambda p, x: chain(["a", "b"], False)(p, x).T, params("a", "b"))


def test_layers_that_cannot_be_told_apart_are_asked() -> None:
    """A sum does not say which of its terms is which."""

    class Sum(Chain):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.alpha(x) + self.omega(x)  # type: ignore[operator, no-any-return]

    def port(p: Any, x: Any) -> Any:
        return x @ p["x"]["kernel"] + p["x"]["b"] + x @ p["y"]["kernel"] + p["y"]["b"]

    leaves = {n: {"kernel": v["w"], "b": v["b"]} for n, v in params("x", "y").items()}
    with pytest.raises(MappingError, match="several agree"):
        settled(Sum("alpha", "omega"), port, leaves)


class Spare(Chain):
    """A layer that nothing reads."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.a(x))  # type: ignore[operator, no-any-return]


def test_a_parameter_that_nothing_reads_may_have_no_counterpart() -> None:
    leaves = {"a": {"kernel": params("a")["a"]["w"], "bias": params("a")["a"]["b"]}}
    mapping = settled(Spare("a", "never"), lambda p, x: jnp.tanh(x @ p["a"]["kernel"] + p["a"]["bias"]), leaves)
    assert {Rule("never.weight", None), Rule("never.bias", None)} <= set(mapping.rules)


def test_a_parameter_that_the_reference_reads_may_not() -> None:
    leaves = {"a": {"kernel": params("a")["a"]["w"], "bias": params("a")["a"]["b"]}}
    with pytest.raises(MappingError, match=r"b\.weight, b\.bias"):
        settled(Chain("a", "b"), lambda p, x: jnp.tanh(x @ p["a"]["kernel"] + p["a"]["bias"]), leaves)


def test_the_models_stay_as_they_were() -> None:
    model, leaves = Chain("alpha", "omega"), params("x", "y")
    before = {path: value.clone() for path, value in model.state_dict().items()}
    settled(model, chain(["y", "x"], False), leaves)
    assert all(torch.equal(before[path], value) for path, value in model.state_dict().items())
    assert not any(leaf.any() for layer in leaves.values() for leaf in layer.values())
    assert model.training


@settings(max_examples=20)
@given(st.integers(2, 5), st.integers(0, 10**6))
def test_symmetric_values_move_alike_by_every_alternative(size: int, seed: int) -> None:
    source = Leaves({"a.weight": (size, size), "b.weight": (size, size), "c.weight": (2, 3 * size)})
    target = Leaves({"x.w": (size, size), "y.w": (size, size), "c.w": (3 * size, 2)})
    alternatives = [
        Mapping(rules).bind_part(source, target)
        for rules in (
            [Rule("a.weight", "x.w"), Rule("b.weight", "y.w"), Rule("c.weight", "c.w", "o k -> k o")],
            [Rule("a.weight", "y.w", "o k -> k o"), Rule("b.weight", "x.w"), Rule("c.weight", "c.w", "o k -> k o")],
            [Rule("a.weight", "x.w"), Rule("b.weight", "y.w"), Rule("c.weight", "c.w", "o (c p) -> (p c) o", c=3)],
        )
    ]
    rng = np.random.default_rng(seed)
    weights = {path: rng.standard_normal(shape).astype(np.float32) for path, shape in source.shapes.items()}
    made = symmetric(alternatives, weights)
    landed = [bound.forward(made) for bound in alternatives]
    for path in target.shapes:
        assert all(np.array_equal(landed[0][path], other[path]) for other in landed[1:])
    # as free as the alternatives leave it: one value for two elements only where they change places
    assert len(np.unique(made["c.weight"])) > 2
