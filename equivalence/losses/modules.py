"""A torch loss module as the JAX function that it is, its options bound."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from equivalence import losses
from equivalence.errors import InputError

OPTIONS: dict[str, tuple[str, tuple[str, ...]]] = {
    "L1Loss": ("l1", ()),
    "MSELoss": ("mse", ()),
    "SmoothL1Loss": ("smooth_l1", ("beta",)),
    "HuberLoss": ("huber", ("delta",)),
    "PoissonNLLLoss": ("poisson_nll", ("log_input", "full", "eps")),
    "GaussianNLLLoss": ("gaussian_nll", ("full", "eps")),
    "KLDivLoss": ("kl_div", ("log_target",)),
    "BCELoss": ("bce", ("weight",)),
    "BCEWithLogitsLoss": ("bce_with_logits", ("weight", "pos_weight")),
    "SoftMarginLoss": ("soft_margin", ()),
    "MultiLabelSoftMarginLoss": ("multi_label_soft_margin", ("weight",)),
    "NLLLoss": ("nll", ("weight", "ignore_index")),
    "CrossEntropyLoss": ("cross_entropy", ("weight", "ignore_index", "label_smoothing")),
    "MarginRankingLoss": ("margin_ranking", ("margin",)),
    "HingeEmbeddingLoss": ("hinge_embedding", ("margin",)),
    "MultiMarginLoss": ("multi_margin", ("p", "margin", "weight")),
    "MultiLabelMarginLoss": ("multi_label_margin", ()),
    "CosineEmbeddingLoss": ("cosine_embedding", ("margin",)),
    "TripletMarginLoss": ("triplet_margin", ("margin", "p", "eps", "swap")),
    "TripletMarginWithDistanceLoss": ("triplet_margin_with_distance", ("margin", "swap")),
    "CTCLoss": ("ctc", ("blank", "zero_infinity")),
}
"""torch class -> our name, and its attributes beside `reduction`, which are our keywords."""

TRAINED = {"LinearCrossEntropyLoss": "linear_cross_entropy", "AdaptiveLogSoftmaxWithLoss": "adaptive_log_softmax"}
"""Classes with weights of their own, which belong to the model that is trained."""


def translate(module: Any) -> Callable[..., Any]:
    """The JAX function of a torch loss module: callable(outputs, *targets), as the module is called.

    Raises InputError for a class that is not exactly one of torch.nn's losses, one with weights of its own, and a
    distance function.
    """
    import torch

    kind = type(module)
    name = kind.__name__
    theirs = getattr(torch.nn, name, None) is kind
    if theirs and name in TRAINED:
        raise InputError(
            f"{name} has weights that are trained: give them to equivalence.losses.{TRAINED[name]} instead"
        )
    if not theirs or name not in OPTIONS:
        raise InputError(
            f"{kind.__module__}.{kind.__qualname__} is no loss of torch.nn itself, so nothing is known of what it"
            " computes: write its JAX function and give loss=(torch_loss, jax_loss)"
        )
    ours, attributes = OPTIONS[name]
    if name == "TripletMarginWithDistanceLoss" and module.distance_function is not None:
        default = torch.nn.PairwiseDistance
        plain = type(module.distance_function) is default and _plain(module.distance_function, default())
        if not plain:
            raise InputError(
                "a torch distance_function is not translated: give"
                " equivalence.losses.triplet_margin_with_distance(..., distance_function=<a JAX function>)"
            )
    values = {attribute: getattr(module, attribute) for attribute in (*attributes, "reduction")}
    bound = {k: v.detach().cpu().numpy() if isinstance(v, torch.Tensor) else v for k, v in values.items()}
    return functools.partial(getattr(losses, ours), **bound)


def _plain(distance: Any, default: Any) -> bool:
    return all(getattr(distance, name) == getattr(default, name) for name in ("norm", "eps", "keepdim"))


def reference(module: Any) -> Callable[..., Any]:
    """The module as a function whose weights follow the dtype of the outputs it is given."""
    import torch

    def call(outputs: Any, *targets: Any) -> Any:
        weights = {name: value.to(outputs.dtype) for name, value in module.named_buffers()}
        return torch.func.functional_call(module, weights, (outputs, *targets))

    return call
