"""equinox.Module -> subject. Arrays are leaves under their attribute paths, in torch's own layouts."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from equivalence.errors import InputError
from equivalence.frameworks.function import key_name
from equivalence.frameworks.subject import Flat, Subject
from equivalence.paths import join


@dataclass(frozen=True, eq=False)
class EquinoxModel:
    """A module and how it is called: on whole batches, or on one example and mapped over the first axis."""

    module: eqx.Module
    batched: bool


def equinox(module: eqx.Module, *, batched: bool = False) -> EquinoxModel:
    """An Equinox module written for one example, mapped over the first axis of every input (`batched=False`).

    A module that takes whole batches is handed to `verify` as it is. Raises InputError for another object.
    """
    if not isinstance(module, eqx.Module):
        raise InputError(f"equivalence.equinox takes an equinox.Module, not {type(module).__name__}")
    return EquinoxModel(module, batched)


def accepts(model: Any) -> bool:
    """Whether `model` is an Equinox module or came from `equinox`."""
    return isinstance(model, (eqx.Module, EquinoxModel))


def subject(model: eqx.Module | EquinoxModel) -> Subject:
    """The subject of an Equinox module: floating arrays are params, other arrays buffers.

    The module is put in inference mode in eval mode; a call that takes a `key` gets one. Modules that thread an
    `eqx.nn.State` are not supported.
    """
    wrapped = model if isinstance(model, EquinoxModel) else EquinoxModel(model, batched=True)
    arrays, static = eqx.partition(wrapped.module, eqx.is_array)
    keyed, structure = jax.tree_util.tree_flatten_with_path(arrays)
    paths = [join(key_name(key) for key in path) for path, _ in keyed]
    leaves = {path: np.asarray(leaf) for path, (_, leaf) in zip(paths, keyed, strict=True)}
    params = {path: leaf for path, leaf in leaves.items() if jnp.issubdtype(leaf.dtype, jnp.inexact)}
    takes_key = "key" in inspect.signature(type(wrapped.module).__call__).parameters

    def native(flat: Flat) -> Any:
        return jax.tree_util.tree_unflatten(structure, [flat.get(path) for path in paths])

    def apply(flat: Flat, buffers: Flat, args: Any, kwargs: Any, train: bool) -> tuple[Any, Flat]:
        whole = eqx.combine(native({**flat, **buffers}), static)
        module: Callable[..., Any] = eqx.nn.inference_mode(whole, not train)
        if wrapped.batched:
            extra = {"key": jax.random.key(0)} if takes_key and train else {}
            return module(*args, **kwargs, **extra), buffers
        size = jax.tree_util.tree_leaves((args, kwargs))[0].shape[0]
        keys = jax.random.split(jax.random.key(0), size) if takes_key and train else None

        def one(key: Any, args: Any, kwargs: Any) -> Any:
            return module(*args, **kwargs, **({} if key is None else {"key": key}))

        return jax.vmap(one)(keys, args, kwargs), buffers

    def put(leaves: Iterable[tuple[str, np.ndarray]]) -> Any:
        made = {path: leaf for path, (_, leaf) in zip(paths, keyed, strict=True)}
        for path, array in leaves:
            made[path] = jnp.asarray(array, made[path].dtype)
        module = eqx.combine(native(made), static)
        return dataclasses.replace(model, module=module) if isinstance(model, EquinoxModel) else module

    def flatten(tree: Any) -> Flat:
        found = jax.tree_util.tree_flatten_with_path(tree)[0]
        return {join(key_name(key) for key in path): leaf for path, leaf in found}

    return Subject(
        framework="equinox",
        runtime="jax",
        name=type(wrapped.module).__name__,
        params=params,
        buffers={path: leaf for path, leaf in leaves.items() if path not in params},
        apply=apply,
        model=model,
        native=native,
        flat=flatten,
        put=put,
    )
