"""Which torch class has which translation, and why a module has none."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from equivalence.errors import InputError, nearest
from equivalence.layers.form import Form

FAMILIES = ("containers", "linear", "dropout")
"""The modules of this package that register layers."""


@dataclass(frozen=True)
class Example:
    """One call of a layer for the dictionary: what makes the torch module, and its inputs.

    Attributes:
        torch: the expression, `"nn.Linear(5, 3)"`, with `nn` torch.nn.
        inputs: shapes of floating inputs, `((4, 5),)`, or a callable from a NumPy generator to the arrays.
    """

    torch: str
    inputs: tuple[tuple[int, ...], ...] | Callable[[np.random.Generator], tuple[Any, ...]]


@dataclass(frozen=True)
class Entry:
    """A torch class in the dictionary of layers.

    Attributes:
        name: the class in torch.nn.
        translate: `translate(module, inside) -> Form`; `inside(child)` gives the form of a layer inside.
        example: a call that shows what differs; None for what cannot be called.
        differs: what quietly differs between the Flax form one would write and torch's.
        family: the registering module.
    """

    name: str
    translate: Callable[[Any, Callable[[Any], Form]], Form]
    example: Example | None
    differs: str
    family: str


_ENTRIES: dict[str, Entry] = {}


def layer(
    name: str, example: Example | None, differs: str
) -> Callable[[Callable[[Any, Callable[[Any], Form]], Form]], Callable[[Any, Callable[[Any], Form]], Form]]:
    """Register `translate(module, inside) -> Form` as the translation of torch.nn's class `name`."""

    def register(translate: Callable[[Any, Callable[[Any], Form]], Form]) -> Callable[[Any, Any], Form]:
        assert name not in _ENTRIES, name
        _ENTRIES[name] = Entry(name, translate, example, differs, translate.__module__.rpartition(".")[2])
        return translate

    return register


def entries() -> Mapping[str, Entry]:
    """Every class that has an entry, by name; loads jax."""
    for family in FAMILIES:
        importlib.import_module(f"equivalence.layers.{family}")
    return _ENTRIES


def form_of(module: Any) -> Form:
    """The form of a torch module and of all inside it.

    Raises InputError, naming the module's path and class, for a class without an entry and for a module whose call is
    not its class's own (hooks, parametrizations, a forward put on the object).
    """
    known, made, held = entries(), {}, {id(p): n for n, p in module.named_parameters()}
    named = {id(inner): path for path, inner in module.named_modules()}

    def inside(inner: Any) -> Form:
        if id(inner) not in made:
            path = named.get(id(inner), "")
            where = f"{path} ({type(inner).__qualname__})" if path else type(inner).__qualname__
            made[id(inner)] = _checked(inner, where, known).translate(inner, inside)
        return made[id(inner)]

    form = inside(module)
    _refuse_tied(module, held)
    return form


def _checked(module: Any, where: str, known: Mapping[str, Entry]) -> Entry:
    import torch

    kind = type(module)
    theirs = getattr(torch.nn, kind.__name__, None) is kind
    if not theirs or kind.__name__ not in known:
        near = [] if theirs else nearest(kind.__name__, known, 1)
        inner = ", ".join(name for name, _ in module.named_children()) if not theirs else ""
        raise InputError(
            f"{where} has no entry in the dictionary of layers: "
            + (
                f"{kind.__module__}.{kind.__qualname__} has a forward of its own, which is the porter's to write"
                + (f" (its layers {inner} translate one by one)" if inner else "")
                + (f"; nearest entry: {near[0]}" if near else "")
                if not theirs
                else "torch.nn has it, this package does not"
            )
        )
    if "forward" in vars(module) or any(
        getattr(module, hooks)
        for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    ):
        raise InputError(f"{where} has hooks or a forward of its own, whose effect cannot be read: remove them first")
    lazy = [name for name, leaf in (*module._parameters.items(), *module._buffers.items()) if _unmade(leaf)]
    if lazy:
        raise InputError(f"{where} has no {lazy[0]} yet: call the torch module once, then translate it")
    return known[kind.__name__]


def _unmade(leaf: Any) -> bool:
    from torch.nn.parameter import is_lazy

    return leaf is not None and is_lazy(leaf)


def _refuse_tied(module: Any, first: Mapping[int, str]) -> None:
    """A parameter that two modules share is refused: their layouts may differ. A module in two places is not."""
    owners: dict[int, tuple[int, str]] = {}
    for path, inner in module.named_modules():
        for name, parameter in inner.named_parameters(recurse=False):
            owner = owners.setdefault(id(parameter), (id(inner), f"{path}.{name}".strip(".")))
            if owner[0] != id(inner):
                raise InputError(
                    f"{path}.{name} is the same parameter as {owner[1]}: tied parameters of different layers are not"
                    " translated; write that tie in the port, and verify it"
                )


def leaves(module: Any) -> tuple[dict[str, np.ndarray], frozenset[str]]:
    """A torch module's own leaves as NumPy by name, and which of them are buffers."""
    from equivalence.frameworks.torch import to_numpy

    params = {name: to_numpy(value) for name, value in module.named_parameters(recurse=False)}
    buffers = {name: to_numpy(value) for name, value in module.named_buffers(recurse=False)}
    return {**params, **buffers}, frozenset(buffers)
