"""Optimizers on both sides: named pairs, torch's translated to Optax, and what surrounds a step.

Names are imported when they are first used: importing this package loads neither torch nor jax.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from equivalence.optimizers.pairs import PAIRS, OptimizerPair, resolve

if TYPE_CHECKING:
    from equivalence.optimizers.accumulation import accumulate, per_micro_batch
    from equivalence.optimizers.averaging import average_state, averaging, load_average_state, with_average
    from equivalence.optimizers.clipping import clip_grad_norm, clip_grad_value
    from equivalence.optimizers.masking import decay_mask, freeze
    from equivalence.optimizers.plateau import scale_by_plateau
    from equivalence.optimizers.scaling import load_scaler_state, scale_gradients, scale_loss, scaler_state

__all__ = [
    "PAIRS",
    "OptimizerPair",
    "accumulate",
    "average_state",
    "averaging",
    "clip_grad_norm",
    "clip_grad_value",
    "decay_mask",
    "freeze",
    "load_average_state",
    "load_scaler_state",
    "per_micro_batch",
    "resolve",
    "scale_by_plateau",
    "scale_gradients",
    "scale_loss",
    "scaler_state",
    "with_average",
]

_HOMES = {
    "accumulate": "accumulation",
    "average_state": "averaging",
    "averaging": "averaging",
    "clip_grad_norm": "clipping",
    "clip_grad_value": "clipping",
    "decay_mask": "masking",
    "freeze": "masking",
    "load_average_state": "averaging",
    "load_scaler_state": "scaling",
    "per_micro_batch": "accumulation",
    "scale_by_plateau": "plateau",
    "scale_gradients": "scaling",
    "scale_loss": "scaling",
    "scaler_state": "scaling",
    "with_average": "averaging",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
