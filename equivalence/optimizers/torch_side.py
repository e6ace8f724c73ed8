"""Torch's side of a state: what an optimizer keeps for each named parameter, and putting it there."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from equivalence.errors import InputError
from equivalence.optimizers.translate import assert_known, rule_of
from equivalence.optimizers.trees import Flat

if TYPE_CHECKING:
    from equivalence.optimizers.rules.common import Rule, Slot


@dataclass(frozen=True)
class Torch:
    """A torch optimizer with its parameters named."""

    optimizer: Any
    rule: Rule
    params: Mapping[str, Any]
    """Torch's parameters by name, those that the optimizer holds."""
    groups: Mapping[str, Mapping[str, Any]]
    """The parameter group of each."""
    slots: Mapping[str, Mapping[str, Slot]]
    """What the optimizer keeps for each parameter under its group's options: torch's name -> where Optax keeps it."""

    @classmethod
    def of(cls, optimizer: Any, known: Mapping[int, str]) -> Torch:
        """Read an optimizer whose parameters' names are known by identity."""
        rule = rule_of(optimizer)
        assert_known(optimizer, known)
        params, groups, slots = {}, {}, {}
        for group in optimizer.param_groups:
            kept = rule.slots({name: value for name, value in group.items() if name != "params"})
            for parameter in group["params"]:
                name = known[id(parameter)]
                params[name], groups[name] = parameter, group
                absent = "factored" if parameter.dim() < 2 else "unfactored"
                slots[name] = {slot: how for slot, how in kept.items() if how.kind != absent}
        return cls(optimizer, rule, params, groups, slots)

    @property
    def kind(self) -> str:
        """The name of the optimizer's class."""
        return self.rule.name

    @property
    def fields(self) -> dict[str, tuple[str, Slot]]:
        """Where each field of the Optax state comes from: field -> (torch's slot, how it moves)."""
        return {slot.field: (name, slot) for slots in self.slots.values() for name, slot in slots.items()}

    def held(self, slot: str) -> Flat:
        """One slot of the state by torch's names; parameters that have not been stepped yet have none."""
        found: Flat = {}
        for name, parameter in self.params.items():
            state = self.optimizer.state.get(parameter, {})
            how = self.slots[name].get(slot)
            if how is not None and how.kind == "begun":
                found[name] = np.asarray(int(any(value is not None for value in state.values())))
            elif how is not None and state.get(slot) is not None:
                found[name] = to_numpy(state[slot])
        return found

    def beyond(self) -> list[str]:
        """What the optimizer keeps for its parameters that its class is not known to keep."""
        return sorted(
            f"{name}: {slot}"
            for name, parameter in self.params.items()
            for slot in self.optimizer.state.get(parameter, {})
            if not self.rule.whole and slot not in self.slots[name]
        )

    def made(self, name: str, values: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """One parameter's state of arrays, in torch's own dtypes, {} where torch would have none yet; and what those
        dtypes cannot hold."""
        parameter, group, slots = self.params[name], self.groups[name], self.slots[name]
        if not self.rule.eager and not any(np.any(values[slot]) for slot, how in slots.items() if how.kind != "scalar"):
            return {}, []
        state: dict[str, Any] = {}
        problems: list[str] = []
        # torch keeps numbers beside the parameter where it compiles or fuses the step
        beside = group.get("capturable") or group.get("fused") or self.kind == "ASGD"
        for slot, how in slots.items():
            array = np.array(values[slot], order="C")
            if how.python:
                state[slot] = int(array)
            elif how.kind in ("count", "scalar"):
                number = _number(array, narrow=bool(group.get("fused")))
                state[slot] = number.to(parameter.device) if beside else number
            elif how.kind != "begun":
                kind = kind_of(parameter)
                if tuple(array.shape) != tuple(self.shape(name, slot)):
                    problems.append(f"{name}: {slot} has the shape {array.shape}, in torch {self.shape(name, slot)}")
                elif not holds(kind, array):
                    problems.append(f"{name}: {slot} is {array.dtype}, which torch's {kind} cannot hold")
                made = to_torch(array.astype(kind)).to(parameter.device)
                # laid out in memory as the parameter is, as torch makes it
                state[slot] = parameter.detach().clone().copy_(made) if made.shape == parameter.shape else made
        return state, problems

    def shape(self, name: str, slot: str) -> tuple[int, ...]:
        """The shape of an array of the state: the parameter's, or that of means over an axis of it."""
        shape = list(self.params[name].shape)
        axis = {"row_var": -1, "col_var": -2}.get(slot)
        if axis is not None:
            shape[axis] = 1
        return tuple(shape)

    def put(self, name: str, state: Mapping[str, Any]) -> None:
        """Give one parameter its state."""
        self.optimizer.state.pop(self.params[name], None)
        if state:
            self.optimizer.state[self.params[name]] = dict(state)


def _number(value: np.ndarray, narrow: bool) -> Any:
    """A number as torch holds those of its state: in float64 where that is the default or the number needs it."""
    import torch

    wide = torch.get_default_dtype() == torch.float64 and not narrow
    exact = holds(np.float32, value.astype(np.float64))
    return torch.tensor(value.item(), dtype=torch.float32 if exact and not wide else torch.float64)


def kind_of(parameter: Any) -> Any:
    """A tensor's dtype as NumPy's."""
    return to_numpy(parameter.detach().new_empty(0)).dtype


def holds(dtype: Any, array: np.ndarray) -> bool:
    """Whether an array keeps every value in another dtype."""
    if array.dtype == dtype:
        return True
    with np.errstate(over="ignore", invalid="ignore"):
        back = array.astype(dtype).astype(array.dtype)
    return bool(np.all((back == array) | ((back != back) & (array != array))))


def to_numpy(value: Any) -> np.ndarray:
    """A tensor or a number of torch's as an array of its own, bfloat16 included."""
    if not hasattr(value, "detach"):
        return np.asarray(value)
    import torch

    plain = value.detach().cpu()
    if plain.dtype == torch.bfloat16:
        return plain.view(torch.int16).numpy().copy().view(ml_dtypes.bfloat16)
    return plain.numpy().copy()


def to_torch(array: np.ndarray) -> Any:
    """An array as a tensor of its own dtype, bfloat16 included."""
    import torch

    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


COMMON = {"exp_avg": "mu", "exp_avg_sq": "nu", "momentum_buffer": "trace", "step": "count"}
"""Where Optax keeps what torch optimizers of other people's are likely to keep."""


LBFGS = {"d": "d", "prev_flat_grad": "prev_grad", "n_iter": "n_iter", "func_evals": "func_evals"}
"""What is compared of an LBFGS: its history shows in its next direction."""


def fields_of(optimizer: Any) -> dict[str, str]:
    """Where Optax keeps each piece of an optimizer's state: torch's name -> field."""
    try:
        rule = rule_of(optimizer)
    except InputError:
        return COMMON
    if rule.whole:
        return LBFGS
    found: dict[str, str] = {}
    for group in optimizer.param_groups:
        slots = rule.slots({name: value for name, value in group.items() if name != "params"})
        found |= {name: slot.field for name, slot in slots.items()}
    return found


def past(scheduler: Any, steps: int) -> str | None:
    """That a scheduler has taken more steps than these, where it has."""
    from equivalence.optimizers.schedules import position

    taken = position(scheduler)
    return (
        f"the scheduler has taken {taken} steps and the state {steps}: make a new scheduler" if taken > steps else None
    )


def step_on(scheduler: Any, steps: int) -> None:
    """Step a scheduler until it has taken so many steps, and with it its optimizer's rates. Raises InputError where it
    has taken more."""
    from equivalence.optimizers.schedules import position

    if late := past(scheduler, steps):
        raise InputError(late)
    with warnings.catch_warnings():
        # torch warns when a scheduler steps before its optimizer has: the steps were taken elsewhere
        warnings.simplefilter("ignore", UserWarning)
        for _ in range(steps - position(scheduler)):
            scheduler.step()
