"""Recurrent layers and their cells against torch's, padded and packed sequences too."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import equivalence as eq
from equivalence.errors import InputError
from equivalence.frameworks.torch import mode
from equivalence.frameworks.torch import subject as torch_subject
from equivalence.layers.packed import Packed, padded, rows
from tests.layers.sides import FRAMEWORKS, assert_translates, disagree, normal, perturbed

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
few = settings(max_examples=max(1, settings().max_examples // 5))  # what costs is compiling a structure


@st.composite
def layers(draw: st.DrawFn) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """A recurrent layer, its inputs, and the mode: any options, any legal shapes."""
    kind = draw(st.sampled_from((nn.RNN, nn.LSTM, nn.GRU)))
    size, hidden, depth = draw(st.integers(1, 3)), draw(st.integers(2, 5)), draw(st.integers(1, 3))
    options = {name: draw(st.booleans()) for name in ("bias", "batch_first", "bidirectional")}
    options["dropout"] = draw(st.sampled_from((0.0, 0.25))) if depth > 1 else 0.0
    if kind is nn.RNN:
        options["nonlinearity"] = draw(st.sampled_from(("tanh", "relu")))
    if kind is nn.LSTM:
        options["proj_size"] = draw(st.integers(0, hidden - 1))
    module = kind(size, hidden, depth, **options)
    batch, time = draw(st.sampled_from((None, 1, 2, 3))), draw(st.integers(1, 4))
    lead = [time] if batch is None else [batch, time] if module.batch_first else [time, batch]
    parts = [module.proj_size or hidden, hidden][: 2 if kind is nn.LSTM else 1]
    own = [depth * (2 if module.bidirectional else 1)] + ([] if batch is None else [batch])
    states = tuple(normal(*own, part, seed=number) for number, part in enumerate(parts))
    given_state = draw(st.booleans())
    hx = (states if kind is nn.LSTM else states[0],) if given_state else ()
    return perturbed(module), (normal(*lead, size), *hx), {"train": draw(st.booleans())}


@few
@given(layers(), st.sampled_from(FRAMEWORKS))
def test_any_layer(case: tuple[nn.Module, tuple[Any, ...], dict[str, Any]], to: str) -> None:
    module, inputs, how = case
    assert_translates(module, *inputs, frameworks=(to,), **how)


def test_dropout_is_between_layers_in_torch_s_order_of_axes() -> None:
    module = nn.LSTM(2, 4, num_layers=2, proj_size=3, dropout=0.25, bidirectional=True, batch_first=True)
    assert_translates(perturbed(module), normal(3, 5, 2), train=True, frameworks=("nnx",))


@pytest.mark.parametrize(("dropout", "shape"), [(1.0, (5, 2)), (0.5, (5, 0, 2))])
def test_dropout_of_everything_and_of_nothing_draws_nothing(dropout: float, shape: tuple[int, ...]) -> None:
    module = nn.GRU(2, 3, num_layers=2, dropout=dropout)
    assert_translates(perturbed(module), normal(*shape), train=True, frameworks=("nnx",))


def test_the_kink_of_relu_has_torch_s_slope() -> None:
    module = nn.RNN(2, 3, bias=False, nonlinearity="relu")
    assert_translates(perturbed(module), np.zeros((4, 2, 2), np.float32), moved=("weight_ih_l0", "weight_hh_l0"))


@pytest.mark.parametrize("kind", [nn.RNNCell, nn.GRUCell, nn.LSTMCell])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("lead", [(), (5,)])
def test_any_cell(kind: type[nn.Module], bias: bool, lead: tuple[int, ...]) -> None:
    module = perturbed(kind(3, 4, bias=bias))
    to = FRAMEWORKS[bias]
    states = normal(*lead, 4), normal(*lead, 4, seed=1)
    assert_translates(module, normal(*lead, 3), states if kind is nn.LSTMCell else states[0], frameworks=(to,))


def test_cells_without_a_state_and_with_relu() -> None:
    assert_translates(perturbed(nn.LSTMCell(3, 4)), normal(2, 3), frameworks=("nnx",))
    assert_translates(perturbed(nn.RNNCell(3, 4, nonlinearity="relu")), normal(2, 3), frameworks=("linen",))


def packing(module: nn.Module) -> Callable[..., Any]:
    """torch's module on a padded batch of sequences, which it packs and pads again."""

    def apply(params: Any, buffers: Any, args: Any, kwargs: Any, train: bool) -> Any:
        x, *hx = args
        first = module.batch_first
        lengths = torch.as_tensor(kwargs["lengths"])
        packed = pack_padded_sequence(x, lengths, batch_first=first, enforce_sorted=False)
        with mode(module, train):
            out, state = torch.func.functional_call(module, params, (packed, *hx))
        out, _ = pad_packed_sequence(out, batch_first=first, total_length=x.shape[1 if first else 0])
        return (out, state), buffers

    return apply


def packed_port(subject: Any) -> Any:
    """The translation on what `Packed` holds of a padded batch, time first, and padded again."""

    def apply(params: Any, buffers: Any, args: Any, kwargs: Any, train: bool) -> Any:
        x, *hx = args
        lengths = np.asarray(kwargs["lengths"])
        order = np.argsort(-lengths, kind="stable")
        sizes = (lengths[:, None] > np.arange(lengths.max())).sum(0)
        given = Packed(x[rows(lengths)], sizes, jnp.asarray(order), jnp.asarray(np.argsort(order)))
        (out, state), after = subject.apply(params, buffers, (given, *hx), {}, train)
        assert isinstance(out, Packed)
        whole = padded(out)[0][:, np.argsort(order)]
        return (jnp.zeros((x.shape[0], *whole.shape[1:]), x.dtype).at[: len(whole)].set(whole), state), after

    return dataclasses.replace(subject, apply=apply)


def disagree_packed(module: nn.Module, *inputs: Any, **how: Any) -> dict[str, float]:
    """What differs between torch on packed sequences and a translation on padded ones."""
    reference = dataclasses.replace(torch_subject(module), apply=packing(module))
    with patch("tests.layers.sides.torch_subject", lambda _: reference):
        return disagree(module, *inputs, **how)


UNSORTED = (2, 5, 1)


def test_known_lengths_are_torch_s_packed_sequences() -> None:
    module = perturbed(nn.LSTM(2, 4, proj_size=3, bidirectional=True, num_layers=2, dropout=0.25, batch_first=True))
    states = normal(4, 3, 3), normal(4, 3, 4)
    assert not disagree_packed(module, normal(3, 6, 2), states, lengths=UNSORTED, train=True)


def test_an_array_of_lengths_is_too_where_nothing_is_drawn_for_it() -> None:
    module = perturbed(nn.GRU(2, 4, bidirectional=True))
    assert not disagree_packed(module, normal(6, 3, 2), lengths=np.array(UNSORTED), to="linen")


@pytest.mark.parametrize("to", FRAMEWORKS)
def test_packed_sequences(to: str) -> None:
    module = perturbed(nn.RNN(2, 4, bidirectional=True, num_layers=2, dropout=0.25))
    inputs = normal(6, 3, 2), normal(4, 3, 4)
    assert not disagree_packed(module, *inputs, lengths=UNSORTED, train=True, port=packed_port, to=to)


def test_what_lies_after_the_end_has_no_say_not_even_nan() -> None:
    module = perturbed(nn.RNN(2, 3, bidirectional=True))
    made = eq.translate(module)
    x = normal(5, 2, 2)
    spoilt = x.copy()
    spoilt[3:, 1] = np.nan

    def total(x: Any) -> Any:
        out, state = made(x, lengths=(5, 3))
        return (out**2).sum() + (state**2).sum()

    (left, slope), (right, spoilt_slope) = (jax.value_and_grad(total)(jnp.asarray(some)) for some in (x, spoilt))
    assert left == right
    assert np.array_equal(slope, spoilt_slope)
    assert not slope[3:, 1].any()


def test_torch_s_packed_sequence_goes_in_and_a_packed_comes_out() -> None:
    module = perturbed(nn.RNN(2, 3)).eval()
    given = pack_padded_sequence(torch.from_numpy(normal(5, 3, 2)), torch.tensor([2, 5, 1]), enforce_sorted=False)
    out, state = eq.translate(module)(given)
    wanted, wanted_state = module(given)
    assert isinstance(out, Packed)
    assert out.data.shape == wanted.data.shape
    assert state.shape == wanted_state.shape
    for name in ("batch_sizes", "sorted_indices", "unsorted_indices"):
        assert np.array_equal(getattr(out, name), getattr(wanted, name))


def test_a_length_that_torch_refuses_raises_where_it_is_known_and_is_nan_where_not() -> None:
    module = nn.GRU(2, 3)
    made, x = eq.translate(module), jnp.asarray(normal(5, 2, 2))
    for lengths in ((0, 5), (6, 5)):
        with pytest.raises(InputError, match="lengths from 1 to 5"):
            made(x, lengths=lengths)
        out, state = jax.jit(lambda given: made(x, lengths=given))(jnp.asarray(lengths))
        assert np.isnan(out[:, 0]).all()
        assert np.isnan(state[:, 0]).all()
        assert not np.isnan(out[:, 1]).any()
    with pytest.raises(RuntimeError):
        pack_padded_sequence(torch.zeros(5, 2, 2), torch.tensor([0, 5]), enforce_sorted=False)


REFUSED = {
    "input size": (nn.LSTM(3, 4), (normal(5, 2, 2),)),
    "no steps": (nn.GRU(3, 4), (normal(0, 2, 3),)),
    "four axes": (nn.RNN(3, 4), (normal(1, 5, 2, 3),)),
    "a state for another batch": (nn.RNN(3, 4), (normal(5, 2, 3), normal(1, 1, 4))),
    "a state of another size": (nn.LSTM(3, 4, proj_size=2), (normal(5, 2, 3), (normal(1, 2, 4), normal(1, 2, 4)))),
    "a batched state": (nn.GRU(3, 4), (normal(5, 3), normal(1, 1, 4))),
    "half a state": (nn.LSTM(3, 4), (normal(5, 2, 3), (normal(1, 2, 4),))),
    "a pair": (nn.GRU(3, 4), (normal(5, 2, 3), (normal(1, 2, 4), normal(1, 2, 4)))),
    "a cell's input size": (nn.GRUCell(3, 4), (normal(2, 2),)),
    "a cell's three axes": (nn.RNNCell(3, 4), (normal(1, 2, 3),)),
    "a cell's broadcast state": (nn.RNNCell(3, 4), (normal(2, 3), normal(1, 4))),
    "a cell's unbatched state": (nn.LSTMCell(3, 4), (normal(2, 3), (normal(4), normal(4)))),
    "a cell's batched state": (nn.GRUCell(3, 4), (normal(3), normal(1, 4))),
}


@pytest.mark.parametrize(("module", "inputs"), REFUSED.values(), ids=REFUSED)
def test_what_torch_refuses_is_refused(module: nn.Module, inputs: tuple[Any, ...]) -> None:
    with pytest.raises((RuntimeError, ValueError, IndexError, AttributeError)):
        module(*jax.tree_util.tree_map(torch.from_numpy, inputs))
    with pytest.raises(InputError, match="takes"):
        jax.jit(eq.translate(module))(*inputs)


def test_lengths_need_one_number_a_sequence() -> None:
    made = eq.translate(nn.GRU(3, 4))
    for x, lengths in ((normal(5, 3), (5,)), (normal(5, 2, 3), (5,)), (normal(5, 2, 3), (5.0, 4.0))):
        with pytest.raises(InputError, match="one whole length for each sequence"):
            made(x, lengths=lengths)
