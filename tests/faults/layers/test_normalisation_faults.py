"""Mistakes made in porting normalisation, each of which must be seen."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from torch import nn

import equivalence as eq
from equivalence.layers import normalisation, registry
from equivalence.layers.form import Own
from equivalence.layers.normalised import cross_map_lrn, local_response_norm, normalised, statistics
from tests.layers.sides import disagree, normal, perturbed

X = normal(4, 6, 5) + 1
Call = Callable[..., Any]


def instead(patch: pytest.MonkeyPatch, name: str, call: Call | None = None, **own: Own) -> None:
    """Translate a class by another call, or to another layer of Flax's own."""
    entry = registry.entries()[name]

    def translate(module: Any, inside: Any) -> Any:
        form = entry.translate(module, inside)
        return dataclasses.replace(form, call=call or form.call, own=own)

    patch.setitem(registry._ENTRIES, name, dataclasses.replace(entry, translate=translate))


OPTIONS: dict[str, tuple[Callable[..., nn.Module], dict[str, Any], dict[str, Any], bool]] = {
    "batch norm with Keras's eps": (nn.BatchNorm1d, {}, {"eps": 1e-3}, False),
    "batch norm with Flax's eps of layer norm": (nn.BatchNorm1d, {}, {"eps": 1e-6}, True),
    "momentum as Flax counts it": (nn.BatchNorm1d, {"momentum": 0.1}, {"momentum": 0.9}, True),
    "no momentum as a momentum of 0.1": (nn.BatchNorm1d, {"momentum": None}, {"momentum": 0.1}, True),
    "instance norm with Flax's eps": (nn.InstanceNorm1d, {}, {"eps": 1e-6}, False),
    "group norm with Flax's eps": (
        lambda **o: nn.GroupNorm(num_groups=3, num_channels=6, **o),
        {},
        {"eps": 1e-6},
        False,
    ),
    "layer norm with Flax's eps": (lambda **o: nn.LayerNorm(5, **o), {}, {"eps": 1e-6}, False),
    "RMS norm with Flax's eps": (lambda **o: nn.RMSNorm(5, **o), {}, {"eps": 1e-6}, False),
    "a neighbour too many": (lambda **o: nn.LocalResponseNorm(**o), {"size": 4}, {"size": 5}, False),
    "groups and their size swapped": (
        lambda **o: nn.GroupNorm(num_channels=6, **o),
        {"num_groups": 3},
        {"num_groups": 2},
        False,
    ),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_another_option_is_seen(name: str) -> None:
    kind, right, wrong, train = OPTIONS[name]
    make = (lambda **o: kind(6, **o)) if kind in (nn.BatchNorm1d, nn.InstanceNorm1d) else kind
    reference, other = perturbed(make(**right)), perturbed(make(**wrong))
    calls = 2 if train else 1
    assert not disagree(reference, X, train=train, calls=calls)
    assert disagree(reference, X, train=train, calls=calls, port=lambda _: eq.translate(other).subject)


def over_the_first_axes(m: Any, x: Any) -> Any:
    return normalised(x, *statistics(x, range(x.ndim - 1)), m["scale"], m["bias"], 1e-5)


def by_the_running(m: Any, x: Any) -> Any:
    return normalised(x, m["mean"], m["var"], m["scale"], m["bias"], 1e-5)


def by_the_unbiased(m: Any, x: Any) -> Any:
    mean, var = statistics(x, (0, 1))
    return normalised(x, mean, var * 20 / 19, m["scale"], m["bias"], 1e-5)


def with_eps_outside(m: Any, x: Any) -> Any:
    mean, var = statistics(x, (0, 1))
    return weigh(m, (x - mean) / (jnp.sqrt(var) + 1e-5))


def in_strided_groups(m: Any, x: Any) -> Any:
    split = x.reshape(*x.shape[:-1], 2, 3)
    mean, var = statistics(split, (1, 2))
    return weigh(m, normalised(split, mean, var, None, None, 1e-5).reshape(x.shape))


def over_the_last_alone(m: Any, x: Any) -> Any:
    return normalised(x, *statistics(x, (-1,)), m["scale"], m["bias"], 1e-5)


def about_the_mean(m: Any, x: Any) -> Any:
    return normalised(x, *statistics(x, (-1,)), m["scale"], None, float(jnp.finfo(x.dtype).eps))


def by_one_plus(m: Any, x: Any) -> Any:
    eps = float(jnp.finfo(x.dtype).eps)
    return normalised(x, 0, jnp.mean(x * x, -1, keepdims=True), 1 + m["scale"], None, eps)


def by_a_constant(m: Any, x: Any) -> Any:
    """The statistics are kept out of the gradient."""
    mean, var = jax.lax.stop_gradient(statistics(x, (-1,)))
    return normalised(x, mean, var, m["scale"], m["bias"], 1e-5)


def weigh(m: Any, x: Any) -> Any:
    return x * m["scale"] + m["bias"]


CALLS: dict[str, tuple[nn.Module, bool, Call]] = {
    "batch statistics as instance statistics": (nn.InstanceNorm1d(6, affine=True), False, over_the_first_axes),
    "running statistics in train mode": (nn.BatchNorm1d(6), True, by_the_running),
    "batch statistics in eval mode": (nn.BatchNorm1d(6), False, over_the_first_axes),
    "normalised by the unbiased variance": (nn.BatchNorm1d(6), True, by_the_unbiased),
    "eps outside the root": (nn.BatchNorm1d(6), True, with_eps_outside),
    "strided groups": (nn.GroupNorm(3, 6), False, in_strided_groups),
    "the last axis of two": (nn.LayerNorm((6, 5)), False, over_the_last_alone),
    "a mean taken off the RMS": (nn.RMSNorm(5), False, about_the_mean),
    "one plus the scale": (nn.RMSNorm(5), False, by_one_plus),
    "no gradient through the statistics": (nn.LayerNorm(5), False, by_a_constant),
    "a sum of neighbours": (
        nn.LocalResponseNorm(4, alpha=0.5),
        False,
        lambda m, x: local_response_norm(x, 4, 4 * 0.5, 0.75, 1.0),
    ),
    "an even window that reaches on": (
        nn.LocalResponseNorm(4, alpha=0.5),
        False,
        lambda m, x: local_response_norm(x[..., ::-1], 4, 0.5, 0.75, 1.0)[..., ::-1],
    ),
    "a mean of the neighbours there are": (
        nn.LocalResponseNorm(3, alpha=0.5),
        False,
        lambda m, x: x / (1 + 0.5 * _mean_of_those_there(x)) ** 0.75,
    ),
}


def _mean_of_those_there(x: Any) -> Any:
    count = jnp.convolve(jnp.ones(x.shape[-1], x.dtype), jnp.ones(3, x.dtype), "same")
    padded = jnp.pad(x * x, ((0, 0), (0, 0), (1, 1)))
    return (padded[..., :-2] + padded[..., 1:-1] + padded[..., 2:]) / count


@pytest.mark.parametrize("name", CALLS)
def test_another_call_is_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, train, call = CALLS[name]
    instead(monkeypatch, type(module).__name__, call)
    assert disagree(perturbed(module), X, train=train)


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.InstanceNorm1d])
def test_the_biased_running_variance_is_seen(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    module = perturbed(kind(6, track_running_stats=True))
    assert not disagree(module, X, train=True, calls=2)
    monkeypatch.setattr(normalisation, "unbiased", lambda var, count: var)
    found = disagree(module, X, train=True, calls=2)
    assert {path.partition(" ")[0] for path in found} == {"buffers.running_var"}


@pytest.mark.parametrize("wrong", [lambda share: 1.0, lambda share: share / (1 - share), lambda share: 0.1])
def test_another_share_of_the_mean_of_all_batches_is_seen(wrong: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last batch alone, a counter read before it counts, the default momentum."""
    average = normalisation._average
    module = perturbed(nn.BatchNorm1d(6, momentum=None))
    module.num_batches_tracked.fill_(4)
    assert not disagree(module, X, train=True)
    monkeypatch.setattr(normalisation, "_average", lambda m, share, *new: average(m, wrong(share), *new))
    assert "buffers.running_mean" in disagree(module, X, train=True)


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("LayerNorm", Own("LayerNorm", 5, epsilon=1e-5, use_bias=True)),
        ("GroupNorm", Own("GroupNorm", 6, 3, epsilon=1e-5, use_bias=True)),
    ],
)
def test_the_fast_variance_of_flax_is_seen_far_from_zero(name: str, own: Own, monkeypatch: pytest.MonkeyPatch) -> None:
    module = perturbed(nn.LayerNorm(5) if name == "LayerNorm" else nn.GroupNorm(3, 6))
    far = normal(4, 6, 5) + 3e4
    assert not disagree(module, far)
    instead(monkeypatch, name, nnx=own)
    assert disagree(module, far)


def test_a_shifted_gradient_and_a_forgotten_channel_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """CrossMapLRN2d by the formula of its page, and by its own value with that value's derivative."""
    module, x = nn.CrossMapLRN2d(3, alpha=0.5), normal(2, 7, 3, 1)

    def by_itself(m: Any, x: Any) -> Any:
        return cross_map_lrn.fun(x, 3, 0.5, 0.75, 1.0)

    assert not disagree(module, x)
    with monkeypatch.context() as patch:
        instead(patch, "CrossMapLRN2d", lambda m, x: local_response_norm(x, 3, 0.5, 0.75, 1.0))
        assert "outputs." in "".join(disagree(module, x))
    instead(monkeypatch, "CrossMapLRN2d", by_itself)
    assert all(path.startswith("input_gradients.") for path in disagree(module, x))
    assert disagree(module, x)


def test_a_layout_left_in_torch_s_is_seen() -> None:
    """Channels as many as positions: torch's arrays handed over as they lie normalise the wrong axis."""
    module, square = perturbed(nn.BatchNorm2d(5)), np.asarray(normal(3, 5, 5, 5))

    def as_it_lies(subject: Any) -> Any:
        def apply(params: Any, buffers: Any, args: Any, kwargs: Any, train: bool) -> Any:
            outputs, after = subject.apply(params, buffers, (jnp.moveaxis(args[0], -1, 1),), kwargs, train)
            return jnp.moveaxis(outputs, 1, -1), after

        return dataclasses.replace(subject, apply=apply)

    assert disagree(module, square, port=as_it_lies)
