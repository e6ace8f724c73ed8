"""Activations: functions of one array, with torch's slope at every kink."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from equivalence.errors import InputError
from equivalence.layers import pointwise
from equivalence.layers.form import LAST, Carrier, Form, spatial
from equivalence.layers.registry import Example, layer, leaves
from equivalence.weights import Rule

Inside = Callable[[Any], Form]
Function = Callable[[Any], Any]
SAME = "nothing: the same function, with the same slopes"


def elementwise(torch: str, differs: str) -> Callable[[Callable[[Any], tuple[str, Function]]], Any]:
    """Register an elementwise class, shown by the expression `torch`: `made(module) -> (text, function)`."""
    name = torch.removeprefix("nn.").partition("(")[0]

    def register(made: Callable[[Any], tuple[str, Function]]) -> Callable[[Any], tuple[str, Function]]:
        def translate(module: Any, inside: Inside) -> Form:
            text, function = made(module)
            return Form(name, lambda m, x: function(x), text=text, anywhere=True)

        translate.__module__ = __name__
        layer(name, Example(torch, ((4, 5),)), differs)(translate)
        return made

    return register


@elementwise("nn.ReLU()", "nothing: both have slope 0 at 0, where jnp.maximum(x, 0) has 1/2 (a tie)")
def _relu(module: Any) -> tuple[str, Function]:
    return "jax.nn.relu(x)", jax.nn.relu


@elementwise("nn.ReLU6()", "nothing: both have slope 0 at the kinks 0 and 6, where jnp.clip(x, 0, 6) has 1/2")
def _relu6(module: Any) -> tuple[str, Function]:
    return "jax.nn.relu6(x)", jax.nn.relu6


@elementwise("nn.Sigmoid()", SAME)
def _sigmoid(module: Any) -> tuple[str, Function]:
    return "jax.nn.sigmoid(x)", jax.nn.sigmoid


@elementwise("nn.Tanh()", SAME)
def _tanh(module: Any) -> tuple[str, Function]:
    return "jnp.tanh(x)", jnp.tanh


@elementwise("nn.SiLU()", SAME)
def _silu(module: Any) -> tuple[str, Function]:
    return "jax.nn.silu(x)", jax.nn.silu


@elementwise("nn.Mish()", SAME)
def _mish(module: Any) -> tuple[str, Function]:
    return "jax.nn.mish(x)", jax.nn.mish


@elementwise("nn.LogSigmoid()", SAME)
def _log_sigmoid(module: Any) -> tuple[str, Function]:
    return "jax.nn.log_sigmoid(x)", jax.nn.log_sigmoid


@elementwise("nn.Softsign()", SAME)
def _softsign(module: Any) -> tuple[str, Function]:
    return "jax.nn.soft_sign(x)", jax.nn.soft_sign


@elementwise("nn.Tanhshrink()", "nothing: jax.nn has no name for it")
def _tanhshrink(module: Any) -> tuple[str, Function]:
    return "x - jnp.tanh(x)", lambda x: x - jnp.tanh(x)


@elementwise("nn.SELU()", SAME)
def _selu(module: Any) -> tuple[str, Function]:
    return "jax.nn.selu(x)", jax.nn.selu


@elementwise("nn.ELU(0.5)", "nothing: alpha is its only option in both, and the slope at the kink 0 is alpha")
def _elu(module: Any) -> tuple[str, Function]:
    alpha = float(module.alpha)
    return f"jax.nn.elu(x, {alpha!r})", lambda x: jax.nn.elu(x, alpha)


@elementwise("nn.CELU(0.3)", "jax.nn.celu but for its slope in float64, where torch's alpha is float32's: 3e-8 off")
def _celu(module: Any) -> tuple[str, Function]:
    alpha = float(module.alpha)
    if not alpha:
        raise InputError("CELU with alpha 0 is refused by torch when it is called: use ReLU")
    inplace = bool(module.inplace)
    return f"celu(x, {alpha!r}, {inplace})", lambda x: pointwise.celu(x, alpha, inplace)


@elementwise("nn.GELU()", "torch's default is exact, jax.nn.gelu's is the tanh approximation")
def _gelu(module: Any) -> tuple[str, Function]:
    if module.approximate not in ("none", "tanh"):
        raise InputError(f"GELU: approximate is 'none' or 'tanh', not {module.approximate!r}")
    bent = module.approximate == "tanh"
    return f"jax.nn.gelu(x, approximate={bent})", lambda x: jax.nn.gelu(x, approximate=bent)


@elementwise("nn.LeakyReLU(0.2)", "kink: torch's slope at 0 is negative_slope, jax.nn.leaky_relu's is 1")
def _leaky_relu(module: Any) -> tuple[str, Function]:
    slope = float(module.negative_slope)
    return f"jnp.where(x > 0, x, {slope!r} * x)", lambda x: pointwise.leaky_relu(x, slope)


@elementwise("nn.Hardtanh(-0.5, 2.0)", "kinks: at both edges torch's slope is 0, jnp.clip's 1/2, jax.nn.hard_tanh's 1")
def _hardtanh(module: Any) -> tuple[str, Function]:
    low, high = float(module.min_val), float(module.max_val)
    return f"hardtanh(x, {low!r}, {high!r})", lambda x: pointwise.hardtanh(x, low, high)


@elementwise(
    "nn.Hardsigmoid()", "in float64 torch's slope is 1/6 rounded to float32, 3e-8 off; else jax.nn.hard_sigmoid"
)
def _hardsigmoid(module: Any) -> tuple[str, Function]:
    return "hardsigmoid(x)", pointwise.hardsigmoid


@elementwise("nn.Hardswish()", "nothing: jax.nn.hard_silu; its slopes at the kinks -3 and 3 are 0 and 1 in both")
def _hardswish(module: Any) -> tuple[str, Function]:
    return "jax.nn.hard_silu(x)", pointwise.hardswish


@elementwise("nn.Hardshrink(0.3)", "nothing: jax.nn has none; both edges become 0, with slope 0")
def _hardshrink(module: Any) -> tuple[str, Function]:
    lambd = float(module.lambd)
    return f"hardshrink(x, {lambd!r})", lambda x: pointwise.hardshrink(x, lambd)


@elementwise("nn.Softshrink(0.3)", "kinks: the slope at both edges is 0; sign(x) * relu(abs(x) - lambd) has the same")
def _softshrink(module: Any) -> tuple[str, Function]:
    lambd = float(module.lambd)
    if lambd < 0:
        raise InputError(f"Softshrink: lambd {lambd} is negative, which torch refuses when it is called")
    return f"softshrink(x, {lambd!r})", lambda x: pointwise.softshrink(x, lambd)


@elementwise("nn.Threshold(0.1, 2.0)", "kink: x equal to the threshold becomes value, with slope 0: x > t, not x >= t")
def _threshold(module: Any) -> tuple[str, Function]:
    limit, value = float(module.threshold), float(module.value)
    return f"jnp.where(x > {limit!r}, x, {value!r})", lambda x: pointwise.threshold(x, limit, value)


@elementwise(
    "nn.Softplus(2.0, 3.0)", "above threshold / beta torch returns x (above 20 by default), jax.nn.softplus bends on"
)
def _softplus(module: Any) -> tuple[str, Function]:
    beta, limit = float(module.beta), float(module.threshold)
    return f"softplus(x, {beta!r}, {limit!r})", lambda x: pointwise.softplus(x, beta, limit)


@layer(
    "RReLU",
    Example("nn.RReLU(0.1, 0.4)", ((4, 5),)),
    "train mode draws a slope an element; eval mode is leaky ReLU of their mean; both are the slope at the kink 0",
)
def rrelu(module: Any, inside: Inside) -> Form:
    """nn.RReLU."""
    lower, upper = float(module.lower), float(module.upper)
    if lower > upper:
        raise InputError(f"RReLU: lower {lower} is above upper {upper}, which torch refuses when it is called")

    def call(m: Carrier, x: Any) -> Any:
        if m.train:
            return pointwise.rrelu(x, lower, upper, m.key())
        return pointwise.leaky_relu(x, (lower + upper) / 2)

    return Form("RReLU", call, text=f"rrelu(x, {lower!r}, {upper!r}, key)", anywhere=True, draws=True)


@layer(
    "PReLU",
    Example("nn.PReLU(3)", ((2, 3, 5),)),
    "one slope a channel of axis 1, Flax has one for all; kink: at 0 torch's slope is the learned one, Flax's 1",
)
def prelu(module: Any, inside: Inside) -> Form:
    """nn.PReLU: one slope for all elements, or one a channel."""
    held, _ = leaves(module)
    count = len(held["weight"])

    def call(m: Carrier, x: Any) -> Any:
        if count != 1 and x.shape[-1] != count:
            raise InputError(f"PReLU has {count} slopes, and the input {x.shape[-1]} channels")
        slopes = m["negative_slope"]
        return pointwise.leaky_relu(x, slopes if count != 1 else slopes[0])

    return Form(
        "PReLU",
        call,
        text="jnp.where(x > 0, x, negative_slope * x)",
        rules=(Rule("weight", "negative_slope"),),
        held=held,
        inputs=() if count == 1 else (LAST,),
        outputs=() if count == 1 else (LAST,),
        anywhere=count == 1,
    )


@layer("GLU", Example("nn.GLU(1)", ((2, 6, 5),)), "the axis is torch's, in torch's layout")
def glu(module: Any, inside: Inside) -> Form:
    """nn.GLU."""
    dim = int(module.dim)

    def call(m: Carrier, x: Any) -> Any:
        if not x.ndim or x.shape[dim] % 2:
            raise InputError(f"GLU halves axis {dim}, which must be even; the input is {x.shape}")
        return jax.nn.glu(x, axis=dim)

    return Form("GLU", call, text=f"jax.nn.glu(x, axis={dim})")


def _over_axis(name: str, function: str, differs: str, sign: str = "") -> None:
    """Register Softmax, Softmin or LogSoftmax: `function` of jax.nn over torch's axis."""

    def translate(module: Any, inside: Inside) -> Form:
        dim = None if module.dim is None else int(module.dim)

        def call(m: Carrier, x: Any) -> Any:
            axis = implicit_axis(x.ndim) if dim is None else dim
            rows = (-x if sign else x).reshape(x.shape or (1,))  # a number is a row of one
            return getattr(jax.nn, function)(rows, axis=axis).reshape(x.shape)

        return Form(
            name, call, text=f"jax.nn.{function}({sign}x, axis={'implicit_axis(x.ndim)' if dim is None else dim})"
        )

    translate.__module__ = __name__
    layer(name, Example(f"nn.{name}(1)", ((2, 3, 5),)), differs)(translate)


def implicit_axis(ndim: int) -> int:
    """The axis that torch takes where softmax is given none: 0 for arrays of 0, 1 and 3 axes, else 1.

    https://docs.pytorch.org/docs/stable/generated/torch.nn.Softmax.html
    """
    return 0 if ndim in (0, 1, 3) else 1


_over_axis("Softmax", "softmax", "no axis given: torch takes 0 for 0, 1 and 3 axes, else 1; jax takes the last")
_over_axis("LogSoftmax", "log_softmax", "no axis given: torch takes 0 or 1 by the number of axes; jax takes the last")
_over_axis("Softmin", "softmax", "softmax of -x; no axis given: torch takes 0 or 1 by the number of axes", "-")


@layer("Softmax2d", Example("nn.Softmax2d()", ((2, 3, 4, 5),)), "over channels, the last axis here")
def softmax2d(module: Any, inside: Inside) -> Form:
    """nn.Softmax2d: over the channels of images, with or without a batch."""
    images = spatial("h w")

    def call(m: Carrier, x: Any) -> Any:
        if x.ndim not in (3, 4):
            raise InputError(f"Softmax2d takes arrays of 3 or 4 axes, not {x.ndim}")
        return jax.nn.softmax(x, axis=-1)

    return Form("Softmax2d", call, text="jax.nn.softmax(x, axis=-1)", inputs=(images,), outputs=(images,))
