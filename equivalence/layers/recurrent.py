"""RNN, LSTM, GRU and their cells."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from equivalence.errors import InputError
from equivalence.layers.cells import State, Step, Weights, advanced, affine, gru_step, lstm_step, run, simple_step
from equivalence.layers.dropout import dropped
from equivalence.layers.form import Carrier, Form
from equivalence.layers.packed import Packed, accept_torch, padded, rows
from equivalence.layers.registry import Example, layer, leaves
from equivalence.weights import Rule

Inside = Callable[[Any], Form]


@dataclass(frozen=True)
class Net:
    """The options of a recurrent layer.

    Attributes:
        name: torch's class.
        step: its cell.
        sizes: of the input, and of each array of the state.
        layers, directions: how many.
        batch_first: whether batched inputs are (batch, time, features).
        dropout: the probability to drop, between layers only.
    """

    name: str
    step: Step
    sizes: tuple[int, ...]
    layers: int = 1
    directions: int = 1
    batch_first: bool = False
    dropout: float = 0.0


def stacked(net: Net, m: Carrier, x: Any, state: State, lengths: Any = None) -> tuple[Any, State]:
    """All layers and directions over x (time, batch, features), each state (layers * directions, batch, size).

    Lengths are None, JAX's array (a length outside 1 ... time gives NaN), or known numbers, with which dropout draws
    for the packed elements as torch does.
    """
    alive, known = None, None if isinstance(lengths, jax.Array) or lengths is None else rows(lengths)
    if lengths is not None:
        ends = jnp.asarray(lengths)
        legal = ((ends >= 1) & (ends <= x.shape[0]))[None, :, None]
        alive = (jnp.arange(x.shape[0])[:, None, None] < ends[None, :, None]) | ~legal
        x = jnp.where(legal, jnp.where(alive, x, 0), jnp.nan)
    finals = []
    for number in range(net.layers):
        outputs = []
        for direction in range(net.directions):
            place = number * net.directions + direction
            suffix = f"_l{number}" + "_reverse" * direction
            weights = Weights(*(m[f"{name}{suffix}"] for name in Weights._fields))
            final, out = run(net.step, weights, x, tuple(s[place] for s in state), alive, bool(direction))
            finals.append(final)
            outputs.append(out)
        x = jnp.concatenate(outputs, axis=-1)
        if m.train and number + 1 < net.layers:
            x = _dropped(x, net.dropout, m, known)
    return x, tuple(jnp.stack(part) for part in zip(*finals, strict=True))


def _dropped(x: Any, p: float, m: Carrier, known: tuple[np.ndarray, np.ndarray] | None) -> Any:
    if known is None:
        return dropped(x, p, m.key, x.shape)
    elements = x[known]
    return jnp.zeros_like(x).at[known].set(dropped(elements, p, m.key, elements.shape))


def _call(net: Net, m: Carrier, x: Any, hx: Any = None, *, lengths: Any = None) -> Any:
    """torch's forward; `lengths` (batch,) says how far each sequence of a padded batch goes, outputs after it are 0."""
    if isinstance(x, Packed):
        return _of_packed(net, m, x, hx)
    x, given = jnp.asarray(x), _state(net, hx)
    single = x.ndim == 2
    if x.ndim not in (2, 3) or x.shape[-1] != net.sizes[0]:
        raise InputError(f"{net.name} takes (time, batch, {net.sizes[0]}) or (time, {net.sizes[0]}), not {x.shape}")
    if single:
        x, given = x[:, None], given and tuple(s[:, None] for s in given)
    elif net.batch_first:
        x = x.swapaxes(0, 1)
    if x.shape[0] == 0:
        raise InputError(f"{net.name} takes sequences of at least one step, not of none")
    if lengths is not None:
        lengths = _lengths(net, lengths, x, single)
    x, state = stacked(net, m, x, _checked(net, given, x), lengths)
    if single:
        return x[:, 0], _handed(tuple(s[:, 0] for s in state))
    return x.swapaxes(0, 1) if net.batch_first else x, _handed(state)


def _of_packed(net: Net, m: Carrier, packed: Packed, hx: Any) -> tuple[Packed, Any]:
    if packed.data.ndim != 2 or packed.data.shape[1] != net.sizes[0]:
        raise InputError(f"{net.name} takes packed (elements, {net.sizes[0]}), not {packed.data.shape}")
    x, lengths = padded(packed)
    state = _checked(net, _state(net, hx), x)
    if packed.sorted_indices is not None:
        state = tuple(s[:, packed.sorted_indices] for s in state)
    x, state = stacked(net, m, x, state, lengths)
    if packed.unsorted_indices is not None:
        state = tuple(s[:, packed.unsorted_indices] for s in state)
    return packed._replace(data=x[rows(lengths)]), _handed(state)


def _lengths(net: Net, lengths: Any, x: Any, single: bool) -> Any:
    lengths = lengths if isinstance(lengths, jax.Array) else np.asarray(lengths)
    if single or lengths.shape != x.shape[1:2] or lengths.dtype.kind not in "iu":
        raise InputError(f"{net.name} takes one whole length for each sequence of a batch, not {lengths!r}")
    if isinstance(lengths, np.ndarray) and not ((lengths >= 1) & (lengths <= x.shape[0])).all():
        raise InputError(f"{net.name} takes lengths from 1 to {x.shape[0]}, not {lengths.tolist()}")
    return lengths


def _state(net: Net, hx: Any) -> State | None:
    """The given state as a tuple of arrays, or None. Raises InputError unless it has as many as the cell needs."""
    if hx is None:
        return None
    count = len(net.sizes) - 1
    parts = tuple(hx) if isinstance(hx, (tuple, list)) else (hx,)
    if len(parts) != count or (count == 1 and isinstance(hx, (tuple, list))):
        raise InputError(f"{net.name} takes hx as {'one array' if count == 1 else 'the pair (h, c)'}")
    return tuple(jnp.asarray(part) for part in parts)


def _checked(net: Net, state: State | None, x: Any) -> State:
    """The first state for x (time, batch, features): zeros, or what is given, of the shapes that it must have."""
    shapes = [(net.layers * net.directions, x.shape[1], size) for size in net.sizes[1:]]
    if state is None:
        return tuple(jnp.zeros(shape, x.dtype) for shape in shapes)
    if [s.shape for s in state] != shapes:
        raise InputError(
            f"{net.name} takes hx of {shapes} (layers, batch, size; no batch where the input has none),"
            f" not {[s.shape for s in state]}"
        )
    return state


def _handed(state: State) -> Any:
    return state if len(state) > 1 else state[0]


def _net(module: Any, step: Step) -> Net:
    hidden = module.proj_size or module.hidden_size
    return Net(
        module.mode.partition("_")[0],
        step,
        (module.input_size, hidden, *([module.hidden_size] if module.mode == "LSTM" else [])),
        module.num_layers,
        2 if module.bidirectional else 1,
        module.batch_first,
        float(module.dropout),
    )


def _form(module: Any, step: Step, text: str) -> Form:
    accept_torch()
    held, _ = leaves(module)
    net = _net(module, step)
    draws = net.dropout > 0 and net.layers > 1
    return Form(net.name, functools.partial(_call, net), text=text, rules=_rules(held), held=held, draws=draws)


def _rules(held: Any) -> tuple[Rule, ...]:
    """weight_ih_l0 is kernel_ih_l0, inputs first; biases keep their names."""
    return tuple(
        Rule(name, name.replace("weight", "kernel"), "g k -> k g") if "weight" in name else Rule(name, name)
        for name in held
    )


@layer(
    "RNN",
    Example("nn.RNN(3, 4, num_layers=2, dropout=0.25)", ((5, 2, 3),)),
    "two biases, both trained, so their sum moves twice as fast as Flax's one; time first; dropout between layers only",
)
def rnn(module: Any, inside: Inside) -> Form:
    """nn.RNN with tanh or relu."""
    return _form(module, functools.partial(simple_step, _activation(module)), "jax.lax.scan of simple_step a layer")


@layer(
    "LSTM",
    Example("nn.LSTM(3, 4, num_layers=2, dropout=0.25)", ((5, 2, 3),)),
    "gates i, f, g, o, each with two biases; the state is (h, c), Flax's (c, h); dropout between layers only",
)
def lstm(module: Any, inside: Inside) -> Form:
    """nn.LSTM, with `proj_size` too."""
    return _form(module, lstm_step, "jax.lax.scan of lstm_step a layer")


@layer(
    "GRU",
    Example("nn.GRU(3, 4, num_layers=2, dropout=0.25)", ((5, 2, 3),)),
    "gates r, z, n; the hidden bias of n is multiplied by r, so it does not add to the input bias; h = (1-z) n + z h",
)
def gru(module: Any, inside: Inside) -> Form:
    """nn.GRU."""
    return _form(module, gru_step, "jax.lax.scan of gru_step a layer")


def _activation(module: Any) -> Callable[[Any], Any]:
    known: dict[str, Callable[[Any], Any]] = {"tanh": jnp.tanh, "relu": jax.nn.relu}
    return known[module.nonlinearity]


def _cell(module: Any, step: Step, text: str) -> Form:
    held, _ = leaves(module)
    sizes = (module.input_size, *[module.hidden_size] * (2 if type(module).__name__ == "LSTMCell" else 1))
    net = Net(type(module).__name__, step, sizes)

    def call(m: Carrier, x: Any, hx: Any = None) -> Any:
        x, given = jnp.asarray(x), _state(net, hx)
        if x.ndim not in (1, 2) or x.shape[-1] != net.sizes[0]:
            raise InputError(f"{net.name} takes (batch, {net.sizes[0]}) or ({net.sizes[0]},), not {x.shape}")
        whole = x[None] if x.ndim == 2 else x[None, None]
        lead = (1,) if x.ndim == 2 else (1, 1)
        given = given and tuple(s.reshape(*lead, *s.shape) for s in given)
        weights = Weights(m["kernel_ih"], m["kernel_hh"], m["bias_ih"], m["bias_hh"], None)
        state = tuple(s[0] for s in _checked(net, given, whole))
        new = advanced(step, weights, affine(whole[0], weights.kernel_ih, weights.bias_ih), state)
        return _handed(new if x.ndim == 2 else tuple(s[0] for s in new))

    return Form(net.name, call, text=text, rules=_rules(held), held=held)


@layer(
    "RNNCell",
    Example("nn.RNNCell(3, 4)", ((2, 3), (2, 4))),
    "two biases, both trained, where Flax's SimpleCell has one; the state comes second and is the only output",
)
def rnn_cell(module: Any, inside: Inside) -> Form:
    """nn.RNNCell with tanh or relu."""
    name = "jnp.tanh" if module.nonlinearity == "tanh" else "jax.nn.relu"
    text = f"{name}(x @ kernel_ih + bias_ih + h @ kernel_hh + bias_hh)"
    return _cell(module, functools.partial(simple_step, _activation(module)), text)


@layer(
    "LSTMCell",
    Example(
        "nn.LSTMCell(3, 4)",
        lambda rng: (rng.standard_normal((2, 3)), (rng.standard_normal((2, 4)), rng.standard_normal((2, 4)))),
    ),
    "gates i, f, g, o, each with two biases; the state is (h, c), Flax's (c, h)",
)
def lstm_cell(module: Any, inside: Inside) -> Form:
    """nn.LSTMCell."""
    return _cell(module, lstm_step, "lstm_step(x @ kernel_ih + bias_ih, h @ kernel_hh + bias_hh, (h, c))")


@layer(
    "GRUCell",
    Example("nn.GRUCell(3, 4)", ((2, 3), (2, 4))),
    "gates r, z, n; the hidden bias of n is multiplied by r, so it does not add to the input bias; h = (1-z) n + z h",
)
def gru_cell(module: Any, inside: Inside) -> Form:
    """nn.GRUCell."""
    return _cell(module, gru_step, "gru_step(x @ kernel_ih + bias_ih, h @ kernel_hh + bias_hh, (h,))")
