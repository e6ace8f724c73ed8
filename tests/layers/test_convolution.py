"""Convolutions and transposed convolutions against torch's."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from flax.errors import ScopeParamShapeError
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

import equivalence as eq
from equivalence.errors import InputError
from tests.layers.sides import FRAMEWORKS, assert_translates, normal, perturbed

few = settings(max_examples=max(1, settings().max_examples // 5))  # what costs is compiling a structure
Case = tuple[nn.Module, np.ndarray]
AXES = st.sampled_from((1, 1, 2, 2, 3))
LEADS = st.sampled_from(((2,), (), (0,), (1,)))


def whole(axes: int, least: int, most: int) -> st.SearchStrategy[tuple[int, ...]]:
    return st.tuples(*[st.integers(least, most)] * axes)


@st.composite
def convolutions(draw: st.DrawFn) -> Case:
    """A convolution of any options and an input, which it may not take."""
    axes, groups = draw(AXES), draw(st.integers(1, 3))
    channels = [groups * draw(st.integers(1, 3)) for _ in range(2)]
    padding = draw(st.one_of(st.sampled_from(("same", "valid")), whole(axes, 0, 3)))
    module = getattr(nn, f"Conv{axes}d")(
        *channels,
        draw(whole(axes, 1, 4)),
        (1,) * axes if padding == "same" else draw(whole(axes, 1, 3)),
        padding,
        draw(whole(axes, 1, 2)),
        groups,
        draw(st.booleans()),
        draw(st.sampled_from(("zeros", "reflect", "replicate", "circular"))),
    )
    return perturbed(module), normal(*draw(LEADS), channels[0], *draw(whole(axes, 1, 7)))


@st.composite
def transposed(draw: st.DrawFn) -> Case:
    """A transposed convolution of any options and an input, which it may not take."""
    axes, groups = draw(AXES), draw(st.integers(1, 3))
    channels = [groups * draw(st.integers(1, 3)) for _ in range(2)]
    sizes = [draw(whole(axes, 1, most)) for most in (4, 3, 2)]
    module = getattr(nn, f"ConvTranspose{axes}d")(
        *channels, *sizes, draw(whole(axes, 0, 1)), groups, draw(st.booleans()), draw(whole(axes, 1, 2))
    )
    return perturbed(module), normal(*draw(LEADS), channels[0], *draw(whole(axes, 1, 5)))


@few
@given(st.one_of(convolutions(), transposed()), st.sampled_from(FRAMEWORKS))
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_any_options(case: Case, to: str) -> None:
    module, x = case
    try:
        module(torch.tensor(x))
    except RuntimeError:
        assume(False)
    assume(0 not in module(torch.tensor(x)).shape[1:])
    assert_translates(module, x, frameworks=(to,))


def test_same_puts_the_odd_zero_after() -> None:
    with pytest.warns(UserWarning, match="even kernel"):
        assert_translates(
            perturbed(nn.Conv2d(3, 4, (4, 2), padding="same", dilation=(1, 3))),
            normal(2, 3, 5, 6),
            frameworks=("linen",),
        )


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_a_padding_mode_with_everything(mode: str) -> None:
    module = nn.Conv2d(4, 6, (3, 2), (2, 1), (2, 3), (1, 2), 2, padding_mode=mode)
    assert_translates(perturbed(module), normal(2, 4, 5, 6), frameworks=("nnx",))


def test_a_negative_padding_of_a_mode_crops() -> None:
    assert_translates(
        perturbed(nn.Conv1d(3, 4, 3, padding=-1, padding_mode="reflect")), normal(2, 3, 7), frameworks=("nnx",)
    )


def test_an_output_size_that_is_asked_for() -> None:
    module = perturbed(nn.ConvTranspose2d(3, 4, 3, stride=2, padding=1))
    assert_translates(module, normal(2, 3, 5, 6), output_size=[9, 12])
    x, ours = torch.tensor(normal(2, 3, 5, 6)), eq.translate(module)
    sizes: tuple[Any, ...] = ((9, 11), [10, 12], (2, 4, 9, 12), torch.Size((10, 11)))
    for size in sizes:
        assert ours(x, size).shape == ours(x, output_size=size).shape == module(x, size).shape


def test_an_axis_that_breaks_xla() -> None:
    """Kernel 2, stride 2, padding 1 beside a kernel larger than its input: left alone, it aborts jaxlib 0.10.2."""
    module = nn.ConvTranspose2d(1, 3, (2, 4), stride=2, padding=(1, 2), dilation=(1, 2), bias=False)
    assert_translates(perturbed(module), normal(1, 4, 2), frameworks=("nnx",))


def test_the_kernel_of_a_transposed_convolution_is_flax_s() -> None:
    module = perturbed(nn.ConvTranspose2d(3, 4, (3, 2), stride=2, padding=1, output_padding=(1, 0), dilation=2))
    ours = eq.translate(module).module
    theirs = nnx.ConvTranspose(
        3, 4, (3, 2), (2, 2), padding=((3, 4), (1, 1)), kernel_dilation=2, transpose_kernel=True, rngs=nnx.Rngs(0)
    )
    theirs.kernel[...], theirs.bias[...] = ours.kernel[...], ours.bias[...]
    x = jnp.asarray(normal(2, 5, 6, 3))
    np.testing.assert_array_equal(np.asarray(theirs(x)), np.asarray(ours(x)))


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.Conv2d(3, 4, 3, padding=2, padding_mode="reflect"), (2, 3, 2, 5)),
        (nn.Conv2d(3, 4, 3, padding=3, padding_mode="circular"), (2, 3, 2, 5)),
        (nn.Conv1d(3, 4, 5, padding_mode="replicate"), (2, 3, 4)),
        (nn.Conv1d(3, 4, 2), (2, 5, 4)),
        (nn.Conv1d(3, 4, 5), (2, 3, 4)),
        (nn.Conv2d(3, 4, 2), (1, 2, 3, 5, 6)),
        (nn.Sequential(nn.Tanh(), nn.Conv2d(3, 4, (2, 5))), (2, 3, 6, 4)),
        (nn.ConvTranspose1d(3, 4, 3, output_padding=1), (2, 3, 5)),
        (nn.ConvTranspose1d(3, 4, 3, padding=5), (2, 3, 5)),
        (nn.ConvTranspose1d(3, 4, 3), (2, 4, 5)),
        (nn.ConvTranspose1d(3, 4, 3), (2, 2, 3, 5)),
        (nn.ConvTranspose1d(3, 4, 3), (3,)),
    ],
)
def test_both_sides_refuse(module: nn.Module, shape: tuple[int, ...]) -> None:
    with pytest.raises(RuntimeError):
        module(torch.zeros(shape))
    for to in FRAMEWORKS:
        with pytest.raises((ValueError, TypeError, InputError, ScopeParamShapeError)):
            eq.translate(module, to=to)(np.zeros(shape, np.float32))


def changed(module: nn.Module, **attributes: Any) -> nn.Module:
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


@pytest.mark.parametrize(
    "module",
    [
        changed(nn.Conv2d(3, 3, 3), stride=2, padding=1, dilation=2),
        changed(nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect"), padding=(2, 0)),
        changed(nn.Conv2d(3, 3, 3, bias=False), weight=nn.Parameter(torch.ones(4, 3, 2, 1))),
        changed(nn.ConvTranspose2d(3, 3, 3), stride=2, padding=(1, 0), output_padding=(1, 1)),
    ],
    ids=["numbers", "a mode keeps the first padding", "weight", "transposed"],
)
def test_what_was_changed_after_construction_counts_as_in_torch(module: nn.Module) -> None:
    for to in FRAMEWORKS:
        assert_translates(perturbed(module), normal(2, 3, 6, 7), frameworks=(to,))


@pytest.mark.parametrize("size", [(9, 13), (8, 11), (4, 9, 11), (9,)])
def test_an_output_size_that_cannot_be_is_refused(size: tuple[int, ...]) -> None:
    module, x = nn.ConvTranspose2d(3, 4, 3, stride=2, padding=1), torch.zeros(2, 3, 5, 6)
    for run in (module, eq.translate(module)):
        with pytest.raises(ValueError, match=r"output.size"):
            run(x, output_size=size)


@pytest.mark.parametrize("options", [{"padding": -1}, {"stride": 0}, {"dilation": 0}])
@pytest.mark.parametrize("kind", [nn.Conv1d, nn.ConvTranspose1d])
def test_options_that_no_call_can_run_are_refused(kind: Any, options: dict[str, int]) -> None:
    with pytest.raises(InputError, match="torch"):
        eq.translate(kind(3, 4, 3, **options))
