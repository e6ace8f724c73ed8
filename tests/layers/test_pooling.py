"""Pooling against torch's: every option, ties, overlapping windows put back, and what torch refuses."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

import equivalence as eq
from equivalence.errors import InputError
from equivalence.layers.pooling import max_unpool
from equivalence.layers.windows import Window, within
from tests.layers.sides import assert_translates, disagree, normal

INF = float("inf")
frameworks = st.sampled_from(["nnx", "linen"])


@st.composite
def shapes(draw: st.DrawFn, axes: int, most: int = 7) -> tuple[int, ...]:
    """Of inputs over so many axes, batched or not; sizes may be 1."""
    return (*draw(st.sampled_from([(), (2,)])), 3, *(draw(st.integers(1, most)) for _ in range(axes)))


@st.composite
def windows(draw: st.DrawFn, axes: int) -> dict[str, Any]:
    kernel = tuple(draw(st.integers(1, 4)) for _ in range(axes))
    return {
        "kernel_size": kernel,
        "stride": draw(st.one_of(st.none(), st.tuples(*[st.integers(1, 4)] * axes))),
        "padding": tuple(draw(st.integers(0, k // 2)) for k in kernel),
        "ceil_mode": draw(st.booleans()),
    }


def tied(*shape: int) -> np.ndarray:
    """Numbers 0, 1 and 2, as after a ReLU of quantised values."""
    return np.random.default_rng(shape).integers(0, 3, shape).astype(np.float32)


def callable_in_torch(module: nn.Module, *inputs: np.ndarray) -> bool:
    try:
        module(*map(torch.tensor, inputs))
    except (RuntimeError, ValueError):
        return False
    return True


def padding_alone(shape: tuple[int, ...], options: dict[str, Any], dilation: int) -> bool:
    """Whether a window sees padding only: torch's gradient of it then lands outside the channel."""
    axes = len(options["kernel_size"])
    stride = options["stride"] or options["kernel_size"]
    given = Window(options["kernel_size"], stride, options["padding"], (dilation,) * axes, options["ceil_mode"])
    sizes = shape[-axes:]
    return any((within(at, n) >= n).any() for at, n in zip(given.places(sizes), sizes, strict=True))


@settings(max_examples=6)
@given(st.data(), st.integers(1, 3), frameworks)
def test_max_pool(data: st.DataObject, axes: int, to: str) -> None:
    options, dilation = data.draw(windows(axes)), data.draw(st.integers(1, 2))
    x = normal(*data.draw(shapes(axes)))
    module = getattr(nn, f"MaxPool{axes}d")(**options, dilation=dilation, return_indices=data.draw(st.booleans()))
    assume(callable_in_torch(module, x) and not padding_alone(x.shape, options, dilation))
    assert_translates(module, x, frameworks=(to,))


@pytest.mark.parametrize("options", [{}, {"dilation": 2}, {"return_indices": True}, {"ceil_mode": True}], ids=str)
def test_the_first_of_tied_values_takes_the_gradient(options: dict[str, Any]) -> None:
    assert_translates(nn.MaxPool2d(3, 2, 1, **options), tied(2, 3, 6, 8), moved=(), frameworks=("nnx",))


@pytest.mark.parametrize(
    "options", [{}, {"padding": 1, "return_indices": True}, {"padding": 1, "dilation": 2}], ids=str
)
def test_a_window_without_a_finite_value(options: dict[str, Any]) -> None:
    x = np.full((1, 2, 5, 7), -np.inf, np.float32)
    assert_translates(nn.MaxPool2d(3, 2, **options), x, moved=(), frameworks=("nnx",))


def test_a_padded_window_without_a_finite_value_loses_its_gradient() -> None:
    x = np.full((1, 1, 4), -np.inf, np.float32)
    module = nn.MaxPool1d(2, 2, 1)
    differ = disagree(module, x, moved=())
    assert differ
    assert all(path.startswith("input_gradients") for path in differ)


def test_a_window_in_the_padding_is_the_least_number_and_has_no_gradient() -> None:
    module = nn.MaxPool1d(2, 1, 1, 3)  # its one window reads places -1 and 2
    x = normal(1, 1, 2)
    made = eq.translate(module)
    assert np.asarray(made(x)).item() == module(torch.tensor(x)).item() == -INF
    assert not jax.grad(lambda x: made(x).sum())(jnp.asarray(x)).any()


def test_integers_have_a_greatest_value_and_no_mean() -> None:
    x = np.arange(24, dtype=np.int32).reshape(1, 2, 3, 4) - 12
    ours = eq.translate(nn.MaxPool2d(2, 2, 1))(jnp.asarray(x))
    assert np.array_equal(ours, nn.MaxPool2d(2, 2, 1)(torch.tensor(x)))
    with pytest.raises(InputError, match="floating"):
        eq.translate(nn.AvgPool2d(2))(jnp.asarray(x))


@settings(max_examples=8)
@given(st.data(), st.integers(1, 3), frameworks)
def test_average_pool(data: st.DataObject, axes: int, to: str) -> None:
    options = data.draw(windows(axes)) | {"count_include_pad": data.draw(st.booleans())}
    if axes > 1:
        options["divisor_override"] = data.draw(st.sampled_from([None, 3, -2]))
    module, x = getattr(nn, f"AvgPool{axes}d")(**options), normal(*data.draw(shapes(axes)))
    assume(callable_in_torch(module, x))
    assert_translates(module, x, frameworks=(to,))


@settings(max_examples=6)
@given(st.data(), st.integers(1, 3), st.sampled_from([1, 2, 3, 2.5, -2, INF, -INF]), frameworks)
def test_power_pool(data: st.DataObject, axes: int, p: float, to: str) -> None:
    options = data.draw(windows(axes))
    kernel, stride = options["kernel_size"], options["stride"]
    if axes == 1:
        kernel, stride = kernel[0], stride and stride[0]
    x = normal(*data.draw(shapes(axes)))
    module = getattr(nn, f"LPPool{axes}d")(p, kernel, stride, ceil_mode=options["ceil_mode"])
    x = x if p in (1, 2, INF, -INF) else np.abs(x) + np.float32(0.1)
    assume(callable_in_torch(module, x))
    assert_translates(module, x, frameworks=(to,))


@pytest.mark.parametrize("p", [1, 2, 2.5, INF, -INF])
def test_a_window_of_zeros_has_gradient_zero(p: float) -> None:
    x = tied(1, 2, 6, 4)
    x[..., :3, :] = 0
    assert_translates(nn.LPPool2d(p, 2), x, moved=(), frameworks=("nnx",))


@settings(max_examples=6)
@given(st.data(), st.integers(1, 3), frameworks)
def test_max_unpool(data: st.DataObject, axes: int, to: str) -> None:
    options, x = data.draw(windows(axes)), torch.tensor(normal(*data.draw(shapes(axes))))
    del options["ceil_mode"]
    pool = getattr(nn, f"MaxPool{axes}d")(**options, return_indices=True)
    assume(callable_in_torch(pool, x.numpy()))
    values, indices = pool(x)
    back = getattr(nn, f"MaxUnpool{axes}d")(**options)
    size = data.draw(st.sampled_from([{}, {"output_size": list(x.shape[-axes:])}, {"output_size": list(x.shape)}]))
    try:
        assume(back(values, indices, **size).numel())
    except (RuntimeError, ValueError):
        assume(False)
    assert_translates(back, values.numpy(), indices.numpy(), frameworks=(to,), **size)


def test_of_several_values_at_one_place_the_last_stays_and_each_has_the_gradient() -> None:
    indices = np.array([[[2, 2, 0, 2]]])
    assert_translates(nn.MaxUnpool1d(2, 1), normal(1, 1, 4), indices)


def test_nothing_made_is_empty() -> None:
    values, indices = torch.ones(2, 3, 1), torch.zeros(2, 3, 1, dtype=torch.int64)
    module = nn.MaxUnpool1d(2, 1, 1)
    assert eq.translate(module)(values, indices).shape == tuple(module(values, indices).shape) == (2, 3, 0)


def test_an_index_out_of_range_makes_its_channel_nan() -> None:
    for wrong in (-1, 4):
        indices = jnp.asarray([[0, 1], [0, wrong], [3, 1]]).T
        made = np.isnan(max_unpool(jnp.ones((2, 3)), indices, (4,)))
        assert made.all(0).tolist() == made.any(0).tolist() == [False, True, False]
        with pytest.raises(RuntimeError, match="invalid max index"):
            nn.MaxUnpool1d(2)(torch.ones(3, 2), torch.tensor(np.asarray(indices.T), dtype=torch.int64))


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_an_empty_batch(axes: int) -> None:
    for module in (getattr(nn, f"MaxPool{axes}d")(2, dilation=2), getattr(nn, f"AvgPool{axes}d")(2, padding=1)):
        x = np.zeros((0, 3, *(4,) * axes), np.float32)
        assert eq.translate(module)(x).shape == tuple(module(torch.tensor(x)).shape)
    x = np.zeros((0, 3, *(2,) * axes), np.float32)
    module = getattr(nn, f"MaxUnpool{axes}d")(2)
    assert eq.translate(module)(x, x.astype(int)).shape == (0, 3, *(4,) * axes)


REFUSED: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "padding over half the kernel": (nn.MaxPool2d(3, 1, 2), (1, 2, 7, 7)),
    "padding over half the kernel, dilated": (nn.MaxPool1d(3, 1, 2, 2), (1, 2, 7)),
    "padding over half the kernel of a mean": (nn.AvgPool2d(3, 1, 2), (1, 2, 7, 7)),
    "no window fits": (nn.MaxPool2d(3), (1, 2, 2, 5)),
    "no window fits when dilated": (nn.MaxPool1d(3, dilation=3), (1, 2, 6)),
    "stride 0": (nn.MaxPool2d(2, 0), (1, 2, 4, 4)),
    "kernel 0": (nn.AvgPool2d(0, 1), (1, 2, 4, 4)),
    "dilation 0": (nn.MaxPool3d(2, dilation=0), (1, 2, 4, 4, 4)),
    "negative padding": (nn.MaxPool2d(2, padding=-1), (1, 2, 4, 4)),
    "too many axes": (nn.MaxPool2d(2), (1, 1, 2, 4, 4)),
    "too few axes": (nn.AvgPool2d(2), (4, 4)),
    "no channels": (nn.MaxPool2d(2), (2, 0, 4, 4)),
    "an empty axis": (nn.AvgPool1d(1), (2, 3, 0)),
    "a padded volume smaller than the kernel": (nn.AvgPool3d(3, 1, 1), (1, 2, 2, 3, 3)),
    "a divisor of 0": (nn.AvgPool2d(2, divisor_override=0), (1, 2, 4, 4)),
    "two kernel sizes for one axis": (nn.AvgPool1d((2, 3)), (1, 2, 6)),
    "a norm of 0": (nn.LPPool1d(0, 3), (1, 2, 6)),
    "a tuple for one axis": (nn.LPPool1d(2, (3,)), (1, 2, 6)),
    "one number in a tuple for two": (nn.LPPool2d(2, (3,)), (1, 2, 6, 6)),
}


@pytest.mark.parametrize(("module", "shape"), REFUSED.values(), ids=REFUSED)
def test_what_torch_refuses_is_refused(module: nn.Module, shape: tuple[int, ...]) -> None:
    x = np.zeros(shape, np.float32)
    with pytest.raises((RuntimeError, ValueError, TypeError, IndexError, ZeroDivisionError)):
        module(torch.tensor(x))
    with pytest.raises(InputError):
        jax.jit(eq.translate(module))(x)


@pytest.mark.parametrize("size", [[4, 5], [9], [1, 2, 6, 8], [6, -1]], ids=str)
def test_a_size_more_than_a_stride_away_is_refused(size: list[int]) -> None:
    values, indices = torch.zeros(1, 2, 3, 3), torch.zeros(1, 2, 3, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match="output_size"):
        nn.MaxUnpool2d(2)(values, indices, size)
    with pytest.raises(InputError, match="output_size"):
        eq.translate(nn.MaxUnpool2d(2))(values, indices, output_size=size)


def test_indices_of_another_shape_or_kind_are_refused() -> None:
    made = eq.translate(nn.MaxUnpool1d(2))
    for wrong in (np.zeros((1, 2, 2), int), np.zeros((1, 1, 3), int), np.zeros((1, 2, 3), np.float32)):
        with pytest.raises(InputError, match="indices"):
            made(np.zeros((1, 2, 3), np.float32), wrong)


def test_pooling_between_other_layers() -> None:
    model = nn.Sequential(nn.ReLU(), nn.MaxPool2d(2), nn.AvgPool2d(2, ceil_mode=True), nn.Flatten())
    assert disagree(model, normal(2, 3, 6, 9)) == {}
