"""Proves that a PyTorch model (the reference) and its JAX port are the same function, or says where they part.

>>> import equivalence as eq
>>> eq.Rule  # doctest: +SKIP
<class 'equivalence.weights.Rule'>

Names are imported when they are first used: importing this package loads neither torch nor jax.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from equivalence import losses, optimizers
    from equivalence.api import verify
    from equivalence.errors import (
        DivergenceError,
        EquivalenceError,
        InconclusiveError,
        InputError,
        MappingError,
    )
    from equivalence.frameworks.function import function
    from equivalence.frameworks.linen import linen
    from equivalence.layers.translation import translate
    from equivalence.optimizers.schedules import to_schedule
    from equivalence.optimizers.state import load_optimizer_state, optimizer_state
    from equivalence.optimizers.translate import to_optax
    from equivalence.spec import BatchPlan, Spec, TrainingData
    from equivalence.transfer import copy_weights
    from equivalence.verdict import Report
    from equivalence.weights import Mapping, Rule

__version__ = "0.1.0"

__all__ = [
    "BatchPlan",
    "DivergenceError",
    "EquivalenceError",
    "InconclusiveError",
    "InputError",
    "Mapping",
    "MappingError",
    "Report",
    "Rule",
    "Spec",
    "TrainingData",
    "__version__",
    "copy_weights",
    "function",
    "linen",
    "load_optimizer_state",
    "losses",
    "optimizer_state",
    "optimizers",
    "to_optax",
    "to_schedule",
    "translate",
    "verify",
]

_HOMES = {
    "BatchPlan": "equivalence.spec",
    "DivergenceError": "equivalence.errors",
    "EquivalenceError": "equivalence.errors",
    "InconclusiveError": "equivalence.errors",
    "InputError": "equivalence.errors",
    "Mapping": "equivalence.weights",
    "MappingError": "equivalence.errors",
    "Report": "equivalence.verdict",
    "Rule": "equivalence.weights",
    "Spec": "equivalence.spec",
    "TrainingData": "equivalence.spec",
    "copy_weights": "equivalence.transfer",
    "function": "equivalence.frameworks.function",
    "linen": "equivalence.frameworks.linen",
    "load_optimizer_state": "equivalence.optimizers.state",
    "optimizer_state": "equivalence.optimizers.state",
    "to_optax": "equivalence.optimizers.translate",
    "to_schedule": "equivalence.optimizers.schedules",
    "translate": "equivalence.layers.translation",
    "verify": "equivalence.api",
}

_PACKAGES = ("losses", "optimizers")


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
