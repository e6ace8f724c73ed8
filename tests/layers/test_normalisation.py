"""Normalisation against torch's: options, statistics over several calls, sizes 0 and 1, what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import equivalence as eq
from equivalence.errors import InputError
from tests.layers.sides import assert_translates, normal, perturbed

BATCH = {
    nn.BatchNorm1d: ((4, 3), (1, 3, 5), (0, 3), (2, 3, 0)),
    nn.BatchNorm2d: ((4, 3, 5, 2), (1, 3, 1, 2)),
    nn.BatchNorm3d: ((2, 3, 1, 2, 4),),
    nn.SyncBatchNorm: ((4, 3), (2, 3, 4, 1, 2)),
}
INSTANCE = {
    nn.InstanceNorm1d: ((3, 5), (4, 3, 2), (1, 3, 7), (0, 3, 2), (2, 3, 0)),
    nn.InstanceNorm2d: ((3, 5, 1), (4, 3, 5, 2)),
    nn.InstanceNorm3d: ((3, 1, 2, 4), (2, 3, 1, 2, 4)),
}
frameworks = st.sampled_from(["nnx", "linen"])
modes = st.booleans()


def shaped(kinds: dict[type, tuple[tuple[int, ...], ...]]) -> st.SearchStrategy[tuple[type, tuple[int, ...]]]:
    return st.sampled_from(list(kinds)).flatmap(lambda kind: st.tuples(st.just(kind), st.sampled_from(kinds[kind])))


def judged(module: nn.Module, shape: tuple[int, ...], to: str, train: bool, seed: int = 0) -> None:
    calls = 3 if train and list(module.buffers()) else 1
    x = 2 * normal(*shape, seed=seed) + 1
    for name, counter in module.named_buffers():
        if name == "num_batches_tracked":
            counter.fill_(2)  # with none before, the mean of equal batches is the last of them
    assert_translates(perturbed(module, seed), x, frameworks=(to,), train=train, calls=calls)


@settings(max_examples=10)
@given(
    shaped(BATCH),
    st.fixed_dictionaries(
        {
            "eps": st.sampled_from([1e-5, 0.1]),
            "momentum": st.sampled_from([0.1, None, 0.0, 1.0]),
            "affine": st.booleans(),
            "track_running_stats": st.booleans(),
        }
    ),
    frameworks,
    modes,
)
def test_batch_norm(given: tuple[Any, tuple[int, ...]], options: dict[str, Any], to: str, train: bool) -> None:
    kind, shape = given
    judged(kind(3, **options), shape, to, train)


@settings(max_examples=10)
@given(
    shaped(INSTANCE),
    st.fixed_dictionaries(
        {
            "eps": st.sampled_from([1e-5, 0.1]),
            "momentum": st.sampled_from([0.1, None]),
            "affine": st.booleans(),
            "track_running_stats": st.booleans(),
        }
    ),
    frameworks,
    modes,
)
def test_instance_norm(given: tuple[Any, tuple[int, ...]], options: dict[str, Any], to: str, train: bool) -> None:
    kind, shape = given
    if 0 in shape:
        options = {**options, "affine": False}  # torch fails on an empty batch with a scale
    judged(kind(3, **options), shape, to, train)


@settings(max_examples=8)
@given(
    st.sampled_from([(2, 6, 5), (2, 6), (3, 6, 2, 1), (0, 6, 4)]),
    st.sampled_from([1, 2, 3, 6]),
    st.booleans(),
    st.booleans(),
    frameworks,
)
def test_group_norm(shape: tuple[int, ...], groups: int, affine: bool, bias: bool, to: str) -> None:
    judged(nn.GroupNorm(groups, 6, eps=1e-3, affine=affine, bias=bias), shape, to, False)


@settings(max_examples=8)
@given(
    st.sampled_from([(5,), (3, 5), (1,), (1, 3, 5)]),
    st.sampled_from([(4,), (2, 1), (0,)]),
    st.sampled_from([None, 1e-2]),
    st.sampled_from(["layer", "rms"]),
    st.booleans(),
    st.booleans(),
    frameworks,
)
def test_over_the_last_axes(
    shape: tuple[int, ...],
    rest: tuple[int, ...],
    eps: float | None,
    kind: str,
    affine: bool,
    bias: bool,
    to: str,
) -> None:
    module = (
        nn.RMSNorm(shape, eps, affine)
        if kind == "rms"
        else nn.LayerNorm(shape, eps or 1e-5, elementwise_affine=affine, bias=bias)
    )
    judged(module, (*rest, *shape), to, False)


@settings(max_examples=8)
@given(st.integers(1, 9), st.sampled_from([(2, 7, 5), (2, 1, 3), (2, 4, 3, 2), (0, 3, 4), (1, 5, 2, 1, 3)]), frameworks)
def test_by_neighbours(size: int, shape: tuple[int, ...], to: str) -> None:
    judged(nn.LocalResponseNorm(size, alpha=0.5, k=1.5), shape, to, False)


@pytest.mark.parametrize("size", [2, 3, 4, 5, 9])
def test_across_maps(size: int) -> None:
    """More channels than the window, so that the window's slips show; fewer for the largest."""
    judged(nn.CrossMapLRN2d(size, alpha=0.5, k=1.5), (2, 7, 3, 1), "nnx", False)


def test_a_feature_of_one_value_keeps_its_convention() -> None:
    """A constant channel has variance 0: what is left is the bias, and eps alone scales the gradient."""
    x = np.ones((4, 3, 5), np.float32)
    for module in (nn.BatchNorm1d(3), nn.InstanceNorm1d(3, affine=True), nn.GroupNorm(3, 3), nn.LayerNorm(5)):
        assert_translates(perturbed(module), x, frameworks=("nnx",), train=True, moved=("weight", "bias"))


def test_far_from_zero() -> None:
    """Statistics in two passes: mean(x^2) - mean(x)^2 would cancel here."""
    x = normal(4, 6, 5) + 1000
    for module in (nn.BatchNorm1d(6), nn.InstanceNorm1d(6), nn.GroupNorm(3, 6), nn.LayerNorm(5)):
        assert_translates(perturbed(module), x, frameworks=("nnx",), train=True)


def test_batch_statistics_that_are_no_longer_tracked() -> None:
    module = nn.BatchNorm1d(3)
    module.track_running_stats = False
    for train in (False, True):
        judged(module, (4, 3), "nnx", train)
    instance = nn.InstanceNorm1d(3, track_running_stats=True)
    instance.track_running_stats = False
    with pytest.raises(InputError, match="no longer tracks"):
        eq.translate(instance)


def test_a_lazy_layer_that_was_called() -> None:
    module = nn.LazyBatchNorm1d()
    module(torch.ones(4, 3))
    judged(module, (4, 3), "nnx", True)


def test_a_translation_moves_its_buffers() -> None:
    module = perturbed(nn.BatchNorm1d(3)).train()
    made = eq.translate(module)
    x = torch.from_numpy(normal(4, 3))
    module(x), made(x)
    module(2 * x), made(2 * x)
    assert int(made.module.num_batches_tracked[...]) == int(module.num_batches_tracked) == 2


def test_flax_s_own_layers_where_they_are_exact() -> None:
    def own(module: nn.Module, to: str) -> str:
        return eq.translate(module, to=to)._form.written(to)

    assert own(nn.LayerNorm(5), "nnx") == ("nnx.LayerNorm(5, epsilon=1e-05, use_bias=True, use_fast_variance=False)")
    assert own(nn.LayerNorm((3, 5)), "linen").startswith("nn.LayerNorm(")
    assert own(nn.LayerNorm((3, 5)), "nnx").startswith("normalised(")
    assert own(nn.GroupNorm(3, 6), "nnx").startswith("nnx.GroupNorm(6, 3,")
    assert own(nn.RMSNorm(5, 1e-3), "linen").startswith("nn.RMSNorm(")
    assert own(nn.RMSNorm(5), "nnx").startswith("normalised(")


REFUSED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "one value a channel": (lambda: nn.BatchNorm1d(3), (1, 3)),
    "one value a channel, nothing tracked": (lambda: nn.BatchNorm2d(3, track_running_stats=False).eval(), (1, 3, 1, 1)),
    "other channels": (lambda: nn.BatchNorm1d(3), (2, 4)),
    "one channel for many": (lambda: nn.BatchNorm1d(1), (2, 4)),
    "an image for a sequence": (lambda: nn.BatchNorm1d(3), (2, 3, 4, 5)),
    "a sequence for an image": (lambda: nn.BatchNorm2d(3), (2, 3, 4)),
    "one value a sample": (lambda: nn.InstanceNorm1d(3), (2, 3, 1)),
    "one value a sample in eval mode": (lambda: nn.InstanceNorm2d(3).eval(), (3, 1, 1)),
    "other channels of a sample": (lambda: nn.InstanceNorm1d(3, affine=True), (2, 4, 5)),
    "an instance of too many axes": (lambda: nn.InstanceNorm1d(3), (2, 3, 4, 5)),
    "one value a group": (lambda: nn.GroupNorm(6, 6), (1, 6)),
    "groups that do not divide": (lambda: nn.GroupNorm(3, 6, affine=False), (2, 4, 5)),
    "groups of a vector": (lambda: nn.GroupNorm(3, 6, affine=False), (6,)),
    "another last axis": (lambda: nn.LayerNorm(5, elementwise_affine=False), (2, 1)),
    "another last axis with a scale": (lambda: nn.LayerNorm(5), (2, 1)),
    "another last axis of a mean square": (lambda: nn.RMSNorm(5), (2, 1)),
    "neighbours of two axes": (lambda: nn.LocalResponseNorm(2), (2, 3)),
    "no neighbours": (lambda: nn.LocalResponseNorm(0), (2, 3, 4)),
    "maps without a batch": (lambda: nn.CrossMapLRN2d(3), (2, 3, 4)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_on_both_sides(name: str) -> None:
    make, shape = REFUSED[name]
    with pytest.raises((RuntimeError, ValueError)):
        make()(torch.ones(shape))
    with pytest.raises((InputError, ValueError, TypeError)):
        eq.translate(make())(torch.ones(shape))


def test_a_window_of_one_has_no_derivative_across_maps() -> None:
    x = torch.ones(2, 4, 3, 1, requires_grad=True)
    value = nn.CrossMapLRN2d(1)(x).sum()
    with pytest.raises(RuntimeError):
        value.backward()
    made = eq.translate(nn.CrossMapLRN2d(1)).module
    with pytest.raises(ValueError, match="no derivative"):
        jax.grad(lambda x: made(x).sum())(np.ones((2, 3, 1, 4), np.float32))
