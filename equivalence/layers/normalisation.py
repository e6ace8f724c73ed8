"""Normalisation over batch, instance, group and layer: statistics in two passes, as torch's."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from equivalence.errors import InputError
from equivalence.layers.form import LAST, Carrier, Form, Own, spatial
from equivalence.layers.normalised import (
    cross_map_lrn,
    local_response_norm,
    mean_square,
    normalised,
    statistics,
    unbiased,
    weighted,
    weights_text,
)
from equivalence.layers.registry import Example, layer, leaves
from equivalence.weights import Rule

Inside = Callable[[Any], Form]
RULES = (
    Rule("weight", "scale"),
    Rule("bias", "bias"),
    Rule("running_mean", "mean"),
    Rule("running_var", "var"),
    Rule("num_batches_tracked", "num_batches_tracked"),
)


def _fit(m: Carrier, x: Any, name: str) -> None:
    for leaf in ("scale", "mean"):
        if m[leaf] is not None and m[leaf].shape != x.shape[-1:]:
            raise InputError(f"{name} is of {m[leaf].shape[0]} channels, and the input has {x.shape[-1]}")


def _rank(x: Any, ranks: Sequence[int], name: str) -> None:
    if x.ndim not in ranks:
        raise InputError(f"{name} takes arrays of {' or '.join(map(str, ranks))} axes, not {x.ndim}")


def _batch_norm(name: str, options: str, shape: tuple[int, ...], ranks: Sequence[int], differs: str) -> None:
    """Register a batch normalisation of channels, for inputs of these numbers of axes."""

    def translate(module: Any, inside: Inside) -> Form:
        held, buffers = leaves(module)
        eps, momentum, tracks = float(module.eps), module.momentum, bool(module.track_running_stats)
        held_or_batch = "mean, var" if "running_mean" in held else "*statistics(x, range(x.ndim - 1))"

        def call(m: Carrier, x: Any) -> Any:
            _rank(x, ranks, name)
            _fit(m, x, name)
            weight = (m["scale"], m["bias"], eps)
            if not m.train and m["mean"] is not None:
                return normalised(x, m["mean"], m["var"], *weight)
            count = x.size // max(x.shape[-1], 1)
            if count == 1:
                raise InputError(f"{name} by the batch needs more than one value a channel; the input is {x.shape}")
            tracked = m.train and tracks and m["mean"] is not None
            if tracked:
                m["num_batches_tracked"] = m["num_batches_tracked"] + 1
            mean, var = statistics(x, range(x.ndim - 1))
            if tracked and count:
                share = 1 / m["num_batches_tracked"].astype(x.dtype) if momentum is None else momentum
                _average(m, share, mean.ravel(), unbiased(var, count).ravel())
            return normalised(x, mean, var, *weight)

        return Form(
            name,
            call,
            text=f"normalised(x, {held_or_batch}, {weights_text(held)}, {eps!r})",
            rules=tuple(rule for rule in RULES if rule.source in held),
            held=held,
            buffers=buffers,
            inputs=(LAST,),
            outputs=(LAST,),
        )

    translate.__module__ = __name__
    layer(name, Example(f"nn.{name}({options})", (shape,)), differs)(translate)


def _average(m: Carrier, share: Any, mean: Any, var: Any) -> None:
    """Move the running statistics towards new ones by this share of the way: torch's momentum, 1 - Flax's."""
    for name, new in (("mean", mean), ("var", var)):
        m[name] = (1 - share) * m[name] + share * jax.lax.stop_gradient(new)


_UNBIASED = "momentum 0.1 is Flax's 0.9; the running variance averages the unbiased variance, Flax's the biased one"
_batch_norm("BatchNorm1d", "3", (4, 3, 5), (2, 3), _UNBIASED)
_batch_norm(
    "BatchNorm2d",
    "3, momentum=None",
    (4, 3, 5, 2),
    (4,),
    "momentum=None is the mean of all batches so far, which Flax has not; one value a channel is refused in train mode",
)
_batch_norm(
    "BatchNorm3d",
    "3, track_running_stats=False",
    (4, 3, 5, 2, 2),
    (5,),
    "track_running_stats=False normalises by the batch in eval mode too: use_running_average=False always",
)
_batch_norm("SyncBatchNorm", "3", (4, 3, 5), range(2, 9), f"on one process it is BatchNorm: {_UNBIASED}")


def _instance_norm(name: str, options: str, shape: tuple[int, ...], axes: str, differs: str) -> None:
    """Register a normalisation of each channel of each sample over these axes."""
    dims = len(axes.split())
    over = range(-dims - 1, -1)

    def translate(module: Any, inside: Inside) -> Form:
        held, buffers = leaves(module)
        eps, momentum, tracks = float(module.eps), module.momentum or 0.0, bool(module.track_running_stats)
        if not tracks and "running_mean" in held:
            raise InputError(f"{name} with statistics that it no longer tracks moves them in eval mode: make a new one")

        moments = "mean, var" if tracks else f"*statistics(x, {tuple(over)})"

        def call(m: Carrier, x: Any) -> Any:
            _rank(x, (dims + 1, dims + 2), name)
            _fit(m, x, name)
            weight = (m["scale"], m["bias"], eps)
            if tracks and not m.train:
                return normalised(x, m["mean"], m["var"], *weight)
            count = math.prod(x.shape[axis] for axis in over)
            if count == 1:
                raise InputError(f"{name} needs more than one value a channel of a sample; the input is {x.shape}")
            mean, var = statistics(x, over)
            if tracks and count:
                batch = range(x.ndim - 1)
                _average(m, momentum, jnp.mean(mean, batch), jnp.mean(unbiased(var, count), batch))
            return normalised(x, mean, var, *weight)

        return Form(
            name,
            call,
            text=f"normalised(x, {moments}, {weights_text(held)}, {eps!r})",
            rules=tuple(rule for rule in RULES if rule.source in held),
            held=held,
            buffers=buffers,
            inputs=(spatial(axes),),
            outputs=(spatial(axes),),
        )

    translate.__module__ = __name__
    layer(name, Example(f"nn.{name}({options})", (shape,)), differs)(translate)


_instance_norm(
    "InstanceNorm1d",
    "3",
    (4, 3, 5),
    "l",
    "torch has no scale and bias and eps 1e-5 by default, Flax both and 1e-6; (c, l) without a batch works here too",
)
_instance_norm(
    "InstanceNorm2d",
    "3, affine=True",
    (4, 3, 5, 2),
    "h w",
    "without a batch, (c, h, w), torch still normalises over h and w; Flax takes the first axis for a batch",
)
_instance_norm(
    "InstanceNorm3d",
    "3, track_running_stats=True",
    (4, 3, 5, 2, 2),
    "d h w",
    "track_running_stats keeps the mean over samples of mean and unbiased variance; Flax keeps none",
)


@layer(
    "GroupNorm",
    Example("nn.GroupNorm(3, 6)", ((2, 6, 5),)),
    "eps is 1e-5, Flax's 1e-6; the first argument is the number of groups; Flax's fast variance cancels: turn it off",
)
def group_norm(module: Any, inside: Inside) -> Form:
    """nn.GroupNorm; Flax's own where torch refuses nothing that Flax accepts."""
    held, _ = leaves(module)
    groups, channels, eps = int(module.num_groups), int(module.num_channels), float(module.eps)

    def call(m: Carrier, x: Any) -> Any:
        _fit(m, x, "GroupNorm")
        if x.ndim < 2 or x.shape[-1] % groups:
            raise InputError(f"GroupNorm takes (n, c, ...) with channels in {groups} groups; the input is {x.shape}")
        if x.size == groups:
            raise InputError(f"GroupNorm needs more than one value a group; the input is {x.shape}")
        split = x.reshape(*x.shape[:-1], groups, x.shape[-1] // groups)
        mean, var = statistics(split, (*range(1, x.ndim - 1), x.ndim))
        return weighted(normalised(split, mean, var, None, None, eps).reshape(x.shape), m["scale"], m["bias"])

    options = {"epsilon": eps, "use_bias": "bias" in held, "use_fast_variance": False}
    return Form(
        "GroupNorm",
        call,
        text=f"weighted(normalised(x in {groups} groups, mean, var, None, None, {eps!r}), {weights_text(held)})",
        rules=tuple(rule for rule in RULES if rule.source in held),
        held=held,
        inputs=(LAST,),
        outputs=(LAST,),
        own={
            "nnx": Own("GroupNorm", channels, groups, **options),
            "linen": Own("GroupNorm", groups, **options),
        }
        if "weight" in held and channels > groups
        else {},
    )


@layer(
    "LayerNorm",
    Example("nn.LayerNorm((3, 5))", ((4, 3, 5),)),
    "eps is 1e-5, Flax's 1e-6; a shape of several sizes normalises that many axes, Flax's the last alone",
)
def layer_norm(module: Any, inside: Inside) -> Form:
    """nn.LayerNorm, with or without a scale and a bias."""
    eps = float(module.eps)
    return _over_last(module, eps, statistics)


@layer(
    "RMSNorm",
    Example("nn.RMSNorm(5)", ((4, 3, 5),)),
    "eps None is the finfo of the input's dtype, 1.2e-7 in float32; Flax's is 1e-6",
)
def rms_norm(module: Any, inside: Inside) -> Form:
    """nn.RMSNorm."""
    eps = None if module.eps is None else float(module.eps)
    return _over_last(module, eps, mean_square)


def _over_last(module: Any, eps: float | None, moments: Callable[[Any, Sequence[int]], tuple[Any, Any]]) -> Form:
    """LayerNorm or RMSNorm over the last axes; Flax's own where it has weights, which say the shape it is made for."""
    held, _ = leaves(module)
    name, shape = type(module).__name__, tuple(module.normalized_shape)
    axes = tuple(range(-len(shape), 0))

    def call(m: Carrier, x: Any) -> Any:
        if x.shape[-len(shape) :] != shape:
            raise InputError(f"{name} is of the shape {shape}, in which the input {x.shape} does not end")
        least = float(jnp.finfo(x.dtype).eps) if eps is None else eps
        return normalised(x, *moments(x, axes), m["scale"], m["bias"], least)

    small = "jnp.finfo(x.dtype).eps" if eps is None else repr(eps)
    bias = {} if name == "RMSNorm" else {"use_bias": "bias" in held}
    options: dict[str, Any] = {"epsilon": eps, **bias, "use_fast_variance": False}
    several = {"reduction_axes": axes, "feature_axes": axes} if len(axes) > 1 else {}
    own = {"linen": Own(name, **options, **several)}
    if len(axes) == 1:
        own["nnx"] = Own(name, shape[0], **options)
    return Form(
        name,
        call,
        text=f"normalised(x, *{moments.__name__}(x, {axes}), {weights_text(held)}, {small})",
        rules=tuple(rule for rule in RULES if rule.source in held),
        held=held,
        own=own if "weight" in held and eps is not None else {},
    )


@layer(
    "LocalResponseNorm",
    Example("nn.LocalResponseNorm(4)", ((2, 7, 5),)),
    "Flax has none; the mean counts the zeros beyond the ends, and an even size reaches one channel further back",
)
def neighbours(module: Any, inside: Inside) -> Form:
    """nn.LocalResponseNorm."""
    return _by_neighbours(module, local_response_norm, range(3, 9))


@layer(
    "CrossMapLRN2d",
    Example("nn.CrossMapLRN2d(3)", ((2, 7, 5, 3),)),
    "not LocalResponseNorm: torch's windows keep channel 0 for ever, and its derivative's window lies one channel back",
)
def cross_map(module: Any, inside: Inside) -> Form:
    """nn.CrossMapLRN2d."""
    return _by_neighbours(module, cross_map_lrn, (4,))


def _by_neighbours(module: Any, function: Callable[..., Any], ranks: Sequence[int]) -> Form:
    name, size = type(module).__name__, int(module.size)
    options = (size, float(module.alpha), float(module.beta), float(module.k))
    if size < 1:
        raise InputError(f"{name}: the size is at least 1, not {size}")

    def call(m: Carrier, x: Any) -> Any:
        _rank(x, ranks, name)
        return function(x, *options)

    text = f"{function.__name__}(x, {', '.join(map(repr, options))})"
    return Form(name, call, text=text, inputs=(LAST,), outputs=(LAST,))
