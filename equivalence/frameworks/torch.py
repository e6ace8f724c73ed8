"""torch.nn.Module -> subject. The user's module is run through `functional_call`; its own tensors are never written."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from equivalence.frameworks.subject import Flat, Subject

LOW = (torch.bfloat16, torch.float16)
"""Dtypes that are verified as float32: the same weights, run at the precisions of the comparison."""


def accepts(model: Any) -> bool:
    """Whether `model` is a torch module."""
    return isinstance(model, torch.nn.Module)


def subject(model: torch.nn.Module, *, copy: bool = True) -> Subject:
    """The subject of a torch module: parameters, persistent and other buffers, ties, frozen leaves, layer types.

    Its arrays are copies; without `copy` they are the model's own memory, for who only reads them at once.
    """
    params: Flat = {}
    aliases: dict[str, str] = {}
    first: dict[int, str] = {}
    for path, tensor in model.named_parameters(remove_duplicate=False):
        if id(tensor) in first:
            aliases[path] = first[id(tensor)]
            continue
        first[id(tensor)] = path
        params[path] = to_numpy(tensor, copy=copy)
    buffers: Flat = {}
    for path, held in model.named_buffers(remove_duplicate=False):
        if id(held) in first:
            aliases[path] = first[id(held)]
            continue
        first[id(held)] = path
        buffers[path] = to_numpy(held, copy=copy)
    layers = {}
    for path in (*params, *buffers, *aliases):
        owner = path.rpartition(".")[0]
        layers[path] = type(model.get_submodule(owner)).__name__

    def apply(params: Flat, buffers: Flat, args: Any, kwargs: Any, train: bool) -> tuple[Any, Flat]:
        with mode(model, train):
            outputs = torch.func.functional_call(model, {**params, **buffers}, args, kwargs)
        return outputs, buffers

    return Subject(
        framework="torch",
        runtime="torch",
        name=type(model).__name__,
        params=params,
        buffers=buffers,
        apply=apply,
        model=model,
        aliases=aliases,
        frozen=frozenset(
            path for path, tensor in model.named_parameters() if not tensor.requires_grad and path in params
        ),
        layers=layers,
        low=tuple(path for path, tensor in model.named_parameters() if tensor.dtype in LOW),
    )


@contextlib.contextmanager
def mode(model: torch.nn.Module, train: bool) -> Iterator[None]:
    """Put a module and all below it in train or eval mode, and every one of them back as it was."""
    before = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in before:
            module.training = train
        yield
    finally:
        for module, training in before:
            module.training = training


def to_numpy(tensor: torch.Tensor, *, copy: bool = True) -> np.ndarray:
    """A tensor as NumPy, a copy or its memory; bfloat16 and float16 as float32, which holds all their values."""
    plain = tensor.detach().cpu()
    return np.array((plain.float() if plain.dtype in LOW else plain).numpy(), copy=copy or None)
