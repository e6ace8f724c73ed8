"""Upsampling, in the arithmetic of torch's kernels: where an output reads is rounded as they round it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from equivalence.errors import InputError
from equivalence.layers.adaptive_pooling import adaptive_average
from equivalence.layers.form import LAST, Form
from equivalence.layers.registry import Example, layer
from equivalence.layers.windows import spatial_sizes, spread

Inside = Callable[[Any], Form]
AXES = {
    "nearest": (1, 2, 3),
    "nearest-exact": (1, 2, 3),
    "area": (1, 2, 3),
    "linear": (1,),
    "bilinear": (2,),
    "bicubic": (2,),
    "trilinear": (3,),
}
"""How many spatial axes a mode is for."""

LINEAR = ("linear", "bilinear", "trilinear")
CUBIC = -0.75
SMALL = 128
"""Two output sizes that sum to at most this are read by another kernel, which rounds otherwise."""

DIFFERS = (
    "jax.image.resize antialiases when it makes smaller (antialias=False), has a = -0.5 for cubic (torch -0.75), no"
    " align_corners, and nearest is torch's nearest-exact"
)


@layer("Upsample", Example('nn.Upsample(scale_factor=1.7, mode="bicubic")', ((2, 3, 5, 7),)), DIFFERS)
@layer("UpsamplingNearest2d", Example("nn.UpsamplingNearest2d((3, 9))", ((2, 3, 5, 7),)), DIFFERS)
@layer("UpsamplingBilinear2d", Example("nn.UpsamplingBilinear2d(scale_factor=1.7)", ((2, 3, 5, 7),)), DIFFERS)
def upsample(module: Any, inside: Inside) -> Form:
    """nn.Upsample, nn.UpsamplingNearest2d and nn.UpsamplingBilinear2d."""
    mode, size, factor, align = module.mode, module.size, module.scale_factor, module.align_corners
    again = bool(module.recompute_scale_factor)
    if (
        mode not in AXES
        or (size is None) == (factor is None)
        or (again and factor is None)
        or (mode not in (*LINEAR, "bicubic") and align is not None)
    ):
        raise InputError(f"{module} cannot be called in torch either: mode, size, scale_factor and align_corners clash")

    def call(m: Any, x: Any) -> Any:
        inputs = spatial_sizes(x, x.ndim - 2)
        factors = None if factor is None else each(factor, len(inputs))
        sizes = (
            each(size, len(inputs)) if factors is None else [int(n * f) for n, f in zip(inputs, factors, strict=True)]
        )
        return resized(x, sizes, mode, bool(align), None if again else factors)

    plain = mode in LINEAR and not align and factor is None
    asked = ", ".join(map(str, each(size, AXES[mode][0]))) if plain else ""
    text = f'jax.image.resize(x, (n, {asked}, c), "linear", antialias=False)'
    return Form(
        type(module).__name__,
        call,
        text if plain else f"resized(x, sizes, {mode!r}, align_corners={bool(align)}, factors={factor})",
        inputs=(LAST,),
        outputs=(LAST,),
    )


def each(value: Any, count: int) -> tuple[Any, ...]:
    """One number an axis, from one or from as many as there are axes; raises InputError for another count."""
    whole = tuple(value) if isinstance(value, (tuple, list)) else (value,) * count
    if len(whole) != count:
        raise InputError(f"size or scale_factor {value} is not for {count} spatial axes")
    return whole


def resized(
    x: Any, sizes: Sequence[int], mode: str, align_corners: bool = False, factors: Sequence[float] | None = None
) -> Any:
    """The axes between the first and the last at other sizes.

    https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.interpolate.html, where `jax.image.resize`
    antialiases, reads from half pixels for nearest, and takes the steps from the sizes even if factors were given.

    Args:
        x: floating inputs (n, *axes, c), not empty but in n.
        sizes: of the outputs.
        mode: torch's.
        align_corners: whether the corners' centres stay where they are, or the corners.
        factors: by which the steps are taken, where they are not the quotients of the sizes.

    Raises InputError for what torch refuses, and for integers.
    """
    inputs = spatial_sizes(x, x.ndim - 2)
    if len(inputs) not in AXES[mode] or not jnp.issubdtype(x.dtype, jnp.inexact):
        raise InputError(f"mode {mode} takes floating inputs of {AXES[mode]} spatial axes, not {x.dtype} {x.shape}")
    if mode == "area":
        return adaptive_average(x, sizes)
    if min(sizes) < 1 or x.shape[-1] == 0:
        raise InputError(f"inputs {x.shape}, channels last, cannot be resized to {tuple(sizes)}: empty")
    if mode == "bicubic" and tuple(sizes) == inputs:
        return _graded(x, lambda x: _read(x, sizes, mode, align_corners, factors), lambda tangent: tangent)
    return _read(x, sizes, mode, align_corners, factors)


def _graded(x: Any, forward: Callable[[Any], Any], backward: Callable[[Any], Any]) -> Any:
    """A linear function with the gradient of another, as torch has it where its two kernels do not match."""
    function = jax.custom_jvp(forward)
    function.defjvps(lambda tangent, _, x: backward(tangent))
    return function(x)


def _read(x: Any, sizes: Sequence[int], mode: str, align_corners: bool, factors: Sequence[float] | None) -> Any:
    real = np.dtype(x.dtype).type if x.dtype.itemsize >= 4 else np.float32
    small = len(sizes) == 2 and sum(sizes) <= SMALL
    for axis, (size, count) in enumerate(zip(x.shape[1:-1], sizes, strict=True), 1):
        factor = None if factors is None else factors[axis - 1]
        if mode.startswith("nearest"):
            x = _nearest(x, axis, count, factor, mode == "nearest-exact", real, small)
            continue
        step = _step(size, count, factor, align_corners, real)
        places, weights = (cubic if mode == "bicubic" else linear)(size, count, step, align_corners)
        values = jnp.take(x, places, axis=axis)
        x = (values * spread(weights, values.ndim, axis).astype(x.dtype)).sum(axis + 1)
    return x


def _nearest(x: Any, axis: int, count: int, factor: float | None, exact: bool, real: Any, small: bool) -> Any:
    backward = nearest_small(x.shape[axis], count, factor, exact)
    forward = backward if small else nearest_large(x.shape[axis], count, factor, exact, real)
    if (forward == backward).all():
        return jnp.take(x, forward, axis=axis)
    return _graded(x, lambda x: jnp.take(x, forward, axis=axis), lambda tangent: jnp.take(tangent, backward, axis=axis))


def _step(size: int, count: int, factor: float | None, align_corners: bool, real: Any) -> Any:
    """How far apart outputs read, in precision `real`."""
    if align_corners:
        return real(size - 1) / real(count - 1) if count > 1 else real(0)
    return real(1.0 / factor) if factor else real(size) / real(count)


def nearest_small(size: int, count: int, factor: float | None, exact: bool) -> np.ndarray:
    """The place (count,) that each output reads, in float32: torch's gradients, and its outputs of small images."""
    number = np.arange(count)
    if not exact and count in (size, 2 * size):
        return number // (count // size)
    step = _step(size, count, factor, False, np.float32)
    at = ((number + 0.5) * np.float64(step)).astype(np.float32) if exact else number.astype(np.float32) * step
    return np.minimum(np.floor(at).astype(int), size - 1)


def nearest_large(size: int, count: int, factor: float | None, exact: bool, real: Any) -> np.ndarray:
    """The place (count,) that each output reads, in precision `real`: torch's outputs of all else."""
    step, number = _step(size, count, factor, False, real), np.arange(count).astype(real)
    if not exact:
        at = number * step
    else:  # one rounding: torch's kernels are compiled to fused multiply-adds
        at = (np.float64(step) * (number + real(0.5)) - 0.5).astype(real)
        at = np.maximum(at, real(0)) + real(0.5)
    return np.minimum(np.floor(at.astype(np.float32)).astype(int), size - 1)


def linear(size: int, count: int, step: Any, align_corners: bool) -> tuple[np.ndarray, np.ndarray]:
    """The places (count, 2) between which each output lies, and their weights, in the precision of the step."""
    real = type(step)
    number = np.arange(count)
    if count == size:
        return np.stack([number, number], 1), np.stack([np.ones(count, real), np.zeros(count, real)], 1)
    at = _centres(count, step, align_corners)
    place, share = _floored(np.maximum(at, real(0)), size)
    return np.stack([place, np.minimum(place + 1, size - 1)], 1), np.stack([real(1) - share, share], 1)


def cubic(size: int, count: int, step: Any, align_corners: bool) -> tuple[np.ndarray, np.ndarray]:
    """The places (count, 4) around each output, held inside, and their weights, in the precision of the step.

    https://en.wikipedia.org/wiki/Bicubic_interpolation, the convolution algorithm with a = -0.75.
    """
    real = type(step)
    a = real(CUBIC)
    place, share = _floored(_centres(count, step, align_corners), size)

    def near(t: Any) -> Any:
        return ((a + 2) * t - (a + 3)) * t * t + 1

    def far(t: Any) -> Any:
        return ((a * t - 5 * a) * t + 8 * a) * t - 4 * a

    weights = np.stack([far(share + 1), near(share), near(1 - share), far(2 - share)], 1).astype(real)
    return np.clip(place[:, None] + np.arange(-1, 3), 0, size - 1), weights


def _centres(count: int, step: Any, align_corners: bool) -> np.ndarray:
    """Where along the inputs each output lies."""
    real = type(step)
    number = np.arange(count).astype(real)
    at: np.ndarray = step * number if align_corners else step * (number + real(0.5)) - real(0.5)
    return at


def _floored(at: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The place before, rounded down from float32, and the share of the way to the next, 0 to 1."""
    place = np.minimum(np.floor(at.astype(np.float32)).astype(int), size - 1)
    return place, np.clip(at - place, 0, 1).astype(at.dtype)
