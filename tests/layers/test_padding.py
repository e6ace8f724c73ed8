"""Padding layers against torch's: every mode, pads of either sign, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import equivalence as eq
from equivalence.errors import InputError
from tests.layers.sides import FRAMEWORKS, assert_translates, normal

few = settings(max_examples=max(1, settings().max_examples // 5))
KINDS = ("Zero", "Constant", "Reflection", "Replication", "Circular")


@st.composite
def paddings(draw: st.DrawFn) -> tuple[nn.Module, np.ndarray]:
    """A padding layer of any pads and an input, which it may not take."""
    kind, axes = draw(st.sampled_from(KINDS)), draw(st.integers(1, 3))
    least = 0 if kind == "Circular" else draw(st.sampled_from((0, -2)))  # torch reads what it has not written yet
    pads = draw(st.one_of(st.integers(least, 3), st.tuples(*[st.integers(least, 3)] * (2 * axes))))
    lead = draw(st.sampled_from(((2, 3), (3,), (0, 3), (1, 1))))
    sizes = draw(st.tuples(*[st.integers(1, 5)] * axes))
    return getattr(nn, f"{kind}Pad{axes}d")(pads, *([0.7] if kind == "Constant" else [])), normal(*lead, *sizes)


@few
@given(paddings(), st.sampled_from(FRAMEWORKS))
def test_any_pads_or_both_refuse(case: tuple[nn.Module, np.ndarray], to: str) -> None:
    module, x = case
    try:
        module(torch.tensor(x))
    except RuntimeError:
        with pytest.raises(ValueError, match="padding"):
            eq.translate(module, to=to)(x)
        return
    assert_translates(module, x, frameworks=(to,))


@pytest.mark.parametrize("kind", KINDS)
def test_each_axis_has_its_own_pads(kind: str) -> None:
    value = [np.inf] if kind == "Constant" else []
    module = getattr(nn, f"{kind}Pad3d")((1, 2, 0, 3, 1, 0), *value)
    assert_translates(module, normal(2, 3, 4, 5, 6), frameworks=("nnx",))


@pytest.mark.parametrize("kind", ["Reflection", "Replication"])
@pytest.mark.parametrize("pads", [(-2, 3), (3, -2), (-5, 3), (-1, -2)])
def test_cropped_and_padded_from_the_whole(kind: str, pads: tuple[int, int]) -> None:
    assert_translates(getattr(nn, f"{kind}Pad1d")(pads), normal(2, 3, 4), frameworks=("nnx",))


def test_wrapped_around_what_is_left() -> None:
    assert_translates(nn.CircularPad1d((-1, 2)), normal(2, 3, 6), frameworks=("nnx",))
    assert_translates(nn.CircularPad1d(4), normal(2, 3, 4), frameworks=("nnx",))


def test_a_constant_pads_integers_and_more_axes_of_batch() -> None:
    x = np.arange(24, dtype=np.int32).reshape(1, 2, 3, 4)
    for shape in ((1, 2, 3, 4), (2, 1, 1, 3, 4)):
        wanted = nn.ConstantPad2d((1, -1, 0, 2), 7)(torch.tensor(x.reshape(shape)))
        ours = eq.translate(nn.ConstantPad2d((1, -1, 0, 2), 7))(x.reshape(shape))
        np.testing.assert_array_equal(np.asarray(ours), wanted.numpy())


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.ReflectionPad1d(4), (2, 3, 4)),
        (nn.ReflectionPad1d((-2, -2)), (2, 3, 4)),
        (nn.ReflectionPad1d(1), (2, 0, 4)),
        (nn.ReflectionPad2d(1), (2, 3, 1, 4)),
        (nn.ReflectionPad2d(1), (4, 5)),
        (nn.ReflectionPad2d(1), (2, 2, 3, 4, 5)),
        (nn.ReplicationPad1d(1), (2, 3, 0)),
        (nn.ReplicationPad3d((-1, -1, 0, 0, -2, -2)), (2, 3, 3, 4, 1)),
        (nn.CircularPad1d(5), (2, 3, 4)),
        (nn.CircularPad1d((-2, 3)), (1, 1, 4)),
        (nn.CircularPad2d(1), (4, 5)),
        (nn.ZeroPad1d((-3, -2)), (2, 3, 4)),
        (nn.ConstantPad1d((-5, 3), 1.0), (2, 3, 4)),
    ],
)
def test_both_sides_refuse(module: nn.Module, shape: tuple[int, ...]) -> None:
    with pytest.raises((RuntimeError, ValueError, NotImplementedError)):
        module(torch.zeros(shape))
    for to in FRAMEWORKS:
        with pytest.raises((ValueError, InputError)):
            eq.translate(module, to=to)(np.zeros(shape, np.float32))


def test_a_constant_pad_needs_an_axis_of_channels() -> None:
    with pytest.raises(InputError, match="2 axes"):
        eq.translate(nn.ZeroPad2d(1))(np.zeros((4, 5), np.float32))
