"""Sliding patches and their sum: Unfold and Fold."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from einops import rearrange

from equivalence.layers.form import Carrier, Form, spatial
from equivalence.layers.padding import padded
from equivalence.layers.registry import Example, layer

Inside = Callable[[Any], Form]
Pair = tuple[int, int]


def unfold(x: Any, kernel: Pair, dilation: Pair, padding: Pair, stride: Pair) -> Any:
    """The patches of an image, one after the other: (..., h, w, c) to (..., patches, c * kernel).

    https://docs.pytorch.org/docs/stable/generated/torch.nn.Unfold.html. A patch lists channel after channel, each with
    all its pixels, where patches cut out by slicing in JAX list pixel after pixel.

    Raises ValueError for an array that is no image, and where the kernel does not fit into it.
    """
    if x.ndim not in (3, 4) or 0 in x.shape[-3:]:
        raise ValueError(f"unfold takes an image or a batch of images, it was given an array of shape {x.shape}")
    rows, columns = _pixels(x.shape[-3:-1], kernel, dilation, padding, stride)
    patches = padded(x, [(p, p) for p in padding])[..., rows, columns, :]
    return rearrange(patches, "... y x i j c -> ... (y x) (c i j)")


def fold(x: Any, size: Pair, kernel: Pair, dilation: Pair, padding: Pair, stride: Pair) -> Any:
    """The sum of patches, each where it stood: (..., patches, c * kernel) to (..., h, w, c); undoes no overlap.

    https://docs.pytorch.org/docs/stable/generated/torch.nn.Fold.html. Where patches overlap they add, so that
    fold(unfold(x)) is x times the count of patches at a pixel.

    Raises ValueError for patches of another number or size.
    """
    rows, columns = _pixels(size, kernel, dilation, padding, stride)
    count = rows.shape[0] * columns.shape[1]
    if x.ndim not in (2, 3) or x.shape[-2] != count or x.shape[-1] % math.prod(kernel) or x.shape[-1] == 0:
        raise ValueError(f"fold to {size} takes {count} patches of a multiple of {math.prod(kernel)}, not {x.shape}")
    patches = rearrange(x, "... (y x) (c i j) -> ... y x i j c", y=rows.shape[0], i=kernel[0], j=kernel[1])
    whole = (size[0] + 2 * padding[0], size[1] + 2 * padding[1])
    canvas = jnp.zeros((*x.shape[:-2], *whole, patches.shape[-1]), x.dtype)
    return padded(canvas.at[..., rows, columns, :].add(patches), [(-p, -p) for p in padding])


def _pixels(size: Pair, kernel: Pair, dilation: Pair, padding: Pair, stride: Pair) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of a padded image by (patch row, patch column, kernel row, kernel column), to be broadcast."""
    if min(*kernel, *dilation, *stride) < 1 or min(padding) < 0:
        raise ValueError(
            f"kernel {kernel}, dilation {dilation} and stride {stride} are positive, padding {padding} is 0 up"
        )
    found = []
    for n, k, d, p, s in zip(size, kernel, dilation, padding, stride, strict=True):
        patches = (n + 2 * p - d * (k - 1) - 1) // s + 1
        if patches < 1:
            raise ValueError(f"a kernel {kernel} with dilation {dilation} does not fit into {size} padded by {padding}")
        found.append(np.arange(patches)[:, None] * s + np.arange(k) * d)
    return found[0][:, None, :, None], found[1][None, :, None, :]


def _pair(value: Any) -> Pair:
    return (value, value) if isinstance(value, int) else (value[0], value[-1])


_PATCHES = spatial("l")


@layer(
    "Unfold",
    Example("nn.Unfold((2, 3), padding=1, stride=2)", ((2, 3, 5, 7),)),
    "a patch is (c kh kw): channel after channel; slicing patches of an NHWC array gives (kh kw c)",
)
def unfolding(module: Any, inside: Inside) -> Form:
    """nn.Unfold."""
    how = [_pair(v) for v in (module.kernel_size, module.dilation, module.padding, module.stride)]

    def call(m: Carrier, x: Any) -> Any:
        return unfold(x, *how)

    text = f"unfold(x, {', '.join(map(str, how))})"
    return Form("Unfold", call, text=text, inputs=(spatial("h w"),), outputs=(_PATCHES,))


@layer(
    "Fold",
    Example("nn.Fold((4, 5), (2, 3), padding=1, stride=2)", ((2, 18, 9),)),
    "overlapping patches add; a patch is (c kh kw), channel after channel",
)
def folding(module: Any, inside: Inside) -> Form:
    """nn.Fold."""
    how = [_pair(v) for v in (module.kernel_size, module.dilation, module.padding, module.stride)]
    size = _pair(module.output_size)

    def call(m: Carrier, x: Any) -> Any:
        return fold(x, size, *how)

    text = f"fold(x, {', '.join(map(str, [size, *how]))})"
    return Form("Fold", call, text=text, inputs=(_PATCHES,), outputs=(spatial("h w"),))
