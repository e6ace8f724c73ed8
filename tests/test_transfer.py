"""Copying weights into a port of every framework: what verify would have moved, in the port's own dtypes."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

import equivalence as eq
from equivalence.errors import InputError, MappingError

MODEL = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
X = np.random.default_rng(0).standard_normal((5, 3)).astype(np.float32)
RULES = [("0.weight", "a.kernel"), ("0.bias", "a.bias"), ("2.weight", "b.kernel"), ("2.bias", "b.bias")]
AXES = {"weight": "o k -> k o", "bias": None}
MAPPING = eq.Mapping([eq.Rule(ours, theirs, AXES[ours[2:]]) for ours, theirs in RULES])


class Nnx(nnx.Module):
    def __init__(self) -> None:
        rngs = nnx.Rngs(1)
        self.a, self.b = nnx.Linear(3, 4, rngs=rngs), nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.b(jnp.tanh(self.a(x)))


class Linen(linen.Module):
    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return linen.Dense(2, name="b")(jnp.tanh(linen.Dense(4, name="a")(x)))


class Equinox(eqx.Module):
    a: eqx.nn.Linear
    b: eqx.nn.Linear

    def __call__(self, x: jax.Array) -> jax.Array:
        return jax.vmap(lambda one: self.b(jnp.tanh(self.a(one))))(x)


def apply(params: Any, x: jax.Array) -> jax.Array:
    hidden = jnp.tanh(x @ params["a"]["kernel"] + params["a"]["bias"])
    return hidden @ params["b"]["kernel"] + params["b"]["bias"]


def ports() -> dict[str, tuple[Any, eq.Mapping | None]]:
    zeros = {name: {"kernel": jnp.zeros(s), "bias": jnp.zeros(s[1])} for name, s in (("a", (3, 4)), ("b", (4, 2)))}
    keys = jax.random.split(jax.random.key(0))
    own = eq.Mapping([eq.Rule(ours, theirs.replace("kernel", "weight")) for ours, theirs in RULES])
    made = Linen()
    return {
        "nnx": (Nnx(), MAPPING),
        "linen": (eq.linen(made, made.init(jax.random.key(1), X)), MAPPING),
        "equinox": (Equinox(eqx.nn.Linear(3, 4, key=keys[0]), eqx.nn.Linear(4, 2, key=keys[1])), own),
        "function": (eq.function(apply, zeros), MAPPING),
        "translation": (eq.translate(torch.nn.Sequential(*[type(m)(*s) for m, s in SHAPES]), to="linen"), None),
    }


SHAPES = [(MODEL[0], (3, 4)), (MODEL[1], ()), (MODEL[2], (4, 2))]


@pytest.mark.parametrize("framework", ["nnx", "linen", "equinox", "function", "translation"])
def test_a_port_holds_the_reference_s_weights(framework: str) -> None:
    port, mapping = ports()[framework]
    made = eq.copy_weights(MODEL, port, mapping)
    assert (made is port) == (framework in ("nnx", "translation"))
    weights = mapping if mapping is not None else made.mapping
    report = eq.verify(MODEL, made, (X,), weights=weights, port_weights="keep", checks=["roundtrip", "outputs"])
    report.assert_equivalent()


def test_low_precision_ports_keep_their_dtype() -> None:
    params = {name: {"kernel": jnp.zeros(s, jnp.bfloat16), "bias": jnp.zeros(s[1])} for name, s in SIZES}
    made = eq.copy_weights(MODEL, eq.function(apply, params), MAPPING)
    assert made.params["a"]["kernel"].dtype == jnp.bfloat16
    assert made.params["a"]["bias"].dtype == jnp.float32


SIZES = (("a", (3, 4)), ("b", (4, 2)))


def test_leaves_that_do_not_fit_are_named() -> None:
    with pytest.raises(MappingError, match=r"2\.bias"):
        eq.copy_weights(MODEL, Nnx(), eq.Mapping(MAPPING.rules[:3]))


def test_the_sides_cannot_be_swapped() -> None:
    with pytest.raises(InputError, match=r"a torch\.nn\.Module first"):
        eq.copy_weights(Nnx(), MODEL)


def test_the_reference_s_memory_is_not_shared() -> None:
    model = torch.nn.Linear(3, 2)
    port = eq.translate(torch.nn.Linear(3, 2))
    eq.copy_weights(model, port)
    before = np.array(port.module.kernel[...])
    with torch.no_grad():
        model.weight.zero_()
        model.bias.zero_()
    np.testing.assert_array_equal(np.asarray(port.module.kernel[...]), before)
    assert np.asarray(port.module.bias[...]).any()
