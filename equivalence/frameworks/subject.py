"""A subject: one implementation made functional, in terms that no framework owns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from equivalence.errors import InputError
from equivalence.weights import Leaves
from equivalence.weights import Mapping as Rules

Flat = dict[str, Any]
"""Arrays by leaf path."""


@dataclass(frozen=True)
class OwnStep:
    """How a JAX framework runs a train step that the user wrote on the framework's own objects.

    `init(params, buffers, transformation) -> carry` and `step(user_step, carry, inputs, targets) -> (carry, loss)`
    are traceable; `params(carry)`, `buffers(carry)` are flat, `optimizer(carry)` is the Optax state
    and `with_optimizer(carry, state)` the carry with another.
    """

    init: Callable[[Flat, Flat, Any], Any]
    step: Callable[[Callable[..., Any], Any, Any, tuple[Any, ...]], tuple[Any, Any]]
    params: Callable[[Any], Flat]
    buffers: Callable[[Any], Flat]
    optimizer: Callable[[Any], Any]
    with_optimizer: Callable[[Any, Any], Any]


@dataclass(frozen=True, eq=False)
class Subject:
    """One implementation, functional.

    `apply(params, buffers, args, kwargs, train) -> (outputs, buffers)` runs on arrays of its runtime; in JAX it is
    traceable. Params that the call itself renewed (an embedding's `max_norm`) come back beside the buffers.
    `native`/`flat` translate flat params to the tree an Optax transformation sees and back.
    """

    framework: str
    runtime: str
    name: str
    params: Mapping[str, np.ndarray]
    buffers: Mapping[str, np.ndarray]
    apply: Callable[..., tuple[Any, Flat]]
    model: Any
    aliases: Mapping[str, str] = field(default_factory=dict)
    frozen: frozenset[str] = frozenset()
    layers: Mapping[str, str] = field(default_factory=dict)
    low: tuple[str, ...] = ()
    """Params that the model holds in less than float32."""
    native: Callable[[Flat], Any] = dict
    flat: Callable[[Any], Flat] = dict
    own_step: OwnStep | None = None
    put: Callable[[Iterable[tuple[str, np.ndarray]]], Any] | None = None
    """The model with these leaves, taken one at a time, in its own dtypes: changed in place where the framework does
    so, else a new one. None for the reference's side."""
    mapping: Rules | None = None
    """The mapping that the model brings with it: a translation knows its own."""

    @property
    def leaves(self) -> Leaves:
        """Shapes of params and buffers together, with aliases."""
        shapes = {path: tuple(array.shape) for path, array in {**self.params, **self.buffers}.items()}
        return Leaves(shapes, self.aliases)

    def require_finite(self) -> None:
        """Raise InputError, naming every leaf, where the model's own weights hold NaN or infinity."""
        bad = [
            path
            for path, array in {**self.params, **self.buffers}.items()
            if np.asarray(array).dtype.kind == "f" and not np.isfinite(np.asarray(array)).all()
        ]
        if bad:
            raise InputError(f"{self.name} holds NaN or infinity in {', '.join(bad)}")


def call(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Inputs as positional and keyword arguments: a dict is passed by keyword, anything else by position."""
    if isinstance(inputs, dict):
        return (), inputs
    return tuple(inputs), {}
