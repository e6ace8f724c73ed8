"""Losses as layers: the functions of `equivalence.losses`, with their class weights as leaves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from equivalence import losses
from equivalence.errors import InputError
from equivalence.layers.form import Carrier, Form
from equivalence.layers.linear import linear
from equivalence.layers.registry import Example, layer, leaves
from equivalence.losses.arguments import demand
from equivalence.losses.modules import OPTIONS
from equivalence.losses.table import LOSSES
from equivalence.weights import Rule

Inside = Callable[[Any], Form]

EXAMPLES = {
    "L1Loss": ("nn.L1Loss()", "x y"),
    "MSELoss": ("nn.MSELoss()", "x y"),
    "CrossEntropyLoss": ("nn.CrossEntropyLoss(label_smoothing=0.1)", "x y"),
    "NLLLoss": ("nn.NLLLoss()", "x y"),
    "CTCLoss": ("nn.CTCLoss()", "x y t s"),
    "PoissonNLLLoss": ("nn.PoissonNLLLoss(full=True)", "x y"),
    "GaussianNLLLoss": ("nn.GaussianNLLLoss()", "x y v"),
    "KLDivLoss": ("nn.KLDivLoss(reduction='batchmean')", "x y"),
    "BCELoss": ("nn.BCELoss()", "x y"),
    "BCEWithLogitsLoss": ("nn.BCEWithLogitsLoss()", "x y"),
    "MarginRankingLoss": ("nn.MarginRankingLoss(margin=0.5)", "a0 b0 y"),
    "HingeEmbeddingLoss": ("nn.HingeEmbeddingLoss()", "x y"),
    "MultiLabelMarginLoss": ("nn.MultiLabelMarginLoss()", "x y"),
    "HuberLoss": ("nn.HuberLoss(delta=2.0)", "x y"),
    "SmoothL1Loss": ("nn.SmoothL1Loss(beta=2.0)", "x y"),
    "SoftMarginLoss": ("nn.SoftMarginLoss()", "x y"),
    "MultiLabelSoftMarginLoss": ("nn.MultiLabelSoftMarginLoss()", "x y"),
    "CosineEmbeddingLoss": ("nn.CosineEmbeddingLoss(margin=0.1)", "a b y"),
    "MultiMarginLoss": ("nn.MultiMarginLoss()", "x y"),
    "TripletMarginLoss": ("nn.TripletMarginLoss()", "a p n"),
    "TripletMarginWithDistanceLoss": ("nn.TripletMarginWithDistanceLoss(swap=True)", "a p n"),
    "AdaptiveLogSoftmaxWithLoss": ("nn.AdaptiveLogSoftmaxWithLoss(8, 10, [2, 5], div_value=2.0)", "x y"),
    "LinearCrossEntropyLoss": ("nn.LinearCrossEntropyLoss(3, 7)", "x y"),
}
"""torch class -> the module of its example, and which arrays of its example in `losses.LOSSES` it is called with."""


DIFFERS = {
    "CrossEntropyLoss": "optax.softmax_cross_entropy's mean counts ignored labels and knows no class weights, by whose"
    " sum torch divides",
    "CosineEmbeddingLoss": "below the margin nothing is lost; at zero vectors optax.cosine_similarity's slope is nan",
    "HuberLoss": "nothing: the mean of optax.huber_loss is it",
    "LinearCrossEntropyLoss": "nothing but that optax.softmax_cross_entropy_with_integer_labels has no ignored labels,"
    " class weights or smoothing",
}
"""What differs, of losses whose words in `losses.LOSSES` need the form that stands beside them there."""


class ASMOutput(NamedTuple):
    """What AdaptiveLogSoftmaxWithLoss returns: the log-probability of each target (b,), and minus their mean."""

    output: jax.Array
    loss: jax.Array


def _plain(module: Any, inside: Inside) -> Form:
    """A loss without weights that are trained; its class weights are buffers."""
    name = type(module).__name__
    ours, attributes = OPTIONS["NLLLoss" if name == "NLLLoss2d" else name]
    held, buffers = leaves(module)
    options = {a: getattr(module, a) for a in (*attributes, "reduction") if a not in ("weight", "pos_weight")}
    function = getattr(losses, ours)

    def call(m: Carrier, *inputs: Any) -> jax.Array:
        loss: jax.Array = function(*inputs, **{name: m[name] for name in held}, **options)
        return loss

    weights = [f"{name}={name}" for name in held]
    text = ", ".join([*weights, *(f"{option}={value!r}" for option, value in options.items())])
    rules = tuple(Rule(name, name) for name in held)
    return Form(name, call, text=f"losses.{ours}(..., {text})", rules=rules, held=held, buffers=buffers)


def _triplet(module: Any, inside: Inside) -> Form:
    """nn.TripletMarginWithDistanceLoss, whose distance is a layer."""
    import torch

    if not isinstance(module.distance_function, torch.nn.Module):
        raise InputError(
            f"TripletMarginWithDistanceLoss has a Python function as distance_function ({module.distance_function}):"
            " give a module, nn.PairwiseDistance() say, or call losses.triplet_margin_with_distance in the port"
        )
    options = {"margin": module.margin, "swap": module.swap, "reduction": module.reduction}

    def call(m: Carrier, anchor: Any, positive: Any, negative: Any) -> jax.Array:
        distance = m.layer("distance_function")
        return losses.triplet_margin_with_distance(anchor, positive, negative, distance_function=distance, **options)

    return Form(
        "TripletMarginWithDistanceLoss",
        call,
        text=f"losses.triplet_margin_with_distance(a, p, n, {', '.join(f'{k}={v!r}' for k, v in options.items())})",
        children={"distance_function": inside(module.distance_function)},
    )


def _linear_cross_entropy(module: Any, inside: Inside) -> Form:
    """nn.LinearCrossEntropyLoss: a linear layer and the cross-entropy of its logits; chunks change no number."""
    held, buffers = leaves(module)
    shape, ignored = (module.num_classes, *module.out_features), module.ignore_index
    options = {"label_smoothing": module.label_smoothing, "reduction": module.reduction}

    def call(m: Carrier, x: Any, target: Any) -> jax.Array:
        demand(x.ndim == 2 or (x.ndim == 1 == len(shape)), f"classes {shape} do not take an input of shape {x.shape}")
        logits = m.layer("linear")(x).reshape(*x.shape[:-1], *shape)
        soft = logits.shape == target.shape
        demand(not soft or ignored is None, "ignore_index is for integer targets: these are probabilities")
        index = -100 if ignored is None else ignored
        return losses.cross_entropy(logits, target, weight=m["weight"], ignore_index=index, **options)

    return Form(
        "LinearCrossEntropyLoss",
        call,
        text="losses.linear_cross_entropy(x, linear_weight, y)",
        rules=tuple(Rule(name, name) for name in held),
        held=held,
        buffers=buffers,
        children={"linear": linear(module.linear, inside)},
    )


def _adaptive(module: Any, inside: Inside) -> Form:
    """nn.AdaptiveLogSoftmaxWithLoss, whose weights keep torch's layout: `losses.adaptive_log_softmax` reads it."""
    from equivalence.frameworks.torch import to_numpy

    held = {name: to_numpy(value) for name, value in module.named_parameters()}
    names = {name: name.replace(".", "_") for name in held}

    def call(m: Carrier, x: Any, target: Any) -> ASMOutput:
        params = {name: m[ours] for name, ours in names.items()}
        return ASMOutput(*losses.adaptive_log_softmax(x, target, params))

    return Form(
        "AdaptiveLogSoftmaxWithLoss",
        call,
        text="losses.adaptive_log_softmax(x, y, params)",
        rules=tuple(Rule(name, ours) for name, ours in names.items()),
        held=held,
    )


SPECIAL = {
    "AdaptiveLogSoftmaxWithLoss": _adaptive,
    "LinearCrossEntropyLoss": _linear_cross_entropy,
    "TripletMarginWithDistanceLoss": _triplet,
}
"""The losses with layers or trained weights of their own."""


def _inputs(arrays: Callable[[np.random.Generator], dict[str, np.ndarray]], names: str) -> Any:
    def drawn(rng: np.random.Generator) -> tuple[np.ndarray, ...]:
        given = arrays(rng)
        found = [given[name[0]][:, 0] if name.endswith("0") else given[name] for name in names.split()]
        return tuple(a.astype(np.float32) if a.dtype.kind == "f" else a for a in found)

    return drawn


for _entry in LOSSES:
    _made, _names = EXAMPLES[_entry.torch]
    _differs = DIFFERS.get(_entry.torch, _entry.differs)
    layer(_entry.torch, Example(_made, _inputs(_entry.example, _names)), _differs)(SPECIAL.get(_entry.torch, _plain))
    if _entry.torch == "NLLLoss":
        layer("NLLLoss2d", Example("nn.NLLLoss2d()", _inputs(_entry.example, _names)), _differs)(_plain)
