"""The arithmetic of normalisation: by a mean and a variance, and by neighbours in the channels, the last axis."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp


def normalised(x: Any, mean: Any, var: Any, scale: Any, bias: Any, eps: float) -> Any:
    """`(x - mean) / sqrt(var + eps) * scale + bias`; a scale or bias of None is left out.

    https://docs.pytorch.org/docs/stable/generated/torch.nn.BatchNorm1d.html
    """
    return weighted((x - mean) * jax.lax.rsqrt(var + eps), scale, bias)


def weighted(x: Any, scale: Any, bias: Any) -> Any:
    """`x * scale + bias`; a scale or bias of None is left out."""
    x = x if scale is None else x * scale
    return x if bias is None else x + bias


def weights_text(held: Mapping[str, Any]) -> str:
    """The scale and the bias as one writes them, None where torch's leaves hold none."""
    return f"{'scale' if 'weight' in held else None}, {'bias' if 'bias' in held else None}"


def statistics(x: Any, axes: Sequence[int]) -> tuple[Any, Any]:
    """Mean and biased variance over axes, which are kept with length 1; the variance from differences to the mean."""
    mean = jnp.mean(x, axes, keepdims=True)
    return mean, jnp.mean(jnp.square(x - mean), axes, keepdims=True)


def mean_square(x: Any, axes: Sequence[int]) -> tuple[Any, Any]:
    """0 and the mean square over axes, which are kept with length 1: what RMSNorm has for `statistics`."""
    return 0, jnp.mean(jnp.square(x), axes, keepdims=True)


def unbiased(var: Any, count: int) -> Any:
    """A biased variance of `count` elements as the unbiased one, which torch's running variance averages."""
    return var * (count / (count - 1))


def local_response_norm(x: Any, size: int, alpha: float, beta: float, k: float) -> Any:
    """`x / (k + alpha * mean of x^2 over size channels)^beta`; an even size reaches one channel further back than on.

    https://docs.pytorch.org/docs/stable/generated/torch.nn.LocalResponseNorm.html
    """
    around = _window(jnp.square(x), size // 2, (size - 1) // 2)
    return x / jnp.power(alpha * around / size + k, beta)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3, 4))
def cross_map_lrn(x: Any, size: int, alpha: float, beta: float, k: float) -> Any:
    """LocalResponseNorm as torch's port of it from Lua computes it, value and derivative.

    Its windows hold channel 0 for ever, an even size counts one channel less, and its derivative is not that of its
    value: the derivative's window lies one channel too far back.

    https://docs.pytorch.org/docs/stable/generated/torch.nn.CrossMapLRN2d.html
    """
    return _forward(x, size, alpha, beta, k)[0]


def _forward(x: Any, size: int, alpha: float, beta: float, k: float) -> tuple[Any, tuple[Any, Any, Any]]:
    reach, squares = (size + 1) // 2, jnp.square(x)
    late = jnp.arange(x.shape[-1]) >= reach
    around = _window(squares, reach - 1, reach - 1) + jnp.where(late, squares[..., :1], 0)
    scale = around * (alpha / size) + k
    y = x * jnp.power(scale, -beta)
    return y, (x, y, scale)


def _backward(size: int, alpha: float, beta: float, k: float, kept: tuple[Any, Any, Any], slope: Any) -> tuple[Any]:
    if size == 1:
        raise ValueError("CrossMapLRN2d of size 1 has no derivative in torch, which refuses it")
    x, y, scale = kept
    back = size - size // 2
    around = _window(slope * y / scale, back, size - 1 - back)
    return (slope * jnp.power(scale, -beta) - 2 * alpha * beta / size * x * around,)


cross_map_lrn.defvjp(_forward, _backward)


def _window(x: Any, before: int, after: int) -> Any:
    """The sum, at each channel, of the channels from `before` back to `after` on; none beyond the ends."""
    count = x.shape[-1]
    padded = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(before, after)])
    return sum(padded[..., i : i + count] for i in range(before + after + 1))
