"""Pooling to a given size: adaptive and fractional."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from equivalence.errors import InputError
from equivalence.layers.form import Form
from equivalence.layers.pooling import dimensions, over_space
from equivalence.layers.registry import Example, layer, leaves
from equivalence.layers.windows import greatest, numbers, spatial_sizes, spread
from equivalence.weights import Rule

Inside = Callable[[Any], Form]
Sizes = Sequence[int | None]


def parts(size: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """An axis in `count` parts that may overlap: the places (count, widest) of each, and how many it has.

    https://docs.pytorch.org/docs/stable/generated/torch.nn.AdaptiveAvgPool2d.html: part i goes from
    floor(i size / count) to ceil((i + 1) size / count). Beyond its end a part repeats its last place.

    >>> parts(5, 3)[0].tolist()
    [[0, 1, 1], [1, 2, 3], [3, 4, 4]]
    """
    number = np.arange(count)
    first, last = number * size // max(count, 1), -(-(number + 1) * size // max(count, 1)) - 1
    widest = int((last - first).max(initial=0)) + 1
    return np.minimum(first[:, None] + np.arange(widest), last[:, None]), last - first + 1


def asked_sizes(module: Any) -> tuple[int | None, ...]:
    """The sizes that an adaptive layer gives; None keeps the input's. Raises InputError for what torch refuses."""
    count, asked = dimensions(module), module.output_size
    whole = tuple(asked) if isinstance(asked, (tuple, list)) else (asked,) * count
    alone = asked is None or (count == 1 and None in whole)
    if alone or len(whole) != count or any(size is not None and size < 0 for size in whole):
        raise InputError(f"{module} cannot be called in torch either: output_size is no size for {count} axes")
    return whole


def _given(x: Any, asked: Sizes) -> list[tuple[int, int, int]]:
    """(axis, size, size asked for) of each spatial axis."""
    axes = range(x.ndim - 1 - len(asked), x.ndim - 1)
    sizes = zip(spatial_sizes(x, len(asked)), asked, strict=True)
    return [(axis, size, size if wanted is None else wanted) for axis, (size, wanted) in zip(axes, sizes, strict=True)]


MEAN = "Flax has none: parts overlap where sizes do not divide; jnp.mean over the axes only for size 1"


@layer("AdaptiveAvgPool1d", Example("nn.AdaptiveAvgPool1d(3)", ((2, 3, 8),)), MEAN)
@layer("AdaptiveAvgPool2d", Example("nn.AdaptiveAvgPool2d((3, None))", ((2, 3, 8, 6),)), MEAN)
@layer("AdaptiveAvgPool3d", Example("nn.AdaptiveAvgPool3d(1)", ((2, 3, 4, 5, 6),)), MEAN)
def adaptive_average_layer(module: Any, inside: Inside) -> Form:
    """nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d and nn.AdaptiveAvgPool3d."""
    asked = asked_sizes(module)
    axes = tuple(range(-1 - len(asked), -1))
    text = f"jnp.mean(x, {axes}, keepdims=True)" if set(asked) == {1} else f"adaptive_average(x, {asked})"
    return over_space(module, lambda m, x: adaptive_average(x, asked), text)


def adaptive_average(x: Any, asked: Sizes) -> Any:
    """The mean of each part of the axes before the last, `parts`; None keeps an axis.

    https://docs.pytorch.org/docs/stable/generated/torch.nn.AdaptiveAvgPool2d.html. Raises InputError for what torch
    refuses.
    """
    for axis, size, count in _given(x, asked):
        places, counts = parts(size, count)
        values, taken = jnp.take(x, places, axis=axis), np.arange(places.shape[1]) < counts[:, None]
        sums = jnp.where(spread(taken, values.ndim, axis), values, 0).sum(axis + 1, keepdims=True)
        x = (sums / spread(counts[:, None], values.ndim, axis).astype(x.dtype)).squeeze(axis + 1)
    return x


GREATEST = "Flax has none: parts overlap where sizes do not divide; ties: the first takes all, where jnp.max splits"


@layer("AdaptiveMaxPool1d", Example("nn.AdaptiveMaxPool1d(3)", ((2, 3, 8),)), GREATEST)
@layer("AdaptiveMaxPool2d", Example("nn.AdaptiveMaxPool2d((3, None))", ((2, 3, 8, 6),)), GREATEST)
@layer("AdaptiveMaxPool3d", Example("nn.AdaptiveMaxPool3d(2, return_indices=True)", ((2, 3, 4, 5, 6),)), GREATEST)
def adaptive_max_layer(module: Any, inside: Inside) -> Form:
    """nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d and nn.AdaptiveMaxPool3d."""
    asked, indices = asked_sizes(module), bool(module.return_indices)

    def call(m: Any, x: Any) -> Any:
        both = adaptive_max(x, asked)
        return both if indices else both[0]

    return over_space(module, call, f"adaptive_max(x, {asked})" + "[0]" * (not indices), outputs=1 + indices)


def adaptive_max(x: Any, asked: Sizes) -> tuple[Any, Any]:
    """The greatest value of each part of the axes before the last, and its first place; None keeps an axis.

    https://docs.pytorch.org/docs/stable/generated/torch.nn.AdaptiveMaxPool2d.html. Raises InputError for what torch
    refuses.
    """
    given = _given(x, asked)
    if x.shape[-1] == 0:
        raise InputError(f"inputs of shape {x.shape}, channels last, have no channels")
    return greatest(x, [parts(size, count)[0] for _, size, count in given], [axis for axis, _, _ in given])


FRACTIONAL = "Flax has none; torch draws in eval mode too; in 2d the first random number places windows along the width"


@layer("FractionalMaxPool2d", Example("nn.FractionalMaxPool2d(2, output_size=(3, 4))", ((2, 3, 8, 6),)), FRACTIONAL)
@layer("FractionalMaxPool3d", Example("nn.FractionalMaxPool3d(2, output_ratio=0.5)", ((2, 3, 4, 5, 6),)), FRACTIONAL)
def fractional_layer(module: Any, inside: Inside) -> Form:
    """nn.FractionalMaxPool2d and nn.FractionalMaxPool3d."""
    count, indices = dimensions(module), bool(module.return_indices)
    kernel = numbers(module.kernel_size, count)
    held, buffers = leaves(module)
    ratio, asked = module.output_ratio, module.output_size

    def call(m: Any, x: Any) -> Any:
        sizes = spatial_sizes(x, count)
        wanted = tuple(int(n * part) for n, part in zip(sizes, ratio, strict=True)) if asked is None else asked
        samples = m["random_samples"]
        if samples is None:
            shape = (x.shape[0] if x.ndim == count + 2 else 1, x.shape[-1], count)
            samples = jax.random.uniform(m.key(), shape, x.dtype)
        both = fractional_max(x, kernel, wanted, samples)
        return both if indices else both[0]

    form = over_space(module, call, "fractional_max(x, kernel, sizes, samples)", outputs=1 + indices)
    return dataclasses.replace(
        form, held=held, buffers=buffers, draws=not held, rules=tuple(Rule(name, name[1:]) for name in held)
    )


def fractional_max(x: Any, kernel: Sequence[int], sizes: Sequence[int], samples: Any) -> tuple[Any, Any]:
    """The greatest value of windows spread by random numbers over the axes before the last, and its first place.

    https://docs.pytorch.org/docs/stable/generated/torch.nn.FractionalMaxPool2d.html, https://arxiv.org/abs/1412.6071.

    Args:
        x: (n, *axes, c) or (*axes, c).
        kernel: the size of the windows.
        sizes: how many windows.
        samples: uniform numbers (n or more, c, axes); over two axes the last axis' number stands first.

    Raises InputError for windows that do not fit and for samples of another shape.
    """
    count = len(kernel)
    inputs = spatial_sizes(x, count)
    if (
        min(kernel) < 1
        or min(sizes) < 0
        or any(k + n - 1 > size for k, n, size in zip(kernel, sizes, inputs, strict=True))
    ):
        raise InputError(f"{tuple(sizes)} windows of {tuple(kernel)} do not fit in inputs of sizes {inputs}")
    batch = x[None] if x.ndim == count + 1 else x
    if x.shape[-1] == 0 or samples.shape[1:] != (x.shape[-1], count) or len(samples) < len(batch):
        raise InputError(f"random samples {samples.shape} do not fit inputs {x.shape}, channels last")
    order = (1, 0) if count == 2 else (0, 1, 2)

    def plane(values: Any, sample: Any) -> tuple[Any, Any]:
        places = [
            _starts(sample[order[i]].astype(x.dtype), inputs[i], sizes[i], kernel[i])[:, None] + np.arange(kernel[i])
            for i in range(count)
        ]
        return greatest(values, places, range(count))

    channels = jax.vmap(plane, in_axes=(-1, 0), out_axes=-1)
    values, where = jax.vmap(channels)(batch, samples[: len(batch)])
    return (values, where) if x.ndim == count + 2 else (values[0], where[0])


def _starts(sample: Any, size: int, count: int, kernel: int) -> Any:
    """Where the windows of an axis start, in the arithmetic of the inputs; the last ends with the axis."""
    real = np.dtype(sample.dtype).type
    step = real(size - kernel) / real(max(count - 1, 1))
    spread = ((jnp.arange(count, dtype=sample.dtype) + sample) * step).astype(int) - (sample * step).astype(int)
    return jnp.where(np.arange(count) == count - 1, size - kernel, spread)
