"""One step of each recurrent cell, and a layer of steps in one direction.

Gates stay fused and in torch's order, and both of torch's biases stay.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

State = tuple[Any, ...]
"""The hidden state, and after it the cell state of an LSTM."""
Step = Callable[[Any, Any, State], State]
"""`step(of_input, of_hidden, state) -> state`: the two halves of the gates, each with its own bias."""


class Weights(NamedTuple):
    """One layer's leaves in one direction, gates along the last axis; None where it has none."""

    kernel_ih: Any
    kernel_hh: Any
    bias_ih: Any
    bias_hh: Any
    kernel_hr: Any


def simple_step(activation: Callable[[Any], Any], of_input: Any, of_hidden: Any, state: State) -> State:
    """One step of an Elman network. https://docs.pytorch.org/docs/stable/generated/torch.nn.RNNCell.html"""
    del state
    return (activation(of_input + of_hidden),)


def lstm_step(of_input: Any, of_hidden: Any, state: State) -> State:
    """One step of an LSTM, gates packed i, f, g, o; the state is (h, c) where Flax's is (c, h).

    https://docs.pytorch.org/docs/stable/generated/torch.nn.LSTMCell.html
    """
    i, f, g, o = jnp.split(of_input + of_hidden, 4, axis=-1)
    cell = jax.nn.sigmoid(f) * state[1] + jax.nn.sigmoid(i) * jnp.tanh(g)
    return jax.nn.sigmoid(o) * jnp.tanh(cell), cell


def gru_step(of_input: Any, of_hidden: Any, state: State) -> State:
    """One step of a GRU, gates packed r, z, n; r multiplies the hidden half of n with its bias, not h alone.

    https://docs.pytorch.org/docs/stable/generated/torch.nn.GRUCell.html
    """
    input_r, input_z, input_n = jnp.split(of_input, 3, axis=-1)
    hidden_r, hidden_z, hidden_n = jnp.split(of_hidden, 3, axis=-1)
    new = jnp.tanh(input_n + jax.nn.sigmoid(input_r + hidden_r) * hidden_n)
    return (new + jax.nn.sigmoid(input_z + hidden_z) * (state[0] - new),)


def advanced(step: Step, weights: Weights, of_input: Any, state: State) -> State:
    """The state after one step, its hidden part projected where there is a kernel for it (`proj_size`)."""
    new = step(of_input, affine(state[0], weights.kernel_hh, weights.bias_hh), state)
    return new if weights.kernel_hr is None else (new[0] @ weights.kernel_hr, *new[1:])


def affine(x: Any, kernel: Any, bias: Any) -> Any:
    """`x @ kernel + bias`, without the bias where it is None."""
    return x @ kernel if bias is None else x @ kernel + bias


def run(
    step: Step, weights: Weights, x: Any, state: State, alive: Any = None, reverse: bool = False
) -> tuple[State, Any]:
    """The last state and all outputs of one layer in one direction.

    Args:
        step: the cell.
        weights: its leaves.
        x: (time, batch, features).
        state: the first, each (batch, size).
        alive: (time, batch, 1), whether each sequence reaches each step: where not, the state stays and the output is
            0, so that in reverse a sequence starts at its own end, as torch's packed sequences do. None: all do.
        reverse: whether time runs backwards; outputs stay in the order of `x`.
    """

    def body(state: State, now: Any) -> tuple[State, Any]:
        of_input, lives = now
        new = advanced(step, weights, of_input, state)
        if lives is None:
            return new, new[0]
        return tuple(jnp.where(lives, n, s) for n, s in zip(new, state, strict=True)), jnp.where(lives, new[0], 0)

    gates = affine(x, weights.kernel_ih, weights.bias_ih)
    final: State
    final, outputs = jax.lax.scan(body, state, (gates, alive), reverse=reverse)
    return final, outputs
