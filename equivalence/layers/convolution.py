"""Convolutions and transposed convolutions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from einops import rearrange
from jax import lax

from equivalence.errors import InputError
from equivalence.layers.form import Carrier, Form, Own, spatial
from equivalence.layers.padding import AXES, Pads, in_order, padded, written
from equivalence.layers.registry import Example, layer, leaves
from equivalence.layers.windows import numbers
from equivalence.weights import Rule

Inside = Callable[[Any], Form]
Sizes = tuple[int, ...]


def convolve(
    x: Any,
    kernel: Any,
    bias: Any = None,
    *,
    strides: Sizes,
    padding: Pads,
    dilation: Sizes,
    groups: int = 1,
    input_dilation: Sizes | None = None,
) -> Any:
    """A convolution with or without a batch: `lax.conv_general_dilated`, refusing what torch refuses.

    https://docs.pytorch.org/docs/stable/generated/torch.nn.Conv2d.html. Torch pads both sides of every axis alike,
    where Flax's default "SAME" with a stride depends on the size; output channels are group after group in both.

    Args:
        x: (n, spatial axes, channels) or without n.
        kernel: (spatial axes, channels / groups, outputs).
        bias: (outputs,) or None.
        strides, dilation, input_dilation: of each spatial axis.
        padding: zeros before and after each spatial axis; may be negative.
        groups: into how many groups the channels are split.

    Raises ValueError for an array of other axes or channels, and where the kernel does not fit into it.
    """
    axes, spread = len(strides), input_dilation or (1,) * len(strides)
    _fit(x, kernel.shape, padding, dilation, groups, spread)
    names = AXES[axes].upper().replace(" ", "")
    batched = x if x.ndim == axes + 2 else x[None]
    y = lax.conv_general_dilated(
        batched,
        kernel,
        strides,
        padding,
        lhs_dilation=spread,
        rhs_dilation=dilation,
        dimension_numbers=(f"N{names}C", f"{names}IO", f"N{names}C"),
        feature_group_count=groups,
    )
    y = y if bias is None else y + bias
    return y if x.ndim == axes + 2 else y[0]


def _fit(x: Any, kernel: Sizes, padding: Pads, dilation: Sizes, groups: int, spread: Sizes) -> None:
    """Raise ValueError for an array that a convolution with a kernel of this shape does not take."""
    *sizes, inputs, _ = kernel
    axes, channels = len(sizes), inputs * groups
    if x.ndim not in (axes + 1, axes + 2) or x.shape[-1] != channels:
        raise ValueError(f"a convolution over {axes} axes of {channels} channels was given an array of shape {x.shape}")
    for size, step, pair, k, d in zip(x.shape[-1 - axes : -1], spread, padding, sizes, dilation, strict=True):
        if (size - 1) * step + sum(pair) < d * (k - 1):
            raise ValueError(f"a kernel of shape {tuple(sizes)} does not fit into an array of shape {x.shape}")


def convolve_transposed(
    x: Any,
    kernel: Any,
    bias: Any = None,
    *,
    strides: Sizes,
    padding: Sizes,
    output_padding: Sizes,
    dilation: Sizes,
    groups: int = 1,
) -> Any:
    """A transposed convolution: `lax.conv_transpose`, in torch's counting of the padding.

    https://docs.pytorch.org/docs/stable/generated/torch.nn.ConvTranspose2d.html. Torch's padding is what the forward
    convolution would have, so p crops p here: lax pads d (k - 1) - p before and that plus the output padding after.

    Args:
        x: (n, spatial axes, channels) or without n.
        kernel: (spatial axes, outputs / groups, channels), as Flax's ConvTranspose has it with transpose_kernel=True.
        bias: (outputs,) or None.
        strides, padding, output_padding, dilation: of each spatial axis, as torch counts them.
        groups: into how many groups the channels are split.

    Raises ValueError for an array of other axes or channels, an output padding of a stride and a dilation or more,
    and where nothing is left.
    """
    if any(o >= max(s, d) for o, s, d in zip(output_padding, strides, dilation, strict=True)):
        raise ValueError(
            f"output padding {output_padding} must be smaller than stride {strides} or dilation {dilation}"
        )
    axes = len(strides)
    edges = [d * (k - 1) - p for d, k, p in zip(dilation, kernel.shape[:axes], padding, strict=True)]
    pads = [(e, e + o) for e, o in zip(edges, output_padding, strict=True)]
    # XLA's CPU compiler (jaxlib 0.10.2) aborts the process on an axis of kernel 2, stride 2 and no zeros beside one
    # whose kernel is larger than its input: such an axis gets a zero more, whose output is cut off.
    spare = [int((k, s, p) == (2, 2, (0, 0))) for k, s, p in zip(kernel.shape[:axes], strides, pads, strict=True)]
    turned = jnp.flip(kernel, range(axes))
    y = convolve(
        x,
        rearrange(turned, "... o (g i) -> ... i (g o)", g=groups),
        bias,
        strides=(1,) * axes,
        padding=[(before + n, after) for n, (before, after) in zip(spare, pads, strict=True)],
        dilation=dilation,
        groups=groups,
        input_dilation=strides,
    )
    return padded(y, [(-n, 0) for n in spare]) if any(spare) else y


_SAME = "padding=1 is ((1, 1), ...); Flax's default 'SAME' is (0, 1) at kernel 3, stride 2 on even sizes: one pixel off"


@layer("Conv1d", Example("nn.Conv1d(3, 4, 3, stride=2, padding=1)", ((2, 3, 8),)), _SAME)
@layer("Conv2d", Example("nn.Conv2d(3, 4, 3, stride=2, padding=1)", ((2, 3, 8, 6),)), _SAME)
@layer("Conv3d", Example("nn.Conv3d(3, 4, 3, stride=2, padding=1)", ((2, 3, 8, 6, 4),)), _SAME)
def convolution(module: Any, inside: Inside) -> Form:
    """nn.Conv1d, Conv2d and Conv3d: Flax's own, but for the padding modes."""
    outputs, inputs, *sizes = module.weight.shape
    stride, dilation = _whole(module, sizes)
    pads, mode = _pads(module, sizes, dilation), module.padding_mode
    zeros = mode == "zeros"
    if zeros and min(min(pair) for pair in pads) < 0:
        raise InputError(f"{module} has a negative padding, which torch cannot run with zeros: crop the input instead")
    options = {
        "strides": stride,
        "padding": pads if zeros else ((0, 0),) * len(pads),
        "dilation": dilation,
        "groups": module.groups,
    }

    def call(m: Carrier, x: Any) -> Any:
        return convolve(x if zeros else padded(x, pads, mode), m["kernel"], m["bias"], **options)

    def refuse(x: Any) -> None:
        _fit(x, (*sizes, inputs, outputs), pads, dilation, module.groups, (1,) * len(sizes))

    axes = AXES[len(pads)]
    text = f"convolve({'x' if zeros else written(pads, mode)}, kernel, bias, {_listed(options)})"
    form = _form(module, call, text, Rule("weight", "kernel", f"o i {axes} -> {axes} i o"))
    return dataclasses.replace(form, own=_own(module, options), refuse=refuse) if zeros else form


def _own(module: Any, options: Mapping[str, Any]) -> dict[str, Own]:
    """Flax's own, which has no padding mode that is torch's."""
    outputs, inputs, *kernel = module.weight.shape
    theirs = {"strides": options["strides"], "padding": options["padding"], "use_bias": module.bias is not None}
    if set(options["dilation"]) != {1}:
        theirs["kernel_dilation"] = options["dilation"]
    if module.groups != 1:
        theirs["feature_group_count"] = module.groups
    sizes = (outputs, tuple(kernel))
    return {"nnx": Own("Conv", inputs * module.groups, *sizes, **theirs), "linen": Own("Conv", *sizes, **theirs)}


def _pads(module: Any, sizes: Sequence[int], dilation: Sizes) -> tuple[tuple[int, int], ...]:
    """Pairs of a convolution's padding; "same" puts the odd one after."""
    if module.padding_mode != "zeros":  # torch pads by what its constructor made of `padding`
        return in_order(module._reversed_padding_repeated_twice)
    if module.padding == "valid":
        return ((0, 0),) * len(sizes)
    if module.padding == "same":
        total = [d * (k - 1) for k, d in zip(sizes, dilation, strict=True)]
        return tuple((t // 2, t - t // 2) for t in total)
    return tuple((p, p) for p in numbers(module.padding, len(sizes)))


_CROPS = "padding p is (d (k - 1) - p, that + output_padding) in Flax, which has neither groups nor output_size"


@layer("ConvTranspose1d", Example("nn.ConvTranspose1d(3, 4, 3, 2, 1, output_padding=1)", ((2, 3, 5),)), _CROPS)
@layer("ConvTranspose2d", Example("nn.ConvTranspose2d(3, 4, 3, 2, 1, output_padding=1)", ((2, 3, 5, 7),)), _CROPS)
@layer("ConvTranspose3d", Example("nn.ConvTranspose3d(3, 4, 3, 2, 1, output_padding=1)", ((2, 3, 5, 7, 4),)), _CROPS)
def transposed(module: Any, inside: Inside) -> Form:
    """nn.ConvTranspose1d, 2d and 3d, with `output_size` in the call, which Flax's own do not have."""
    sizes = module.weight.shape[2:]
    stride, dilation = _whole(module, sizes)
    padding, output_padding = (numbers(value, len(sizes)) for value in (module.padding, module.output_padding))
    if min(*padding, *output_padding) < 0:
        raise InputError(f"{module} has a negative padding, which torch cannot run: pad the input instead")

    options = {
        "strides": stride,
        "padding": padding,
        "output_padding": output_padding,
        "dilation": dilation,
        "groups": module.groups,
    }

    def call(m: Carrier, x: Any, output_size: Sequence[int] | None = None) -> Any:
        asked = {} if output_size is None else {"output_padding": _missing(x, m["kernel"], output_size, options)}
        return convolve_transposed(x, m["kernel"], m["bias"], **{**options, **asked})

    axes = AXES[len(sizes)]
    rule = Rule("weight", "kernel", f"i o {axes} -> {axes} o i")
    return _form(module, call, f"convolve_transposed(x, kernel, bias, {_listed(options)})", rule)


def _missing(x: Any, kernel: Any, output_size: Sequence[int], options: Mapping[str, Any]) -> Sizes:
    """The output padding that gives `output_size`: the spatial sizes, or all sizes in torch's order."""
    axes = len(options["strides"])
    if len(output_size) not in (axes, x.ndim):
        raise ValueError(f"output_size takes {axes} or {x.ndim} sizes, it was given {len(output_size)}")
    missing = []
    for axis, (size, stride) in enumerate(zip(output_size[-axes:], options["strides"], strict=True)):
        reach = options["dilation"][axis] * (kernel.shape[axis] - 1) + 1
        least = (x.shape[axis - axes - 1] - 1) * stride - 2 * options["padding"][axis] + reach
        if not least <= size < least + stride:
            raise ValueError(f"output_size {size} of spatial axis {axis} is not in {least} to {least + stride - 1}")
        missing.append(size - least)
    return tuple(missing)


def _whole(module: Any, sizes: Sequence[int]) -> tuple[Sizes, Sizes]:
    """Stride and dilation, one number an axis. Raises InputError for what torch can construct and not call."""
    stride, dilation = (numbers(value, len(sizes)) for value in (module.stride, module.dilation))
    if min(*sizes, *stride, *dilation) < 1:
        raise InputError(f"{module} cannot run in torch: kernel sizes, strides and dilations are at least 1")
    return stride, dilation


def _form(module: Any, call: Callable[..., Any], text: str, rule: Rule) -> Form:
    held, _ = leaves(module)
    lies = (spatial(AXES[module.weight.ndim - 2]),)
    rules = tuple(r for r in (rule, Rule("bias", "bias")) if r.source in held)
    return Form(type(module).__name__, call, text=text, rules=rules, held=held, inputs=lies, outputs=lies)


def _listed(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in options.items())
