"""Reading a torch optimizer: its rule, groups, options and schedules, and where its parameters lie in the port."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import optax

from equivalence.errors import InputError
from equivalence.optimizers.translated import Group, Schedule, Translation
from equivalence.optimizers.trees import Layout, Shapes
from equivalence.weights import Bound, Leaves, infer
from equivalence.weights import Mapping as Rules

if TYPE_CHECKING:
    from equivalence.optimizers.rules.common import Rule

CHANGES_NOTHING = frozenset(
    (
        *("params", "param_names", "name", "foreach", "fused", "capturable", "differentiable"),
        *("initial_lr", "base_momentum", "max_momentum", "max_lr", "min_lr", "swa_lr"),
    )
)
"""Entries of a torch group that name it, decide how torch computes, or that a scheduler keeps there for itself."""

_ADAM = frozenset(("lr", "betas", "eps", "weight_decay", "maximize"))
OPTIONS: dict[str, frozenset[str]] = {
    "ASGD": frozenset(("lr", "lambd", "alpha", "t0", "weight_decay", "maximize")),
    "Adadelta": frozenset(("lr", "rho", "eps", "weight_decay", "maximize")),
    "Adafactor": frozenset(("lr", "beta2_decay", "eps", "d", "weight_decay", "maximize")),
    "Adagrad": frozenset(("lr", "lr_decay", "eps", "weight_decay", "initial_accumulator_value", "maximize")),
    "Adam": _ADAM | {"amsgrad", "decoupled_weight_decay"},
    "AdamW": _ADAM | {"amsgrad", "decoupled_weight_decay"},
    "Adamax": _ADAM,
    "LBFGS": frozenset(
        ("lr", "max_iter", "max_eval", "tolerance_grad", "tolerance_change", "history_size", "line_search_fn")
    ),
    "Muon": frozenset(
        ("lr", "weight_decay", "momentum", "nesterov", "ns_coefficients", "eps", "ns_steps", "adjust_lr_fn")
    ),
    "NAdam": _ADAM | {"momentum_decay", "decoupled_weight_decay"},
    "RAdam": _ADAM | {"decoupled_weight_decay"},
    "RMSprop": frozenset(("lr", "momentum", "alpha", "eps", "centered", "weight_decay", "maximize")),
    "Rprop": frozenset(("lr", "etas", "step_sizes", "maximize")),
    "SGD": frozenset(("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize")),
    "SparseAdam": frozenset(("lr", "betas", "eps", "maximize")),
}
"""The options of torch's classes that are translated: all of torch 2.13's. Another one is refused, not passed over."""


@dataclass(frozen=True)
class Names:
    """A torch model's parameters as far as a translation needs them: shapes by name, ties, layer types, frozen ones."""

    leaves: Leaves
    layers: Mapping[str, str]
    frozen: frozenset[str]

    @classmethod
    def of(cls, model: Any) -> Names:
        """The parameters of a torch module."""
        shapes: dict[str, tuple[int, ...]] = {}
        aliases: dict[str, str] = {}
        first: dict[int, str] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if first.setdefault(id(parameter), name) != name:
                aliases[name] = first[id(parameter)]
            else:
                shapes[name] = tuple(parameter.shape)
        layers = {n: type(model.get_submodule(n.rpartition(".")[0])).__name__ for n in (*shapes, *aliases)}
        still = frozenset(name for name, p in model.named_parameters() if not p.requires_grad)
        return cls(Leaves(shapes, aliases), layers, still)

    def only(self, held: frozenset[str]) -> Names:
        """These parameters alone."""
        leaves = Leaves(
            {name: shape for name, shape in self.leaves.shapes.items() if name in held},
            {alias: name for alias, name in self.leaves.aliases.items() if name in held},
        )
        return Names(leaves, self.layers, self.frozen)


def named(model: Any) -> dict[int, str]:
    """The names of a torch module's parameters by their identity. Raises InputError for what is no module."""
    if not hasattr(model, "named_parameters"):
        raise InputError(f"model= takes the torch module whose parameters are moved, not {type(model).__name__}")
    return {id(parameter): name for name, parameter in model.named_parameters()}


def bound_to(names: Names | None, mapping: Any, shapes: Shapes) -> Layout:
    """A mapping bound to torch's parameters and the port's; one inferred from names where none is given."""
    assert_mapping(mapping)
    if isinstance(mapping, Bound):
        return Layout(mapping)
    if names is None:
        return Layout.named_alike(shapes)
    target = Leaves(dict(shapes))
    if mapping is not None:
        return Layout(mapping.about(names.leaves, target).bind(names.leaves, target))
    if names.leaves.shapes == dict(shapes):
        return Layout.named_alike(shapes)
    return Layout(infer(names.leaves, target, names.layers).bind(names.leaves, target))


def assert_mapping(mapping: Any) -> None:
    """Raise InputError for what is no mapping."""
    if not (mapping is None or isinstance(mapping, Rules | Bound)):
        raise InputError(f"mapping= takes an equivalence Mapping, not {type(mapping).__name__}")


def to_optax(
    optimizer: Any, *, scheduler: Any = None, model: Any = None, mapping: Any = None, every: int = 1
) -> optax.GradientTransformationExtraArgs:
    """The Optax transformation that takes the steps of a torch optimizer.

    Args:
        optimizer: an optimizer of `torch.optim`, of exactly one of its classes, with any of its options.
        scheduler: what moves its learning rate: a scheduler of `torch.optim.lr_scheduler` on that optimizer, or an
            Optax schedule, `count -> learning rate`, for all groups.
        model: the torch module whose parameters it holds; needed where it has several parameter groups, where the
            model has frozen parameters, and for rules to which the order of axes matters (Adafactor, Muon).
        mapping: the `Mapping` from the model's leaves to the port's; None infers one from names.
        every: optimizer steps between two steps of the scheduler (a scheduler stepped once an epoch: the steps of an
            epoch).

    Returns a transformation whose `update(gradients, state, params)` gives the changes to add to the parameters; see
    `Translation.update` for gradients that are missing, the metric of a ReduceLROnPlateau and the closure of LBFGS.
    The options are read now; a scheduler's position is the state's, see `optimizer_state`. In `optax.partition` or
    `optax.masked` the leaves that are not masked must be those that the optimizer holds.

    Differs from Optax's own optimizers: a leaf without gradient (None) keeps its moments and its step counter, as in
    torch; a zero gradient moves them. https://docs.pytorch.org/docs/stable/optim.html

    Raises InputError for an optimizer, an option or a scheduler that has no translation, with what to do instead.

    >>> import jax.numpy as jnp
    >>> import torch
    >>> linear = torch.nn.Linear(3, 2)
    >>> transformation = to_optax(torch.optim.AdamW(linear.parameters(), lr=1e-3))
    >>> state = transformation.init({"kernel": jnp.ones((3, 2)), "bias": jnp.zeros(2)})
    """
    known = None if model is None else named(model)
    names = None if model is None else Names.of(model)
    made = translation(optimizer, scheduler, names, known, mapping, every)
    return optax.GradientTransformationExtraArgs(made.init, made.update)


def translation(
    optimizer: Any,
    scheduler: Any,
    names: Names | None,
    known: Mapping[int, str] | None,
    mapping: Any,
    every: int = 1,
) -> Translation:
    """What `to_optax` reads off an optimizer, whose parameters' names are known by identity. Raises as it does."""
    rule = rule_of(optimizer)
    assert_steps(every)
    assert_mapping(mapping)
    held = _held(optimizer, known)
    if names is None and (len(held) > 1 or rule.in_reference_layout):
        why = "has several parameter groups" if len(held) > 1 else "depends on the order of axes"
        raise InputError(f"{rule.name} {why}: pass model=, the torch module whose parameters it holds")
    hooks = (*optimizer._optimizer_step_pre_hooks.values(), *optimizer._optimizer_step_post_hooks.values())
    if hooks:
        found = ", ".join(getattr(hook, "__name__", type(hook).__name__) for hook in hooks)
        raise InputError(f"{rule.name} has step hooks ({found}), which may do anything: remove them, write their part")
    moving, plateau = _scheduled(optimizer, scheduler)
    options = [_options(rule, optimizer, number) for number in range(len(held))]
    groups = tuple(Group(*of_group) for of_group in zip(options, held, moving, strict=True))
    for group in groups:
        rule.make(group.options)  # refuses now what it would refuse at the first step
    held_names = frozenset(name for of_group in held for name in of_group or ())
    place = partial(_place, names, mapping, held_names)
    return Translation(rule, groups, names.frozen if names else frozenset(), place, every, plateau)


def assert_steps(every: Any) -> None:
    """Raise InputError for what is no number of steps."""
    if not isinstance(every, int) or every < 1:
        raise InputError(f"every= is a number of optimizer steps, not {every}")


def _place(names: Names | None, mapping: Any, held: frozenset[str] | None, shapes: Shapes, masked: bool) -> Layout:
    """Where torch's parameters lie in a tree; in a masked one only those that the optimizer holds."""
    return bound_to(names.only(held) if masked and names and held else names, mapping, shapes)


def rule_of(optimizer: Any) -> Rule:
    """The rule of a torch optimizer. Raises InputError for what is none, and for a class that is not torch's own."""
    from equivalence.optimizers.rules import HOMES, rule_for

    kind = type(optimizer)
    if not hasattr(optimizer, "param_groups"):
        raise InputError(f"to_optax takes an optimizer of torch.optim, not {kind.__name__}")
    if kind.__name__ not in HOMES or kind.__module__.split(".")[:2] != ["torch", "optim"]:
        raise InputError(
            f"{kind.__module__}.{kind.__name__} is not an optimizer of torch.optim: its steps are not known here;"
            f" write them as an Optax transformation and pass optimizer=(torch factory, transformation) to verify"
            f" (translated: {', '.join(sorted(HOMES))})"
        )
    return rule_for(kind.__name__)


def _options(rule: Rule, optimizer: Any, number: int) -> dict[str, Any]:
    """A group's options as Python holds them. Raises InputError for one that is not torch's."""
    group = optimizer.param_groups[number]
    # LBFGS refuses some of what a tensor as learning rate does, and has to see it
    found = {n: value if rule.whole else _number(value) for n, value in group.items() if n not in CHANGES_NOTHING}
    if rule.name == "Adagrad":  # torch reads the optimizer's own, not the group's
        found["initial_accumulator_value"] = optimizer.defaults["initial_accumulator_value"]
    if beyond := sorted(set(found) - OPTIONS[rule.name]):
        raise InputError(f"{rule.name} has options that are not translated: {', '.join(beyond)} (group {number})")
    return found


def _number(value: Any) -> Any:
    """An option as Python holds it: a tensor of one element is a number."""
    if isinstance(value, tuple):
        return tuple(_number(part) for part in value)
    return value.item() if hasattr(value, "item") else value


def _held(optimizer: Any, known: Mapping[int, str] | None) -> list[frozenset[str] | None]:
    """The names of each group's parameters."""
    held = [(number, p) for number, group in enumerate(optimizer.param_groups) for p in group["params"]]
    if known is None:
        if any(not parameter.requires_grad for _, parameter in held):
            raise InputError("the optimizer holds frozen parameters: pass model=, which names them")
        return [None] * len(optimizer.param_groups)
    assert_known(optimizer, known)
    return [frozenset(known[id(p)] for p in group["params"]) for group in optimizer.param_groups]


def assert_known(optimizer: Any, known: Mapping[int, str]) -> None:
    """Raise InputError with all parameters of an optimizer that are not the model's."""
    strangers = [
        f"group {number}, shape {tuple(parameter.shape)}"
        for number, group in enumerate(optimizer.param_groups)
        for parameter in group["params"]
        if id(parameter) not in known
    ]
    if strangers:
        raise InputError(f"the optimizer's parameters are not all the model's: {'; '.join(strangers)}")


def _scheduled(optimizer: Any, scheduler: Any) -> tuple[list[Mapping[str, Schedule]], Any]:
    """The values that move, by group, and the plateau that moves them by a metric."""
    count = len(optimizer.param_groups)
    if scheduler is None:
        return [{}] * count, None
    if not is_torch(scheduler):
        if not callable(scheduler):
            raise InputError(f"scheduler= takes one of torch's or an Optax schedule, not {type(scheduler).__name__}")
        return [{"lr": scheduler}] * count, None
    if scheduler.optimizer is not optimizer:
        raise InputError("scheduler= moves another optimizer than this one")
    if is_plateau(scheduler):
        from equivalence.optimizers.plateau import Plateau

        return [{}] * count, Plateau.of(scheduler)
    from equivalence.optimizers.schedules import schedules

    return list(schedules(scheduler)), None


def is_torch(scheduler: Any) -> bool:
    """Whether a scheduler is an object like torch's, that moves an optimizer."""
    return hasattr(scheduler, "optimizer")


def is_plateau(scheduler: Any) -> bool:
    """Whether a scheduler follows a metric."""
    return "ReduceLROnPlateau" in {kind.__name__ for kind in type(scheduler).__mro__}
