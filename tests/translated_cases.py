"""Every optimizer of torch.optim that steps on given gradients, with two groups of different options."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from equivalence.weights import Rule, offset
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


SUITED = {
    "Adam": ("square", "conv", "bias", "gain", "nothing"),
    "Muon": ("kernel", "square"),
    "SparseAdam": ("kernel", "bias"),
}
"""The parameters of a class: of all kinds once, of those that torch lets a class move, or else of three kinds."""


def case_of(name: str, suited: tuple[str, ...] = (), **scheduled: Any) -> Case:
    """A class's case."""
    held = {leaf: SHAPES[leaf] for leaf in suited or SUITED.get(name, ("conv", "bias", "gain"))}
    rules = tuple(rule for rule in RULES if rule.source in held)
    port = {leaf: shape for leaf, shape in PORT.items() if leaf in {rule.target for rule in rules}}
    everywhere, *of_groups = OPTIONS[name]
    groups = tuple(
        (tuple(leaf for leaf in leaves if leaf in held), options)
        for leaves, options in zip(GROUPS, of_groups, strict=True)
    )
    return Case(name, everywhere, groups, held, port, rules, **scheduled)


CASES = {name: case_of(name) for name in OPTIONS}

NET = {"h.0.w": (2, 3), "h.1.w": (2, 3), "q": (2, 5), "k": (2, 5), "v": (2, 5), "proj": (6, 4)}
NET |= {"emb": (5, 2), "norm": (3,), "ice": (2,)}
NET_PORT = {"h.kernel": (2, 3, 2), "qkv": (5, 6), "emb.embedding": (5, 2), "norm.scale": (3,), "ice": (2,)}
NET_PORT |= {f"attn.{part}.kernel": (4, 2) for part in ("query", "key", "value")}
NET_RULES = (
    Rule("h.{i}.w", "h.kernel", "i o k -> i k o"),
    Rule("{s}", "qkv", "s o k -> k (s o)", s=("q", "k", "v")),
    Rule("proj", "attn.{s}.kernel", "(s o) k -> s k o", s=("query", "key", "value")),
    Rule("head", "emb.embedding"),
    Rule("ice", "ice"),
)
"""Leaves stacked, fused, split, tied, frozen; `net` adds one that is stored as 1 + w."""


def net(name: str, first: tuple[str, ...], changed: bool = True) -> Case:
    """The class on that model, with these parameters in the first group and the others in the second; some have a
    leaf that holds other values than torch."""
    everywhere, *of_groups = OPTIONS[name]
    second = tuple(leaf for leaf in NET if leaf not in first)
    norm = Rule("norm", "norm.scale", change=offset(-1.0) if changed else None)
    groups = ((first, of_groups[0]), (second, of_groups[1]))
    return Case(name, everywhere, groups, NET, NET_PORT, (*NET_RULES, norm), ("ice",), {"head": "emb"})


NETS = {
    "leaves of the port": net("NAdam", ("h.0.w", "h.1.w", "q", "k", "v"), False),
    "groups inside a leaf": net("AdamW", ("h.0.w", "q", "emb", "ice")),
    "order of axes": net("Adafactor", ("h.0.w", "k", "proj")),
}
"""In whose layout the rules run: the port's where they can; torch's where a leaf's parts are in different groups, where
a leaf holds other values than torch's, and where the rule looks at rows and columns."""


def _rates(kind: str, **options: Any) -> Callable[[Any], Any]:
    return lambda optimizer: getattr(torch.optim.lr_scheduler, kind)(optimizer, **options)


TWO = ("square", "bias")
SCHEDULED = {
    "every third step": case_of("AdamW", TWO, scheduler=_rates("StepLR", step_size=4, gamma=0.5), every=3),
    "momentum too": case_of("SGD", TWO, scheduler=_rates("OneCycleLR", max_lr=[0.1, 0.02], total_steps=120)),
    "a function": case_of("Adam", TWO, scheduler=lambda optimizer: lambda count: 0.1 / (1 + count)),
    "a metric": case_of("RMSprop", TWO, scheduler=_rates("ReduceLROnPlateau", factor=0.5, patience=1), every=2),
}
"""What moves the rates."""
