"""Forms carried by Flax NNX: one module class for every layer that Flax does not have exactly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from flax import nnx

from equivalence.errors import InputError
from equivalence.layers.form import Form


class Layer(nnx.Module):
    """A layer by its form: leaves and layers inside are attributes, the call is the form's function."""

    def __init__(self, form: Form, made: dict[int, nnx.Module], rngs: nnx.Rngs) -> None:
        self.form = form
        self.deterministic = not form.train
        if form.draws:
            self.rngs = rngs.dropout.fork()
        params, buffers = form.arrays()
        for name in (*params, *buffers, *(() if form.numbered else form.children)):
            if hasattr(self, name):
                raise InputError(f"{form.name} holds {name!r}, a name that an nnx.Module has for itself: rename it")
        for name, value in params.items():
            setattr(self, name, nnx.Param(jnp.asarray(value)))
        for name, value in buffers.items():
            setattr(self, name, nnx.BatchStat(jnp.asarray(value)))
        children = {name: _made(child, made, rngs) for name, child in form.children.items()}
        if form.numbered:
            self.layers = nnx.List(list(children.values()))
        else:
            for name, child in children.items():
                setattr(self, name, child)

    def __call__(self, *inputs: Any, **kwargs: Any) -> Any:
        """The layer's outputs, in our layout. Raises NotImplementedError for a list of layers, as torch does."""
        if self.form.call is None:
            raise NotImplementedError(f"{self.form.name} holds layers and is not called")
        return self.form.call(_View(self), *inputs, **kwargs)


@dataclass(frozen=True)
class _View:
    """A Layer as its function sees it: see `form.Carrier`."""

    module: Layer

    @property
    def train(self) -> bool:
        return not self.module.deterministic

    def __getitem__(self, name: str) -> Any:
        held = getattr(self.module, name, None)
        return None if held is None else held[...]

    def __setitem__(self, name: str, value: Any) -> None:
        getattr(self.module, name)[...] = value

    def key(self) -> Any:
        return self.module.rngs()

    def layer(self, name: str) -> Callable[..., Any]:
        inside: Callable[..., Any]
        if self.module.form.numbered:
            inside = self.module.layers[list(self.module.form.children).index(name)]
        else:
            inside = getattr(self.module, name)
        return inside


def build(form: Form, rngs: nnx.Rngs) -> nnx.Module:
    """The NNX module of a form, with its weights, each layer in the mode that torch's was in."""
    return _made(form, {}, rngs)


def _made(form: Form, made: dict[int, nnx.Module], rngs: nnx.Rngs) -> nnx.Module:
    """The module of a form; a form that stands in two places is one module."""
    if id(form) not in made:
        made[id(form)] = _own(form, rngs) if "nnx" in form.own else Layer(form, made, rngs)
    return made[id(form)]


def _own(form: Form, rngs: nnx.Rngs) -> nnx.Module:
    own = form.own["nnx"]
    module: nnx.Module = getattr(nnx, own.name)(*own.arguments, **own.options, rngs=rngs)
    for leaves in form.arrays():
        for name, value in leaves.items():
            getattr(module, name)[...] = jnp.asarray(value)
    return module
