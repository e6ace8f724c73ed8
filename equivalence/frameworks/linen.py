"""flax.linen -> subject. A Linen model is a module with its variables: `equivalence.linen(module, variables)`."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.training import train_state
from flax.traverse_util import flatten_dict

from equivalence.errors import InputError
from equivalence.frameworks.subject import Flat, OwnStep, Subject, call
from equivalence.paths import join, unflatten


@dataclass(frozen=True, eq=False)
class LinenModel:
    """A Linen module, its variables, and how its training state is made.

    `create_state(module, variables, transformation)` returns the state that the user's `train_step(state, *inputs,
    *targets) -> (state, loss)` takes; None is Flax's own `TrainState`. The state keeps `params` and `opt_state`, and
    any other collection under its own name (`batch_stats`).
    """

    module: nn.Module
    variables: Mapping[str, Any]
    create_state: Callable[[nn.Module, Any, Any], Any] | None = None
    method: str | None = None


def linen(
    module: nn.Module,
    variables: Mapping[str, Any],
    *,
    create_state: Callable[[nn.Module, Any, Any], Any] | None = None,
    method: str | None = None,
) -> LinenModel:
    """A Linen module with its variables, ready for `verify`. Raises InputError without a `params` collection."""
    if not isinstance(module, nn.Module):
        raise InputError(f"equivalence.linen takes a flax.linen.Module first, not {type(module).__name__}")
    if not isinstance(variables, Mapping) or "params" not in variables:
        raise InputError("equivalence.linen takes the module's variables second: a dict with the collection 'params'")
    return LinenModel(module, variables, create_state, method)


def accepts(model: Any) -> bool:
    """Whether `model` came from `linen`."""
    return isinstance(model, LinenModel)


def subject(model: LinenModel) -> Subject:
    """The subject of a Linen model: the collection `params` are params, all other collections are buffers.

    Leaf paths leave out the collection's name. Train mode sets the call argument that the module declares (`train`,
    `training`, `is_training`; `deterministic` and `use_running_average` turned round).
    """
    collections = {name: _flat(tree) for name, tree in model.variables.items()}
    params = collections.pop("params")
    owner = {path: name for name, leaves in collections.items() for path in leaves}
    buffers = {path: leaf for leaves in collections.values() for path, leaf in leaves.items()}
    flags = _mode_flags(getattr(model.module, model.method or "__call__"))

    def variables(flat: Flat, buffers: Flat) -> dict[str, Any]:
        made: dict[str, Any] = {"params": unflatten(flat)}
        for name in collections:
            made[name] = unflatten({path: leaf for path, leaf in buffers.items() if owner[path] == name})
        return made

    def apply(flat: Flat, buffers: Flat, args: Any, kwargs: Any, train: bool) -> tuple[Any, Flat]:
        modes = {name: train if direct else not train for name, direct in flags.items() if name not in kwargs}
        outputs, updated = model.module.apply(
            variables(flat, buffers),
            *args,
            **kwargs,
            **modes,
            rngs={name: jax.random.key(0) for name in ("dropout", "default")},
            mutable=list(collections) if train else [],
            method=model.method,
        )
        new = {path: leaf for tree in updated.values() for path, leaf in _flat(tree).items()}
        return outputs, {**buffers, **new}

    def put(leaves: Iterable[tuple[str, np.ndarray]]) -> LinenModel:
        made = {name: _flat(tree) for name, tree in model.variables.items()}
        for path, array in leaves:
            held = made[owner.get(path, "params")]
            held[path] = jnp.asarray(array, held[path].dtype)
        return dataclasses.replace(model, variables={name: unflatten(flat) for name, flat in made.items()})

    return Subject(
        framework="linen",
        runtime="jax",
        name=type(model.module).__name__,
        params={path: np.asarray(leaf) for path, leaf in params.items()},
        buffers={path: np.asarray(leaf) for path, leaf in buffers.items()},
        apply=apply,
        model=model,
        native=unflatten,
        flat=_flat,
        own_step=_own_step(model, variables),
        put=put,
    )


def _flat(tree: Any) -> Flat:
    plain = nn.meta.unbox(tree)
    return {join(path): leaf for path, leaf in flatten_dict(dict(plain)).items()}


def _mode_flags(method: Callable[..., Any]) -> dict[str, bool]:
    """Mode arguments that a call declares: name -> whether it is true in train mode."""
    known = {
        "train": True,
        "training": True,
        "is_training": True,
        "deterministic": False,
        "use_running_average": False,
    }
    return {name: known[name] for name in inspect.signature(method).parameters if name in known}


def _own_step(model: LinenModel, variables: Callable[[Flat, Flat], dict[str, Any]]) -> OwnStep:
    """`user_step(state, *inputs, *targets) -> (state, loss)` on the user's own train state."""

    def init(params: Flat, buffers: Flat, transformation: Any) -> Any:
        made = variables(params, buffers)
        if model.create_state is not None:
            return model.create_state(model.module, made, transformation)
        return train_state.TrainState.create(apply_fn=model.module.apply, params=made["params"], tx=transformation)

    def step(user_step: Callable[..., Any], state: Any, inputs: Any, targets: tuple[Any, ...]) -> tuple[Any, Any]:
        args, kwargs = call(inputs)
        state, loss = user_step(state, *args, *targets, **kwargs)
        return state, loss

    def buffers(state: Any) -> Flat:
        found: Flat = {}
        for name in model.variables:
            if name != "params" and hasattr(state, name):
                found.update(_flat(getattr(state, name)))
        return found

    return OwnStep(
        init=init,
        step=step,
        params=lambda state: _flat(state.params),
        buffers=buffers,
        optimizer=lambda state: state.opt_state,
        with_optimizer=lambda state, moved: state.replace(opt_state=moved),
    )
