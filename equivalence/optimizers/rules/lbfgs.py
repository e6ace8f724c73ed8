"""LBFGS: https://docs.pytorch.org/docs/stable/generated/torch.optim.LBFGS.html"""

from __future__ import annotations

from equivalence.optimizers.lbfgs import scale_by_torch_lbfgs
from equivalence.optimizers.rules.common import Rule

RULES = {"LBFGS": Rule("LBFGS", scale_by_torch_lbfgs, lambda options: {}, whole=True)}
