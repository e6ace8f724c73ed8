"""Forms carried by Flax Linen: one module class for every layer that Flax does not have exactly, and variables."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from equivalence.errors import InputError
from equivalence.layers.form import Form

BUFFERS = "batch_stats"
"""The collection of a layer's buffers."""


class Layer(nn.Module):
    """A layer by its form. Its weights are those of the variables that `translate` hands over with it.

    `train=None` runs each layer inside in the mode that torch's was in.
    """

    form: Form

    @nn.compact
    def __call__(self, *inputs: Any, train: bool | None = False, **kwargs: Any) -> Any:
        """The layer's outputs, in our layout. Raises NotImplementedError for a list of layers, as torch does."""
        if self.form.call is None:
            raise NotImplementedError(f"{self.form.name} holds layers and is not called")
        return self.form.call(_View(self, train), *inputs, **kwargs)


@dataclass
class _View:
    """A Layer as its function sees it in one call: see `form.Carrier`."""

    module: Layer
    asked: bool | None
    kept: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.params, self.buffers = self.module.form.arrays()

    @property
    def train(self) -> bool:
        return self.module.form.train if self.asked is None else self.asked

    def __getitem__(self, name: str) -> Any:
        if name in self.params:
            if name not in self.kept:
                self.kept[name] = self.module.param(name, lambda _: jnp.asarray(self.params[name]))
            return self.kept[name]
        return self._buffer(name).value if name in self.buffers else None

    def __setitem__(self, name: str, value: Any) -> None:
        if name not in self.params:
            self._buffer(name).value = value
            return
        self.kept[name] = value
        if self.module.is_mutable_collection("params"):
            self.module.put_variable("params", name, value)

    def _buffer(self, name: str) -> Any:
        if name not in self.kept:
            self.kept[name] = self.module.variable(BUFFERS, name, lambda: jnp.asarray(self.buffers[name]))
        return self.kept[name]

    def key(self) -> Any:
        return self.module.make_rng("dropout")

    def layer(self, name: str) -> Callable[..., Any]:
        form = self.module.form
        child = form.children[name]
        first = next(other for other, held in form.children.items() if held is child)
        if first not in self.kept:
            self.kept[first] = build(child, form.path(first, "linen"), self.module)
        inside = self.kept[first]
        if isinstance(inside, Layer):
            return lambda *inputs, **kwargs: inside(*inputs, train=self.asked, **kwargs)
        return inside


def build(form: Form, name: str | None = None, parent: nn.Module | None = None) -> nn.Module:
    """The Linen module of a form, inside `parent` if there is one."""
    place: dict[str, Any] = {} if parent is None else {"parent": parent, "name": name}
    own = form.own.get("linen")
    if own is None:
        return Layer(form, **place)
    made: nn.Module = getattr(nn, own.name)(*own.arguments, **own.options, **place)
    return made


def variables(form: Form) -> dict[str, Any]:
    """The collections that hold the form's weights. Raises InputError where one layer stands under two parents."""
    collections: dict[str, Any] = {"params": {}, BUFFERS: {}}
    _fill(form, (), collections, {})
    return {name: tree for name, tree in collections.items() if tree or name == "params"}


def _fill(form: Form, path: tuple[str, ...], collections: dict[str, Any], homes: dict[int, tuple[str, ...]]) -> None:
    home = homes.setdefault(id(form), path)
    if home != path:
        if home[:-1] != path[:-1]:
            places = " and ".join(".".join(place) for place in (home, path))
            raise InputError(f"{form.name} stands in two layers, at {places}: Linen cannot share it; use to='nnx'")
        return
    for collection, leaves in zip(("params", BUFFERS), form.arrays(), strict=True):
        for name, value in leaves.items():
            tree = collections[collection]
            for part in path:
                tree = tree.setdefault(part, {})
            tree[name] = jnp.asarray(value)
    for name, child in form.children.items():
        _fill(child, (*path, form.path(name, "linen")), collections, homes)
