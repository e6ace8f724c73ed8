"""Planted faults in pooling: other windows, counts, ties, places and norms, as one writes them first. All caught."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import flax.linen as flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from torch import nn

from equivalence.layers import adaptive_pooling, pooling
from equivalence.layers.windows import Window, greatest
from tests.layers.sides import disagree, normal
from tests.layers.test_pooling import tied

SPACE, WHOLE = "equivalence.layers.pooling", "equivalence.layers.adaptive_pooling"
TIED = tied(1, 2, 6, 8)
NEGATIVE = -np.abs(normal(1, 2, 6, 8)) - 1
ONCE_MORE = np.array([[[2, 2, 0, 2]]])


def split_greatest(x: Any, places: Any, axes: Any) -> Any:
    """The greatest by jnp.max, which splits the gradient of ties."""
    _, where = greatest(x, places, axes)
    for axis, at in zip(axes, places, strict=True):
        x = jnp.take(x, at, axis=axis, mode="fill", fill_value=-jnp.inf).max(axis + 1)
    return x, where


def last_greatest(x: Any, places: Any, axes: Any) -> Any:
    """The last of tied values."""
    return greatest(x, [at[:, ::-1] for at in places], axes)


def column_by_column(x: Any, given: Window) -> Any:
    values, where = pooling.max_pool(x, given), max_pool_places(x, given)[1]
    height, width = x.shape[-3:-1]
    return values, where % width * height + where // width


def whole_counts(x: Any, given: Window, include: bool, divisor: Any) -> Any:
    """The mean over the kernel's size even where a last window is cut."""
    return average_pool(x, given, include, divisor or math.prod(given.kernel))


def plain_norm(x: Any, p: float, given: Window) -> Any:
    return (average_pool(x ** int(p), given) * math.prod(given.kernel)) ** (1 / p)


def mean_norm(x: Any, p: float, given: Window) -> Any:
    return average_pool(x ** int(p), given) ** (1 / p)


def cut_norm(x: Any, p: float, given: Window) -> Any:
    """The sum of what there is, where a last window is cut."""
    return average_pool(x ** int(p), given, True, 1) ** (1 / p)


def absolute_norm(x: Any, p: float, given: Window) -> Any:
    return max_pool(jnp.abs(x), given)


def unpooled(how: str) -> Callable[..., Any]:
    """Unpooling by `.at[].add` or by `.at[].set` alone."""

    def put(x: Any, indices: Any, sizes: Any) -> Any:
        at = jnp.zeros((1, *sizes, 1), x.dtype).at[0, indices.reshape(-1), 0]
        return getattr(at, how)(x.reshape(-1))

    return put


average_pool, max_pool, max_pool_places = pooling.average_pool, pooling.max_pool, pooling.max_pool_places

FAULTS: dict[str, tuple[nn.Module, tuple[Any, ...], str, Any]] = {
    "SAME on even sizes": (
        nn.MaxPool2d(3, 2, 1),
        (normal(1, 2, 6, 8),),
        f"{SPACE}.max_pool",
        lambda x, given: flax.max_pool(x, given.kernel, given.stride, "SAME"),
    ),
    "padding with zeros that win": (
        nn.MaxPool2d(3, 2, 1),
        (NEGATIVE,),
        f"{SPACE}.max_pool",
        lambda x, given: jnp.maximum(max_pool(x, given), -1.0),
    ),
    "zeros at the end for ceil_mode": (
        nn.MaxPool2d(2, ceil_mode=True),
        (NEGATIVE[..., :5, :7],),
        f"{SPACE}.max_pool",
        lambda x, given: flax.max_pool(jnp.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0))), (2, 2), (2, 2)),
    ),
    "no dilation": (
        nn.MaxPool2d(3, 1, 1, 2),
        (normal(1, 2, 6, 8),),
        f"{SPACE}.max_pool",
        lambda x, given: flax.max_pool(x, given.kernel, given.stride),
    ),
    "ties split": (nn.MaxPool2d(2, return_indices=True), (TIED,), f"{SPACE}.greatest", split_greatest),
    "the last of ties": (nn.MaxPool2d(2, dilation=2), (TIED,), f"{SPACE}.greatest", last_greatest),
    "places column by column": (
        nn.MaxPool2d(2, return_indices=True),
        (normal(1, 2, 6, 8),),
        f"{SPACE}.max_pool_places",
        column_by_column,
    ),
    "the padding counted": (
        nn.AvgPool2d(3, 2, 1, count_include_pad=False),
        (normal(1, 2, 6, 8),),
        f"{SPACE}.average_pool",
        lambda x, given, include, divisor: average_pool(x, given, True, divisor),
    ),
    "the padding not counted": (
        nn.AvgPool2d(3, 2, 1),
        (normal(1, 2, 6, 8),),
        f"{SPACE}.average_pool",
        lambda x, given, include, divisor: average_pool(x, given, False, divisor),
    ),
    "a cut window counted whole": (
        nn.AvgPool2d(3, 2, ceil_mode=True),
        (normal(1, 2, 6, 8),),
        f"{SPACE}.average_pool",
        whole_counts,
    ),
    "no divisor": (
        nn.AvgPool2d(2, divisor_override=3),
        (normal(1, 2, 6, 8),),
        f"{SPACE}.average_pool",
        lambda x, given, include, divisor: average_pool(x, given, include),
    ),
    "a norm whose gradient is NaN at 0": (nn.LPPool2d(2, 2), (TIED * 0,), f"{SPACE}.power_pool", plain_norm),
    "a norm of the mean": (nn.LPPool2d(2, 2), (normal(1, 2, 6, 8),), f"{SPACE}.power_pool", mean_norm),
    "a cut norm not scaled up": (
        nn.LPPool2d(2, 3, 2, ceil_mode=True),
        (normal(1, 2, 6, 8),),
        f"{SPACE}.power_pool",
        cut_norm,
    ),
    "absolute values with slope 1 at 0": (
        nn.LPPool2d(math.inf, 2),
        (TIED * 0,),
        f"{SPACE}.power_pool",
        absolute_norm,
    ),
    "values at one place added": (
        nn.MaxUnpool1d(2, 1),
        (normal(1, 1, 4), ONCE_MORE),
        f"{SPACE}.max_unpool",
        unpooled("add"),
    ),
    "values at one place with one gradient": (
        nn.MaxUnpool1d(2, 1),
        (normal(1, 1, 4), ONCE_MORE),
        f"{SPACE}.max_unpool",
        unpooled("set"),
    ),
    "parts that do not overlap": (
        nn.AdaptiveAvgPool1d(3),
        (normal(1, 2, 8),),
        f"{WHOLE}.parts",
        lambda size, count: (np.arange(count * (size // count)).reshape(count, -1), np.full(count, size // count)),
    ),
    "ties of parts split": (nn.AdaptiveMaxPool2d(3), (TIED,), f"{WHOLE}.greatest", split_greatest),
    "a mean over all": (
        nn.AdaptiveAvgPool2d((None, 1)),
        (normal(1, 2, 6, 8),),
        f"{WHOLE}.adaptive_average",
        lambda x, asked: x.mean((-3, -2), keepdims=True) + 0 * x[..., :, :1, :],
    ),
    "random numbers for height first": (
        nn.FractionalMaxPool2d(2, output_size=4),
        (normal(1, 3, 17, 19),),
        f"{WHOLE}.fractional_max",
        lambda x, kernel, sizes, samples: fractional_max(x, kernel, sizes, samples[..., ::-1]),
    ),
    "fractional windows in regular places": (
        nn.FractionalMaxPool2d(2, output_size=4),
        (normal(1, 3, 17, 19),),
        f"{WHOLE}.fractional_max",
        lambda x, kernel, sizes, samples: fractional_max(x, kernel, sizes, 0 * samples),
    ),
    "a last window that does not end with the axis": (
        nn.FractionalMaxPool2d(2, output_size=4),
        (normal(1, 3, 17, 19),),
        f"{WHOLE}._starts",
        lambda sample, size, count, kernel: starts(sample, size - 1, count, kernel),
    ),
}
fractional_max, starts = adaptive_pooling.fractional_max, adaptive_pooling._starts


@pytest.mark.parametrize(("module", "inputs", "name", "fault"), FAULTS.values(), ids=FAULTS)
def test_a_fault(
    module: nn.Module, inputs: tuple[Any, ...], name: str, fault: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(name, fault)
    assert disagree(module, *inputs, moved=())


@pytest.mark.parametrize(("module", "inputs", "name", "fault"), FAULTS.values(), ids=FAULTS)
def test_the_same_without_it(module: nn.Module, inputs: tuple[Any, ...], name: str, fault: Any) -> None:
    assert disagree(module, *inputs, moved=()) == {}


def test_windows_drawn_once_and_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax.random, "uniform", lambda key, shape, dtype: jnp.full(shape, 0.5, dtype))
    with pytest.raises(Exception, match="draw"):
        disagree(nn.FractionalMaxPool2d(2, output_size=4), normal(1, 3, 17, 19))
