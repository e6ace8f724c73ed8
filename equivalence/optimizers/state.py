"""An optimizer's state carried over: torch's into an Optax state, and an Optax state into torch's optimizer.

The mapping that moves weights moves what is kept for each of their elements; counters move as the numbers they are.
A state that does not fit is refused with all that is wrong with it: nothing is filled in.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from equivalence.errors import InputError
from equivalence.optimizers.torch_side import Torch, step_on
from equivalence.optimizers.translate import Names, TranslatedState, bound_to
from equivalence.optimizers.trees import Entry, Flat, Layout, by_path, entries, slots_in_reference
from equivalence.weights import Bound

STEPS_TAKEN = {
    "ScaleByScheduleState": ("count",),
    "InjectHyperparamsState": ("count",),
    "InjectStatefulHyperparamsState": ("count",),
    "TranslatedState": ("count",),
}
"""Fields of Optax states that count the steps taken, as a schedule does, and not those of a leaf."""


ELSEWHERE = ("PlateauState", "TorchLbfgsState")
"""States that are moved as wholes."""


def optimizer_state(
    optimizer: Any,
    transform: Any,
    params: Any,
    *,
    model: Any,
    mapping: Any = None,
    scheduler: Any = None,
    every: int = 1,
    steps: int | None = None,
) -> Any:
    """The state that an Optax transformation would be in, had it taken the steps that a torch optimizer has taken.

    Args:
        optimizer: the torch optimizer, anywhere in its training.
        transform: what goes on from there: `to_optax(optimizer, ...)`, Optax's own (`optax.adamw(...)`), or a chain
            of them.
        params: the port's parameters; only their shapes and dtypes matter.
        model: the torch module whose parameters the optimizer holds.
        mapping: from the model's leaves to the port's; None infers one from names.
        scheduler, every: as in `to_optax`: the position of schedules is that scheduler's.
        steps: the optimizer steps taken, where no scheduler tells them; None takes the largest step counter.

    Raises InputError with every array that has no counterpart, or that does not fit it.
    """
    known = {id(parameter): name for name, parameter in model.named_parameters()}
    flat = by_path(params)
    layout = _layout(Names.of(model), mapping, flat)
    return moved_state(Torch.of(optimizer, known), transform.init(params), flat, layout, scheduler, every, steps)


def _layout(names: Names, mapping: Any, flat: Flat) -> Layout:
    if isinstance(mapping, Bound):
        return Layout(mapping)
    return bound_to(names, mapping, {path: tuple(jnp.shape(leaf)) for path, leaf in flat.items()})


def moved_state(
    torch: Torch,
    template: Any,
    flat: Mapping[str, Any],
    layout: Layout,
    scheduler: Any = None,
    every: int = 1,
    steps: Any = None,
) -> Any:
    """A state like `template` with torch's in it; see `optimizer_state`."""
    mover = _Mover(torch, flat, layout, _steps_taken(torch, scheduler, every, steps))
    keyed, structure = jax.tree_util.tree_flatten(template)
    made = [mover.value(entry) for entry in entries(template, flat)]
    assert len(made) == len(keyed)
    mover.finish()
    state = jax.tree_util.tree_unflatten(structure, made)
    return jax.tree_util.tree_map(
        lambda node: _whole(node, torch, layout, scheduler), state, is_leaf=lambda n: isinstance(n, TranslatedState)
    )


def _whole(node: Any, torch: Torch, layout: Layout, scheduler: Any) -> Any:
    """The parts of a translated state that belong to no leaf: LBFGS's vectors and a ReduceLROnPlateau's place."""
    if not isinstance(node, TranslatedState):
        return node
    if torch.whole:
        from equivalence.optimizers.lbfgs_slots import fill, moved, read

        slots = moved(read(torch.optimizer, tuple(torch.params)), layout.forward)
        node = node._replace(whole=fill(node.whole, slots))
    if node.plateau != () and scheduler is not None:
        from equivalence.optimizers.plateau import state_of

        node = node._replace(plateau=state_of(scheduler))
    return node


def _steps_taken(torch: Torch, scheduler: Any, every: int, steps: int | None) -> int | None:
    if steps is not None:
        return steps
    if scheduler is not None:
        from equivalence.optimizers.schedules import position

        return int(position(scheduler)) * every
    if any("step" in slots for slots in torch.slots.values()):
        return max((int(value) for value in torch.held("step").values()), default=0)
    return None


@dataclass
class _Mover:
    """Finds for every array of an Optax state what torch keeps, and collects what is wrong."""

    torch: Torch
    flat: Mapping[str, Any]
    layout: Layout
    steps: int | None
    problems: list[str] = dataclasses.field(default_factory=list)
    used: set[str] = dataclasses.field(default_factory=set)
    _moved: dict[str, Flat] = dataclasses.field(default_factory=dict)

    def value(self, entry: Entry) -> Any:
        """The array to stand where `entry` stands."""
        if entry.field in STEPS_TAKEN.get(entry.owner, ()):
            if self.steps is None:
                self.problems.append(f"{_at(entry)}: torch's {self.kind} counts no steps: pass scheduler= or steps=")
            return jnp.asarray(self.steps or 0, entry.array.dtype)
        if entry.owner in ELSEWHERE:
            return entry.array
        if entry.field not in self.torch.fields:
            if entry.leaf or jnp.issubdtype(entry.array.dtype, jnp.number):
                self.problems.append(f"{_at(entry)} has no counterpart in torch's {self.kind}")
            return entry.array
        slot, how = self.torch.fields[entry.field]
        self.used.add(slot)
        held = self.torch.held(slot)
        if entry.own:
            return self._fitting(entry, slot, held.get(entry.leaf))
        if entry.leaf == "":
            return self._shared(entry, slot, held)
        if how.kind in ("count", "scalar"):
            return self._fitting(entry, slot, self._of_leaf(entry, slot, held))
        if slot not in self._moved:
            self._moved[slot] = self.layout.forward(held, gradient=how.kind != "value")
        return self._fitting(entry, slot, self._moved[slot].get(entry.leaf))

    @property
    def kind(self) -> str:
        return type(self.torch.optimizer).__name__

    def _shared(self, entry: Entry, slot: str, held: Flat) -> Any:
        """One counter for all leaves: torch's must agree."""
        values = {name: np.asarray(value) for name, value in held.items()}
        if len({value.tobytes() for value in values.values()}) > 1:
            text = ", ".join(f"{name} {value}" for name, value in values.items())
            self.problems.append(f"{_at(entry)} is one for all leaves, and torch's {slot} differs: {text}")
        return self._fitting(entry, slot, next(iter(values.values()), None))

    def _of_leaf(self, entry: Entry, slot: str, held: Flat) -> Any:
        """A number about one leaf of the port; where it holds several of torch's, theirs must agree."""
        values = {name: held.get(name) for name in self.layout.sources(entry.leaf)}
        if len({None if value is None else np.asarray(value).tobytes() for value in values.values()}) > 1:
            text = ", ".join(f"{name} {value}" for name, value in values.items())
            self.problems.append(f"{entry.leaf} holds several of torch's parameters, whose {slot} differs: {text}")
        return next(iter(values.values()), None)

    def _fitting(self, entry: Entry, slot: str, value: Any) -> Any:
        """Torch's value in the state's dtype; what is not there yet stays as it began."""
        if value is None:
            return entry.array
        if tuple(value.shape) != tuple(entry.array.shape):
            shapes = f"{tuple(value.shape)} in torch, {tuple(entry.array.shape)} here"
            self.problems.append(f"{entry.leaf or entry.field}: {slot} has the shape {shapes}")
            return entry.array
        made = np.asarray(value).astype(entry.array.dtype)
        if not np.array_equal(made.astype(value.dtype), value, equal_nan=value.dtype.kind == "f"):
            text = f"{slot} is {value.dtype}, which {made.dtype} cannot hold"
            self.problems.append(f"{entry.leaf or entry.field}: {text}")
        return jnp.asarray(made)

    def finish(self) -> None:
        """Raise InputError with all problems."""
        for slot in sorted({slot for slots in self.torch.slots.values() for slot in slots} - self.used):
            if self.torch.held(slot) and not self.torch.whole:
                self.problems.append(f"torch's {slot} has no counterpart in the Optax state")
        if self.problems:
            raise InputError(f"the state of {self.kind} does not fit: {'; '.join(self.problems)}")


def _at(entry: Entry) -> str:
    return f"{entry.owner}.{entry.field}" + (f" of {entry.leaf}" if entry.leaf else "")


def load_optimizer_state(
    optimizer: Any,
    state: Any,
    params: Any,
    *,
    model: Any,
    mapping: Any = None,
    scheduler: Any = None,
    every: int = 1,
) -> None:
    """Put an Optax state into a torch optimizer, and its schedule's position into the scheduler.

    Args:
        optimizer: the torch optimizer that goes on; what it held before is given up.
        state: an Optax state: that of `to_optax(optimizer, ...)`, or Optax's own.
        params: the port's parameters; only their shapes and dtypes matter.
        model, mapping: as in `optimizer_state`.
        scheduler, every: the scheduler of the optimizer, stepped on here to where the state is.

    Raises InputError with everything that does not fit, before anything is changed; also where the scheduler is
    further on than the state.
    """
    known = {id(parameter): name for name, parameter in model.named_parameters()}
    flat = by_path(params)
    put_state(Torch.of(optimizer, known), state, flat, _layout(Names.of(model), mapping, flat), scheduler, every)


def put_state(
    torch: Torch, state: Any, flat: Mapping[str, Any], layout: Layout, scheduler: Any = None, every: int = 1
) -> None:
    """Put an Optax state into a named torch optimizer; see `load_optimizer_state`."""
    on_host = jax.tree_util.tree_map(np.asarray, state)
    if torch.whole:
        _put_whole(torch, on_host, layout)
    else:
        _put_slots(torch, on_host, flat, layout)
    if scheduler is not None:
        _move_on(scheduler, on_host, flat, every)


def _put_whole(torch: Torch, state: Any, layout: Layout) -> None:
    from equivalence.optimizers.lbfgs_slots import moved, slots_of_state, write

    nodes = jax.tree_util.tree_leaves(state, is_leaf=lambda node: isinstance(node, TranslatedState))
    held = [node.whole for node in nodes if isinstance(node, TranslatedState)]
    if not held:
        raise InputError("LBFGS goes on from the state of to_optax(LBFGS): Optax's own keeps other things")
    write(torch.optimizer, tuple(torch.params), moved(slots_of_state(held[0]), layout.backward))


def _put_slots(torch: Torch, state: Any, flat: Mapping[str, Any], layout: Layout) -> None:
    shapes = {path: tuple(jnp.shape(leaf)) for path, leaf in flat.items()}
    as_values = frozenset(slot.field for _, slot in torch.fields.values() if slot.kind == "value")
    found = slots_in_reference(state, layout, shapes, as_values)
    problems = _unlike(state, flat, layout)
    made: dict[str, dict[str, Any]] = {}
    for name, slots in torch.slots.items():
        made[name] = {}
        for slot, how in slots.items():
            leaves = found.get(how.field, {})
            value = leaves.get(name, leaves.get("") if how.kind != "begun" else None)
            if value is None:
                problems.append(f"{name}: the state holds no {how.field}, which torch keeps as {slot}")
            elif how.kind in ("moment", "value") and tuple(value.shape) != tuple(torch.params[name].shape):
                there = f"{tuple(value.shape)} here, {tuple(torch.params[name].shape)} in torch"
                problems.append(f"{name}: {slot} has the shape {there}")
            else:
                made[name][slot] = value
    if problems:
        raise InputError(f"the state does not fit torch's {type(torch.optimizer).__name__}: {'; '.join(problems)}")
    for name, values in made.items():
        torch.put(name, values)


def _unlike(state: Any, flat: Mapping[str, Any], layout: Layout) -> list[str]:
    """Numbers about a torch parameter on which the port's leaves that hold its parts disagree."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for entry in entries(state, flat):
        if entry.leaf and not entry.own and tuple(entry.array.shape) == ():
            for name in layout.sources(entry.leaf):
                found.setdefault((name, entry.field), {})[entry.leaf] = entry.array
    return [
        f"{name} lies in {', '.join(leaves)}, whose {field} differs: {', '.join(map(str, leaves.values()))}"
        for (name, field), leaves in found.items()
        if len({value.tobytes() for value in leaves.values()}) > 1
    ]


def _move_on(scheduler: Any, state: Any, flat: Mapping[str, Any], every: int) -> None:
    """Step a scheduler on to where an Optax state is; a ReduceLROnPlateau is put there."""
    held = jax.tree_util.tree_leaves(state, is_leaf=lambda node: isinstance(node, TranslatedState))
    for part in held:
        if isinstance(part, TranslatedState) and part.plateau != ():
            from equivalence.optimizers.plateau import load_state

            load_state(scheduler, part.plateau)
            return
    taken = [int(e.array) for e in entries(state, flat) if e.field in STEPS_TAKEN.get(e.owner, ())]
    if not taken:
        raise InputError("the state counts no steps, so the scheduler's position is not known: step it on yourself")
    step_on(scheduler, max(taken) // every)
