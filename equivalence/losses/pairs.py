"""Built-in pairs of losses, by the name that `verify(loss=...)` takes; loads no framework."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from equivalence.errors import InputError, unknown

LossPair = tuple[Callable[..., Any], Callable[..., Any]]


def _pair(name: str, functional: str, summary: str, **options: Any) -> Callable[[], LossPair]:
    def pair() -> LossPair:
        import torch

        from equivalence import losses

        ours, theirs = getattr(torch.nn.functional, functional), getattr(losses, name)
        return functools.partial(ours, **options), functools.partial(theirs, **options)

    pair.__doc__ = summary
    return pair


PAIRS: dict[str, Callable[[], LossPair]] = {
    name: _pair(name, functional, summary, **options)
    for name, functional, summary, options in (
        ("mse", "mse_loss", "Mean squared error.", {}),
        ("l1", "l1_loss", "Mean absolute error.", {}),
        ("smooth_l1", "smooth_l1_loss", "Absolute error, squared within 1 of the target.", {}),
        ("huber", "huber_loss", "Squared error, absolute beyond 1 of the target.", {}),
        ("cross_entropy", "cross_entropy", "Cross-entropy of logits (b, classes) against labels (b,).", {}),
        ("nll", "nll_loss", "Minus the log-probability (b, classes) of labels (b,).", {}),
        ("bce", "binary_cross_entropy", "Binary cross-entropy of probabilities against targets from 0 to 1.", {}),
        (
            "bce_with_logits",
            "binary_cross_entropy_with_logits",
            "Binary cross-entropy of logits against targets from 0 to 1.",
            {},
        ),
        ("poisson_nll", "poisson_nll_loss", "Negative log-likelihood of counts under the log of a rate.", {}),
        ("gaussian_nll", "gaussian_nll_loss", "Negative log-likelihood of targets under variances, both given.", {}),
        (
            "kl_div",
            "kl_div",
            "Divergence of log-probabilities from probabilities, divided by the batch.",
            {"reduction": "batchmean"},
        ),
        ("hinge_embedding", "hinge_embedding_loss", "Distances against targets 1 (near) and -1 (far).", {}),
        ("soft_margin", "soft_margin_loss", "Logistic loss of logits against targets 1 and -1.", {}),
        ("multi_margin", "multi_margin_loss", "Hinge loss of scores (b, classes) against labels (b,).", {}),
        (
            "multi_label_margin",
            "multilabel_margin_loss",
            "Hinge loss of scores against lists of labels that end in -1.",
            {},
        ),
        (
            "multi_label_soft_margin",
            "multilabel_soft_margin_loss",
            "Binary cross-entropy of logits (b, classes), mean over the classes.",
            {},
        ),
        ("ctc", "ctc_loss", "CTC of log-probabilities (frames, b, classes) against labels and both lengths.", {}),
    )
}
"""The losses called as loss(outputs, *targets), with the options that torch has by default."""


def resolve(loss: Any) -> LossPair | None:
    """The pair that `verify(loss=...)` names.

    Args:
        loss: None, a name in `PAIRS`, a torch loss module (translated by `translate`), or (reference loss, port loss).

    Raises InputError for anything else.
    """
    if loss is None:
        return None
    if isinstance(loss, str):
        if loss not in PAIRS:
            raise unknown("loss", loss, PAIRS)
        return PAIRS[loss]()
    if isinstance(loss, tuple) and len(loss) == 2 and all(callable(side) for side in loss):
        return loss
    if any(base.__module__ == "torch.nn.modules.module" for base in type(loss).__mro__):
        from equivalence.losses.modules import reference, translate

        port = translate(loss)
        return reference(loss), port
    raise InputError(
        "loss= takes None, a name, a torch loss module, or (reference_loss, port_loss),"
        " each callable(outputs, *targets)"
    )
