"""`translate`: a torch module as a Flax module with the same weights, and the mapping that moved them."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from equivalence.errors import unknown
from equivalence.frameworks.linen import linen
from equivalence.frameworks.linen import subject as linen_subject
from equivalence.frameworks.nnx import subject as nnx_subject
from equivalence.frameworks.subject import Flat, Subject
from equivalence.frameworks.torch import to_numpy
from equivalence.layers.form import moved
from equivalence.layers.linen import BUFFERS, Layer, variables
from equivalence.layers.linen import build as build_linen
from equivalence.layers.nnx import build as build_nnx
from equivalence.layers.registry import form_of
from equivalence.weights import Mapping

FRAMEWORKS = ("nnx", "linen")


class Translation:
    """A torch module as a JAX module.

    Attributes:
        module: the `nnx.Module` or `flax.linen.Module`.
        variables: the Linen module's collections, weights and buffers; None for NNX, which keeps its own.
        inputs: the einops pattern, from torch's layout to the module's, of each argument in order; None: unchanged.
        outputs: the same of each array that is returned.
        mapping: the rules that carry the torch module's leaves to the module's.
        train: the mode that the torch module was in; `translation(...)` runs each layer inside in its own.
    """

    def __init__(self, module: Any, to: str, seed: int) -> None:
        form = form_of(module)
        self.to, self.train, self._form = to, bool(module.training), form
        self.inputs, self.outputs = form.inputs, form.outputs
        self.mapping = Mapping(form.mapping(to))
        self._names = list(inspect.signature(type(module).forward).parameters)[1:]
        self._key, self._calls = jax.random.key(seed), 0
        self.variables: dict[str, Any] | None = None
        self.module: Any
        if to == "nnx":
            self.module = build_nnx(form, nnx.Rngs(seed))
        else:
            self.module, self.variables = build_linen(form), variables(form)

    @property
    def written(self) -> str:
        """The module as one would write it in its framework."""
        return self._form.written(self.to)

    @property
    def own(self) -> bool:
        """Whether the module is a layer of Flax's own."""
        return self.to in self._form.own

    def __call__(self, *inputs: Any, **kwargs: Any) -> Any:
        """The module's outputs; arrays are taken and returned in torch's layout. In train mode buffers move."""
        args, named = self._ours(inputs, kwargs)
        if self.variables is None:
            return self._theirs(self.module(*args, **named))
        modes = {"train": None} if isinstance(self.module, Layer) else {}
        self._calls += 1
        key = jax.random.fold_in(self._key, self._calls)
        outputs, updated = self.module.apply(  # an embedding's max_norm moves its rows
            self.variables, *args, **named, **modes, rngs={"dropout": key}, mutable=["params", BUFFERS]
        )
        self.variables = {**self.variables, **updated}
        return self._theirs(outputs)

    @property
    def subject(self) -> Subject:
        """What `verify` judges: the module between torch's layouts."""
        model: Any = self.module if self.variables is None else linen(self.module, self.variables)
        inner = nnx_subject(model) if self.variables is None else linen_subject(model)

        def apply(params: Flat, buffers: Flat, args: Any, kwargs: Any, train: bool) -> tuple[Any, Flat]:
            args, kwargs = self._ours(args, kwargs)
            outputs, after = inner.apply(params, buffers, args, kwargs, train)
            return self._theirs(outputs), after

        def put(leaves: Iterable[tuple[str, np.ndarray]]) -> Translation:
            assert inner.put is not None
            made = inner.put(leaves)
            if self.variables is not None:
                self.variables = made.variables
            return self

        return Subject(
            framework=inner.framework,
            runtime="jax",
            name=f"{self._form.name} ({self.to})",
            params=inner.params,
            buffers=inner.buffers,
            apply=apply,
            model=model,
            aliases=inner.aliases,
            native=inner.native,
            flat=inner.flat,
            mapping=self.mapping,
            put=put,
        )

    def _ours(self, inputs: Any, kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        patterns = dict(zip(self._names, self.inputs, strict=False))
        inputs, kwargs = list(inputs), dict(kwargs)
        for name in self._names[len(inputs) :]:  # torch's names of the first arguments are not Flax's
            if name not in kwargs:
                break
            inputs.append(kwargs.pop(name))
        args = tuple(_moved(value, None, p) for value, p in _padded(inputs, self.inputs))
        if self._form.refuse is not None and args:
            self._form.refuse(args[0])
        return args, {name: _moved(value, None, patterns.get(name)) for name, value in kwargs.items()}

    def _theirs(self, outputs: Any) -> Any:
        whole, structure = jax.tree_util.tree_flatten(outputs)
        leaves = [_moved(value, pattern, None) for value, pattern in _padded(whole, self.outputs)]
        return jax.tree_util.tree_unflatten(structure, leaves)


def _padded(values: Any, patterns: tuple[str | None, ...]) -> list[tuple[Any, str | None]]:
    return [(value, patterns[i] if i < len(patterns) else None) for i, value in enumerate(values)]


def _moved(value: Any, now: str | None, wanted: str | None) -> Any:
    """A tree's arrays in another layout; what is no array (None, a flag) stays."""

    def one(leaf: Any) -> Any:
        array = jnp.asarray(to_numpy(leaf)) if hasattr(leaf, "detach") else leaf
        return moved(array, now, wanted) if hasattr(array, "ndim") else array

    return jax.tree_util.tree_map(one, value)


def translate(module: Any, to: str = "nnx", *, seed: int = 0) -> Translation:
    """A torch module made of layers of torch.nn as a Flax module with its weights and buffers.

    Args:
        module: a layer of torch.nn, or a container of them; its weights, buffers and modes are taken as they are, but
            for bfloat16 and float16, which become float32.
        to: "nnx" or "linen".
        seed: of the random draws in train mode.

    Raises InputError, naming the module's path and class, for one whose class has no entry in the dictionary.

    >>> import torch
    >>> made = translate(torch.nn.Linear(5, 3, bias=False))
    >>> made.mapping
    Mapping([
        Rule('weight', 'kernel', 'o k -> k o'),
    ])
    """
    if to not in FRAMEWORKS:
        raise unknown("framework", to, FRAMEWORKS)
    return Translation(module, to, seed)
