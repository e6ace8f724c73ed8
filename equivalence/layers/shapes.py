"""Layers that only rearrange: Flatten, Unflatten, PixelShuffle, PixelUnshuffle, ChannelShuffle."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from einops import rearrange

from equivalence.layers.form import LAST, Carrier, Form, spatial
from equivalence.layers.registry import Example, layer

Inside = Callable[[Any], Form]


def flatten(x: Any, start: int = 1, end: int = -1) -> Any:
    """The axes from `start` to `end`, the last one included, as one; an array without axes gets one.

    https://docs.pytorch.org/docs/stable/generated/torch.nn.Flatten.html. Torch flattens (c h w), which `x.reshape` of a
    channels-last array does not.

    Raises ValueError for an axis that `x` does not have, and for a start after the end.
    """
    if x.ndim == 0:
        _axis(1, start), _axis(1, end)
        return x.reshape(1)
    first, last = _axis(x.ndim, start), _axis(x.ndim, end)
    if first > last:
        raise ValueError(f"flatten from axis {start} to axis {end} of {x.ndim}: the start comes after the end")
    return x.reshape(*x.shape[:first], math.prod(x.shape[first : last + 1]), *x.shape[last + 1 :])


def unflatten(x: Any, axis: int, sizes: Sequence[int]) -> Any:
    """An axis as several, of which one size may be -1 for what is left.

    https://docs.pytorch.org/docs/stable/generated/torch.nn.Unflatten.html.

    Raises ValueError for an axis that `x` does not have, and for sizes that do not multiply to its length.
    """
    at = _axis(x.ndim, axis)
    known = math.prod(size for size in sizes if size != -1)
    rest = x.shape[at] // max(known, 1) if -1 in sizes else 1
    open_ = list(sizes).count(-1)
    if not sizes or min(sizes) < -1 or open_ > 1 or (open_ and not known) or known * rest != x.shape[at]:
        raise ValueError(f"sizes {tuple(sizes)} do not multiply to {x.shape[at]}, axis {axis} of {x.shape}")
    return x.reshape(*x.shape[:at], *(rest if size == -1 else size for size in sizes), *x.shape[at + 1 :])


def pixel_shuffle(x: Any, factor: int) -> Any:
    """Channels as pixels: (..., h, w, c r r) to (..., h r, w r, c).

    https://docs.pytorch.org/docs/stable/generated/torch.nn.PixelShuffle.html. Torch reads the channels as (c r r);
    the depth-to-space of channels-last frameworks reads (r r c).

    Raises ValueError for an array without height and width, and for channels that r * r does not divide.
    """
    if x.ndim < 3 or factor < 1 or x.shape[-1] % factor**2:
        raise ValueError(f"channels of an image of shape {x.shape} do not shuffle to {factor} x {factor} pixels")
    return rearrange(x, "... h w (c i j) -> ... (h i) (w j) c", i=factor, j=factor)


def pixel_unshuffle(x: Any, factor: int) -> Any:
    """Pixels as channels: (..., h r, w r, c) to (..., h, w, c r r).

    https://docs.pytorch.org/docs/stable/generated/torch.nn.PixelUnshuffle.html. The new channels are (c r r); the
    space-to-depth of channels-last frameworks makes (r r c).

    Raises ValueError for an array without height and width, and for sizes that r does not divide.
    """
    if x.ndim < 3 or factor < 1 or x.shape[-3] % factor or x.shape[-2] % factor:
        raise ValueError(f"an image of shape {x.shape} does not divide into {factor} x {factor} pixels")
    return rearrange(x, "... (h i) (w j) c -> ... h w (c i j)", i=factor, j=factor)


def channel_shuffle(x: Any, groups: int) -> Any:
    """The channels, the last axis, dealt out: (g c) to (c g).

    https://docs.pytorch.org/docs/stable/generated/torch.nn.ChannelShuffle.html.

    Raises ValueError for an array of fewer than three axes, and for channels that the groups do not divide.
    """
    if x.ndim < 3 or groups < 1 or x.shape[-1] % groups:
        raise ValueError(f"the channels of an array of shape {x.shape} do not divide into {groups} groups")
    return rearrange(x, "... (g c) -> ... (c g)", g=groups)


def _axis(ndim: int, axis: int) -> int:
    if not -ndim <= axis < ndim:
        raise ValueError(f"axis {axis} of an array of {ndim} axes")
    return axis % ndim


@layer(
    "Flatten",
    Example("nn.Flatten()", ((2, 3, 5, 7),)),
    "torch flattens (c h w): after a channels-last convolution move the channels back, or permute the next kernel",
)
def flattening(module: Any, inside: Inside) -> Form:
    """nn.Flatten, on arrays in torch's layout."""
    start, end = module.start_dim, module.end_dim
    plain = (start, end) == (1, -1)
    text = "x.reshape(x.shape[0], -1)" if plain else f"flatten(x, {start}, {end})"
    return Form("Flatten", lambda m, x: flatten(x, start, end), text=text)


@layer(
    "Unflatten",
    Example("nn.Unflatten(1, (3, 5))", ((2, 15),)),
    "the sizes are torch's (c h w): what follows as channels last is a transpose away",
)
def unflattening(module: Any, inside: Inside) -> Form:
    """nn.Unflatten, on arrays in torch's layout."""
    axis, sizes = module.dim, tuple(module.unflattened_size)
    return Form("Unflatten", lambda m, x: unflatten(x, axis, sizes), text=f"unflatten(x, {axis}, {sizes})")


@layer(
    "PixelShuffle",
    Example("nn.PixelShuffle(2)", ((2, 12, 3, 5),)),
    "torch reads the channels as (c r r); depth-to-space of channels-last frameworks reads (r r c)",
)
def shuffling(module: Any, inside: Inside) -> Form:
    """nn.PixelShuffle."""
    return _pixels(module, pixel_shuffle, module.upscale_factor)


@layer(
    "PixelUnshuffle",
    Example("nn.PixelUnshuffle(2)", ((2, 3, 4, 6),)),
    "torch makes channels (c r r); space-to-depth of channels-last frameworks makes (r r c)",
)
def unshuffling(module: Any, inside: Inside) -> Form:
    """nn.PixelUnshuffle."""
    return _pixels(module, pixel_unshuffle, module.downscale_factor)


def _pixels(module: Any, function: Callable[[Any, int], Any], factor: int) -> Form:
    lies = (spatial("h w"),)
    text = f"{function.__name__}(x, {factor})"
    return Form(type(module).__name__, lambda m, x: function(x, factor), text=text, inputs=lies, outputs=lies)


@layer(
    "ChannelShuffle",
    Example("nn.ChannelShuffle(2)", ((2, 6, 3, 5),)),
    "the channels (g c) become (c g): reshape to (groups, c), and swap; the other way round it undoes itself",
)
def dealing(module: Any, inside: Inside) -> Form:
    """nn.ChannelShuffle."""
    groups = module.groups

    def call(m: Carrier, x: Any) -> Any:
        return channel_shuffle(x, groups)

    return Form("ChannelShuffle", call, text=f"channel_shuffle(x, {groups})", inputs=(LAST,), outputs=(LAST,))
