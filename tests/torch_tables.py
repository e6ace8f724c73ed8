"""torch's own tables of optimizer configurations and of losses: the yardsticks that nobody here wrote.

Importing them would forbid this process torch's global flags; that is kept from happening.
"""

from __future__ import annotations

import importlib
import warnings
from typing import Any

import pytest
import torch


def optimizer_configurations() -> dict[str, list[dict[str, Any]]]:
    """The options that torch tests each optimizer with, by class; a tensor among them as the number it holds."""
    return {
        info.optim_cls.__name__: [
            {k: v.item() if isinstance(v, torch.Tensor) else v for k, v in config.kwargs.items()}
            for config in info.optim_inputs_func(device="cpu")
        ]
        for info in _table("common_optimizers", "optim_db")
    }


def modules() -> dict[str, Any]:
    """What torch tests its modules with, by class."""
    return {info.module_cls.__name__: info for info in _table("common_modules", "module_db")}


def _table(module: str, name: str) -> Any:
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setattr(torch.backends, "disable_global_flags", lambda: None)
        pytest.importorskip("expecttest", reason="expecttest is not installed: torch's own tables need it")
        return getattr(importlib.import_module(f"torch.testing._internal.{module}"), name)
