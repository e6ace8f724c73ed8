"""The state of torch.optim.LBFGS on its ways: read and written to the bit, handed over in training, and refused."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from torch.optim import LBFGS

from equivalence.errors import InputError
from equivalence.optimizers import lbfgs
from equivalence.optimizers.lbfgs_slots import fill, moved, read, slots_of_state, write
from equivalence.runtimes.jax import environment
from tests.agreement import Arrays, assert_agree, disagreements
from tests.lbfgs_sides import (
    KINDS,
    Case,
    flat,
    in_torch,
    network,
    parts,
    problem,
    squares,
)

SHORT = {"history_size": 3}
SQUARES = Case("squares", {"history_size": 4, "max_iter": 4}, 20, 1)


def same(a: Any, b: Any) -> bool:
    """Whether two state_dicts are the same in every type and bit."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return len(a) == len(b) and all(map(same, a, b)) if isinstance(a, list) else a == b


def stepped(steps: int, kind: Any = torch.float64, **options: Any) -> tuple[Any, list[str], dict[str, Any], Any]:
    """A torch optimizer some steps on: with its parameters' names, them, and its closure."""
    made, data = parts(problem("network", 3), lambda value: torch.tensor(value).to(kind))
    optimizer = LBFGS([param.requires_grad_() for param in made.values()], **{"max_iter": 3, **SHORT, **options})

    def closure() -> Any:
        optimizer.zero_grad()
        loss = network(torch, made, data)
        loss.backward()
        return loss

    for _ in range(steps):
        optimizer.step(closure)
    return optimizer, list(made), made, closure


@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"line_search_fn": "strong_wolfe"}, {"max_iter": 0}, {"tolerance_grad": 1e9}])
@pytest.mark.parametrize("steps", [0, 1, 4])
def test_torchs_state_returns_to_the_bit(kind, options, steps):
    optimizer, names, _, _ = stepped(steps, kind, **options)
    other = stepped(1)[0] if kind == torch.float64 else stepped(0, kind)[0]
    write(other, names, read(optimizer, names))
    assert same(other.state_dict()["state"], optimizer.state_dict()["state"])


@pytest.mark.parametrize("search", [None, "strong_wolfe"])
@pytest.mark.parametrize("steps", [0, 1, 4])
def test_a_state_filled_and_read_is_the_same(search, steps):
    optimizer, names, made, _ = stepped(steps, line_search_fn=search)
    slots = read(optimizer, names)
    with environment(64):
        group = {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}
        template = lbfgs.scale_by_torch_lbfgs(group).init({n: jnp.asarray(p.detach().numpy()) for n, p in made.items()})
        back = slots_of_state(fill(template, slots))
    first, second = flat(0, slots, 3), flat(0, back, 3)
    assert first.keys() == second.keys()
    for key in first:
        np.testing.assert_array_equal(first[key], second[key], err_msg=key)


def over(leaves: Mapping[str, Any]) -> dict[str, Any]:
    return {"layer.kernel": leaves["w"].T, "layer.bias": leaves["b"]}


def back(leaves: Mapping[str, Any]) -> dict[str, Any]:
    return {"w": leaves["layer.kernel"].T, "b": leaves["layer.bias"]}


def handed_over(bits: int, arrays: Arrays, lost: str | None = None) -> dict[str, np.ndarray]:
    """Two steps in torch, two in JAX on transposed kernels, two in torch again."""
    params, data = parts(arrays, lambda value: torch.tensor(value, dtype=KINDS[bits]))
    names = list(params)

    def in_torch_again(state: Any) -> Any:
        optimizer = LBFGS([param.requires_grad_() for param in params.values()], **SQUARES.options)
        write(optimizer, names, state)
        for _ in range(2):
            optimizer.step(functools.partial(_closure, optimizer, params, data))
        return read(optimizer, names)

    slots = in_torch_again({})
    with environment(bits):
        moving = over({name: param.detach().numpy() for name, param in params.items()})
        tree = {"layer": {key.partition(".")[2]: jnp.asarray(value) for key, value in moving.items()}}
        numbers = {key: jnp.asarray(value.numpy()) for key, value in data.items()}

        def value(tree: Any) -> Any:
            return squares(jnp, back({f"layer.{key}": leaf for key, leaf in tree["layer"].items()}), numbers)

        transform = lbfgs.scale_by_torch_lbfgs(SQUARES.group)
        state = fill(transform.init(tree), moved(slots, over))
        state = state if lost is None else state._replace(**{lost: jax.tree.map(jnp.zeros_like, getattr(state, lost))})

        @jax.jit
        def step(tree: Any, state: Any) -> Any:
            change, state = transform.update(jax.grad(value)(tree), state, tree, value_fn=value)
            return optax.apply_updates(tree, change), state

        for _ in range(2):
            tree, state = step(tree, state)
        found = back({f"layer.{key}": np.array(leaf) for key, leaf in tree["layer"].items()})
        slots = moved(slots_of_state(state), back)
    params = {name: torch.from_numpy(np.ascontiguousarray(found[name])) for name in names}
    slots = in_torch_again(slots)
    return {f"params.{name}": p.detach().numpy() for name, p in params.items()} | {
        key[4:]: value for key, value in flat(0, slots, 4).items()
    }


def _closure(optimizer: Any, params: Any, data: Any) -> Any:
    optimizer.zero_grad()
    loss = squares(torch, params, data)
    loss.backward()
    return loss


def never_handed_over(bits: int, arrays: Arrays) -> dict[str, np.ndarray]:
    found = in_torch(dataclasses.replace(SQUARES, steps=6), bits, arrays)
    return {key[4:]: value for key, value in found.items() if key.startswith("005.") and key != "005.loss"}


def test_training_goes_over_and_returns():
    assert_agree(never_handed_over, handed_over, SQUARES.arrays)


@pytest.mark.parametrize("lost", ["old_stps", "prev_grad", "held"])
def test_a_state_lost_on_the_way_is_seen(lost):
    def port(bits: int, arrays: Arrays) -> Arrays:
        return handed_over(bits, arrays, lost) if bits == 64 else never_handed_over(bits, arrays)

    assert disagreements(never_handed_over, port, SQUARES.arrays)


def test_errors_name_what_is_missing():
    group = Case("valley").group
    make = lbfgs.scale_by_torch_lbfgs
    params = {"w": jnp.ones(3)}
    state = make(group).init(params)
    with pytest.raises(InputError, match="value_fn"):
        make(group).update(params, state, params)
    with pytest.raises(InputError, match="needs params"):
        make(group).update(params, state, value_fn=jnp.sum)
    for wrong, text in (
        ({"line_search_fn": "armijo"}, "armijo"),
        ({"history_size": 0}, "history_size=0"),
        ({"line_search_fn": "strong_wolfe", "max_eval": 0}, "max_eval=0"),
        ({"line_search_fn": "strong_wolfe", "lr": torch.tensor(0.1)}, "tensor"),
    ):
        with pytest.raises(InputError, match=text):
            make({**group, **wrong})
    with pytest.raises(InputError, match="complex64"):
        make(group).init({"w": jnp.ones(3, jnp.complex64)})
    optimizer, names, _, _ = stepped(4)
    with pytest.raises(InputError, match="4 parameters, but 3 names"):
        read(optimizer, names[1:])
    slots = read(optimizer, names)
    fresh = {name: jnp.zeros(1) for name in names}
    with pytest.raises(InputError, match="lacks b, s, v, w, or has it in another shape"):
        fill(make(group).init(fresh), slots)
    with pytest.raises(InputError, match="lacks w"):
        write(optimizer, names, {**slots, "d": {name: slots["d"][name] for name in names if name != "w"}})
    with pytest.raises(InputError, match="more than its history_size 2"):
        fill(make({**group, "history_size": 2}).init(fresh), slots)
