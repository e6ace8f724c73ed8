"""A linear layer after a flattened convolution: torch flattens channels first, a JAX model mostly channels last."""

from __future__ import annotations

from collections.abc import Sequence

from equivalence.weights.candidates import Module
from equivalence.weights.rules import Rule


def flattened(settled: Sequence[Rule], ours: Sequence[Module]) -> tuple[list[Rule], list[tuple[tuple[Rule, ...], ...]]]:
    """Takes out of settled rules those of a first linear layer after convolutions, where its inputs are whole images.

    Returns the rules that stay, and for each one taken out its alternatives: as it was, or with channels moved behind
    the places (height and width keep their order). Types allow either, and names tell nothing of it.
    """
    kept, choices = list(settled), list[tuple[tuple[Rule, ...], ...]]()
    channels = 0
    known = {rule.source: rule for rule in settled}
    for module in ours:
        weight = module.leaves.get("weight")
        if weight is None:
            continue
        if module.kind in ("Conv1d", "Conv2d", "Conv3d"):
            channels = weight.shape[0]
        elif module.kind.endswith("Linear") and channels and len(weight.shape) == 2:
            rule, inputs = known.get(weight.template), weight.shape[1]
            if rule is not None and rule.axes == "o k -> k o" and inputs % channels == 0 and inputs > channels > 1:
                kept.remove(rule)
                choices.append(((rule,), (Rule(rule.source, rule.target, "o (c p) -> (p c) o", c=channels),)))
            channels = 0
    return kept, choices
