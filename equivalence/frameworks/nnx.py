"""flax.nnx.Module -> subject. The module is split once a mode; the user's own is never touched."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from equivalence.frameworks.subject import Flat, OwnStep, Subject, call
from equivalence.paths import join


def accepts(model: Any) -> bool:
    """Whether `model` is an NNX module."""
    return isinstance(model, nnx.Module)


def subject(model: nnx.Module) -> Subject:
    """The subject of an NNX module: `nnx.Param` are params, other variables but random state are buffers."""
    graphs: dict[bool, tuple[Any, Any]] = {}
    for train in (False, True):
        copy = nnx.clone(model)
        (copy.train if train else copy.eval)()
        graph, params, randoms, rest = _split(copy)
        graphs[train] = (graph, randoms)
    paths_params = {join(path): path for path, _ in nnx.to_flat_state(params)}
    paths_rest = {join(path): path for path, _ in nnx.to_flat_state(rest)}

    def native(flat: Flat) -> Any:
        return _state(params, paths_params, flat)

    def merge(flat: Flat, buffers: Flat, train: bool) -> nnx.Module:
        graph, randoms = graphs[train]
        return nnx.merge(graph, native(flat), randoms, _state(rest, paths_rest, buffers), copy=True)

    def apply(flat: Flat, buffers: Flat, args: Any, kwargs: Any, train: bool) -> tuple[Any, Flat]:
        module = merge(flat, buffers, train)
        outputs = module(*args, **kwargs)
        _, held, _, rest_after = _split(module)
        renewed = {path: value for path, value in _flat(held).items() if value is not flat[path]}
        return outputs, {**renewed, **_flat(rest_after)}

    def put(leaves: Iterable[tuple[str, np.ndarray]]) -> nnx.Module:
        variables = {join(path): variable for path, variable in nnx.to_flat_state(nnx.state(model))}
        for path, array in leaves:
            variables[path][...] = jnp.asarray(array, variables[path][...].dtype)
        return model

    return Subject(
        framework="nnx",
        runtime="jax",
        name=type(model).__name__,
        params={path: np.asarray(array) for path, array in _flat(params).items()},
        buffers={path: np.asarray(array) for path, array in _flat(rest).items()},
        apply=apply,
        model=model,
        aliases=_aliases(model),
        native=native,
        flat=_flat,
        own_step=_own_step(merge),
        put=put,
    )


def _split(module: nnx.Module) -> Any:
    """`(graph, params, random state, everything else)`."""
    return nnx.split(module, nnx.Param, nnx.RngState, ...)


def _flat(state: Any) -> Flat:
    return {join(path): _value(leaf) for path, leaf in nnx.to_flat_state(state)}


def _value(leaf: Any) -> Any:
    return leaf[...] if isinstance(leaf, nnx.Variable) else leaf


def _state(template: Any, paths: dict[str, tuple[Any, ...]], flat: Flat) -> Any:
    """A state like `template` holding the arrays of `flat`."""
    leaves = dict(nnx.to_flat_state(template))
    new = {}
    for path, keys in paths.items():
        old = leaves[keys]
        new[keys] = old.replace(flat[path]) if isinstance(old, nnx.Variable) else flat[path]
    return nnx.from_flat_state(new)


def _aliases(model: nnx.Module) -> dict[str, str]:
    """Paths at which a variable that the split keeps once is reached again: tied leaves."""
    first: dict[int, str] = {}
    aliases: dict[str, str] = {}
    kept = {join(path) for path, _ in nnx.to_flat_state(nnx.split(model)[1])}

    def walk(node: Any, path: tuple[str, ...], seen: frozenset[int]) -> None:
        if isinstance(node, nnx.Variable):
            name = join(path)
            if id(node) not in first:
                first[id(node)] = name
            elif name not in kept:
                aliases[name] = first[id(node)]
            elif first[id(node)] not in kept:
                aliases[first[id(node)]] = name
            return
        if id(node) in seen:
            return
        items: list[tuple[Any, Any]] = []
        if isinstance(node, (list, tuple, nnx.List)):
            items = list(enumerate(node))
        elif isinstance(node, dict):
            items = list(node.items())
        elif isinstance(node, nnx.Module):
            items = list(vars(node).items())
        for key, value in items:
            walk(value, (*path, str(key)), seen | {id(node)})

    walk(model, (), frozenset())
    return aliases


def _own_step(merge: Callable[..., nnx.Module]) -> OwnStep:
    """`user_step(model, optimizer, *inputs, *targets) -> loss`, mutating both, as a pure function of a carry."""

    def split(model: nnx.Module, optimizer: nnx.Optimizer) -> Any:
        return nnx.split((model, optimizer))

    def init(params: Flat, buffers: Flat, transformation: Any) -> Any:
        model = merge(params, buffers, True)
        graph, state = split(model, nnx.Optimizer(model, transformation, wrt=nnx.Param))
        return _Carry(graph, state)

    def step(user_step: Callable[..., Any], carry: Any, inputs: Any, targets: tuple[Any, ...]) -> tuple[Any, Any]:
        model, optimizer = nnx.merge(carry.graph, carry.state, copy=True)
        args, kwargs = call(inputs)
        loss = user_step(model, optimizer, *args, *targets, **kwargs)
        return _Carry(*split(model, optimizer)), loss

    def model_of(carry: Any) -> Any:
        return _split(nnx.merge(carry.graph, carry.state, copy=True)[0])

    def with_optimizer(carry: Any, state: Any) -> Any:
        model, optimizer = nnx.merge(carry.graph, carry.state, copy=True)
        optimizer.opt_state = state
        return _Carry(*split(model, optimizer))

    return OwnStep(
        init=init,
        step=step,
        params=lambda carry: _flat(model_of(carry)[1]),
        buffers=lambda carry: _flat(model_of(carry)[3]),
        optimizer=lambda carry: nnx.merge(carry.graph, carry.state, copy=True)[1].opt_state,
        with_optimizer=with_optimizer,
    )


@jax.tree_util.register_pytree_node_class
class _Carry:
    """A split model and optimizer: the graph is static, the state is data."""

    def __init__(self, graph: Any, state: Any) -> None:
        self.graph, self.state = graph, state

    def tree_flatten(self) -> tuple[tuple[Any], Any]:
        return (self.state,), self.graph

    @classmethod
    def tree_unflatten(cls, graph: Any, children: tuple[Any]) -> _Carry:
        return cls(graph, children[0])
