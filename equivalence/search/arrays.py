"""Weights moved off their initial values and inputs of each kind, from a NumPy seed: representable in float32."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from equivalence.numerics import representable, rms
from equivalence.observation import Batch, Observation

KINDS = ("ordinary", "large", "tiny", "zeros", "repeated", "ties")
"""Kinds of inputs. Anything but `ordinary` is constructed: a convention at a tie that only it reaches is a caveat."""


def moved(
    params: Mapping[str, np.ndarray],
    buffers: Mapping[str, np.ndarray],
    layers: Mapping[str, str],
    scale: float,
    seed: int,
) -> Observation:
    """Every leaf off its initial value, then all params times `scale`.

    A param keeps its own spread and gains noise a third as large (a leaf of zeros or ones gains noise of 0.3).
    Running statistics of normalisation layers move too, variances staying positive; other buffers (tables, masks,
    counters) keep their values.
    """
    rng = np.random.default_rng(seed)
    new: Observation = {}
    for path, value in params.items():
        if value.dtype.kind != "f":
            new[path] = value
            continue
        spread = float(np.std(value)) if value.size else 0.0
        noise = rng.standard_normal(value.shape) * (0.3 * spread if spread > 0 else 0.3)
        new[path] = representable((value.astype(np.float64) + noise) * scale)
    for path, value in buffers.items():
        leaf = path.rpartition(".")[2]
        if value.dtype.kind == "f" and "Norm" in layers.get(path, "") and leaf == "running_mean":
            new[path] = representable(value + 0.5 * rng.standard_normal(value.shape))
        elif value.dtype.kind == "f" and "Norm" in layers.get(path, "") and leaf == "running_var":
            new[path] = representable(value * np.exp(0.5 * rng.standard_normal(value.shape)))
        else:
            new[path] = value
    return new


def batch_like(batch: Batch, kind: str, seed: int) -> Batch:
    """A batch shaped like the user's. Floats are drawn with the mean and spread of theirs; integers, booleans, arrays
    of few distinct values, and targets (a loss may take probabilities, or variances) are drawn from the values that
    theirs hold, so that they stay legal."""
    rng = np.random.default_rng(seed)
    inputs = {name: _like(array, kind, rng) for name, array in batch.arrays().items()}
    targets = tuple(_again(array, rng) for array in batch.targets)
    return Batch(inputs if isinstance(batch.inputs, dict) else tuple(inputs.values()), targets)


def _like(array: np.ndarray, kind: str, rng: np.random.Generator) -> np.ndarray:
    if array.size == 0:
        return array
    if array.dtype.kind != "f" or len(np.unique(array)) <= max(2, min(8, array.size // 4)):
        return _again(array, rng)
    spread = float(np.std(array)) or rms(array) or 1.0
    new = float(np.mean(array)) + spread * rng.standard_normal(array.shape)
    if kind == "large":
        new = new * 100.0
    elif kind == "tiny":
        new = new * 1e-4
    elif kind == "zeros":
        new = np.zeros_like(new)
    elif kind == "repeated" and array.ndim > 0:
        new = np.broadcast_to(new[:1], new.shape).copy()
    elif kind == "ties":
        new = np.round(new / spread * 2.0) * (spread / 2.0)
    return representable(new)


def _again(array: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return rng.choice(array.reshape(-1), size=array.shape) if array.size else array
