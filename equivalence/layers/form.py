"""What a torch layer becomes, before a framework carries it: a function, its leaves, and how its arrays lie."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from equivalence.errors import InputError
from equivalence.weights import Rule


class Carrier(Protocol):
    """What a layer's function is handed first: its leaves, its mode, random keys and the layers inside it.

    Both frameworks offer it, so that a function is written once: `def linear(m, x): return x @ m["kernel"]`.
    """

    @property
    def train(self) -> bool:
        """Whether the layer is in train mode."""

    def __getitem__(self, name: str) -> Any:
        """The leaf of that name, or None where the layer has none (`bias=False`)."""

    def __setitem__(self, name: str, value: Any) -> None:
        """Keep a new value of a buffer, or of a parameter that a call itself renews."""

    def key(self) -> Any:
        """A fresh key for random draws."""

    def layer(self, name: str) -> Callable[..., Any]:
        """The layer inside, by its torch name; it runs in the same mode."""


@dataclass(frozen=True, init=False)
class Own:
    """A layer of Flax's own, as one would write it: `Own("Linear", 5, 3, use_bias=False)`."""

    name: str
    arguments: tuple[Any, ...]
    options: Mapping[str, Any]

    def __init__(self, name: str, *arguments: Any, **options: Any) -> None:
        put = object.__setattr__
        put(self, "name", name)
        put(self, "arguments", arguments)
        put(self, "options", options)

    def text(self, package: str) -> str:
        """The call, with every option that was given.

        >>> Own("Linear", 5, 3, use_bias=False).text("nnx")
        'nnx.Linear(5, 3, use_bias=False)'
        """
        given = [*map(repr, self.arguments), *(f"{name}={value!r}" for name, value in self.options.items())]
        return f"{package}.{self.name}({', '.join(given)})"


LAST = "n c ... -> n ... c"
"""Channels, torch's second axis, moved last; arrays (n, c) stay what they are."""


def spatial(axes: str) -> str:
    """The pattern of a layer over these axes, with or without a batch: torch's channels moved last.

    >>> spatial("h w")
    '... c h w -> ... h w c'
    """
    return f"... c {axes} -> ... {axes} c"


def moved(array: Any, now: str | None, wanted: str | None) -> Any:
    """An array that lies as pattern `now` says, from torch's layout, as pattern `wanted` says; None is torch's own.

    Raises InputError for an array with fewer axes than a pattern names.
    """
    if now == wanted:
        return array
    back = np.argsort(_order(now, array.ndim))
    order = tuple(int(back[axis]) for axis in _order(wanted, array.ndim))
    return array if order == tuple(range(array.ndim)) else array.transpose(order)


def _order(pattern: str | None, ndim: int) -> tuple[int, ...]:
    """The permutation that a pattern is for arrays of this many axes."""
    if pattern is None:
        return tuple(range(ndim))
    sides = []
    for side in pattern.split("->"):
        names = side.split()
        rest = ndim - len(names) + 1
        if rest < 0:
            raise InputError(f"an array of {ndim} axes cannot be laid out as {pattern!r}")
        at = names.index("...")
        sides.append([*names[:at], *(f"axis {i}" for i in range(rest)), *names[at + 1 :]])
    return tuple(sides[0].index(name) for name in sides[1])


@dataclass(frozen=True, eq=False)
class Form:
    """What one torch layer becomes.

    Attributes:
        name: torch's class.
        call: `call(m, *inputs, **kwargs)`, with `m` a Carrier, on arrays in our layout. None is for a list of layers
            that cannot be called.
        text: how one would write the call in JAX, `"jax.nn.gelu(x, approximate=False)"`; None where `own` says it.
        rules: where every torch leaf of the layer itself goes, in the layer's own names.
        held: the layer's own torch leaves, by torch's names.
        buffers: those of them that are no parameters, by torch's names.
        children: the layers inside it by torch's names, in torch's order.
        numbered: whether the children are a list, `layers.0` in nnx and `layers_0` in linen.
        inputs: the einops pattern, from torch's layout to ours, of each argument of the call in order; None leaves it.
        outputs: the same, of each array that is returned.
        anywhere: whether the layer is the same function in every layout (it works element by element).
        draws: whether it draws random numbers in train mode; they are drawn in torch's layout.
        own: Flax's own layer that is exactly this one, by framework.
        refuse: `refuse(x)` raises for an array, in our layout, that torch refuses and Flax's own layer takes.
        train: the mode that the torch layer was in.
    """

    name: str
    call: Callable[..., Any] | None
    text: str | None = None
    rules: tuple[Rule, ...] = ()
    held: Mapping[str, np.ndarray] = field(default_factory=dict)
    buffers: frozenset[str] = frozenset()
    children: Mapping[str, Form] = field(default_factory=dict)
    numbered: bool = False
    inputs: tuple[str | None, ...] = ()
    outputs: tuple[str | None, ...] = ()
    anywhere: bool = False
    draws: bool = False
    own: Mapping[str, Own] = field(default_factory=dict)
    refuse: Callable[[Any], None] | None = None
    train: bool = False

    def __repr__(self) -> str:
        """Without the weights, which a printed module would show a page of."""
        return f"Form({self.name})"

    def arrays(self) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """The layer's own `(parameters, buffers)` by our names, in our layout."""
        from equivalence.weights.rules import Move

        params: dict[str, np.ndarray] = {}
        buffers: dict[str, np.ndarray] = {}
        for rule in self.rules:
            source, target = rule.source, rule.target
            if source is not None and target is not None:
                value = Move(rule, (source,), (target,), lengths=rule.lengths).run([self.held[source]], np.stack)[0]
                (buffers if source in self.buffers else params)[target] = value
        return params, buffers

    def path(self, name: str, framework: str) -> str:
        """The path of a child."""
        if not self.numbered:
            return name
        return f"layers.{list(self.children).index(name)}" if framework == "nnx" else f"layers_{name}"

    def mapping(self, framework: str) -> list[Rule]:
        """The rules of the layer and of all inside it; a layer that stands in two places moves once."""
        return list(_rules(self, framework, "", "", set()))

    def written(self, framework: str) -> str:
        """How one would write this layer in a framework."""
        package = "nnx" if framework == "nnx" else "nn"
        if framework in self.own:
            return self.own[framework].text(package)
        return (self.text or self.name).replace("nnx.", f"{package}.")


def _rules(form: Form, framework: str, source: str, target: str, seen: set[int]) -> Sequence[Rule]:
    if id(form) in seen:
        return []
    seen.add(id(form))
    found = [rule.inside(source, target) for rule in form.rules]
    for name, child in form.children.items():
        found += _rules(child, framework, f"{source}{name}.", f"{target}{form.path(name, framework)}.", seen)
    return found
