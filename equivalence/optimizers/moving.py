"""What each array of an Optax state is to torch, and torch's value for it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from equivalence.errors import InputError
from equivalence.optimizers.torch_side import Torch, holds
from equivalence.optimizers.trees import STEPS_TAKEN, Entry, Flat, Layout

ELSEWHERE = ("PlateauState", "TorchLbfgsState", "ClipNormState")
"""States that are moved as wholes, or that are an output only."""

RESTING = {
    "MultiStepsState": ("mini_step", "acc_grads", "skip_state"),
    "AccumulateState": ("micro", "total"),
}
"""What an accumulation of gradients keeps from one step to the next; first the counter, which is 0 after a step."""

NOT_OURS = {
    "AverageState": "the average of weights: move it with average_state, and the state inside by itself",
    "ScaleState": "the loss scaler's: move it with scaler_state, and the state inside by itself",
}
"""States that torch keeps outside its optimizer."""

NOT_THE_SAME = {
    ("Adam", "ScaleByAmsgradState", "nu_max"): "optax.amsgrad keeps the largest moment after its bias is corrected",
    ("AdamW", "ScaleByAmsgradState", "nu_max"): "optax.amsgrad keeps the largest moment after its bias is corrected",
    ("RMSprop", "TraceState", "trace"): "optax.rmsprop keeps the momentum of its steps, -lr times torch's",
    ("Muon", "TraceState", "trace"): "optax.trace is a sum of gradients, torch's momentum an average",
}
"""What Optax's own states hold in place of torch's, by torch's class, the state and its field."""


def moving(torch: Torch, layout: Layout) -> list[str]:
    """Torch's parameters whose state moves: not frozen ones, nor those that the port is declared not to have."""
    return [name for name, parameter in torch.params.items() if parameter.requires_grad and layout.targets(name)]


def stranger(entry: Entry, torch: Torch, scheduled: frozenset[str]) -> str | None:
    """Why an array can be moved neither from nor to this optimizer; None where it can."""
    at = f"{entry.owner}.{entry.field}" + (f" of {entry.leaf}" if entry.leaf else "")
    if entry.owner in NOT_OURS:
        return f"{at} is {NOT_OURS[entry.owner]}"
    if _is_option(entry) and entry.field == "learning_rate" and entry.field not in scheduled:
        here, rates = np.asarray(entry.array), {float(group["lr"]) for group in torch.optimizer.param_groups}
        if {np.asarray(rate, here.dtype).item() for rate in rates} != {here.item()}:
            return f"{at} is {here} and torch's lr {', '.join(map(str, sorted(rates)))}: make them the same"
    if _is_around(entry):
        return None
    if not entry.translated and (torch.kind, entry.owner, entry.field) in NOT_THE_SAME:
        return f"{at}: {NOT_THE_SAME[torch.kind, entry.owner, entry.field]}; use the state of to_optax"
    if entry.field not in torch.fields and (entry.leaf or jnp.issubdtype(entry.array.dtype, jnp.number)):
        return f"{at} has no counterpart in torch's {torch.kind}"
    return None


def scheduled(state: Any) -> frozenset[str]:
    """The hyperparameters of `optax.inject_hyperparams` that follow a schedule."""
    nodes = jax.tree_util.tree_leaves(state, is_leaf=lambda node: hasattr(node, "hyperparams_states"))
    return frozenset(name for node in nodes for name in getattr(node, "hyperparams_states", ()))


def _is_count(entry: Entry) -> bool:
    return STEPS_TAKEN.get(entry.owner) == entry.field


def _is_option(entry: Entry) -> bool:
    return entry.owner.endswith("HyperparamsState") and not _is_count(entry)


def _is_around(entry: Entry) -> bool:
    """Whether an array is no slot of torch's: part of what stands around an optimizer, a position, or an option."""
    resting = entry.field in RESTING.get(entry.owner, ())
    return _is_count(entry) or _is_option(entry) or entry.owner in ELSEWHERE or resting


def steps_taken(torch: Torch, scheduler: Any, every: int, steps: int | None) -> int | None:
    """The optimizer steps that torch has taken: the position of schedules; None where nothing tells.

    Raises InputError where the scheduler and `steps` disagree, or do not tell.
    """
    if steps is not None and (not isinstance(steps, int) or steps < 0):
        raise InputError(f"steps= is a number of optimizer steps, not {steps}")
    counts = {int(value) for value in torch.held("step").values()}
    # a parameter that had no gradient in some step counts fewer of them
    counted = counts.pop() if len(counts) == 1 else None
    if scheduler is None:
        return counted if steps is None else steps
    from equivalence.optimizers.schedules import position

    at = position(scheduler)
    taken = steps if steps is not None else at if every == 1 else counted
    if taken is None:
        raise InputError(f"torch's {torch.kind} does not tell its steps, and the scheduler one in {every}: pass steps=")
    if taken // every != at:
        raise InputError(f"{taken} steps are {taken // every} of the scheduler's (every={every}); it has taken {at}")
    return taken


@dataclass
class Mover:
    """Finds for every array of an Optax state what torch keeps, and collects what is wrong."""

    torch: Torch
    layout: Layout
    steps: int | None
    scheduled: frozenset[str]
    problems: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        wanted = dict.fromkeys(moving(self.torch, self.layout))
        slots = dict.fromkeys(slot for name in wanted for slot in self.torch.slots[name])
        held = {slot: self.torch.held(slot) for slot in slots}
        self._held = {slot: {name: v for name, v in found.items() if name in wanted} for slot, found in held.items()}
        self._wanted = wanted
        self._used: set[tuple[str, str]] = set()
        self._moved: dict[str, Flat] = {}

    def value(self, entry: Entry) -> Any:
        """The array to stand where `entry` stands."""
        if why := stranger(entry, self.torch, self.scheduled):
            self.problems.append(why)
            return entry.array
        if _is_count(entry):
            if self.steps is None:
                why = "has different step counters" if self.torch.held("step") else "counts no steps"
                self.problems.append(f"torch's {self.torch.kind} {why}, {entry.owner} needs their number: pass steps=")
            return jnp.asarray(self.steps or 0, entry.array.dtype)
        if _is_around(entry) or entry.field not in self.torch.fields:
            return entry.array
        slot, how = self.torch.fields[entry.field]
        names = [name for name in self._names(entry) if name in self._wanted]
        self._used |= {(slot, name) for name in names}
        if how.kind in ("count", "scalar", "begun"):
            return self._fitting(entry, slot, self._agreed(entry, slot, names))
        if entry.own:
            return self._fitting(entry, slot, self._held.get(slot, {}).get(entry.leaf))
        if slot not in self._moved:
            self._moved[slot] = self.layout.forward(self._completed(slot), gradient=how.kind != "value")
        return self._fitting(entry, slot, self._moved[slot].get(entry.leaf))

    def _names(self, entry: Entry) -> Iterable[str]:
        """The torch parameters that an array is about."""
        if entry.own:
            return [entry.leaf]
        leaves = (entry.leaf,) if entry.leaf else entry.shared
        return [name for leaf in leaves for name in self.layout.sources(leaf)] if leaves else self._wanted

    def _completed(self, slot: str) -> Flat:
        """A slot with zeros for parameters that were not stepped yet and share a leaf with one that was."""
        held = dict(self._held.get(slot, {}))
        for names, _ in self.layout.moves:
            like = next((held[name] for name in names if name in held), None)
            if like is not None:
                held |= {name: np.zeros_like(like) for name in names if name not in held}
        return held

    def _agreed(self, entry: Entry, slot: str, names: list[str]) -> Any:
        """A number about several of torch's parameters: theirs must agree; one without state has taken no step."""
        held = self._held.get(slot, {})
        values = {name: held[name].item() if name in held else 0 for name in names}
        if len(set(values.values())) > 1:
            text = ", ".join(f"{name} {value}" for name, value in values.items())
            self.problems.append(f"{entry.leaf or entry.owner} holds one {slot} where torch's differ: {text}")
        return next((held[name] for name in names if name in held), None)

    def _fitting(self, entry: Entry, slot: str, value: Any) -> Any:
        """Torch's value in the state's dtype; what is not there yet stays as it began."""
        if value is None:
            return entry.array
        at = entry.leaf or entry.owner
        if tuple(value.shape) != tuple(entry.array.shape):
            shapes = f"{tuple(value.shape)} in torch, {tuple(entry.array.shape)} here"
            self.problems.append(f"{at}: {slot} has the shape {shapes}")
            return entry.array
        if not holds(entry.array.dtype, value):
            self.problems.append(f"{at}: {slot} is {value.dtype}, which {entry.array.dtype} cannot hold")
        return jnp.asarray(value.astype(entry.array.dtype))

    def finish(self) -> None:
        """Raise InputError with all problems, also what torch keeps and the state has no place for."""
        for name in self._wanted:
            for slot, how in self.torch.slots[name].items():
                # where the formula needs no counter, Optax keeps none
                if name in self._held[slot] and (slot, name) not in self._used and how.kind not in ("count", "begun"):
                    self.problems.append(f"torch's {slot} of {name} has no counterpart in the Optax state")
        self.problems += [f"torch keeps {what}, which is not known" for what in self.torch.beyond()]
        if self.problems:
            raise InputError(f"the state of {self.torch.kind} does not fit: {'; '.join(self.problems)}")
