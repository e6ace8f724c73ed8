"""Every optimizer of torch.optim that steps on given gradients, with two groups of different options."""

from __future__ import annotations

from typing import Any

from tests.translated_sides import PORT, RULES, SHAPES, Case

OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "SGD": (
        {"lr": 0.1, "momentum": 0.9},
        {"nesterov": True, "weight_decay": 0.1},
        {"lr": 0.01, "dampening": 0.5, "maximize": True},
    ),
    "Adam": ({"lr": 0.01, "weight_decay": 0.1}, {"amsgrad": True}, {"betas": (0.8, 0.99), "eps": 1e-3, "lr": 0.002}),
    "AdamW": ({"lr": 0.01, "maximize": True}, {"weight_decay": 0.0}, {"betas": (0.7, 0.9), "amsgrad": True}),
    "Adamax": ({"lr": 0.01}, {"weight_decay": 0.1}, {"betas": (0.8, 0.99)}),
    "NAdam": ({"lr": 0.01}, {"momentum_decay": 0.1}, {"weight_decay": 0.1, "decoupled_weight_decay": True}),
    "RAdam": ({"lr": 0.01}, {"betas": (0.8, 0.9)}, {"weight_decay": 0.1, "decoupled_weight_decay": True}),
    "SparseAdam": ({"lr": 0.01}, {"betas": (0.8, 0.9)}, {"maximize": True, "eps": 1e-3}),
    "Adadelta": ({"lr": 1.0}, {"rho": 0.5}, {"weight_decay": 0.1, "eps": 1e-3}),
    "Adagrad": ({"lr": 0.1, "initial_accumulator_value": 0.5}, {"lr_decay": 0.1}, {"weight_decay": 0.1}),
    "RMSprop": ({"lr": 0.01}, {"centered": True, "momentum": 0.5}, {"alpha": 0.9, "weight_decay": 0.1}),
    "Rprop": ({"lr": 0.01}, {"etas": (0.4, 1.3)}, {"step_sizes": (1e-3, 0.05), "lr": 0.02}),
    "ASGD": ({"lr": 0.05, "t0": 5}, {"lambd": 0.01}, {"alpha": 0.5, "weight_decay": 0.1}),
    "Adafactor": ({"lr": 0.05}, {"weight_decay": 0.1}, {"beta2_decay": -0.5, "d": 0.5}),
    "Muon": ({"lr": 0.02}, {"momentum": 0.8, "nesterov": False}, {"adjust_lr_fn": "match_rms_adamw"}),
}
"""By class: the options of both groups, of the first and of the second."""

GROUPS = (("kernel", "gain", "nothing", "bias"), ("square", "conv"))


ALL = ("square", "conv", "bias", "gain", "nothing")
SUITED = {
    "Muon": ("kernel", "square"),
    "SparseAdam": ("kernel", "conv", "bias"),
    "Adafactor": ("kernel", "conv", "bias", "gain"),
}
"""The parameters of classes that torch itself does not let move every one, or to which axes matter."""


def case_of(name: str) -> Case:
    """A class's case."""
    held = {leaf: SHAPES[leaf] for leaf in SUITED.get(name, ALL)}
    rules = tuple(rule for rule in RULES if rule.source in held)
    port = {leaf: shape for leaf, shape in PORT.items() if leaf in {rule.target for rule in rules}}
    everywhere, *of_groups = OPTIONS[name]
    groups = tuple(
        (tuple(leaf for leaf in leaves if leaf in held), options)
        for leaves, options in zip(GROUPS, of_groups, strict=True)
    )
    return Case(name, everywhere, groups, held, port, rules)


CASES = {name: case_of(name) for name in OPTIONS}
