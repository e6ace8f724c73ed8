"""Planted faults in recurrent layers: other gates, biases, directions, dropout and lengths. All are caught."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from torch import nn

import equivalence as eq
from equivalence.errors import DrawsDiffer
from equivalence.layers import cells, recurrent
from tests.layers.sides import disagree, normal, perturbed
from tests.layers.test_recurrent import UNSORTED, disagree_packed, packed_port

LAYERS = "equivalence.layers.recurrent"
CELLS = "equivalence.layers.cells"


def lstm(order: str = "ifgo", forget: float = 0.0, last: Any = jnp.tanh, state_first: bool = True) -> Any:
    """An LSTM's step with gates in another order, a forget bias, or another output."""

    def step(of_input: Any, of_hidden: Any, state: Any) -> Any:
        gates = dict(zip(order, jnp.split(of_input + of_hidden, 4, axis=-1), strict=True))
        cell = jax.nn.sigmoid(gates["f"] + forget) * state[1] + jax.nn.sigmoid(gates["i"]) * jnp.tanh(gates["g"])
        new = jax.nn.sigmoid(gates["o"]) * last(cell), cell
        return new if state_first else new[::-1]

    return step


def gru(order: str = "rzn", keep: bool = True, inside: bool = True) -> Any:
    """A GRU's step with gates in another order, z turned round, or r on all of the new gate."""

    def step(of_input: Any, of_hidden: Any, state: Any) -> Any:
        left = dict(zip(order, jnp.split(of_input, 3, axis=-1), strict=True))
        right = dict(zip(order, jnp.split(of_hidden, 3, axis=-1), strict=True))
        r, z = (jax.nn.sigmoid(left[gate] + right[gate]) for gate in "rz")
        new = jnp.tanh(left["n"] + r * right["n"] if inside else r * (left["n"] + right["n"]))
        return ((1 - z) * new + z * state[0] if keep else z * new + (1 - z) * state[0],)

    return step


STEPS: dict[str, tuple[type[nn.Module], Any]] = {
    "gates i, g, f, o as in Haiku": (nn.LSTMCell, lstm("igfo")),
    "gates f, i, g, o": (nn.LSTMCell, lstm("figo")),
    "one added to the forget gate": (nn.LSTMCell, lstm(forget=1.0)),
    "no tanh on the cell": (nn.LSTMCell, lstm(last=lambda cell: cell)),
    "the state as (c, h)": (nn.LSTMCell, lstm(state_first=False)),
    "gates z, r, n as in Keras": (nn.GRUCell, gru("zrn")),
    "z keeps the new": (nn.GRUCell, gru(keep=False)),
    "r on the whole new gate": (nn.GRUCell, gru(inside=False)),
}


def called(kind: type[nn.Module], step: Any, **how: Any) -> dict[str, float]:
    """What differs with another step, in a cell that is given its state."""
    states = normal(4, 3), normal(4, 3, seed=1)
    hx = states if kind is nn.LSTMCell else states[0]
    with patch(f"{LAYERS}.{kind.__name__.removesuffix('Cell').lower()}_step", step):
        return disagree(perturbed(kind(2, 3)), normal(4, 2), hx, **how)


@pytest.mark.parametrize(("kind", "step"), STEPS.values(), ids=STEPS)
def test_a_step(kind: type[nn.Module], step: Any) -> None:
    assert called(kind, step)


@pytest.mark.parametrize(("kind", "step"), [(nn.GRUCell, gru()), (nn.LSTMCell, lstm())])
def test_the_steps_here_without_a_fault_are_right(kind: type[nn.Module], step: Any) -> None:
    assert called(kind, step) == {}


def leaves(change: Callable[[dict[str, Any]], None]) -> Callable[[Any], Any]:
    """A port whose weights are changed before each call."""

    def port(subject: Any) -> Any:
        def apply(params: Any, *call: Any) -> Any:
            changed = dict(params)
            change(changed)
            return subject.apply(changed, *call)

        return dataclasses.replace(subject, apply=apply)

    return port


def summed(params: dict[str, Any]) -> None:
    """Both biases as one, for all gates."""
    params["bias_ih"] = params["bias_ih"] + params["bias_hh"]
    params["bias_hh"] = jnp.zeros_like(params["bias_hh"])


def single(params: dict[str, Any]) -> None:
    """One bias is trained, as in Flax: the values are right, one gradient is lost."""
    params["bias_ih"] = params["bias_ih"] + jax.lax.stop_gradient(params["bias_hh"])
    params["bias_hh"] = jnp.zeros_like(params["bias_hh"])


def transposed(params: dict[str, Any]) -> None:
    """Each gate's square matrix the wrong way round."""
    params["kernel_hh"] = params["kernel_hh"].reshape(3, -1, 3).swapaxes(0, 2).reshape(3, -1)


WEIGHTS = {
    "the biases summed": (nn.GRUCell, summed),
    "one bias": (nn.LSTMCell, single),
    "gates transposed": (nn.GRUCell, transposed),
}


@pytest.mark.parametrize(("kind", "change"), WEIGHTS.values(), ids=WEIGHTS)
def test_weights(kind: type[nn.Module], change: Any) -> None:
    name = kind.__name__.removesuffix("Cell").lower()
    assert called(kind, {"gru": cells.gru_step, "lstm": cells.lstm_step}[name], port=leaves(change))


def turned(step: Any, weights: Any, x: Any, state: Any, alive: Any = None, reverse: bool = False) -> Any:
    """A reverse direction that reads x backwards, and forgets to turn its outputs back."""
    final, out = cells.run(step, weights, x, state, alive, reverse)
    return final, out[::-1] if reverse else out


def last_output(step: Any, weights: Any, x: Any, state: Any, alive: Any = None, reverse: bool = False) -> Any:
    """The state of every direction is its output at the last step."""
    final, out = cells.run(step, weights, x, state, alive, reverse)
    return (out[-1], *final[1:]), out


def without_state(step: Any, weights: Any, x: Any, state: Any, alive: Any = None, reverse: bool = False) -> Any:
    """The given state is ignored."""
    return cells.run(step, weights, x, tuple(jnp.zeros_like(part) for part in state), alive, reverse)


@pytest.mark.parametrize("fault", [turned, last_output, without_state])
def test_a_direction(fault: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{LAYERS}.run", fault)
    assert disagree(perturbed(nn.RNN(2, 3, bidirectional=True)), normal(4, 2), normal(2, 3))


def test_states_ordered_by_direction_first(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = recurrent.stacked

    def stacked(*given: Any) -> Any:
        out, state = ours(*given)
        return out, tuple(part[jnp.array([0, 2, 1, 3])] for part in state)

    monkeypatch.setattr(f"{LAYERS}.stacked", stacked)
    assert disagree(perturbed(nn.RNN(2, 3, 2, bidirectional=True)), normal(4, 2))


OTHER = {
    "time and batch in each other's place": (nn.RNN(2, 3), nn.RNN(2, 3, batch_first=True)),
    "tanh for relu": (nn.RNN(2, 3, nonlinearity="relu"), nn.RNN(2, 3)),
}


@pytest.mark.parametrize(("module", "other"), OTHER.values(), ids=OTHER)
def test_options(module: nn.Module, other: nn.Module) -> None:
    assert disagree(perturbed(module), normal(4, 4, 2), port=lambda _: eq.translate(other).subject)


def test_a_relu_with_half_a_slope_at_its_kink(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{LAYERS}._activation", lambda _: lambda x: jnp.maximum(x, 0))
    module, moved = nn.RNNCell(2, 3, bias=False, nonlinearity="relu"), ("weight_ih", "weight_hh")
    assert disagree(perturbed(module), np.zeros((2, 2), np.float32), moved=moved)


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_a_projection_through_tanh(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = cells.advanced

    def advanced(step: Any, weights: Any, of_input: Any, state: Any) -> Any:
        new = ours(step, weights, of_input, state)
        return jnp.tanh(new[0]), *new[1:]

    monkeypatch.setattr(f"{CELLS}.advanced", advanced)
    assert disagree(perturbed(nn.LSTM(2, 3, proj_size=2)), normal(4, 2))


def test_dropout_in_the_batch_s_order_of_axes_or_on_the_last_layer_too(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = recurrent._dropped
    module = perturbed(nn.RNN(2, 3, num_layers=2, dropout=0.25, batch_first=True))
    monkeypatch.setattr(f"{LAYERS}._dropped", lambda x, *how: ours(x.swapaxes(0, 1), *how).swapaxes(0, 1))
    with pytest.raises(DrawsDiffer):
        disagree(module, normal(2, 4, 2), train=True)
    monkeypatch.setattr(f"{LAYERS}._dropped", lambda x, *how: ours(ours(x, *how), *how))
    with pytest.raises(DrawsDiffer):
        disagree(module, normal(2, 4, 2), train=True)


def from_the_padding(step: Any, weights: Any, x: Any, state: Any, alive: Any = None, reverse: bool = False) -> Any:
    """In reverse every sequence starts at the padded end."""
    return cells.run(step, weights, x, state, None if reverse else alive, reverse)


def past_the_end(step: Any, weights: Any, x: Any, state: Any, alive: Any = None, reverse: bool = False) -> Any:
    """The state moves on after the end; outputs are cleared."""
    final, out = cells.run(step, weights, x, state, None, reverse)
    return final, jnp.where(alive, out, 0)


def uncleared(step: Any, weights: Any, x: Any, state: Any, alive: Any = None, reverse: bool = False) -> Any:
    """Outputs after the end repeat the last one."""
    final, out = cells.run(step, weights, x, state, alive, reverse)
    return final, jnp.where(alive, out, final[0]) if not reverse else out


@pytest.mark.parametrize("fault", [from_the_padding, past_the_end, uncleared])
def test_lengths(fault: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{LAYERS}.run", fault)
    assert disagree_packed(perturbed(nn.RNN(2, 3, bidirectional=True)), normal(6, 3, 2), lengths=UNSORTED)


def test_the_state_of_packed_sequences_in_the_order_of_the_caller() -> None:
    def port(subject: Any) -> Any:
        def apply(params: Any, buffers: Any, args: Any, kwargs: Any, train: bool) -> Any:
            order = np.argsort(np.argsort(-np.asarray(UNSORTED)))
            return subject.apply(params, buffers, (args[0], args[1][:, order]), kwargs, train)

        return packed_port(dataclasses.replace(subject, apply=apply))

    module, inputs = perturbed(nn.RNN(2, 3)), (normal(6, 3, 2), normal(1, 3, 3))
    assert disagree_packed(module, *inputs, lengths=UNSORTED, port=packed_port) == {}
    assert disagree_packed(module, *inputs, lengths=UNSORTED, port=port)


def test_dropout_of_known_lengths_over_the_padded_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = recurrent._dropped
    monkeypatch.setattr(f"{LAYERS}._dropped", lambda x, p, m, known: ours(x, p, m, None))
    module = perturbed(nn.RNN(2, 3, num_layers=2, dropout=0.25))
    with pytest.raises(DrawsDiffer):
        disagree_packed(module, normal(6, 3, 2), lengths=UNSORTED, train=True)
