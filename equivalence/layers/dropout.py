"""Dropout in all its forms; masks are drawn in torch's shapes, so that both sides can be served the same."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from equivalence.errors import InputError
from equivalence.layers.form import LAST, Carrier, Form, spatial
from equivalence.layers.registry import Example, layer

Inside = Callable[[Any], Form]
SATURATION = -1.7580993408473766
"""What SELU tends to below: minus its alpha times its scale."""


@layer(
    "Dropout",
    Example("nn.Dropout(0.25)", ((4, 5),)),
    "nothing for finite numbers: p is the probability to drop in both; a dropped inf is nan in torch, 0 in Flax",
)
def dropout(module: Any, inside: Inside) -> Form:
    """nn.Dropout."""
    p = float(module.p)
    return Form(
        "Dropout",
        lambda m, x: dropped(x, p, m.key, x.shape) if m.train else x,
        text=f"nnx.Dropout({p})",
        anywhere=True,
        draws=True,
    )


@layer(
    "AlphaDropout",
    Example("nn.AlphaDropout(0.25)", ((4, 5),)),
    "Flax has none: dropped elements become SELU's saturation, then all are scaled and shifted; p = 1 gives 0",
)
def alpha_dropout(module: Any, inside: Inside) -> Form:
    """nn.AlphaDropout."""
    p = float(module.p)
    return Form(
        "AlphaDropout",
        lambda m, x: saturated(x, p, m.key, x.shape) if m.train else x,
        text=f"saturated(x, {p}, rngs.dropout, x.shape)",
        anywhere=True,
        draws=True,
    )


def _of_channels(
    name: str, arguments: str, shape: tuple[int, ...], differs: str, layout: str, ranks: Sequence[int], single: int = 0
) -> None:
    """Register a dropout of whole channels: a mask element for each channel of each sample.

    `ranks` are the numbers of axes that it takes, `single` that of a sample without a batch.
    """

    def translate(module: Any, inside: Inside) -> Form:
        p = float(module.p)
        drop = saturated if "Alpha" in name else dropped

        def call(m: Carrier, x: Any) -> Any:
            if x.ndim not in ranks:
                raise InputError(f"{name} takes arrays of {ranks[0]} to {ranks[-1]} axes, not {x.ndim}")
            if not m.train:
                return x
            batch = x[None] if x.ndim == single else x
            return drop(batch, p, m.key, (batch.shape[0], batch.shape[-1])).reshape(x.shape)

        text = f"{drop.__name__}(x, {p}, rngs.dropout, (x.shape[0], x.shape[-1]))"
        return Form(name, call, text=text, inputs=(layout,), outputs=(layout,), draws=True)

    translate.__module__ = __name__
    layer(name, Example(f"nn.{name}({arguments})", (shape,)), differs)(translate)


def dropped(x: Any, p: float, key: Callable[[], Any], shape: tuple[int, ...]) -> Any:
    """Elements dropped by a mask drawn with probability 1 - p to keep, the others divided by 1 - p.

    Args:
        x: the input; `shape` is its own, or (n, c) to drop whole channels of (n, ..., c).
        key: gives a random key; it is asked for none where torch draws nothing (p = 0, p = 1, an empty x).

    https://docs.pytorch.org/docs/stable/generated/torch.nn.Dropout.html
    """
    if p == 0 or not x.size:
        return x
    return x * (kept(x, p, key, shape) / (1 - p) if p < 1 else 0)


def saturated(x: Any, p: float, key: Callable[[], Any], shape: tuple[int, ...]) -> Any:
    """Elements replaced by SELU's saturation, then all scaled and shifted so that mean 0 and variance 1 stay.

    Args are those of `dropped`. https://docs.pytorch.org/docs/stable/generated/torch.nn.AlphaDropout.html
    """
    if p == 0 or not x.size:
        return x
    if p == 1:
        return x * 0
    scale = 1 / math.sqrt((SATURATION**2 * p + 1) * (1 - p))
    keep = kept(x, p, key, shape)
    return (x * keep + SATURATION * (1 - keep)) * scale - SATURATION * p * scale


def kept(x: Any, p: float, key: Callable[[], Any], shape: tuple[int, ...]) -> Any:
    """1 where kept and 0 where dropped, drawn in `shape`, (n, c) drawn as torch's (n, c, 1, ...) and laid out as x."""
    whole = shape == x.shape
    drawn = shape if whole else shape + (1,) * (x.ndim - 2)
    mask = jax.random.bernoulli(key(), 1 - p, drawn).astype(x.dtype)
    return mask if whole else jnp.moveaxis(mask, 1, -1)


_of_channels(
    "Dropout1d",
    "0.4",
    (4, 3, 5),
    "one draw for a whole channel: broadcast_dims in Flax, which lists the axes that share it",
    spatial("l"),
    (2, 3),
    single=2,
)
_of_channels(
    "Dropout2d",
    "0.4",
    (4, 3, 5, 2),
    "one draw for a whole channel: broadcast_dims in Flax; torch reads 3 axes as (n, c, l), not as one image",
    LAST,
    range(2, 9),
)
_of_channels(
    "Dropout3d",
    "0.4",
    (4, 3, 5, 2, 2),
    "one draw for a whole channel: broadcast_dims in Flax; 4 axes are one volume, where Dropout2d's 3 are no image",
    spatial("d h w"),
    (4, 5),
    single=4,
)
_of_channels(
    "FeatureAlphaDropout",
    "0.4",
    (4, 3, 5, 2),
    "Flax has none: AlphaDropout with one draw for a whole channel",
    LAST,
    range(2, 9),
)
