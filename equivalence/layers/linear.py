"""Linear layers: Linear and Bilinear."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from equivalence.layers.form import Carrier, Form, Own
from equivalence.layers.registry import Example, layer, leaves
from equivalence.weights import Rule

Inside = Callable[[Any], Form]


@layer("Linear", Example("nn.Linear(5, 3)", ((4, 5),)), "the kernel is torch's weight transposed; (k, o) for (o, k)")
def linear(module: Any, inside: Inside) -> Form:
    """nn.Linear as Flax's own."""
    held, _ = leaves(module)
    sizes, bias = held["weight"].shape[::-1], module.bias is not None
    rules = [Rule("weight", "kernel", "o k -> k o"), Rule("bias", "bias")]
    return Form(
        "Linear",
        lambda m, x: _with_bias(x @ m["kernel"], m["bias"]),
        rules=tuple(rule for rule in rules if rule.source in held),
        held=held,
        own={"nnx": Own("Linear", *sizes, use_bias=bias), "linen": Own("Dense", sizes[1], use_bias=bias)},
    )


@layer(
    "Bilinear",
    Example("nn.Bilinear(3, 4, 5)", ((2, 3), (2, 4))),
    "Flax has none; the kernel keeps torch's (o, i, j)",
)
def bilinear(module: Any, inside: Inside) -> Form:
    """nn.Bilinear: one matrix an output between two inputs."""
    held, _ = leaves(module)

    def call(m: Carrier, x: Any, y: Any) -> Any:
        return _with_bias(jnp.einsum("...i,oij,...j->...o", x, m["kernel"], y), m["bias"])

    rules = [Rule("weight", "kernel"), Rule("bias", "bias")]
    return Form(
        "Bilinear",
        call,
        text='jnp.einsum("...i,oij,...j->...o", x, kernel, y) + bias',
        rules=tuple(rule for rule in rules if rule.source in held),
        held=held,
    )


def _with_bias(x: Any, bias: Any) -> Any:
    return x if bias is None else x + bias
