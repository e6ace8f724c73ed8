"""Containers: Sequential, which knows in which layout each of its layers works, and lists of layers and leaves."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from equivalence.layers.form import Carrier, Form, moved
from equivalence.layers.registry import Example, layer, leaves
from equivalence.weights import Rule

Inside = Callable[[Any], Form]


@layer("Identity", Example("nn.Identity()", ((4, 5),)), "nothing")
def identity(module: Any, inside: Inside) -> Form:
    """nn.Identity."""
    return Form("Identity", lambda m, x: x, text="lambda x: x", anywhere=True)


@layer(
    "Sequential",
    Example("nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(60, 5))", ((2, 3, 5, 7),)),
    "a layer that flattens or mixes axes needs torch's order of them, which it is handed here; a tuple goes on as one"
    " argument, where Flax's own Sequential unpacks it",
)
def sequential(module: Any, inside: Inside) -> Form:
    """nn.Sequential."""
    children = {name: inside(child) for name, child in module._modules.items()}
    fixed = [child for child in children.values() if not child.anywhere]
    return Form(
        "Sequential",
        functools.partial(_chain, children=children),
        text="layer after layer, each with its input as it needs it laid out",
        children=children,
        numbered=True,
        inputs=fixed[0].inputs[:1] if fixed else (),
        outputs=fixed[-1].outputs if fixed else (),
        anywhere=not fixed,
        draws=any(child.draws for child in children.values()),
    )


def _chain(m: Carrier, x: Any, *, children: Mapping[str, Form]) -> Any:
    """Layer after layer: an array stays in the layout that it has until a layer needs another."""
    fixed = [child for child in children.values() if not child.anywhere]
    now = first(fixed[0].inputs) if fixed else None
    for name, child in children.items():
        layer = m.layer(name)
        if child.anywhere:
            x = moved(layer(moved(x, now, None)), None, now) if child.draws and now else layer(x)
            continue
        x = moved(x, now, first(child.inputs)) if hasattr(x, "ndim") else x
        if child.refuse is not None:
            child.refuse(x)
        x = layer(x)
        now = first(child.outputs)
    return x


def first(patterns: tuple[str | None, ...]) -> str | None:
    """The pattern of the first array; None, torch's layout, where none is given."""
    return patterns[0] if patterns else None


@layer("ModuleList", None, "nothing: nnx.List, or a tuple of Linen modules; it is not called")
def module_list(module: Any, inside: Inside) -> Form:
    """nn.ModuleList."""
    children = {name: inside(child) for name, child in module._modules.items()}
    return Form("ModuleList", None, children=children, numbered=True)


@layer("ModuleDict", None, "nothing: nnx.Dict, or a dict of Linen modules; it is not called")
def module_dict(module: Any, inside: Inside) -> Form:
    """nn.ModuleDict."""
    return Form("ModuleDict", None, children={name: inside(child) for name, child in module._modules.items()})


@layer("ParameterList", None, "nothing: an attribute each; it is not called")
@layer("ParameterDict", None, "nothing: an attribute each; it is not called")
def parameters(module: Any, inside: Inside) -> Form:
    """nn.ParameterList and nn.ParameterDict."""
    held, buffers = leaves(module)
    return Form(type(module).__name__, None, rules=tuple(Rule(n, n) for n in held), held=held, buffers=buffers)
