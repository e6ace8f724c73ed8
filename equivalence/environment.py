"""The facts of a run that its figures depend on: versions, devices, threads, precision flags."""

from __future__ import annotations

import platform
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

PACKAGES = ("equivalence-suite", "torch", "jax", "jaxlib", "flax", "optax", "equinox", "numpy", "hypothesis", "einops")


def environment(seed: int) -> dict[str, Any]:
    """Everything recorded beside a verdict. The flags are the process's own; checks run at the highest precision."""
    import jax
    import torch

    config: Any = jax.config

    return {
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "machine": platform.machine(),
        "devices": {"torch": _torch_devices(torch), "jax": [str(device) for device in jax.devices()]},
        "threads": {"torch": torch.get_num_threads()},
        "precision_flags": {
            "torch.float32_matmul_precision": _asked(torch.get_float32_matmul_precision),
            "torch.cuda.matmul.allow_tf32": _asked(lambda: torch.backends.cuda.matmul.allow_tf32),
            "torch.cudnn.allow_tf32": _asked(lambda: torch.backends.cudnn.allow_tf32),
            "torch.autocast": torch.is_autocast_enabled("cpu"),
            "jax.default_matmul_precision": config.jax_default_matmul_precision,
            "jax.enable_x64": bool(config.jax_enable_x64),
            "while_checking": "highest",
        },
        "seed": seed,
        "replayed": [],
    }


def _asked(getter: Callable[[], Any]) -> Any:
    """A flag, or "mixed" where torch refuses to say because its older and newer interfaces were both used."""
    try:
        return getter()
    except RuntimeError:
        return "mixed"


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _torch_devices(torch: Any) -> list[str]:
    return ["cpu", *(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))]
