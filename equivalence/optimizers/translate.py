"""A torch optimizer as an Optax transformation: torch's own rule on every leaf, with that leaf's group and schedule.

torch keeps its optimizer state a parameter: each has its own step counter, and a parameter whose gradient is None is
left alone. Optax keeps one counter for the whole tree and knows no missing gradient. So the translation runs one small
Optax transformation a leaf (`optimizers/rules`), and hands it the values that a scheduler moves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from equivalence.errors import InputError
from equivalence.optimizers.trees import Layout, by_path, like
from equivalence.weights import Bound, Leaves, infer
from equivalence.weights import Mapping as Rules

if TYPE_CHECKING:
    from equivalence.optimizers.rules.common import Rule

Schedule = Callable[[Any], Any]

CHANGES_NOTHING = ("foreach", "fused", "capturable", "differentiable", "initial_lr", "base_momentum", "max_momentum")
"""Entries of a torch group that decide how torch computes, or that a scheduler keeps there for itself."""


class TranslatedState(NamedTuple):
    """The state of a translated optimizer.

    `count`: int32, steps taken: the position of schedules, and () where nothing moves. `leaves`: the rule's state by
    the port's leaf path; `reference`: by torch's parameter name instead, in torch's layout, for rules to which the
    order of axes matters; `whole`: of a rule over the whole tree (LBFGS). `plateau`: of a ReduceLROnPlateau.
    """

    count: Any
    leaves: dict[str, Any]
    reference: dict[str, Any]
    whole: Any
    plateau: Any


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
class Group:
    """One of torch's parameter groups: its options, its parameters' names (None: all), the values that move."""

    options: Mapping[str, Any]
    names: frozenset[str] | None
    moving: Mapping[str, Schedule]

    def at(self, position: Any, rate: Any = None) -> dict[str, Any]:
        """The options at a position of the schedule."""
        found = {**self.options, **{name: schedule(position) for name, schedule in self.moving.items()}}
        if rate is not None:
            found["lr"] = rate
        if "beta1" in found:
            found["betas"] = (found.pop("beta1"), found["betas"][1])
        return found


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


@dataclass(frozen=True)
class Plan:
    """What a translation does on one tree of parameters: each leaf's group, and in whose layout the rules run."""

    layout: Layout
    groups: Mapping[str, int]
    """The group of each leaf that moves: by torch's name if `own`, else by the port's path."""
    own: bool


@dataclass(frozen=True)
class Translation:
    """A torch optimizer read once; `init` and `update` are those of an Optax transformation."""

    rule: Rule
    groups: tuple[Group, ...]
    names: Names | None
    mapping: Rules | Bound | None
    every: int
    plateau: Any = None
    _plans: dict[Any, Plan] = field(default_factory=dict)

    def plan(self, params: Any) -> Plan:
        """The plan for a tree of parameters. Raises MappingError where they are not torch's, InputError where a leaf
        has no gradient-free way to be moved."""
        shapes = {path: tuple(jnp.shape(leaf)) for path, leaf in by_path(params).items()}
        key = tuple(shapes.items())
        if key not in self._plans:
            self._plans[key] = self._planned(shapes, params)
        return self._plans[key]

    def _planned(self, shapes: Mapping[str, tuple[int, ...]], params: Any) -> Plan:
        odd = [
            path for path, leaf in by_path(params).items() if jnp.issubdtype(jnp.result_type(leaf), jnp.complexfloating)
        ]
        if odd:
            raise InputError(f"complex parameters are not translated: {', '.join(odd)}; hold real and imaginary parts")
        layout = self.layout(shapes)
        groups: dict[str, set[int | None]] = {leaf: {self._group(n) for n in layout.sources(leaf)} for leaf in shapes}
        if self.rule.in_reference_layout or any(len(found) > 1 for found in groups.values()):
            names = {name: self._group(name) for leaf in shapes for name in layout.sources(leaf)}
            return Plan(layout, {name: group for name, group in names.items() if group is not None}, True)
        return Plan(layout, {leaf: g for leaf, found in groups.items() for g in found if g is not None}, False)

    def layout(self, shapes: Mapping[str, tuple[int, ...]]) -> Layout:
        """Where torch's parameters lie in a tree of the port's."""
        if isinstance(self.mapping, Bound):
            return Layout(self.mapping)
        return bound_to(self.names, self.mapping, shapes)

    def _group(self, name: str) -> int | None:
        """The group of a torch parameter; None for one that nothing moves."""
        if self.names is not None and name in self.names.frozen:
            return None
        return next((i for i, group in enumerate(self.groups) if group.names is None or name in group.names), None)

    def init(self, params: Any) -> TranslatedState:
        """The state before the first step."""
        plan = self.plan(params)
        flat = by_path(params)
        if plan.own:
            flat = plan.layout.backward(flat, gradient=False)
        options = [group.at(0) for group in self.groups]
        whole: Any = ()
        states: dict[str, Any] = {}
        if self.rule.whole:
            whole = self.rule.make(options[0]).init(params)
        else:
            states = {leaf: self.rule.make(options[group]).init(flat[leaf]) for leaf, group in plan.groups.items()}
        plateau = () if self.plateau is None else self.plateau.init()
        held = ({}, states) if plan.own else (states, {})
        return TranslatedState(jnp.zeros((), jnp.int32) if self.moves else (), *held, whole, plateau)

    @property
    def moves(self) -> bool:
        """Whether a schedule or a plateau moves any option."""
        return self.plateau is not None or any(group.moving for group in self.groups)

    def update(
        self,
        updates: Any,
        state: TranslatedState,
        params: Any = None,
        *,
        received: Any = None,
        value: Any = None,
        value_fn: Any = None,
        **others: Any,
    ) -> tuple[Any, TranslatedState]:
        """The changes of the parameters in one step, and the state after it.

        Args:
            updates: gradients in the parameters' tree. A leaf that is None or masked has no gradient, as in torch:
                neither it nor its state moves.
            state: the state before.
            params: the parameters before the step.
            received: a tree of booleans like `params`, traced ones too: which leaves have a gradient in this step
                (for SparseAdam: which rows, an array over the first axis).
            value: the metric that a ReduceLROnPlateau looks at.
            value_fn: the closure of LBFGS, a function from parameters to the loss.
        """
        del others
        if params is None:
            raise InputError("a translated optimizer needs the parameters: update(gradients, state, params)")
        if self.plateau is not None and value is None:
            raise InputError("ReduceLROnPlateau looks at a metric: update(gradients, state, params, value=metric)")
        options = self._options(state)
        if self.rule.whole:
            rule = self.rule.make(options[0])
            changes, whole = rule.update(updates, state.whole, params, **({"value_fn": value_fn} if value_fn else {}))
            held: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
        else:
            changes, held = self._leafwise(updates, state, params, received, options)
            whole = ()
        count = state.count + 1 if self.moves else ()
        plateau = () if self.plateau is None else self.plateau.after(state.plateau, value, count, self.every)
        return changes, TranslatedState(count, *held, whole, plateau)

    def _options(self, state: TranslatedState) -> list[dict[str, Any]]:
        position = state.count // self.every if self.moves else 0
        rates = [None] * len(self.groups) if self.plateau is None else list(state.plateau.lr)
        return [group.at(position, rate) for group, rate in zip(self.groups, rates, strict=True)]

    def _leafwise(
        self, updates: Any, state: TranslatedState, params: Any, received: Any, options: Sequence[Mapping[str, Any]]
    ) -> tuple[Any, tuple[dict[str, Any], dict[str, Any]]]:
        plan = self.plan(params)
        ported = by_path(params)
        flat, gradients = ported, by_path(updates)
        masks = {} if received is None else by_path(received)
        if plan.own:
            flat, gradients = plan.layout.backward(ported, gradient=False), plan.layout.backward(gradients)
            masks = {name: masks[plan.layout.targets(name)[0]] for name in flat} if masks else {}
        before = state.reference if plan.own else state.leaves
        rules = [self.rule.make(chosen) for chosen in options]
        changes, after = {leaf: jnp.zeros_like(value) for leaf, value in flat.items()}, dict(before)
        for leaf, group in plan.groups.items():
            if leaf in gradients:
                given = gradients[leaf], before[leaf], flat[leaf]
                changes[leaf], after[leaf] = self._one(rules[group], *given, masks.get(leaf))
        if plan.own:
            changes = plan.layout.forward(changes)
        return like(params, changes), (({}, after) if plan.own else (after, {}))

    def _one(self, rule: Any, gradient: Any, state: Any, param: Any, received: Any) -> tuple[Any, Any]:
        """One leaf's step, or none where no gradient was received."""
        if self.rule.needs_rows:
            if received is None:
                raise InputError(
                    f"{self.rule.name} moves only the rows that a sparse gradient holds: update(gradients, state,"
                    " params, received=...), a boolean array over the first axis of every leaf"
                )
            return rule.update(gradient, state, param, rows=received)
        change, after = rule.update(gradient, state, param)
        if received is None:
            return change, after
        kept = jax.tree_util.tree_map(lambda new, old: jnp.where(received, new, old), after, state)
        return jnp.where(received, change, jnp.zeros_like(change)), kept


def bound_to(names: Names | None, mapping: Rules | None, shapes: Mapping[str, tuple[int, ...]]) -> Layout:
    """A mapping bound to torch's parameters and the port's; one inferred from names where none is given."""
    if names is None:
        return Layout.named_alike(shapes)
    target = Leaves(dict(shapes))
    if mapping is not None:
        return Layout(mapping.about(names.leaves, target).bind(names.leaves, target))
    if set(names.leaves.shapes) == set(shapes) and all(names.leaves.shapes[p] == shapes[p] for p in shapes):
        return Layout.named_alike(shapes)
    return Layout(infer(names.leaves, target, names.layers).bind(names.leaves, target))


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
    The options are read now; a scheduler's position is the state's, see `optimizer_state`.

    Raises InputError for an optimizer, an option or a scheduler that has no translation, with what to do instead.

    >>> import torch
    >>> linear = torch.nn.Linear(3, 2)
    >>> transformation = to_optax(torch.optim.AdamW(linear.parameters(), lr=1e-3))
    >>> state = transformation.init({"kernel": jnp.ones((3, 2)), "bias": jnp.zeros(2)})
    """
    names = None if model is None else Names.of(model)
    known = None if model is None else {id(parameter): name for name, parameter in model.named_parameters()}
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
    if every < 1:
        raise InputError(f"every= is a number of optimizer steps, not {every}")
    named = _named(optimizer, known)
    if names is None and (len(optimizer.param_groups) > 1 or rule.in_reference_layout):
        why = "has several parameter groups" if len(optimizer.param_groups) > 1 else "depends on the order of axes"
        raise InputError(f"{rule.name} {why}: pass model=, the torch module whose parameters it holds")
    moving, plateau = _scheduled(optimizer, scheduler)
    groups = []
    for number, held in enumerate(optimizer.param_groups):
        options = {name: _number(value) for name, value in held.items() if name not in ("params", *CHANGES_NOTHING)}
        beyond = sorted(set(options) - OPTIONS[rule.name])
        if beyond:
            raise InputError(f"{rule.name} has options that are not translated: {', '.join(beyond)}")
        groups.append(Group(options, named[number], moving[number]))
    return Translation(rule, tuple(groups), names, mapping, every, plateau)


def rule_of(optimizer: Any) -> Rule:
    """The rule of a torch optimizer. Raises InputError for what is none, and for a class that is not torch's own."""
    from equivalence.optimizers.rules import RULES

    kind = type(optimizer)
    if not hasattr(optimizer, "param_groups"):
        raise InputError(f"to_optax takes an optimizer of torch.optim, not {kind.__name__}")
    if kind.__name__ not in RULES or kind.__module__.split(".")[:2] != ["torch", "optim"]:
        raise InputError(
            f"{kind.__module__}.{kind.__name__} is not an optimizer of torch.optim: its steps are not known here;"
            f" write them as an Optax transformation and pass optimizer=(torch factory, transformation) to verify"
            f" (translated: {', '.join(sorted(RULES))})"
        )
    return RULES[kind.__name__]


def _named(optimizer: Any, known: Mapping[int, str] | None) -> list[frozenset[str] | None]:
    """The names of each group's parameters."""
    held = [(number, p) for number, group in enumerate(optimizer.param_groups) for p in group["params"]]
    if known is None:
        if any(not parameter.requires_grad for _, parameter in held):
            raise InputError("the optimizer holds frozen parameters: pass model=, which names them")
        return [None] * len(optimizer.param_groups)
    strangers = [f"group {number}, shape {tuple(p.shape)}" for number, p in held if id(p) not in known]
    if strangers:
        raise InputError(f"the optimizer's parameters are not all the model's: {'; '.join(strangers)}")
    return [frozenset(known[id(p)] for p in group["params"]) for group in optimizer.param_groups]


def _scheduled(optimizer: Any, scheduler: Any) -> tuple[list[Mapping[str, Schedule]], Any]:
    """The values that move, by group, and the plateau that moves them by a metric."""
    count = len(optimizer.param_groups)
    if scheduler is None:
        return [{}] * count, None
    if not hasattr(scheduler, "optimizer"):
        if not callable(scheduler):
            raise InputError(f"scheduler= takes one of torch's or an Optax schedule, not {type(scheduler).__name__}")
        return [{"lr": scheduler}] * count, None
    if scheduler.optimizer is not optimizer:
        raise InputError("scheduler= moves another optimizer than this one")
    if type(scheduler).__name__ == "ReduceLROnPlateau":
        from equivalence.optimizers.plateau import Plateau

        return [{}] * count, Plateau.of(scheduler)
    from equivalence.optimizers.schedules import schedules

    return list(schedules(scheduler)), None


def _number(value: Any) -> Any:
    """An option as Python holds it: a tensor of one element is a number."""
    return value.item() if hasattr(value, "item") else value
