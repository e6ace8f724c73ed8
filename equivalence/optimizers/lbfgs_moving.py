"""LBFGS's state, which is about all parameters together, moved both ways."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from equivalence.errors import InputError
from equivalence.optimizers.lbfgs_slots import HISTORIES, VECTORS, fill, moved, read, slots_of_state, write
from equivalence.optimizers.torch_side import Torch, holds, kind_of
from equivalence.optimizers.translated import TranslatedState
from equivalence.optimizers.trees import Layout, by_path, nodes


def filled(template: Any, torch: Torch, layout: Layout) -> Any:
    """LBFGS's state with torch's in it. Raises InputError where its dtypes cannot hold that."""
    slots = moved(read(torch.optimizer, tuple(torch.params)), layout.forward)
    if lost := _lost(slots, {leaf: array.dtype for leaf, array in by_path(template.d).items()}):
        raise InputError(f"the state of LBFGS does not fit: {'; '.join(lost)}")
    return fill(template, slots)


def given(torch: Torch, state: Any, layout: Layout, problems: list[str]) -> Callable[[], None]:
    """How a torch LBFGS is given its state; what does not fit is added to `problems`."""
    found = [node.whole for node in nodes(state, TranslatedState) if node.whole != ()]
    if not found:
        problems.append("LBFGS goes on from the state of to_optax(LBFGS): Optax's own keeps other things")
        return lambda: None
    slots = moved(slots_of_state(found[0]), layout.backward)
    for slot in {*VECTORS, *HISTORIES} & set(slots):
        # a frozen parameter has its place in torch's vectors, and nothing in it
        length = () if slot in VECTORS else (len(slots["ro"]),)
        still = {name: np.zeros((*length, *p.shape)) for name, p in torch.params.items() if not p.requires_grad}
        slots[slot] = still | slots[slot]
    rate = torch.optimizer.param_groups[0]["lr"]
    if "t" in slots and isinstance(rate, float) and slots["t"].dtype.type(rate) == slots["t"]:
        slots["t"] = rate  # as torch has it where no search found another: a Python float
    problems += _lost(slots, {name: kind_of(parameter) for name, parameter in torch.params.items()})
    return lambda: write(torch.optimizer, tuple(torch.params), slots)


def _lost(slots: Mapping[str, Any], kinds: Mapping[str, Any]) -> list[str]:
    """LBFGS's vectors that other dtypes cannot hold."""
    return [
        f"{leaf}: {slot} is {array.dtype}, which {kinds[leaf]} cannot hold"
        for slot, leaves in slots.items()
        if isinstance(leaves, dict)
        for leaf, array in leaves.items()
        if leaf in kinds and not holds(kinds[leaf], array)
    ]
