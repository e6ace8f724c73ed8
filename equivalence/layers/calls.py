"""Any call of a layer as a function of its arrays alone: flags, Nones and nested tuples are fixed."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from jax.lax import stop_gradient

from equivalence.frameworks.subject import Flat, Subject
from equivalence.observation import Batch
from equivalence.paths import flatten, rebuild

NESTED = "__"
"""What stands for the dots of a path in a keyword."""


def arrays_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, np.ndarray]:
    """The arrays and tensors of a call by path, `args.0` and `kwargs.mask`, as NumPy."""
    leaves = flatten({"args": args, "kwargs": kwargs})
    return {path: _numpy(leaf) for path, leaf in leaves.items() if hasattr(leaf, "shape")}


def _numpy(leaf: Any) -> np.ndarray:
    return np.asarray(leaf.detach() if hasattr(leaf, "detach") else leaf)


def batch_of(arrays: dict[str, np.ndarray]) -> Batch:
    """The batch that a `closed` subject takes, of arrays by the paths of `arrays_of`."""
    return Batch({path.replace(".", NESTED): array for path, array in arrays.items()})


STILL = {"SoftMarginLoss": ("args.1",)}
"""Floating inputs by which torch cannot differentiate, by class."""


def closed(subject: Subject, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Subject:
    """The subject as a function of a call's arrays, by keyword; all else of the call stays as it is."""
    call, still = {"args": args, "kwargs": kwargs}, STILL.get(subject.name.partition(" ")[0], ())

    def apply(params: Flat, buffers: Flat, _: Any, given: dict[str, Any], train: bool) -> tuple[Any, Flat]:
        arrays = {name.replace(NESTED, "."): value for name, value in given.items()}
        for path in still:
            arrays[path] = arrays[path].detach() if hasattr(arrays[path], "detach") else stop_gradient(arrays[path])
        whole = rebuild(call, lambda path, leaf: arrays.get(path, leaf))
        return subject.apply(params, buffers, tuple(whole["args"]), whole["kwargs"], train)

    return dataclasses.replace(subject, apply=apply)


def present(outputs: Any) -> dict[str, Any]:
    """The arrays of what a call returned, by path; a None and a flag are nothing."""
    return {path: leaf for path, leaf in flatten(outputs).items() if hasattr(leaf, "shape")}
