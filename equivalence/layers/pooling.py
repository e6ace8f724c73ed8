"""Max, average and power-average pooling, and max unpooling."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from equivalence.errors import InputError
from equivalence.layers.form import Form, spatial
from equivalence.layers.registry import Example, layer
from equivalence.layers.windows import Window, greatest, numbers, spatial_sizes, within

Inside = Callable[[Any], Form]
AXES = {1: "l", 2: "h w", 3: "d h w"}


def dimensions(module: Any) -> int:
    """The number of axes that a layer works over, from its class's name."""
    return int(type(module).__name__[-2])


def over_space(module: Any, call: Callable[..., Any], text: str, outputs: int = 1, inputs: int = 1) -> Form:
    """The form of a layer without leaves over the spatial axes."""
    pattern = spatial(AXES[dimensions(module)])
    return Form(type(module).__name__, call, text, inputs=(pattern,) * inputs, outputs=(pattern,) * outputs)


def window(module: Any) -> Window:
    """The window that a pooling layer has."""
    count = dimensions(module)
    kernel = numbers(module.kernel_size, count)
    stride = numbers(module.stride, count) if module.stride not in (None, ()) else kernel
    padding, dilation = numbers(getattr(module, "padding", 0), count), numbers(getattr(module, "dilation", 1), count)
    return Window(kernel, stride, padding, dilation, bool(getattr(module, "ceil_mode", False)))


def _sizes(x: Any, given: Window) -> tuple[int, ...]:
    if x.shape[-1] == 0:
        raise InputError(f"inputs of shape {x.shape}, channels last, have no channels")
    return spatial_sizes(x, len(given.kernel))


def _flax(name: str, given: Window, options: str = "") -> str:
    """Flax's own pooling with a window, as one writes it."""
    padding = f", padding={tuple((p, p) for p in given.padding)}" if any(given.padding) else ""
    return f"nn.{name}(x, {given.kernel}, strides={given.stride}{padding}{options})"


MAX = (
    "nn.max_pool has no ceil_mode, dilation or indices, and SAME shifts windows on even sizes; ties: the first takes"
    " the gradient, jnp.max splits it"
)


@layer("MaxPool1d", Example("nn.MaxPool1d(3, 2, 1, ceil_mode=True)", ((2, 3, 8),)), MAX)
@layer("MaxPool2d", Example("nn.MaxPool2d(3, 2, 1)", ((2, 3, 8, 6),)), MAX)
@layer("MaxPool3d", Example("nn.MaxPool3d(2, return_indices=True)", ((2, 3, 4, 5, 6),)), MAX)
def max_layer(module: Any, inside: Inside) -> Form:
    """nn.MaxPool1d, nn.MaxPool2d and nn.MaxPool3d."""
    given, indices = window(module), bool(module.return_indices)

    def call(m: Any, x: Any) -> Any:
        return max_pool_places(x, given) if indices else max_pool(x, given)

    plain = not indices and not given.ceil_mode and max(given.dilation) == 1
    text = _flax("max_pool", given) if plain else f"max_pool{'_places' * indices}(x, {given})"
    return over_space(module, call, text, outputs=1 + indices)


def max_pool(x: Any, given: Window) -> Any:
    """The greatest value in each window over the axes before the last; padding never wins.

    https://docs.pytorch.org/docs/stable/generated/torch.nn.MaxPool2d.html: `nn.max_pool`, with a last window that
    reaches over the end and with dilation, which it does not have. A window of padding and -inf alone has no gradient.
    Raises InputError for what torch refuses.
    """
    if max(given.dilation) > 1 or not jnp.issubdtype(x.dtype, jnp.inexact):
        return max_pool_places(x, given)[0]
    margins = given.margins(_sizes(x, given))
    return nn.max_pool(x, given.kernel, given.stride, margins)


def max_pool_places(x: Any, given: Window) -> tuple[Any, Any]:
    """`max_pool`, and the first place of each value, counted row by row over the axes without padding."""
    sizes = _sizes(x, given)
    places = [within(at, size) for at, size in zip(given.places(sizes), sizes, strict=True)]
    return greatest(x, places, range(x.ndim - 1 - len(sizes), x.ndim - 1))


AVERAGE = "count_include_pad=False has to be handed on (nn.avg_pool's default is True); it has no ceil_mode or divisor"


@layer("AvgPool1d", Example("nn.AvgPool1d(3, 2, 1, ceil_mode=True)", ((2, 3, 8),)), AVERAGE)
@layer("AvgPool2d", Example("nn.AvgPool2d(3, 2, 1, count_include_pad=False)", ((2, 3, 8, 6),)), AVERAGE)
@layer("AvgPool3d", Example("nn.AvgPool3d(2, divisor_override=3)", ((2, 3, 4, 5, 6),)), AVERAGE)
def average_layer(module: Any, inside: Inside) -> Form:
    """nn.AvgPool1d, nn.AvgPool2d and nn.AvgPool3d."""
    given, include, divisor = window(module), bool(module.count_include_pad), getattr(module, "divisor_override", None)
    if divisor == 0:
        raise InputError(f"{type(module).__name__}'s divisor_override is 0")
    fits = len(given.kernel) == 3

    def call(m: Any, x: Any) -> Any:
        if fits and any(size < kernel for size, kernel in zip(_sizes(x, given), given.kernel, strict=True)):
            raise InputError(f"AvgPool3d's inputs of shape {x.shape}, channels last, are smaller than {given.kernel}")
        return average_pool(x, given, include, divisor)

    plain = divisor is None and not given.ceil_mode
    options = "" if include or not any(given.padding) else ", count_include_pad=False"
    text = _flax("avg_pool", given, options) if plain else f"average_pool(x, {given}, {include}, {divisor})"
    return over_space(module, call, text)


def average_pool(x: Any, given: Window, include: bool = True, divisor: int | None = None) -> Any:
    """The mean in each window over the axes before the last.

    https://docs.pytorch.org/docs/stable/generated/torch.nn.AvgPool2d.html: `nn.avg_pool`, where a last window that
    reaches over the padding counts without what lies there.

    Args:
        x: floating inputs (..., channels).
        given: the window.
        include: whether the padding counts (count_include_pad).
        divisor: what the sums are divided by in place of the counts.

    Raises InputError for what torch refuses, and for integers, which torch rounds.
    """
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        raise InputError(f"average pooling takes floating inputs, not {x.dtype}")
    sizes = _sizes(x, given)
    sums = nn.pooling.pool(x, 0.0, lax.add, given.kernel, given.stride, given.margins(sizes))
    if divisor is not None:
        return sums / divisor
    counts = []
    for size, padding, places in zip(sizes, given.padding, given.places(sizes), strict=True):
        outside = padding if include else 0
        counts.append(((places >= -outside) & (places < size + outside)).sum(1))
    return sums / functools.reduce(np.multiply.outer, counts)[..., None].astype(x.dtype)


POWER = "Flax has none; a zero window has gradient 0 (kink), x ** (1 / p) NaN; ceil_mode scales up the windows it cuts"


@layer("LPPool1d", Example("nn.LPPool1d(2, 3, 2, ceil_mode=True)", ((2, 3, 8),)), POWER)
@layer("LPPool2d", Example("nn.LPPool2d(2, 3, 2)", ((2, 3, 8, 6),)), POWER)
@layer("LPPool3d", Example("nn.LPPool3d(2, 2)", ((2, 3, 4, 5, 6),)), POWER)
def power_layer(module: Any, inside: Inside) -> Form:
    """nn.LPPool1d, nn.LPPool2d and nn.LPPool3d."""
    p, given, count = float(module.norm_type), window(module), dimensions(module)
    if p == 0 or (isinstance(module.kernel_size, tuple) and (count == 1 or len(module.kernel_size) != count)):
        raise InputError(f"{module} cannot be called in torch either: norm_type 0, or a kernel_size that is no size")
    return over_space(module, lambda m, x: power_pool(x, p, given), f"power_pool(x, {p}, {given})")


def power_pool(x: Any, p: float, given: Window) -> Any:
    """The p-norm of each window without absolute values: `sum(x ** p) ** (1 / p)`; p = inf is the greatest |x|.

    https://docs.pytorch.org/docs/stable/generated/torch.nn.LPPool2d.html: in torch the sum is a mean times the kernel's
    size, so a window that ceil_mode cuts counts as a whole one; where the sum is 0 its gradient is 0, in JAX NaN.
    """
    if math.isinf(p):
        size = x * jnp.sign(x)  # jnp.abs has gradient 1 at 0, torch 0
        return max_pool(size, given) if p > 0 else -max_pool(-size, given)
    means = average_pool(x ** (int(p) if p.is_integer() else p), given)
    return jnp.where(means == 0, 0.0, means * math.prod(given.kernel)) ** (1 / p)


UNPOOL = (
    "Flax has none; where windows overlap .at[].set gives the gradient to one of them, torch to each; an index out of"
    " range gives NaN"
)


@layer("MaxUnpool1d", Example("nn.MaxUnpool1d(2)", lambda rng: _pooled(rng, 4)), UNPOOL)
@layer("MaxUnpool2d", Example("nn.MaxUnpool2d(2)", lambda rng: _pooled(rng, 4, 6)), UNPOOL)
@layer("MaxUnpool3d", Example("nn.MaxUnpool3d(2)", lambda rng: _pooled(rng, 4, 6, 2)), UNPOOL)
def unpool_layer(module: Any, inside: Inside) -> Form:
    """nn.MaxUnpool1d, nn.MaxUnpool2d and nn.MaxUnpool3d."""
    given = window(module)

    def call(m: Any, x: Any, indices: Any, output_size: Sequence[int] | None = None) -> Any:
        return max_unpool(x, indices, unpooled_sizes(x, given, output_size))

    return over_space(module, call, "max_unpool(x, indices, sizes)", inputs=2)


def unpooled_sizes(x: Any, given: Window, asked: Sequence[int] | None = None) -> tuple[int, ...]:
    """The sizes that max unpooling gives: those that the window would have covered, or those asked for, close to them.

    https://docs.pytorch.org/docs/stable/generated/torch.nn.MaxUnpool2d.html; `asked` may have batch and channels first.
    Raises InputError for sizes a stride or more away.
    """
    sizes = _sizes(x, given)
    covered = [
        (size - 1) * stride + kernel - 2 * padding
        for size, stride, kernel, padding in zip(sizes, given.stride, given.kernel, given.padding, strict=True)
    ]
    chosen = covered if asked is None else list(asked)[2:] if len(asked) == len(sizes) + 2 else list(asked)
    if len(chosen) != len(sizes) or any(
        size < 0 or abs(size - usual) >= stride
        for size, usual, stride in zip(chosen, covered, given.stride, strict=True)
    ):
        raise InputError(f"output_size {chosen} is not within a stride {given.stride} of {covered}")
    return tuple(chosen)


def max_unpool(x: Any, indices: Any, sizes: Sequence[int]) -> Any:
    """Values put at their places in zeros; of several at one place the last stays, and each has the gradient.

    https://docs.pytorch.org/docs/stable/generated/torch.nn.MaxUnpool2d.html: a scatter, whose derivative in JAX is that
    of the value that stays alone.

    Args:
        x: values (..., channels) over as many axes as `sizes` has.
        indices: their places, integers of the same shape, counted row by row over the axes.
        sizes: of the axes made.

    Returns:
        (..., *sizes, channels); a channel with an index out of range, which torch refuses, is NaN.

    Raises InputError for indices of another shape or dtype.
    """
    if indices.shape != x.shape or not jnp.issubdtype(indices.dtype, jnp.integer):
        raise InputError(f"indices {indices.dtype} {indices.shape} are not integers of the inputs' shape {x.shape}")
    batch, channels = x.shape[: -1 - len(sizes)], x.shape[-1]
    count, flat = math.prod(sizes), (*batch, math.prod(x.shape[len(batch) : -1]), channels)
    values, places = x.reshape(flat), indices.reshape(flat)
    known = ((places >= 0) & (places < count)).all(-2, keepdims=True)
    made = _scattered(values, jnp.where(known, places, 0), count)
    return jnp.where(known, made, jnp.nan).reshape(*batch, *sizes, channels)


def _scattered(values: Any, places: Any, count: int) -> Any:
    """Values (..., k, c) at their places along an axis of `count`."""
    *batch, _, channel = jnp.indices(values.shape, sparse=True)
    zeros = jnp.zeros((*values.shape[:-2], count, values.shape[-1]), values.dtype)

    @jax.custom_jvp
    def put(values: Any, places: Any) -> Any:
        return zeros.at[(*batch, places, channel)].set(values)

    @put.defjvp
    def each(given: Any, tangents: Any) -> Any:
        return put(*given), zeros.at[(*batch, given[1], channel)].add(tangents[0])

    return put(values, places)


def _pooled(rng: np.random.Generator, *sizes: int) -> tuple[Any, Any]:
    """Values (2, 3, half of the sizes), and a place in each window of two (int64)."""
    shape = (2, 3, *(size // 2 for size in sizes))
    along = [
        2 * np.arange(size // 2)[(..., *(None,) * (len(sizes) - 1 - i))] + rng.integers(0, 2, shape)
        for i, size in enumerate(sizes)
    ]
    return rng.standard_normal(shape), np.ravel_multi_index(along, sizes)
