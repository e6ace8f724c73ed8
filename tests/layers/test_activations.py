"""Activations against torch's: options, kinks, axes, what is refused."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import equivalence as eq
from equivalence.errors import InputError
from tests.layers.sides import assert_translates, normal, perturbed

positive = st.sampled_from([0.3, 1.0, 2.5])
KINDS: dict[str, st.SearchStrategy[nn.Module]] = {
    "ELU": st.builds(nn.ELU, positive, st.booleans()),
    "CELU": st.builds(nn.CELU, positive, st.booleans()) | st.just(nn.CELU(-0.5)),
    "GELU": st.builds(nn.GELU, st.sampled_from(["none", "tanh"])),
    "GLU": st.builds(nn.GLU, st.sampled_from([-1, 0, 1])),
    "Hardtanh": st.builds(nn.Hardtanh, st.sampled_from([-1.0, 0.2]), positive, st.booleans()),
    "Hardshrink": st.builds(nn.Hardshrink, st.sampled_from([-0.4, 0.0, 0.7])),
    "LeakyReLU": st.builds(nn.LeakyReLU, st.sampled_from([-0.2, 0.0, 0.3, 1.5])),
    "PReLU": st.builds(nn.PReLU, st.sampled_from([1, 6])),
    "RReLU": st.builds(nn.RReLU, st.sampled_from([0.1, 0.2]), st.sampled_from([0.2, 0.9]), st.booleans()),
    "Softplus": st.builds(nn.Softplus, positive, st.sampled_from([0.5, 3.0, 20.0])),
    "Softshrink": st.builds(nn.Softshrink, st.sampled_from([0.0, 0.7])),
    "Softmax": st.builds(nn.Softmax, st.sampled_from([None, -1, 0, 1])),
    "Softmin": st.builds(nn.Softmin, st.sampled_from([None, -1, 0, 1])),
    "LogSoftmax": st.builds(nn.LogSoftmax, st.sampled_from([None, -1, 0, 1])),
    "Threshold": st.builds(
        nn.Threshold, st.sampled_from([-0.5, 0.5]), st.sampled_from([-2.0, 0.0, 3.0]), st.booleans()
    ),
}
SHAPES = ((4, 6), (2, 6, 4), (2, 6, 1, 4), (0, 6))


@settings(max_examples=25)
@given(st.sampled_from(sorted(KINDS)).flatmap(KINDS.__getitem__), st.sampled_from(SHAPES), st.data())
def test_every_option(module: nn.Module, shape: tuple[int, ...], data: st.DataObject) -> None:
    to, train, seed = (
        data.draw(st.sampled_from(["nnx", "linen"])),
        data.draw(st.booleans()),
        data.draw(st.integers(0, 99)),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the axis that torch chooses for itself
        assert_translates(perturbed(module, seed), 2 * normal(*shape, seed=seed), frameworks=(to,), train=train)


KINKS = {
    "ReLU()": (0.0,),
    "ReLU6()": (0.0, 6.0),
    "Hardtanh(-0.5, 2.0)": (-0.5, 2.0),
    "Hardsigmoid()": (-3.0, 3.0),
    "Hardswish()": (-3.0, 0.0, 3.0),
    "Hardshrink(0.25)": (-0.25, 0.0, 0.25),
    "Softshrink(0.25)": (-0.25, 0.0, 0.25),
    "Softshrink(0.0)": (0.0,),
    "Threshold(0.5, 2.0)": (0.5, 2.0),
    "LeakyReLU(0.2)": (0.0,),
    "PReLU()": (0.0,),
    "RReLU()": (0.0,),
    "ELU(0.5)": (0.0,),
    "CELU(0.5)": (0.0,),
    "SELU()": (0.0,),
    "Softsign()": (0.0,),
    "Softplus(2.0, 3.0)": (1.5, 0.0, 100.0, -100.0),
    "LogSigmoid()": (0.0, 100.0, -100.0),
    "Sigmoid()": (100.0, -100.0),
    "Tanh()": (100.0, -100.0),
    "Tanhshrink()": (0.0,),
    "SiLU()": (0.0, 100.0, -100.0),
    "Mish()": (0.0, 100.0),
    "GELU()": (0.0, 100.0),
    "GELU('tanh')": (0.0, 100.0),
}


@pytest.mark.parametrize("made", KINKS)
def test_values_and_slopes_at_the_kinks(made: str) -> None:
    """More numbers than a vector register holds: torch's vectorised kernels have code of their own."""
    at = np.resize(np.float32(KINKS[made]), 37)
    x = np.concatenate([at, 2 * normal(6)])
    module = eval(f"nn.{made}", {"nn": nn})
    assert_translates(module, x, frameworks=("nnx",), moved=(), train=made == "RReLU()")


def test_nan_and_infinity_are_torch_s() -> None:
    x = np.repeat(np.float32([np.nan, -np.inf, 1.0]), 37)
    for made in KINKS:
        module = eval(f"nn.{made}", {"nn": nn}).eval()
        wanted, found = module(torch.from_numpy(x)).detach().numpy(), np.asarray(eq.translate(module)(x))
        far = ~(np.isfinite(wanted) & np.isfinite(found))
        np.testing.assert_array_equal(found[far], wanted[far], err_msg=made)


def test_a_number_is_a_row_of_one() -> None:
    x = torch.tensor(0.7)
    for module in (nn.Softmax(0), nn.LogSoftmax(-1), nn.PReLU(), nn.GELU()):
        assert_translates(perturbed(module), x, frameworks=("nnx",))


def test_a_row_of_minus_infinity() -> None:
    x = normal(3, 4)
    x[0, 1], x[1] = -np.inf, -np.inf
    assert_translates(nn.Softmax(1), x, frameworks=("nnx",), moved=())
    assert_translates(nn.LogSoftmax(1), x, frameworks=("nnx",), moved=())


def test_softmax2d_with_and_without_a_batch() -> None:
    assert_translates(nn.Softmax2d(), normal(2, 3, 4, 5), frameworks=("nnx",))
    assert_translates(nn.Softmax2d(), normal(3, 4, 5), frameworks=("linen",))


def test_a_drawn_slope_serves_the_derivative_of_rrelu_in_a_network() -> None:
    model = nn.Sequential(nn.Linear(5, 7), nn.RReLU(0.1, 0.9, inplace=True), nn.Linear(7, 3))
    assert_translates(perturbed(model), normal(4, 5), train=True)


REFUSED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "softshrink by a negative amount": (lambda: nn.Softshrink(-0.5), (2, 3)),
    "celu of alpha 0": (lambda: nn.CELU(0.0), (2, 3)),
    "bounds the wrong way round": (lambda: nn.RReLU(0.5, 0.1), (2, 3)),
    "an unknown approximation": (lambda: nn.GELU("fast"), (2, 3)),
    "halving an odd axis": (nn.GLU, (2, 3)),
    "halving a number": (nn.GLU, ()),
    "more slopes than channels": (lambda: nn.PReLU(3), (2, 1, 4)),
    "fewer slopes than channels": (lambda: nn.PReLU(3), (2, 4)),
    "slopes for an array without channels": (lambda: nn.PReLU(3), (3,)),
    "images of two axes": (nn.Softmax2d, (2, 3)),
    "an axis that is not there": (lambda: nn.Softmax(3), (2, 3)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_on_both_sides(name: str) -> None:
    make, shape = REFUSED[name]
    with pytest.raises((RuntimeError, ValueError, IndexError)):
        make()(torch.ones(shape))
    with pytest.raises((InputError, ValueError)):
        eq.translate(make())(torch.ones(shape))
