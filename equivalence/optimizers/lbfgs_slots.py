"""The state of torch.optim.LBFGS by parameter name, and its ways to and from torch and `TorchLbfgsState`.

Torch keeps it as flat vectors, in the order of the params list, in the state of the first parameter. A slot is either
torch's own number (a Python one as such, a tensor as an array of its dtype) or, where torch has vectors, a dict from
leaf name to array; a history's arrays have a leading axis, oldest first:

    {"func_evals": 7, "n_iter": 3, "d": {"w": (2, 3)}, "old_dirs": {"w": (k, 2, 3)}, "ro": [k numbers], ...}
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from equivalence.errors import InputError
from equivalence.optimizers.lbfgs import TorchLbfgsState
from equivalence.optimizers.trees import Flat, by_path, like

Slots = dict[str, Any]

VECTORS = ("d", "prev_flat_grad")
HISTORIES = ("old_dirs", "old_stps")
NUMBERS = ("ro", "al")
LATE = "al"
"""What torch makes in its second iteration."""


def read(optimizer: Any, names: Sequence[str]) -> Slots:
    """The slots of a torch LBFGS; empty before its first step.

    Args:
        optimizer: a `torch.optim.LBFGS`.
        names: the names of its parameters, in the order of its params list.

    Raises InputError if there are more or fewer names than parameters.
    """
    shapes = _shapes(optimizer, names)
    state = optimizer.state.get(optimizer.param_groups[0]["params"][0], {})

    def one(key: str, value: Any) -> Any:
        if value is None:
            return None
        if key in VECTORS:
            return _split(_array(value), shapes)
        if key in HISTORIES:
            size = sum(int(np.prod(shape)) for shape in shapes.values())
            return _split(np.stack([_array(row) for row in value]) if value else np.zeros((0, size)), shapes)
        return [_array(number) for number in value] if key in NUMBERS else _array(value)

    return {key: one(key, value) for key, value in state.items()}


def write(optimizer: Any, names: Sequence[str], slots: Mapping[str, Any]) -> None:
    """Give a torch LBFGS the state that `read` gave: the reverse to the bit, lists and Python types included.

    Args:
        optimizer: a `torch.optim.LBFGS`.
        names: the names of its parameters, in the order of its params list.
        slots: as from `read` or `slots_of_state`; vectors are cast to the dtype of torch's flat vector.

    Raises InputError if there are more or fewer names than parameters, or a vector lacks one or has another shape.
    """
    import torch

    shapes, first = _shapes(optimizer, names), optimizer.param_groups[0]["params"][0]
    flat = torch.cat([param.detach().reshape(-1)[:0] for param in optimizer.param_groups[0]["params"]])

    def vector(leaves: Flat) -> Any:
        return _tensor(_joined(leaves, shapes)).to(flat)

    def one(key: str, value: Any) -> Any:
        if value is None:
            return None
        if key in VECTORS:
            return vector(value)
        if key in HISTORIES:
            return [vector({name: rows[i] for name, rows in value.items()}) for i in range(_length(value))]
        numbers = [_tensor(number, flat.device) for number in (value if key in NUMBERS else [value])]
        return numbers if key in NUMBERS else numbers[0]

    made = {key: one(key, value) for key, value in slots.items()}
    optimizer.state.pop(first, None)
    if made:
        optimizer.state[first] = made


def moved(slots: Mapping[str, Any], move: Callable[[Flat], Flat]) -> Slots:
    """The slots under the leaf names and layouts of the other side.

    Args:
        slots: as from `read` or `slots_of_state`.
        move: from a gradient, as a dict from leaf name to array, to the same gradient on the other side.
    """

    def one(key: str, value: Any) -> Any:
        if value is None or key not in (*VECTORS, *HISTORIES):
            return value
        if key in VECTORS:
            return dict(move(dict(value)))
        length = _length(value)
        # a row of zeros more, so that an empty history has shapes too
        whole = {
            name: np.concatenate([rows, np.zeros_like(rows, shape=(1, *rows.shape[1:]))])
            for name, rows in value.items()
        }
        each = [move({name: rows[i] for name, rows in whole.items()}) for i in range(length + 1)]
        return {name: np.stack([row[name] for row in each])[:length] for name in each[0]}

    return {key: one(key, value) for key, value in slots.items()}


def slots_of_state(state: TorchLbfgsState) -> Slots:
    """The slots, under the port's leaf names, that torch would hold in this state."""
    steps, evals, held = int(state.n_iter), int(state.func_evals), int(state.held)
    if not steps:
        return {"func_evals": evals, "n_iter": steps} if evals else {}

    def history(tree: Any) -> Flat:
        return {name: np.asarray(rows)[:held] for name, rows in by_path(tree).items()}

    slots = {
        "func_evals": evals,
        "n_iter": steps,
        "d": _host(state.d),
        "t": np.asarray(state.t),
        "old_dirs": history(state.old_dirs),
        "old_stps": history(state.old_stps),
        "ro": list(np.asarray(state.ro)[:held]),
        "H_diag": np.asarray(state.H_diag),
        "prev_flat_grad": _host(state.prev_grad),
        "prev_loss": float(state.prev_loss),
    }
    size = state.al.shape[0]
    return slots | ({"al": [*np.asarray(state.al)[:held], *[None] * (size - held)]} if steps > 1 else {})


def fill(template: TorchLbfgsState, slots: Mapping[str, Any]) -> TorchLbfgsState:
    """The state that holds the slots.

    Args:
        template: a fresh state, from the transformation's `init`, of the wanted dtypes and history size.
        slots: under the port's leaf names and layouts.

    Raises InputError if torch holds more pairs than the history has rows, or a leaf is missing or of another shape.
    """
    if not slots.get("n_iter"):
        return template._replace(func_evals=_as(template.func_evals, slots.get("func_evals", 0)))
    size, held = template.ro.shape[0], len(slots["ro"])
    if held > size:
        raise InputError(f"LBFGS holds {held} pairs, more than its history_size {size}")

    def padded(kind: Any, rows: Any) -> Any:
        rows = np.asarray(rows)
        return kind.at[: len(rows)].set(rows.astype(kind.dtype))

    def tree(kinds: Any, leaves: Flat, put: Callable[[Any, Any], Any], axes: int = 0) -> Any:
        known = by_path(kinds)
        _fits(leaves, {name: kind.shape[axes:] for name, kind in known.items()}, axes)
        return like(kinds, {name: put(kind, leaves[name]) for name, kind in known.items()})

    used = [number for number in slots.get(LATE, ()) if number is not None]
    return TorchLbfgsState(
        d=tree(template.d, slots["d"], _as),
        t=_as(template.t, slots["t"]),
        old_dirs=tree(template.old_dirs, slots["old_dirs"], padded, 1),
        old_stps=tree(template.old_stps, slots["old_stps"], padded, 1),
        ro=padded(template.ro, slots["ro"]),
        al=padded(template.al, used),
        H_diag=_as(template.H_diag, slots["H_diag"]),
        prev_grad=tree(template.prev_grad, slots["prev_flat_grad"], _as),
        prev_loss=_as(template.prev_loss, slots["prev_loss"]),
        func_evals=_as(template.func_evals, slots["func_evals"]),
        n_iter=_as(template.n_iter, slots["n_iter"]),
        held=_as(template.held, held),
    )


def _as(kind: Any, value: Any) -> Any:
    return jnp.asarray(value, kind.dtype)


def _host(tree: Any) -> Flat:
    return {name: np.asarray(leaf) for name, leaf in by_path(tree).items()}


def _length(history: Mapping[str, np.ndarray]) -> int:
    return len(next(iter(history.values())))


def _shapes(optimizer: Any, names: Sequence[str]) -> dict[str, tuple[int, ...]]:
    params = optimizer.param_groups[0]["params"]
    if len(params) != len(names):
        raise InputError(f"LBFGS has {len(params)} parameters, but {len(names)} names were given")
    return {name: tuple(param.shape) for name, param in zip(names, params, strict=True)}


def _split(flat: np.ndarray, shapes: Mapping[str, tuple[int, ...]]) -> Flat:
    """A flat vector, or rows of them, by leaf."""
    ends = np.cumsum([int(np.prod(shape)) for shape in shapes.values()])
    parts = np.split(flat, ends[:-1], axis=-1)
    return {
        name: part.reshape((*flat.shape[:-1], *shape))
        for (name, shape), part in zip(shapes.items(), parts, strict=True)
    }


def _joined(leaves: Flat, shapes: Mapping[str, tuple[int, ...]]) -> np.ndarray:
    _fits(leaves, shapes)
    return np.concatenate([np.asarray(leaves[name]).reshape(-1) for name in shapes])


def _fits(leaves: Flat, shapes: Mapping[str, tuple[int, ...]], axes: int = 0) -> None:
    """Raise InputError for leaves that are missing or, beyond the first `axes`, of another shape."""
    wrong = [n for n, shape in shapes.items() if n not in leaves or np.shape(leaves[n])[axes:] != shape]
    if wrong:
        raise InputError(f"LBFGS state lacks {', '.join(wrong)}, or has it in another shape")


def _array(value: Any) -> Any:
    """A tensor as an array of its own, bfloat16 included; anything else as it is."""
    if not hasattr(value, "detach"):
        return value
    import torch

    plain = value.detach().cpu()
    low = plain.dtype == torch.bfloat16
    return plain.view(torch.int16).numpy().copy().view(ml_dtypes.bfloat16) if low else plain.numpy().copy()


def _tensor(value: Any, device: Any = None) -> Any:
    """The reverse of `_array`."""
    if not isinstance(value, np.ndarray | np.generic):
        return value
    import torch

    low = value.dtype == ml_dtypes.bfloat16
    plain = np.array(value)
    return (torch.from_numpy(plain.view(np.int16)).view(torch.bfloat16) if low else torch.from_numpy(plain)).to(device)
