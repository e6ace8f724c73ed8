"""An optimizer's state carried over: torch's into an Optax state, and an Optax state into torch's optimizer.

The mapping that moves weights moves what is kept for each of their elements; counters move as the numbers they are.
A state that does not fit is refused with all that is wrong with it: nothing is filled in.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from equivalence.errors import InputError
from equivalence.optimizers.moving import RESTING, Mover, moving, scheduled, steps_taken, stranger
from equivalence.optimizers.plateau import PlateauState, load_state, state_of
from equivalence.optimizers.torch_side import Torch, assert_not_past, holds, step_on
from equivalence.optimizers.translate import Names, assert_steps, bound_to, is_plateau, is_torch, named
from equivalence.optimizers.translated import TranslatedState
from equivalence.optimizers.trees import (
    STEPS_TAKEN,
    Entry,
    Flat,
    Layout,
    by_path,
    entries,
    shapes_of,
    slots_in_reference,
)


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
        steps: the optimizer steps taken, where nothing in torch tells them; None takes the scheduler's, or the largest
            step counter.

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
    masked = jax.tree_util.tree_leaves(params, is_leaf=_masked)
    if any(map(_masked, masked)):
        names = names.only(frozenset(torch.params))
    return torch, flat, bound_to(names, mapping, shapes_of(flat))


def _masked(node: Any) -> bool:
    return type(node).__name__ == "MaskedNode"


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
    plateaus = _nodes(template, PlateauState)
    if plateaus and not is_plateau(scheduler):
        mover.problems.append("it follows a ReduceLROnPlateau: pass scheduler=, which says where that is")
    mover.finish()

    def whole(node: Any) -> Any:
        if isinstance(node, PlateauState):
            return jax.tree_util.tree_map(lambda new, old: jnp.asarray(new, old.dtype), state_of(scheduler), node)
        if not isinstance(node, TranslatedState):
            return node
        if torch.rule.whole:
            node = node._replace(whole=_filled(node.whole, torch, layout))
        return node._replace(plateau=whole(node.plateau))

    return jax.tree_util.tree_map(whole, state, is_leaf=lambda n: isinstance(n, TranslatedState | PlateauState))


def _nodes(state: Any, kind: type) -> list[Any]:
    """The nodes of a type in a state."""
    found = jax.tree_util.tree_leaves(state, is_leaf=lambda node: isinstance(node, kind))
    return [node for node in found if isinstance(node, kind)]


def _filled(template: Any, torch: Torch, layout: Layout) -> Any:
    """LBFGS's state with torch's in it."""
    from equivalence.optimizers.lbfgs_slots import fill, moved, read

    slots = moved(read(torch.optimizer, tuple(torch.params)), layout.forward)
    _assert_held({leaf: array.dtype for leaf, array in by_path(template.d).items()}, slots, "the port's")
    return fill(template, slots)


def _assert_held(kinds: Mapping[str, Any], slots: Mapping[str, Any], whose: str) -> None:
    """Raise InputError with LBFGS's vectors that other dtypes cannot hold."""
    problems = [
        f"{leaf}: {slot} is {array.dtype}, which {whose} {kinds[leaf]} cannot hold"
        for slot, leaves in slots.items()
        if isinstance(leaves, dict)
        for leaf, array in leaves.items()
        if leaf in kinds and not holds(kinds[leaf], array)
    ]
    if problems:
        raise InputError(f"the state of LBFGS does not fit: {'; '.join(problems)}")


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
    taken = steps if steps is not None else _taken(held)
    plateaus = _nodes(on_host, PlateauState)
    if is_plateau(scheduler) and not plateaus:
        raise InputError("the state follows no ReduceLROnPlateau: its scheduler cannot go on from it")
    if is_torch(scheduler) and not is_plateau(scheduler):
        if taken is None:
            raise InputError("the state counts no steps, so that the scheduler's position is not known: pass steps=")
        assert_not_past(scheduler, taken // every)
    problems = _unfit(on_host, held, torch, layout)
    whole = _put_whole(torch, on_host, layout, problems) if torch.rule.whole else {}
    made = {} if torch.rule.whole else _made(torch, on_host, held, flat, layout, taken, problems)
    if problems:
        raise InputError(f"the state does not fit torch's {torch.kind}: {'; '.join(problems)}")
    TODO
    if is_plateau(scheduler):
        load_state(scheduler, plateaus[0])
    elif is_torch(scheduler):
        assert taken is not None
        step_on(scheduler, taken // every)


def _taken(held: list[Entry]) -> int | None:
    """The steps that an Optax state has taken, by the first kind of counter that it has."""
    for owner, field in STEPS_TAKEN.items():
        counts = [int(entry.array) for entry in held if (entry.owner, entry.field) == (owner, field)]
        if counts:
            return max(counts)
    return None


def _put_whole(torch: Torch, state: Any, layout: Layout) -> None:
    from equivalence.optimizers.lbfgs_slots import HISTORIES, VECTORS, moved, slots_of_state, write

    nodes = _nodes(state, TranslatedState)
    if not nodes or not type(nodes[0].whole).__name__.startswith("Torch"):
        raise InputError("LBFGS goes on from the state of to_optax(LBFGS): Optax's own keeps other things")
    slots = moved(slots_of_state(nodes[0].whole), layout.backward)
    still = {name: tuple(p.shape) for name, p in torch.params.items() if not p.requires_grad}
    for slot in {*VECTORS, *HISTORIES} & set(slots):
        # a frozen parameter has its place in torch's vectors, and nothing in it
        length = () if slot in VECTORS else (len(slots["ro"]),)
        slots[slot] = {name: np.zeros((*length, *shape)) for name, shape in still.items()} | slots[slot]
    write(torch.optimizer, tuple(torch.params), slots)


def _made(
    torch: Torch, state: Any, held: list[Entry], flat: Mapping[str, Any], layout: Layout, steps: int | None
) -> dict[str, dict[str, Any]]:
    """Torch's state of every parameter. Raises InputError with all that does not fit."""
    as_values = frozenset(slot.field for _, slot in torch.fields.values() if slot.kind == "value")
    found = slots_in_reference(state, layout, shapes_of(flat), as_values)
    problems = _unfit(torch, held, layout)
    made: dict[str, dict[str, Any]] = {}
    for name in moving(torch, layout):
        values = {}
        for slot, how in torch.slots[name].items():
            leaves, value = found.get(how.field, {}), None
            if how.kind == "count":
                value = leaves.get(name, leaves.get("", None if steps is None else np.asarray(steps)))
            elif how.kind != "begun":
                value = leaves.get(name)
            elif (how.field in found) and name in leaves:
                value = leaves[name]
            else:
                # Optax's own momentum has no counter, and torch's first step no momentum: zeros are the same
                moments = [found.get(other.field, {}).get(name, 0) for other in torch.slots[name].values()]
                value = np.asarray(int(any(np.any(moment) for moment in moments)))
            if value is None and how.kind == "count":
                problems.append(f"{name}: the state counts no steps, and torch does: pass steps=")
            elif value is None:
                problems.append(f"{name}: the state holds no {how.field}, which torch keeps as {slot}")
            elif how.kind in ("moment", "value") and tuple(value.shape) != tuple(torch.params[name].shape):
                there = f"{tuple(value.shape)} here, {tuple(torch.params[name].shape)} in torch"
                problems.append(f"{name}: {slot} has the shape {there}")
            else:
                values[slot] = value
        if len(values) == len(torch.slots[name]):
            try:
                made[name] = torch.made(name, values)
            except InputError as error:
                problems.append(str(error))
    if problems:
        raise InputError(f"the state does not fit torch's {torch.kind}: {'; '.join(problems)}")
    return made
