"""Dropout in all its forms; masks are drawn in torch's shapes, so that both sides can be served the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from equivalence.layers.form import Carrier, Form
from equivalence.layers.registry import Example, layer

Inside = Callable[[Any], Form]


@layer("Dropout", Example("nn.Dropout(0.25)", ((4, 5),)), "nothing: p is the probability to drop in both")
def dropout(module: Any, inside: Inside) -> Form:
    """nn.Dropout."""
    p = float(module.p)

    def call(m: Carrier, x: Any) -> Any:
        return dropped(x, p, m.key(), x.shape) if m.train and p > 0 else x

    return Form("Dropout", call, text=f"nnx.Dropout({p})", anywhere=True, draws=True)


def dropped(x: Any, p: float, key: Any, shape: tuple[int, ...]) -> Any:
    """Elements dropped by a mask of `shape`, drawn with probability 1 - p to keep, the others divided by 1 - p.

    https://docs.pytorch.org/docs/stable/generated/torch.nn.Dropout.html
    """
    keep = jax.random.bernoulli(key, 1.0 - p, shape)
    return jnp.where(keep, x / (1.0 - p), jnp.zeros_like(x)) if p < 1 else jnp.zeros_like(x) * x
