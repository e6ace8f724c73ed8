"""Mistakes made in porting activations and dropout, each of which must be seen; most at a kink alone."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from torch import nn

from equivalence.errors import DrawsDiffer
from equivalence.layers import dropout, registry
from tests.layers.sides import disagree, normal, perturbed

Call = Callable[..., Any]
AT_KINKS = np.concatenate([np.resize(np.float32([-3, -1, -0.5, 0, 0.5, 1, 2, 3, 6]), 18), 2 * normal(18)])


def instead(patch: pytest.MonkeyPatch, name: str, call: Call) -> None:
    entry = registry.entries()[name]

    def translate(module: Any, inside: Any) -> Any:
        return dataclasses.replace(entry.translate(module, inside), call=call)

    patch.setitem(registry._ENTRIES, name, dataclasses.replace(entry, translate=translate))


FUNCTIONS: dict[str, tuple[nn.Module, Callable[[Any], Any]]] = {
    "jax's default gelu": (nn.GELU(), jax.nn.gelu),
    "exact gelu for tanh": (nn.GELU("tanh"), lambda x: jax.nn.gelu(x, approximate=False)),
    "quick gelu": (nn.GELU(), lambda x: x * jax.nn.sigmoid(1.702 * x)),
    "relu by maximum": (nn.ReLU(), lambda x: jnp.maximum(x, 0)),
    "relu6 by clip": (nn.ReLU6(), lambda x: jnp.clip(x, 0, 6)),
    "leaky relu of slope 1 at 0": (nn.LeakyReLU(0.2), lambda x: jax.nn.leaky_relu(x, 0.2)),
    "leaky relu of jax's slope": (nn.LeakyReLU(0.2), jax.nn.leaky_relu),
    "hardtanh by clip": (nn.Hardtanh(), lambda x: jnp.clip(x, -1, 1)),
    "jax's hard_tanh": (nn.Hardtanh(), jax.nn.hard_tanh),
    "softplus that bends on": (nn.Softplus(2.0, 3.0), lambda x: jax.nn.softplus(2 * x) / 2),
    "softplus with beta alone": (nn.Softplus(2.0), lambda x: jax.nn.softplus(2 * x)),
    "softplus above 20": (nn.Softplus(), jax.nn.softplus),
    "Keras's hard sigmoid": (nn.Hardsigmoid(), lambda x: jnp.clip(0.2 * x + 0.5, 0, 1)),
    "swish for hardswish": (nn.Hardswish(), jax.nn.silu),
    "hardswish by clip": (nn.Hardswish(), lambda x: x * jnp.clip(x + 3, 0, 6) / 6),
    "elu for celu": (nn.CELU(0.5), lambda x: jax.nn.elu(x, 0.5)),
    "celu for elu": (nn.ELU(0.5), lambda x: jax.nn.celu(x, 0.5)),
    "celu of the value's own slope": (nn.CELU(0.3), lambda x: jax.nn.celu(x, 0.3)),
    "hardsigmoid of the value's own slope": (nn.Hardsigmoid(), jax.nn.hard_sigmoid),
    "elu for selu": (nn.SELU(), jax.nn.elu),
    "soft for hard shrinking": (nn.Hardshrink(0.5), lambda x: jnp.sign(x) * jax.nn.relu(jnp.abs(x) - 0.5)),
    "shrinking the edge included": (nn.Hardshrink(0.5), lambda x: jnp.where(jnp.abs(x) < 0.5, 0, x)),
    "shrinking by maximum": (nn.Softshrink(0.5), lambda x: jnp.sign(x) * jnp.maximum(jnp.abs(x) - 0.5, 0)),
    "a threshold that is passed": (nn.Threshold(0.5, 2.0), lambda x: jnp.where(x >= 0.5, x, 2.0)),
    "a threshold that clips": (nn.Threshold(0.5, 2.0), lambda x: jnp.maximum(x, 0.5)),
    "a log of a sigmoid": (nn.LogSigmoid(), lambda x: jnp.log(jax.nn.sigmoid(x))),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_another_function_is_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, wrong = FUNCTIONS[name]
    x = np.concatenate([AT_KINKS, np.float32([25, -800 if name == "a log of a sigmoid" else -25])])
    instead(monkeypatch, type(module).__name__, lambda m, x: wrong(x))
    assert disagree(module, x, moved=())


CALLS: dict[str, tuple[nn.Module, tuple[int, ...], bool, Call]] = {
    "the last axis where torch takes the first": (nn.Softmax(), (3, 4, 5), False, lambda m, x: jax.nn.softmax(x)),
    "the first axis where torch takes the second": (
        nn.LogSoftmax(),
        (3, 4),
        False,
        lambda m, x: jax.nn.log_softmax(x, 0),
    ),
    "softmax for softmin": (nn.Softmin(1), (3, 4), False, lambda m, x: jax.nn.softmax(x, 1)),
    "softmax over a batch of images": (nn.Softmax2d(), (2, 3, 4, 5), False, lambda m, x: jax.nn.softmax(x, 1)),
    "the gate first": (nn.GLU(1), (3, 4), False, lambda m, x: jax.nn.glu(jnp.roll(x, 2, 1), axis=1)),
    "every other row a gate": (nn.GLU(0), (4, 3), False, lambda m, x: x[::2] * jax.nn.sigmoid(x[1::2])),
    "slopes in another order": (
        nn.PReLU(3),
        (2, 3, 5),
        False,
        lambda m, x: jnp.where(x > 0, x, m["negative_slope"][::-1] * x),
    ),
    "a slope of 1 at 0": (nn.PReLU(), (0,), False, lambda m, x: jnp.where(x >= 0, x, m["negative_slope"][0] * x)),
    "the lower slope in eval mode": (nn.RReLU(0.1, 0.4), (3, 4), False, lambda m, x: jnp.where(x > 0, x, 0.1 * x)),
    "the mean slope in train mode": (nn.RReLU(0.1, 0.4), (3, 4), True, lambda m, x: jnp.where(x > 0, x, 0.25 * x)),
    "a slope a row": (
        nn.RReLU(0.1, 0.4),
        (3, 4),
        True,
        lambda m, x: jnp.where(x > 0, x, jax.random.uniform(m.key(), (3, 1), x.dtype, 0.1, 0.4) * x),
    ),
    "slopes of [0, 1)": (
        nn.RReLU(0.1, 0.4),
        (3, 4),
        True,
        lambda m, x: jnp.where(x > 0, x, jax.random.uniform(m.key(), x.shape, x.dtype) * x),
    ),
    "p kept for p dropped": (nn.Dropout(0.3), (3, 4), True, lambda m, x: dropout.dropped(x, 0.7, m.key, x.shape)),
    "kept elements not scaled": (
        nn.Dropout(0.3),
        (8, 8),
        True,
        lambda m, x: x * dropout.kept(x, 0.3, m.key, x.shape),
    ),
    "dropped in eval mode": (nn.Dropout(0.3), (3, 4), False, lambda m, x: dropout.dropped(x, 0.3, m.key, x.shape)),
    "elements dropped, not channels": (
        nn.Dropout1d(0.4),
        (4, 3, 5),
        True,
        lambda m, x: dropout.dropped(x, 0.4, m.key, x.shape),
    ),
    "a mask drawn channels last": (
        nn.Dropout2d(0.4),
        (4, 3, 5, 2),
        True,
        lambda m, x: x * jax.random.bernoulli(m.key(), 0.6, (4, 1, 1, 3)) / 0.6,
    ),
    "a mask read channels last": (
        nn.Dropout2d(0.4),
        (4, 4, 5, 2),
        True,
        lambda m, x: x * jax.random.bernoulli(m.key(), 0.6, (4, 4, 1, 1)).T.reshape(4, 1, 1, 4) / 0.6,
    ),
    "positions dropped for channels": (
        nn.Dropout1d(0.4),
        (4, 5, 5),
        True,
        lambda m, x: x * jax.random.bernoulli(m.key(), 0.6, (4, 5, 1)) / 0.6,
    ),
    "alpha dropout to zero": (nn.AlphaDropout(0.3), (4, 5), True, lambda m, x: dropout.dropped(x, 0.3, m.key, x.shape)),
    "alpha dropout not scaled back": (
        nn.AlphaDropout(0.3),
        (4, 5),
        True,
        lambda m, x: jnp.where(dropout.kept(x, 0.3, m.key, x.shape) > 0, x, dropout.SATURATION),
    ),
    "all dropped saturate": (nn.AlphaDropout(1.0), (4, 5), True, lambda m, x: jnp.full_like(x, dropout.SATURATION)),
}


@pytest.mark.parametrize("name", CALLS)
def test_another_call_is_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, shape, train, call = CALLS[name]
    x = AT_KINKS if shape == (0,) else normal(*shape) + 0.1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the axis that torch chooses for itself
        assert not disagree(perturbed(module), x, train=train, moved=())
        instead(monkeypatch, type(module).__name__, call)
        try:
            found = bool(disagree(module, x, train=train, moved=()))
        except DrawsDiffer:
            found = True
    assert found


def test_one_mask_for_two_layers_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A key that is never split makes every mask the same; the tape asks for as many draws as torch's."""
    model = nn.Sequential(nn.Dropout(0.5), nn.Tanh(), nn.Dropout(0.5))
    x = normal(4, 5)
    assert not disagree(model, x, train=True)

    def chain(m: Any, x: Any) -> Any:
        mask = dropout.kept(x, 0.5, m.key, x.shape)
        return jnp.tanh(x * mask * 2) * mask * 2

    entry = registry.entries()["Sequential"]

    def translate(module: Any, inside: Any) -> Any:
        form = entry.translate(module, inside)
        return dataclasses.replace(form, call=chain, children={})

    monkeypatch.setitem(registry._ENTRIES, "Sequential", dataclasses.replace(entry, translate=translate))
    with pytest.raises(DrawsDiffer, match="2 draws, the port for 1"):
        disagree(model, x, train=True)
