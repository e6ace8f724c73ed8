"""Which torch class has which translation, and why a module has none."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from equivalence.errors import InputError
from equivalence.layers.form import Form

FAMILIES = (
    "activations",
    "adaptive_pooling",
    "attention",
    "containers",
    "convolution",
    "distances",
    "dropout",
    "embedding",
    "folding",
    "linear",
    "losses",
    "normalisation",
    "padding",
    "pooling",
    "recurrent",
    "resizing",
    "shapes",
    "transformer",
)
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

    Raises InputError, naming the module's path and class, for a class without an entry, for a module whose call is
    not its class's own (hooks, parametrizations, a forward put on the object), for one that has no weights yet, and
    for a parameter that two modules share; and for what is no module.
    """
    import torch

    if not isinstance(module, torch.nn.Module):
        raise InputError(f"a torch.nn.Module is translated, not {module!r:.80}")
    known, made = entries(), dict[int, Form]()
    paths = {id(inner): path for path, inner in module.named_modules()}

    def inside(inner: Any) -> Form:
        if id(inner) not in made:
            form = _entry(inner, paths.get(id(inner), ""), known).translate(inner, inside)
            empty = any(array.size == 0 for array in form.held.values())  # Flax's initialisers divide by its sizes
            own = {} if empty else form.own
            made[id(inner)] = dataclasses.replace(form, train=bool(inner.training), own=own)
        return made[id(inner)]

    form = inside(module)
    _refuse_tied(module)
    return form


def _entry(module: Any, path: str, known: Mapping[str, Entry]) -> Entry:
    """The entry of a module that is called as its class is. Raises InputError for any other."""
    import torch

    kind = type(module)
    where = f"{path} ({kind.__qualname__})" if path else kind.__qualname__
    if getattr(torch.nn, kind.__name__, None) is not kind:
        inner = ", ".join(name for name, _ in module.named_children())
        raise InputError(
            f"{where} has no entry in the dictionary of layers: the forward of {kind.__module__}.{kind.__qualname__}"
            " is its own, and the porter's to write"
            + (f"; its layers ({inner}) can be translated one by one" if inner else "")
        )
    if kind.__name__.startswith("Lazy"):
        raise InputError(f"{where} has no weights yet: call the torch module once, then translate it")
    if kind.__name__ not in known:
        raise InputError(f"{where} has no entry in the dictionary of layers, equivalence list layers")
    if any(leaf.is_meta for leaf in (*module.parameters(recurse=False), *module.buffers(recurse=False))):
        raise InputError(f"{where} has weights on the device 'meta', which hold no numbers: load them first")
    if "forward" in vars(module) or any(getattr(module, hooks) for hooks in HOOKS):
        raise InputError(f"{where} has hooks or a forward of its own, whose effect cannot be read: remove them first")
    return known[kind.__name__]


HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _refuse_tied(module: Any) -> None:
    """A parameter that two modules share is refused: their layouts may differ. A module in two places is not."""
    owners: dict[int, tuple[Any, str]] = {}
    for path, inner in module.named_modules():
        for name, parameter in inner.named_parameters(recurse=False):
            here = f"{path}.{name}" if path else name
            owner, first = owners.setdefault(id(parameter), (inner, here))
            if owner is not inner:
                raise InputError(
                    f"{here} is the same parameter as {first}: parameters tied between layers are not translated;"
                    " tie them in a port of your own, and verify that"
                )


def leaves(module: Any) -> tuple[dict[str, np.ndarray], frozenset[str]]:
    """A torch module's own leaves as NumPy by name, and which of them are buffers."""
    from equivalence.frameworks.torch import to_numpy

    params = {name: to_numpy(value) for name, value in module.named_parameters(recurse=False)}
    buffers = {name: to_numpy(value) for name, value in module.named_buffers(recurse=False)}
    return {**params, **buffers}, frozenset(buffers)
