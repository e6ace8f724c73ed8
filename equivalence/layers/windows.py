"""Windows along axes: where the windows of a pooling layer lie, and their greatest values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from equivalence.errors import InputError


@dataclass(frozen=True)
class Window:
    """The window of a pooling layer, one number an axis.

    Attributes:
        kernel, stride, padding, dilation: as torch's; the padding is added on both sides.
        ceil_mode: whether a last window may reach over the end, as long as it starts inside or in the left padding.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    ceil_mode: bool = False

    def outputs(self, sizes: Sequence[int]) -> tuple[int, ...]:
        """The number of windows along each axis.

        https://docs.pytorch.org/docs/stable/generated/torch.nn.MaxPool2d.html, where JAX only has VALID and SAME.
        Raises InputError for a window that torch refuses, on its own or for inputs of these sizes.
        """
        for name, least in (("kernel", 1), ("stride", 1), ("padding", 0), ("dilation", 1)):
            if min(getattr(self, name)) < least:
                raise InputError(f"{name} is {getattr(self, name)}: each must be at least {least}")
        if any(2 * padding > kernel for padding, kernel in zip(self.padding, self.kernel, strict=True)):
            raise InputError(f"padding {self.padding} is more than half of the kernel {self.kernel}")
        counts = []
        for size, kernel, stride, padding, dilation in zip(
            sizes, self.kernel, self.stride, self.padding, self.dilation, strict=True
        ):
            room = size + 2 * padding - dilation * (kernel - 1) - 1
            count = (room + (stride - 1 if self.ceil_mode else 0)) // stride + 1
            counts.append(count - (self.ceil_mode and (count - 1) * stride >= size + padding))
        if min(counts) < 1:
            raise InputError(f"inputs of sizes {tuple(sizes)} are too small for windows of {self.kernel}")
        return tuple(counts)

    def places(self, sizes: Sequence[int]) -> list[np.ndarray]:
        """For each axis the places (outputs, kernel) that each window covers, from -padding on."""
        return [
            np.arange(count)[:, None] * stride - padding + np.arange(kernel) * dilation
            for count, kernel, stride, padding, dilation in zip(
                self.outputs(sizes), self.kernel, self.stride, self.padding, self.dilation, strict=True
            )
        ]

    def margins(self, sizes: Sequence[int]) -> tuple[tuple[int, int], ...]:
        """For each axis the padding (low, high) with which a framework that only rounds down has these windows."""
        return tuple(
            (padding, max(padding, int(places[-1, -1]) + 1 - size))
            for padding, places, size in zip(self.padding, self.places(sizes), sizes, strict=True)
        )


def numbers(value: Any, count: int) -> tuple[Any, ...]:
    """One number an axis, from one or from as many; raises InputError for another count."""
    whole = tuple(value) if isinstance(value, (tuple, list)) else (value,) * count
    whole = whole * count if len(whole) == 1 else whole
    if len(whole) != count:
        raise InputError(f"{value} is not one number or {count}")
    return whole


def spatial_sizes(x: Any, count: int) -> tuple[int, ...]:
    """The sizes of the spatial axes of inputs that lie channels last, with or without a batch.

    Raises InputError for another number of axes, and for a spatial axis of size 0.
    """
    if x.ndim not in (count + 1, count + 2):
        raise InputError(
            f"inputs of shape {x.shape}, channels last, have {x.ndim} axes, not {count + 1} or {count + 2}"
        )
    if 0 in x.shape[-1 - count : -1]:
        raise InputError(f"inputs of shape {x.shape}, channels last, have a spatial axis of size 0")
    return tuple(x.shape[-1 - count : -1])


def within(places: np.ndarray, size: int) -> np.ndarray:
    """Places (outputs, kernel) with those outside the axis moved to the nearest of the same window inside.

    A window that is all padding keeps its first place after the axis' start, at or over its end.

    >>> within(np.array([[-1, 0, 1], [2, 3, 4]]), 4).tolist()
    [[0, 0, 1], [2, 3, 3]]
    """
    first = np.where(places >= 0, places, places.max(initial=0) + 1).min(1, keepdims=True)
    last = np.maximum(np.where(places < size, places, -1).max(1, keepdims=True), first)
    return np.clip(places, first, last)


def greatest(x: Any, places: Sequence[Any], axes: Sequence[int]) -> tuple[Any, Any]:
    """The greatest value of each window, and where it first stands.

    https://docs.pytorch.org/docs/stable/generated/torch.nn.MaxPool2d.html: the gradient goes to the first
    greatest value alone, where `jnp.max` splits it evenly. Among NaN that is the first, torch's the last.

    Args:
        x: inputs.
        places: for each axis the places (outputs, kernel), ascending; one at or over the end counts as -inf.
        axes: the axes, ascending and adjacent.

    Returns:
        the values, and their places counted row by row over the axes.
    """
    lowest = -jnp.inf if jnp.issubdtype(x.dtype, jnp.inexact) else jnp.iinfo(x.dtype).min
    where: Any = jnp.zeros(x.shape, int)
    row = 1
    for axis, at in reversed(list(zip(axes, places, strict=True))):
        size = x.shape[axis]
        values = jnp.take(x, at, axis=axis, mode="fill", fill_value=lowest)
        found = jnp.argmax(values, axis + 1, keepdims=True)
        x = jnp.take_along_axis(values, found, axis + 1).squeeze(axis + 1)
        before = jnp.take(where, at, axis=axis, mode="clip") + spread(at, values.ndim, axis) * row
        where = jnp.take_along_axis(before, found, axis + 1).squeeze(axis + 1)
        row *= size
    return x, where


def spread(table: Any, ndim: int, axis: int) -> Any:
    """A table (outputs, terms) as it multiplies what `jnp.take` along an axis gives, an array of `ndim` axes."""
    return jnp.expand_dims(jnp.asarray(table), tuple(i for i in range(ndim) if i not in (axis, axis + 1)))
