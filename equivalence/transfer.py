"""A reference's weights put into a port: leaf by leaf, so that no third model is held."""

from __future__ import annotations

from typing import Any

from equivalence.errors import InputError
from equivalence.frameworks import adapt
from equivalence.weights import Mapping as Rules
from equivalence.weights import infer
from equivalence.weights.copying import copied
from equivalence.weights.layouts import constants


def copy_weights(reference: Any, port: Any, weights: Rules | None = None) -> Any:
    """Put the weights and buffers of a PyTorch model into a JAX port.

    Args:
        reference: a `torch.nn.Module`.
        port: what `verify` takes as a port; the leaves that only it has keep their values.
        weights: a `Mapping`; None takes a translation's own, or infers one from names, layer types and shapes.

    Returns the port with these weights, in its own dtypes: an `nnx.Module` or a translation is changed in place and
    returned, of the others a new one is made. Raises MappingError where leaves do not fit.
    """
    from equivalence.frameworks import torch

    theirs = adapt(port)
    if not torch.accepts(reference) or theirs.put is None:
        raise InputError("copy_weights takes a torch.nn.Module first and a JAX port second")
    ours = torch.subject(reference, copy=False)
    mapping = weights if weights is not None else theirs.mapping
    if mapping is None:
        held = {*ours.buffers, *constants({path: ours.params[path] for path in ours.frozen})}
        mapping = infer(ours.leaves, theirs.leaves, ours.layers, held, theirs.framework)
    bound = mapping.bind(ours.leaves, theirs.leaves)
    return theirs.put(copied(bound, {**ours.params, **ours.buffers}))
