"""A torch optimizer read once, as an Optax transformation: torch's own rule on every leaf, with its group's values.

torch keeps its optimizer state a parameter: each has its own step counter, and a parameter whose gradient is None is
left alone. Optax keeps one counter for the whole tree and knows no missing gradient. So the translation runs one small
Optax transformation a leaf (`optimizers/rules`), and hands it the values that a scheduler moves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import reduce
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from equivalence.errors import InputError
from equivalence.optimizers.trees import Flat, Layout, Shapes, by_path, like, nodes, shapes_of

if TYPE_CHECKING:
    from equivalence.optimizers.rules.common import Rule

Schedule = Callable[[Any], Any]


class TranslatedState(NamedTuple):
    """The state of a translated optimizer.

    `count`: int32, steps taken: the position of schedules, and () where nothing moves. `leaves`: the rule's state by
    the port's leaf path; `reference`: by torch's parameter name instead, in torch's layout, for rules to which the
    order of axes matters; `whole`: of a rule over all leaves together (LBFGS). `plateau`: of a ReduceLROnPlateau.
    """

    count: Any
    leaves: dict[str, Any]
    reference: dict[str, Any]
    whole: Any
    plateau: Any


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
class Plan:
    """What a translation does on one tree of parameters: each leaf's group, and in whose layout the rules run."""

    layout: Layout
    shapes: Shapes
    groups: Mapping[str, int]
    """The group of each leaf that moves: by torch's name if `own`, else by the port's path."""
    own: bool

    def taken(self, leaves: Flat, gradient: bool = True) -> Flat:
        """The port's leaves as the rules see them."""
        return self.layout.backward(leaves, gradient) if self.own else leaves

    def given(self, changes: Flat, params: Flat) -> Flat:
        """The changes of parameters, both as the rules see them, as changes of the port's leaves."""
        if not self.own:
            return changes
        result: Flat = jax.jvp(lambda leaves: self.layout.forward(leaves, gradient=False), (params,), (changes,))[1]
        return result

    def gradients(self, updates: Any, received: Any) -> tuple[Flat, Flat]:
        """Gradients, and where `received` is given whether they were, both by leaf as the rules see them.

        A torch parameter has a gradient where any leaf that holds a part of it has one; the rest of it is then zero.
        """
        gradients, masks = by_path(updates), {} if received is None else by_path(received)
        self._fits("gradients", gradients)
        if unknown := sorted(set(masks) - set(self.shapes)):
            raise InputError(f"received= is not shaped like the parameters: there is no {', '.join(unknown)}")
        found: Flat = {}
        for sources, targets in self.layout.moves:
            parts = {leaf: masks[leaf] for leaf in targets if leaf in masks}
            if parts and len(targets) > 1:
                gradients |= {t: jnp.where(m, gradients[t], 0) for t, m in parts.items() if t in gradients}
            held = [leaf for leaf in targets if leaf in gradients]
            if held:
                gradients |= {
                    leaf: jnp.zeros(self.shapes[leaf], gradients[held[0]].dtype)
                    for leaf in targets
                    if leaf not in gradients
                }
            if parts:
                mask = reduce(jnp.logical_or, parts.values())
                found |= dict.fromkeys(sources if self.own else targets, mask)
        return self.taken(gradients), found

    def _fits(self, what: str, leaves: Flat) -> None:
        odd = [f"{leaf} is not a parameter" for leaf in leaves if leaf not in self.shapes]
        odd += [
            f"{leaf} has the shape {tuple(jnp.shape(value))}, the parameter {self.shapes[leaf]}"
            for leaf, value in leaves.items()
            if leaf in self.shapes and tuple(jnp.shape(value)) != self.shapes[leaf]
        ]
        if odd:
            raise InputError(f"the {what} are not shaped like the parameters: {'; '.join(odd)}")

    def rows(self, received: Any) -> Flat:
        """Which rows of torch's parameters have a gradient, from masks over the port's leaves or their first axes."""
        found = {}
        for leaf, mask in by_path(received).items():
            shape, mask = self.shapes.get(leaf, ()), jnp.asarray(mask)
            if mask.ndim == 1 and len(shape) > 1 and mask.shape == shape[:1]:
                mask = mask.reshape(-1, *(1 for _ in shape[1:]))
            try:
                found[leaf] = jnp.broadcast_to(mask, shape).astype(float)
            except ValueError:
                raise InputError(f"received= has the shape {mask.shape} for {leaf} {shape}") from None
        return {name: jnp.any(mask != 0, axis=tuple(range(1, mask.ndim))) for name, mask in self.taken(found).items()}


@dataclass(frozen=True)
class Translation:
    """A torch optimizer read once; `init` and `update` are those of an Optax transformation."""

    rule: Rule
    groups: tuple[Group, ...]
    frozen: frozenset[str]
    place: Callable[[Shapes, bool], Layout]
    """The layout of a tree of parameters of these shapes, parts of which may be masked."""
    every: int
    plateau: Any = None
    _plans: dict[Any, Plan] = field(default_factory=dict)

    def plan(self, params: Any) -> Plan:
        """The plan for a tree of parameters. Raises MappingError where they are not torch's, InputError where the rule
        cannot move them."""
        flat = by_path(params)
        masked = bool(nodes(params, optax.MaskedNode))
        key = (tuple(shapes_of(flat).items()), masked)
        if key not in self._plans:
            self._plans[key] = self._planned(flat, masked)
        return self._plans[key]

    def _planned(self, flat: Flat, masked: bool) -> Plan:
        assert_real(flat)
        shapes = shapes_of(flat)
        layout = self.place(shapes, masked)
        found: dict[str, set[int | None]] = {leaf: {self._group(n) for n in layout.sources(leaf)} for leaf in shapes}
        mixed = [leaf for leaf, groups in found.items() if len(groups) > 1]
        if mixed and self.rule.whole:
            raise InputError(f"{self.rule.name}: {', '.join(mixed)} would move in part: hold the frozen part apart")
        # a leaf that holds 1 + w is not what torch decays
        changed = any(move.rule.change is not None for move in layout.bound.moves) and not self.rule.whole
        if self.rule.in_reference_layout or self.rule.needs_rows or mixed or changed:
            names = {name: self._group(name) for leaf in shapes for name in layout.sources(leaf)}
            return Plan(layout, shapes, {name: group for name, group in names.items() if group is not None}, True)
        return Plan(layout, shapes, {leaf: g for leaf, groups in found.items() for g in groups if g is not None}, False)

    def _group(self, name: str) -> int | None:
        """The group of a torch parameter; None for one that nothing moves."""
        if name in self.frozen:
            return None
        return next((i for i, group in enumerate(self.groups) if group.names is None or name in group.names), None)

    @property
    def moves(self) -> bool:
        """Whether a schedule or a plateau moves any option."""
        return self.plateau is not None or any(group.moving for group in self.groups)

    def init(self, params: Any) -> TranslatedState:
        """The state before the first step."""
        plan = self.plan(params)
        flat = plan.taken(by_path(params), gradient=False)
        options = [group.at(0) for group in self.groups]
        whole: Any = ()
        states: dict[str, Any] = {}
        if self.rule.whole:
            whole = self.rule.make(options[0]).init({leaf: flat[leaf] for leaf in plan.groups})
        else:
            states = {leaf: self.rule.make(options[group]).init(flat[leaf]) for leaf, group in plan.groups.items()}
        plateau = () if self.plateau is None else self.plateau.init()
        held = ({}, states) if plan.own else (states, {})
        return TranslatedState(jnp.zeros((), jnp.int32) if self.moves else (), *held, whole, plateau)

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
            received: a tree of booleans like `params`, traced ones too: which leaves have a gradient in this step.
                For SparseAdam which rows, an array over a leaf's first axis, or one that broadcasts to the leaf.
            value: the metric that a ReduceLROnPlateau looks at.
            value_fn: the closure of LBFGS, a function from parameters to the loss.

        Raises InputError where one of these is missing that the optimizer needs, or is not shaped like the parameters.
        """
        del others
        if params is None:
            raise InputError("a translated optimizer needs the parameters: update(gradients, state, params)")
        if self.plateau is not None and value is None:
            raise InputError("ReduceLROnPlateau looks at a metric: update(gradients, state, params, value=metric)")
        plan = self.plan(params)
        move = self._together if self.rule.whole else self._leafwise
        changes, leaves, reference, whole = move(plan, updates, state, params, received, value_fn)
        ported = by_path(params)
        changes = {path: jnp.zeros_like(leaf) for path, leaf in ported.items()} | changes
        count = state.count + 1 if self.moves else ()
        plateau = () if self.plateau is None else self.plateau.after(state.plateau, value, count, self.every)
        return like(params, changes), TranslatedState(count, leaves, reference, whole, plateau)

    def _options(self, state: TranslatedState) -> list[dict[str, Any]]:
        position = state.count // self.every if self.moves else 0
        rates = [None] * len(self.groups) if self.plateau is None else list(state.plateau.lr)
        return [group.at(position, rate) for group, rate in zip(self.groups, rates, strict=True)]

    def _leafwise(
        self, plan: Plan, updates: Any, state: TranslatedState, params: Any, received: Any, value_fn: Any
    ) -> tuple[Flat, dict[str, Any], dict[str, Any], Any]:
        del value_fn
        rows = self.rule.needs_rows
        gradients, masks = plan.gradients(updates, None if rows else received)
        masks = plan.rows(received) if rows and received is not None else masks
        flat, before = plan.taken(by_path(params), gradient=False), state.reference if plan.own else state.leaves
        if set(before) != set(plan.groups):
            odd = ", ".join(sorted(set(before) ^ set(plan.groups)))
            raise InputError(f"the state is not that of these parameters: {odd} stands on one side only")
        rules = [self.rule.make(chosen) for chosen in self._options(state)]
        changes, after = {leaf: jnp.zeros_like(value) for leaf, value in flat.items()}, dict(before)
        for leaf, group in plan.groups.items():
            if leaf in gradients:
                given = gradients[leaf], before[leaf], flat[leaf]
                changes[leaf], after[leaf] = self._one(rules[group], *given, masks.get(leaf))
        return plan.given(changes, flat), {} if plan.own else after, after if plan.own else {}, ()

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

    def _together(
        self, plan: Plan, updates: Any, state: TranslatedState, params: Any, received: Any, value_fn: Any
    ) -> tuple[Flat, dict[str, Any], dict[str, Any], Any]:
        """One step of a rule over all leaves, of those that move: the others are constants of its closure."""
        if received is not None:
            raise InputError(f"{self.rule.name} moves all parameters together: received= says nothing to it")
        ported = by_path(params)
        gradients, _ = plan.gradients(updates, None)
        held = {leaf: ported[leaf] for leaf in plan.groups}

        def closure(moved: Flat) -> Any:
            return value_fn(like(params, {**ported, **moved}))

        rule = self.rule.make(self._options(state)[0])
        given = {leaf: gradients.get(leaf, jnp.zeros_like(value)) for leaf, value in held.items()}
        extra = {} if value_fn is None else {"value_fn": closure}
        changes, whole = rule.update(given, state.whole, held, **extra)
        return changes, {}, {}, whole


def assert_real(params: Flat) -> None:
    """Raise InputError with all complex parameters: torch takes their parts apart, Optax their absolute value."""
    odd = [path for path, leaf in params.items() if jnp.issubdtype(jnp.result_type(leaf), jnp.complexfloating)]
    if odd:
        raise InputError(f"complex parameters are not translated: {', '.join(odd)}; hold real and imaginary parts")
