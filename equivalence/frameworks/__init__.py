"""Framework adapters: each makes a subject of a model object. One small file a framework, imported when needed."""

from __future__ import annotations

import importlib
import sys
from importlib.metadata import entry_points
from types import ModuleType
from typing import Any

from equivalence.errors import InputError
from equivalence.frameworks.subject import Subject

GROUP = "equivalence.frameworks"

BUILT_IN: dict[str, tuple[str, str]] = {
    "torch": ("equivalence.frameworks.torch", "torch"),
    "nnx": ("equivalence.frameworks.nnx", "flax"),
    "linen": ("equivalence.frameworks.linen", "flax"),
    "equinox": ("equivalence.frameworks.equinox", "equinox"),
    "function": ("equivalence.frameworks.function", "jax"),
}
"""framework -> (adapter module, the package that a model of it must have imported)."""


def names() -> list[str]:
    """Every framework that has an adapter, built in or registered under the entry point group."""
    return list(dict.fromkeys([*BUILT_IN, *(point.name for point in entry_points(group=GROUP))]))


def _adapters() -> list[ModuleType]:
    loaded = [importlib.import_module(module) for module, needs in BUILT_IN.values() if needs in sys.modules]
    strangers = [point.load() for point in entry_points(group=GROUP) if point.name not in BUILT_IN]
    return [*loaded, *strangers]


def adapt(model: Any) -> Subject:
    """The subject of a model object. An adapter offers `accepts(model)` and `subject(model)`.

    Raises InputError for an object that no adapter accepts.
    """
    if isinstance(model, Subject):
        return model
    brought = getattr(model, "subject", None)
    if isinstance(brought, Subject):  # a translation makes its own
        return brought
    for adapter in _adapters():
        if adapter.accepts(model):
            made: Subject = adapter.subject(model)
            return made
    raise InputError(
        f"{type(model).__module__}.{type(model).__qualname__} is not a model this project knows: hand in a"
        " torch.nn.Module, an nnx.Module, an equinox.Module, equivalence.linen(module, variables) or"
        " equivalence.function(apply, params)"
    )
