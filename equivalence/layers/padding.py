"""Padding layers, and the function that pads as torch does; it is a convolution's `padding_mode` too."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

from equivalence.layers.form import Carrier, Form, spatial
from equivalence.layers.registry import Example, layer

Inside = Callable[[Any], Form]
Pads = Sequence[tuple[int, int]]

AXES = {1: "w", 2: "h w", 3: "d h w"}
"""Spatial axes of a layer of so many dimensions, in torch's order."""

_NUMPY = {"reflect": "reflect", "replicate": "edge", "circular": "wrap"}


def padded(x: Any, pads: Pads, mode: str = "constant", value: float = 0.0) -> Any:
    """The spatial axes of `x`, those before the last, padded by (before, after) each; a negative pad crops.

    https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.pad.html. Torch names the last axis first, takes
    negative pads, and refuses to reflect or wrap around more than once, where `jnp.pad` goes round again.

    Args:
        x: (..., spatial axes, channels).
        pads: a pair for each spatial axis, in the order of the axes.
        mode: "constant", "reflect", "replicate" or "circular".
        value: what "constant" fills with.

    Raises ValueError for pads that torch refuses.
    """
    sizes = x.shape[x.ndim - 1 - len(pads) : -1]
    if mode != "constant" and x.ndim not in (len(pads) + 1, len(pads) + 2):
        raise ValueError(f"padding {len(pads)} axes by {mode!r} takes {len(pads) + 1} or {len(pads) + 2} of {x.ndim}")
    if mode in ("reflect", "replicate") and 0 in (*sizes, x.shape[-1]):
        raise ValueError(f"nothing to {mode} in an array of shape {x.shape}")
    left = [_left(size, pair, mode) for size, pair in zip(sizes, pads, strict=True)]
    if min(left) < 0 or (mode in ("reflect", "replicate") and max(left) < 1):
        raise ValueError(f"padding {tuple(pads)} leaves nothing of an array of shape {x.shape}")
    added = _all(x, [(max(a, 0), max(b, 0)) for a, b in pads])
    cropped = _all(x, [(min(a, 0), min(b, 0)) for a, b in pads])
    if mode == "constant":
        return _filled(x, _all(x, pads), value)
    if mode == "circular":
        return jnp.pad(_filled(x, cropped), added, mode="wrap")
    return _filled(jnp.pad(x, added, mode=_NUMPY[mode]), cropped)


def _left(size: int, pair: tuple[int, int], mode: str) -> int:
    """What is left of an axis that must not be negative: of its own elements, or with what an edge repeats."""
    kept = size + min(pair[0], 0) + min(pair[1], 0)
    most = {"reflect": size - 1, "circular": kept}.get(mode)
    if most is not None and max(pair) > max(most, 0):
        raise ValueError(f"{mode} padding {pair} goes around an axis of {size} more than once")
    return size + sum(pair) if mode in ("reflect", "replicate") else kept


def _all(x: Any, pads: Pads) -> list[tuple[int, int]]:
    """Pairs of every axis."""
    return [*[(0, 0)] * (x.ndim - 1 - len(pads)), *pads, (0, 0)]


def _filled(x: Any, pads: Pads, value: float = 0.0) -> Any:
    return lax.pad(x, jnp.asarray(value, x.dtype), [(a, b, 0) for a, b in pads])


def in_order(pads: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Torch's flat pads, the last axis first, as a pair an axis in the order of the axes.

    >>> in_order((1, 2, 3, 4))
    ((3, 4), (1, 2))
    """
    return tuple((pads[i], pads[i + 1]) for i in range(len(pads) - 2, -1, -2))


def written(pads: Pads, mode: str, value: float = 0.0) -> str:
    """How one would write a padding in JAX."""
    pairs = ", ".join(map(str, ((0, 0), *pads, (0, 0))))
    if min(min(pair) for pair in pads) < 0:
        filled = "" if mode != "constant" else f", value={value}"
        return f"padded(x, ({', '.join(map(str, pads))},), {mode!r}{filled})"
    how = f"constant_values={value}" if mode == "constant" else f"mode={_NUMPY[mode]!r}"
    return f"jnp.pad(x, ({pairs}), {how})"


def _form(module: Any, mode: str, value: float = 0.0) -> Form:
    pads = in_order(module.padding)

    def call(m: Carrier, x: Any) -> Any:
        return padded(x, pads, mode, value)

    lies = (spatial(AXES[len(pads)]),)
    return Form(type(module).__name__, call, text=written(pads, mode, value), inputs=lies, outputs=lies)


_ORDER = "torch names the last axis's pads first, jnp.pad the first axis's"


@layer("ZeroPad1d", Example("nn.ZeroPad1d((1, 2))", ((2, 3, 5),)), "a negative pad crops; jnp.pad refuses it")
@layer("ZeroPad2d", Example("nn.ZeroPad2d((1, 2, 0, 3))", ((2, 3, 5, 7),)), f"{_ORDER}; a negative pad crops")
@layer("ZeroPad3d", Example("nn.ZeroPad3d((1, 2, 0, 3, 1, 0))", ((2, 3, 5, 7, 4),)), f"{_ORDER}; a negative pad crops")
@layer("ConstantPad1d", Example("nn.ConstantPad1d((1, 2), 0.5)", ((2, 3, 5),)), "a negative pad crops; jnp.pad refuses")
@layer("ConstantPad2d", Example("nn.ConstantPad2d((1, 2, 0, 3), 0.5)", ((2, 3, 5, 7),)), f"{_ORDER}; negative crops")
@layer("ConstantPad3d", Example("nn.ConstantPad3d((1, 2, 0, 3, 1, 0), 0.5)", ((2, 3, 5, 7, 4),)), f"{_ORDER}")
def constant(module: Any, inside: Inside) -> Form:
    """nn.ZeroPad1d, 2d, 3d and nn.ConstantPad1d, 2d, 3d."""
    return _form(module, "constant", module.value)


_EDGE = "the edge itself is not repeated: jnp.pad's 'reflect', not its 'symmetric'"


@layer("ReflectionPad1d", Example("nn.ReflectionPad1d((1, 2))", ((2, 3, 5),)), _EDGE)
@layer("ReflectionPad2d", Example("nn.ReflectionPad2d((1, 2, 0, 3))", ((2, 3, 5, 7),)), f"{_EDGE}; {_ORDER}")
@layer("ReflectionPad3d", Example("nn.ReflectionPad3d((1, 2, 0, 3, 1, 0))", ((2, 3, 5, 7, 4),)), f"{_EDGE}; {_ORDER}")
def reflection(module: Any, inside: Inside) -> Form:
    """nn.ReflectionPad1d, 2d, 3d."""
    return _form(module, "reflect")


@layer("ReplicationPad1d", Example("nn.ReplicationPad1d((1, 2))", ((2, 3, 5),)), "jnp.pad calls it 'edge'")
@layer(
    "ReplicationPad2d", Example("nn.ReplicationPad2d((1, 2, 0, 3))", ((2, 3, 5, 7),)), f"'edge' in jnp.pad; {_ORDER}"
)
@layer("ReplicationPad3d", Example("nn.ReplicationPad3d((1, 2, 0, 3, 1, 0))", ((2, 3, 5, 7, 4),)), f"'edge'; {_ORDER}")
def replication(module: Any, inside: Inside) -> Form:
    """nn.ReplicationPad1d, 2d, 3d."""
    return _form(module, "replicate")


_ONCE = "jnp.pad calls it 'wrap', and goes round more than once, which torch refuses"


@layer("CircularPad1d", Example("nn.CircularPad1d((1, 2))", ((2, 3, 5),)), _ONCE)
@layer("CircularPad2d", Example("nn.CircularPad2d((1, 2, 0, 3))", ((2, 3, 5, 7),)), f"{_ONCE}; {_ORDER}")
@layer("CircularPad3d", Example("nn.CircularPad3d((1, 2, 0, 3, 1, 0))", ((2, 3, 5, 7, 4),)), f"{_ONCE}; {_ORDER}")
def circular(module: Any, inside: Inside) -> Form:
    """nn.CircularPad1d, 2d, 3d."""
    return _form(module, "circular")
