"""A plain JAX function -> subject: `equivalence.function(apply, params)`."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from equivalence.errors import InputError
from equivalence.frameworks.subject import Flat, Subject
from equivalence.paths import join


@dataclass(frozen=True, eq=False)
class FunctionModel:
    """`apply(params, *inputs, **inputs)` over any pytree of arrays."""

    apply: Callable[..., Any]
    params: Any


def function(apply: Callable[..., Any], params: Any) -> FunctionModel:
    """A pure function with its parameters, ready for `verify`.

    Declares train mode by an argument `train`, or `deterministic` turned round, and random numbers by an argument
    `key`, if it has them. Raises InputError when `apply` is not callable.
    """
    if not callable(apply):
        raise InputError(f"equivalence.function takes a callable first, not {type(apply).__name__}")
    return FunctionModel(apply, params)


def accepts(model: Any) -> bool:
    """Whether `model` came from `function`."""
    return isinstance(model, FunctionModel)


def subject(model: FunctionModel) -> Subject:
    """The subject of a function: every floating leaf of its pytree is a param, the others are buffers."""
    keyed, structure = jax.tree_util.tree_flatten_with_path(model.params)
    paths = [join(key_name(key) for key in path) for path, _ in keyed]
    arrays = {path: np.asarray(leaf) for path, (_, leaf) in zip(paths, keyed, strict=True)}
    buffers = {
        path: array for path, array in arrays.items() if not jax.numpy.issubdtype(array.dtype, jax.numpy.inexact)
    }
    declared = inspect.signature(model.apply).parameters

    def native(flat: Flat) -> Any:
        return jax.tree_util.tree_unflatten(structure, [flat[path] for path in paths])

    def put(leaves: Iterable[tuple[str, np.ndarray]]) -> FunctionModel:
        made = {path: leaf for path, (_, leaf) in zip(paths, keyed, strict=True)}
        for path, array in leaves:
            made[path] = jax.numpy.asarray(array, np.asarray(made[path]).dtype)
        return dataclasses.replace(model, params=native(made))

    def flatten(tree: Any) -> Flat:
        return dict(zip(paths, jax.tree_util.tree_leaves(tree), strict=True))

    def apply(flat: Flat, buffers: Flat, args: Any, kwargs: Any, train: bool) -> tuple[Any, Flat]:
        extra: dict[str, Any] = {}
        if "train" in declared:
            extra["train"] = train
        if "deterministic" in declared:
            extra["deterministic"] = not train
        if "key" in declared:
            extra["key"] = jax.random.key(0)
        return model.apply(native({**flat, **buffers}), *args, **{**extra, **kwargs}), buffers

    return Subject(
        framework="function",
        runtime="jax",
        name=getattr(model.apply, "__name__", "function"),
        params={path: array for path, array in arrays.items() if path not in buffers},
        buffers=buffers,
        apply=apply,
        model=model,
        native=dict if buffers else native,
        flat=dict if buffers else flatten,
        put=put,
    )


def key_name(key: Any) -> Any:
    """The name or number that one step of a pytree path stands for."""
    for name in ("key", "name", "idx"):
        if hasattr(key, name):
            return getattr(key, name)
    return key
