"""An optimizer's state carried over: torch's into an Optax state, and an Optax state into torch's optimizer.

The mapping that moves weights moves what is kept for each of their elements; counters move as the numbers they are.
A state that does not fit is refused with all that is wrong with it: nothing is filled in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from equivalence.errors import InputError
from equivalence.optimizers.lbfgs_moving import filled, given
from equivalence.optimizers.moving import RESTING, Mover, moving, scheduled, steps_taken, stranger
from equivalence.optimizers.plateau import PlateauState, load_state, state_of
from equivalence.optimizers.torch_side import Torch, past, step_on
from equivalence.optimizers.translate import Names, assert_steps, bound_to, is_plateau, is_torch, named
from equivalence.optimizers.translated import TranslatedState, assert_real
from equivalence.optimizers.trees import (
    STEPS_TAKEN,
    Entry,
    Flat,
    Layout,
    by_path,
    entries,
    nodes,
    shapes_of,
    slots_in_reference,
)

if TYPE_CHECKING:
    from equivalence.optimizers.rules.common import Slot


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
        steps: the optimizer steps taken, for schedules; None takes the scheduler's or, where that takes one step in
            several or is a function, torch's step counters, which must then agree.

    State of a frozen parameter stays behind: no step uses it. For an `nnx.Optimizer` pass
    `nnx.as_pure(nnx.state(module, nnx.Param))` as params, and put the result there with
    `nnx.update(optimizer.opt_state, nnx.state(state))`.

    Raises InputError with every array that has no counterpart, or that does not fit it.

    Differs from what Optax's own states may suggest: `optax.rmsprop` keeps its momentum times -lr, `optax.amsgrad` the
    largest of the moments after their bias is corrected; those are refused.
    https://docs.pytorch.org/docs/stable/generated/torch.optim.Optimizer.state_dict.html
    """
    torch, flat, layout = _read(optimizer, params, model, mapping, scheduler, every)
    if not (hasattr(transform, "init") and hasattr(transform, "update")):
        raise InputError(f"transform= takes an Optax transformation, not {type(transform).__name__}")
    return moved_state(torch, transform.init(params), flat, layout, scheduler, every, steps)


def load_optimizer_state(
    optimizer: Any,
    state: Any,
    params: Any,
    *,
    model: Any,
    mapping: Any = None,
    scheduler: Any = None,
    every: int = 1,
    steps: int | None = None,
) -> None:
    """Put an Optax state into a torch optimizer, and its schedule's position into the scheduler.

    Args:
        optimizer: the torch optimizer that goes on; what it held before is given up, but for frozen parameters.
        state: an Optax state: that of `to_optax(optimizer, ...)`, or Optax's own.
        params: the port's parameters; only their shapes and dtypes matter.
        model, mapping: as in `optimizer_state`.
        scheduler, every: the scheduler of the optimizer, stepped on here to where the state is.
        steps: the optimizer steps taken, where the state counts none (`optax.rmsprop`).

    Raises InputError with everything that does not fit, before anything is changed; also where the scheduler is
    further on than the state.
    https://docs.pytorch.org/docs/stable/generated/torch.optim.Optimizer.load_state_dict.html
    """
    torch, flat, layout = _read(optimizer, params, model, mapping, scheduler, every)
    put_state(torch, state, flat, layout, scheduler, every, steps)


def _read(
    optimizer: Any, params: Any, model: Any, mapping: Any, scheduler: Any, every: int
) -> tuple[Torch, Flat, Layout]:
    assert_steps(every)
    torch, names, flat = Torch.of(optimizer, named(model)), Names.of(model), by_path(params)
    if is_torch(scheduler) and scheduler.optimizer is not optimizer:
        raise InputError("scheduler= moves another optimizer than this one")
    assert_real(flat)
    if nodes(params, optax.MaskedNode):
        names = names.only(frozenset(torch.params))
    return torch, flat, bound_to(names, mapping, shapes_of(flat))


def moved_state(
    torch: Torch,
    template: Any,
    flat: Mapping[str, Any],
    layout: Layout,
    scheduler: Any = None,
    every: int = 1,
    steps: int | None = None,
) -> Any:
    """A state like `template` with torch's in it; see `optimizer_state`."""
    taken = steps_taken(torch, scheduler if is_torch(scheduler) else None, every, steps)
    mover = Mover(torch, layout, taken, scheduled(template))
    state = jax.tree_util.tree_unflatten(
        jax.tree_util.tree_structure(template), [mover.value(entry) for entry in entries(template, flat)]
    )
    plateaus = nodes(template, PlateauState)
    if plateaus and not is_plateau(scheduler):
        mover.problems.append("it follows a ReduceLROnPlateau: pass scheduler=, which says where that is")
    mover.finish()

    def whole(node: Any) -> Any:
        if isinstance(node, PlateauState):
            return jax.tree_util.tree_map(lambda new, old: jnp.asarray(new, old.dtype), state_of(scheduler), node)
        if not isinstance(node, TranslatedState):
            return node
        if torch.rule.whole:
            node = node._replace(whole=filled(node.whole, torch, layout))
        return node if node.plateau == () else node._replace(plateau=whole(node.plateau))

    return jax.tree_util.tree_map(whole, state, is_leaf=lambda n: isinstance(n, TranslatedState | PlateauState))


def put_state(
    torch: Torch,
    state: Any,
    flat: Mapping[str, Any],
    layout: Layout,
    scheduler: Any = None,
    every: int = 1,
    steps: int | None = None,
) -> None:
    """Put an Optax state into a named torch optimizer; see `load_optimizer_state`."""
    on_host = jax.tree_util.tree_map(np.asarray, state)
    held = entries(on_host, flat)
    taken = _taken(held) if steps is None else steps
    problems = _unfit(on_host, held, torch, layout)
    if is_plateau(scheduler):
        put_scheduler = _plateau(scheduler, on_host, problems)
    else:
        put_scheduler = _stepped(scheduler, taken, every, problems)
    if torch.rule.whole:
        put = given(torch, on_host, layout, problems)
    else:
        put = _leafwise(
            torch, slots_in_reference(on_host, layout, shapes_of(flat), _values(torch)), layout, taken, problems
        )
    if problems:
        raise InputError(f"the state does not fit torch's {torch.kind}: {'; '.join(problems)}")
    put()
    put_scheduler()


def _taken(held: list[Entry]) -> int | None:
    """The steps that an Optax state has taken, by the first kind of counter that it has."""
    for owner, field in STEPS_TAKEN.items():
        counts = [int(entry.array) for entry in held if (entry.owner, entry.field) == (owner, field)]
        if counts:
            return max(counts)
    return None


def _values(torch: Torch) -> frozenset[str]:
    """The fields that move as parameters do, not as gradients."""
    return frozenset(slot.field for _, slot in torch.fields.values() if slot.kind == "value")


def _unfit(state: Any, held: list[Entry], torch: Torch, layout: Layout) -> list[str]:
    """What an Optax state holds that torch's optimizer has no place for, and numbers on which its leaves disagree."""
    problems = [why for entry in held if (why := stranger(entry, torch, scheduled(state)))]
    numbers: dict[tuple[str, str], dict[str, int]] = {}
    for entry in held:
        if entry.field == RESTING.get(entry.owner, ("",))[0] and int(entry.array):
            problems.append(f"{entry.owner}.{entry.field} is {entry.array}: hand over when a step has just been taken")
        if not entry.leaf or entry.own or entry.field not in torch.fields:
            continue
        names = layout.sources(entry.leaf)
        if torch.fields[entry.field][1].kind in ("count", "begun"):
            for name in names:
                numbers.setdefault((name, entry.field), {})[entry.leaf] = int(entry.array)
        elif names and not set(names) & set(torch.params) and np.any(entry.array):
            problems.append(f"{entry.owner}.{entry.field} of {entry.leaf}: torch's optimizer does not hold that")
    return problems + [
        f"{name} lies in {', '.join(leaves)}, whose {field} differs: {', '.join(map(str, leaves.values()))}"
        for (name, field), leaves in numbers.items()
        if len(set(leaves.values())) > 1
    ]


def _plateau(scheduler: Any, state: Any, problems: list[str]) -> Callable[[], None]:
    """How a ReduceLROnPlateau is put where an Optax state is."""
    found = nodes(state, PlateauState)
    if not found:
        problems.append("it follows no ReduceLROnPlateau, so that the scheduler cannot go on from it")
    elif found[0].lr.shape != (len(scheduler.optimizer.param_groups),):
        problems.append(
            f"it holds {found[0].lr.size} learning rates for {len(scheduler.optimizer.param_groups)} groups"
        )
    return lambda: load_state(scheduler, found[0])


def _stepped(scheduler: Any, taken: int | None, every: int, problems: list[str]) -> Callable[[], None]:
    """How a scheduler is stepped on to where an Optax state is."""
    if not is_torch(scheduler):
        return lambda: None
    if taken is None:
        problems.append("it counts no steps, so that the scheduler's position is not known: pass steps=")
    elif (late := past(scheduler, taken // every)) is not None:
        problems.append(late)
    return lambda: step_on(scheduler, (taken or 0) // every)


def _leafwise(
    torch: Torch, found: Mapping[str, Flat], layout: Layout, steps: int | None, problems: list[str]
) -> Callable[[], None]:
    """How every parameter is given its state."""
    made: dict[str, dict[str, Any]] = {}
    for name in moving(torch, layout):
        values = {slot: _slot(found, torch, name, how, steps) for slot, how in torch.slots[name].items()}
        lacking = [slot for slot, value in values.items() if value is None]
        for slot in lacking:
            how = torch.slots[name][slot]
            told = "pass steps=" if how.kind == "count" else f"it would stand in {how.field}"
            problems.append(f"{name}: the state has no {slot}: {told}")
        if not lacking:
            made[name], unfit = torch.made(name, values)
            problems += unfit

    def put() -> None:
        for name, values in made.items():
            torch.put(name, values)

    return put


def _slot(found: Mapping[str, Flat], torch: Torch, name: str, how: Slot, steps: int | None) -> Any:
    """One slot of one parameter in an Optax state, None where it is not there."""
    leaves = found.get(how.field, {})
    if how.kind == "count":
        return leaves.get(name, leaves.get("", None if steps is None else np.asarray(steps)))
    if how.kind == "begun" and name not in leaves:
        # Optax's own momentum has no counter; zeros are what torch's first step makes of no momentum
        moments = [found.get(other.field, {}).get(name, 0) for other in torch.slots[name].values()]
        return np.asarray(any(np.any(moment) for moment in moments))
    return leaves.get(name)
