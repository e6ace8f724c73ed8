"""The losses of torch.nn as JAX functions, in value and gradient, and the pairs that `verify(loss=...)` names.

    from equivalence import losses
    losses.cross_entropy(logits, labels, weight=weight, label_smoothing=0.1)

Each is a function of the torch module's inputs, with the module's options as keywords. Importing this loads no
framework: a function's module, and JAX with it, loads when the function is first asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from equivalence.losses.pairs import PAIRS, LossPair, resolve

if TYPE_CHECKING:
    from equivalence.losses.binary import bce, bce_with_logits, multi_label_soft_margin, soft_margin
    from equivalence.losses.classification import adaptive_log_softmax, cross_entropy, linear_cross_entropy, nll
    from equivalence.losses.distances import cosine_embedding, triplet_margin, triplet_margin_with_distance
    from equivalence.losses.margins import hinge_embedding, margin_ranking, multi_label_margin, multi_margin
    from equivalence.losses.modules import translate
    from equivalence.losses.regression import gaussian_nll, huber, kl_div, l1, mse, poisson_nll, smooth_l1
    from equivalence.losses.sequence import ctc
    from equivalence.losses.table import LOSSES, Loss

__all__ = [
    "LOSSES",
    "PAIRS",
    "Loss",
    "LossPair",
    "adaptive_log_softmax",
    "bce",
    "bce_with_logits",
    "cosine_embedding",
    "cross_entropy",
    "ctc",
    "gaussian_nll",
    "hinge_embedding",
    "huber",
    "kl_div",
    "l1",
    "linear_cross_entropy",
    "margin_ranking",
    "mse",
    "multi_label_margin",
    "multi_label_soft_margin",
    "multi_margin",
    "nll",
    "poisson_nll",
    "resolve",
    "smooth_l1",
    "soft_margin",
    "translate",
    "triplet_margin",
    "triplet_margin_with_distance",
]

_HOMES = {
    "binary": ("bce", "bce_with_logits", "multi_label_soft_margin", "soft_margin"),
    "classification": ("adaptive_log_softmax", "cross_entropy", "linear_cross_entropy", "nll"),
    "distances": ("cosine_embedding", "triplet_margin", "triplet_margin_with_distance"),
    "margins": ("hinge_embedding", "margin_ranking", "multi_label_margin", "multi_margin"),
    "modules": ("translate",),
    "regression": ("gaussian_nll", "huber", "kl_div", "l1", "mse", "poisson_nll", "smooth_l1"),
    "sequence": ("ctc",),
    "table": ("LOSSES", "Loss"),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
