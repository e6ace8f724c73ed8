"""Torch's side of a state: what an optimizer keeps for each named parameter, and putting it there."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from equivalence.errors import InputError
from equivalence.optimizers.translate import rule_of
from equivalence.optimizers.trees import Flat

if TYPE_CHECKING:
    from equivalence.optimizers.rules import Slot


@dataclass(frozen=True)
class Torch:
    """A torch optimizer with its parameters named."""

    optimizer: Any
    params: Mapping[str, Any]
    """Torch's parameters by name, those that the optimizer holds."""
    slots: Mapping[str, Mapping[str, Slot]]
    """What the optimizer keeps for each parameter under its group's options: torch's name -> where Optax keeps it."""

    @classmethod
    def of(cls, optimizer: Any, known: Mapping[int, str]) -> Torch:
        """Read an optimizer whose parameters' names are known by identity."""
        rule = rule_of(optimizer)
        params, slots = {}, {}
        for group in optimizer.param_groups:
            options = {name: value for name, value in group.items() if name != "params"}
            for parameter in group["params"]:
                if id(parameter) not in known:
                    raise InputError(f"the optimizer's parameter of shape {tuple(parameter.shape)} is not the model's")
                params[known[id(parameter)]] = parameter
                slots[known[id(parameter)]] = rule.slots(options)
        return cls(optimizer, params, slots)

    def held(self, slot: str) -> Flat:
        """One slot of the state by torch's names; parameters that have not been stepped yet have none."""
        found: Flat = {}
        for name, parameter in self.params.items():
            state = self.optimizer.state.get(parameter, {})
            how = self.slots[name].get(slot)
            if how is not None and how.kind == "begun":
                found[name] = np.asarray(int(any(value is not None for value in state.values())))
            elif state.get(slot) is not None:
                value = state[slot]
                found[name] = value.detach().cpu().numpy() if hasattr(value, "detach") else np.asarray(value)
        return found

    @property
    def fields(self) -> dict[str, tuple[str, Slot]]:
        """Where each field of the Optax state comes from: field -> (torch's slot, how it moves)."""
        return {slot.field: (name, slot) for slots in self.slots.values() for name, slot in slots.items()}

    @property
    def whole(self) -> bool:
        """Whether its state is about all parameters together (LBFGS)."""
        return rule_of(self.optimizer).whole

    def put(self, name: str, values: Mapping[str, Any]) -> None:
        """Give one parameter its state, as torch's own dtypes have it; one that was never stepped gets none."""
        import torch

        parameter, slots = self.params[name], self.slots[name]
        begun = [int(values[slot]) > 0 for slot, how in slots.items() if how.kind in ("count", "begun")]
        if not slots or (begun and not any(begun) and not rule_of(self.optimizer).eager):
            self.optimizer.state.pop(parameter, None)
            return
        state: dict[str, Any] = {}
        for slot, how in slots.items():
            array = np.array(values[slot])
            if how.kind == "begun":
                continue
            if how.python:
                state[slot] = int(array)
            elif how.kind in ("count", "scalar"):
                wide = torch.get_default_dtype() == torch.float64
                state[slot] = torch.tensor(array.item(), dtype=torch.float64 if wide else torch.float32)
            else:
                state[slot] = torch.from_numpy(array).to(parameter)
        self.optimizer.state[parameter] = state


COMMON = {"exp_avg": "mu", "exp_avg_sq": "nu", "momentum_buffer": "trace", "step": "count"}
"""Where Optax keeps what torch optimizers of other people's are likely to keep."""


def fields_of(optimizer: Any) -> dict[str, str]:
    """Where Optax keeps each piece of an optimizer's state: torch's name -> field."""
    try:
        rule = rule_of(optimizer)
    except InputError:
        return COMMON
    found: dict[str, str] = {}
    for group in optimizer.param_groups:
        slots = rule.slots({name: value for name, value in group.items() if name != "params"})
        found |= {name: slot.field for name, slot in slots.items()}
    return found


def step_on(scheduler: Any, position: int) -> None:
    """Step a scheduler to a position, and with it its optimizer's rates. Raises InputError where it is past that."""
    if scheduler.last_epoch > position:
        raise InputError(
            f"the scheduler has taken {scheduler.last_epoch} steps and the state {position}: make a new scheduler"
        )
    with warnings.catch_warnings():
        # torch warns when a scheduler steps before its optimizer has: the steps were taken elsewhere
        warnings.simplefilter("ignore", UserWarning)
        while scheduler.last_epoch < position:
            scheduler.step()
