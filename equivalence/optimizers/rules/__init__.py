"""The optimizers of torch.optim: one Optax transformation for one leaf each, LBFGS for the whole tree."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from equivalence.errors import unknown

if TYPE_CHECKING:
    from equivalence.optimizers.rules.common import Rule

__all__ = ["RULES", "rule_for"]

HOMES = {
    "SGD": "sgd",
    "Adam": "adam",
    "AdamW": "adam",
    "Adamax": "adam",
    "NAdam": "adam_corrections",
    "RAdam": "adam_corrections",
    "SparseAdam": "adam",
    "Adadelta": "averages",
    "Adagrad": "averages",
    "RMSprop": "averages",
    "ASGD": "steps",
    "Rprop": "steps",
    "Adafactor": "matrix",
    "Muon": "matrix",
    "LBFGS": "lbfgs",
}
"""The module here that holds the rule of a torch class, by the class's name."""


def rule_for(optimizer_class_name: str) -> Rule:
    """The rule of a torch optimizer class; raises InputError for a class without one.

    >>> rule_for("Adamw")
    Traceback (most recent call last):
    equivalence.errors.InputError: unknown torch optimizer 'Adamw' (did you mean Adam or RAdam or NAdam? known: ...)
    """
    if optimizer_class_name not in HOMES:
        raise unknown("torch optimizer", optimizer_class_name, HOMES)
    module = import_module(f"{__name__}.{HOMES[optimizer_class_name]}")
    rule: Rule = module.RULES[optimizer_class_name]
    return rule


def __getattr__(name: str) -> Any:
    if name == "RULES":
        return {known: rule_for(known) for known in HOMES}
    raise AttributeError(name)
