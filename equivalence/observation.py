"""Observations: everything seen of a subject, as a flat dict path -> array; and their file form.

A recorded observation is a safetensors file with its provenance as JSON in the header. Reading one executes nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from equivalence.errors import InputError
from equivalence.randomness import Draw

Observation = dict[str, np.ndarray]


@dataclass(frozen=True)
class Batch:
    """What one call reads: inputs (a tuple by position, a dict by keyword) and what the loss reads beside outputs."""

    inputs: Any
    targets: tuple[np.ndarray, ...] = ()

    def arrays(self) -> dict[str, np.ndarray]:
        """Every array of the inputs by name: the keyword, or the position."""
        items = self.inputs.items() if isinstance(self.inputs, dict) else enumerate(self.inputs)
        return {str(name): array for name, array in items}

    def map(self, change: Any) -> Batch:
        """The same batch with `change` applied to every array."""
        if isinstance(self.inputs, dict):
            inputs: Any = {name: change(array) for name, array in self.inputs.items()}
        else:
            inputs = tuple(change(array) for array in self.inputs)
        return Batch(inputs, tuple(change(array) for array in self.targets))


@dataclass(frozen=True)
class Seen:
    """One run: its observation and the draws it asked for, with the arrays that were served."""

    values: Observation
    draws: tuple[Draw, ...] = ()
    served: tuple[np.ndarray, ...] = ()
    extra: dict[str, Any] = field(default_factory=dict)


def cotangent(seed: int, path: str, shape: tuple[int, ...]) -> np.ndarray:
    """The random unit cotangent of one output: standard normal, representable in float32, the same on every side."""
    digest = int.from_bytes(hashlib.sha256(path.encode()).digest()[:4], "little")
    return np.random.default_rng((seed, digest)).standard_normal(shape).astype(np.float32)


def save(path: Path, arrays: Mapping[str, np.ndarray], provenance: Mapping[str, Any]) -> None:
    """Write arrays and provenance to a safetensors file, under a temporary name first."""
    from safetensors.numpy import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    os.close(handle)
    try:
        contiguous = {key: np.ascontiguousarray(array) for key, array in arrays.items()}
        save_file(contiguous, name, metadata={"provenance": json.dumps(provenance, sort_keys=True)})
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def load(path: Path) -> tuple[Observation, dict[str, Any]]:
    """The arrays and the provenance of a recorded observation. Raises InputError for a file that is not one."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            names = file.keys()  # a handle, not a mapping: it cannot be iterated itself
            return {key: file.get_tensor(key) for key in names}, json.loads(metadata["provenance"])
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise InputError(f"{path} is not a recorded observation: {type(error).__name__}: {error}") from None
