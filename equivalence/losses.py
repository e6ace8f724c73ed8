"""Built-in pairs of losses, by the name that `verify(loss=...)` takes. Both sides average over all elements."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from equivalence.errors import InputError, unknown

LossPair = tuple[Callable[..., Any], Callable[..., Any]]


def _mse() -> LossPair:
    """Mean squared error."""
    import jax.numpy as jnp
    import torch

    return torch.nn.functional.mse_loss, lambda outputs, targets: jnp.mean(jnp.square(outputs - targets))


def _cross_entropy() -> LossPair:
    """Cross-entropy of logits (b, classes) against labels (b,)."""
    import jax.numpy as jnp
    import optax
    import torch

    def port(logits: Any, labels: Any) -> Any:
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))

    return torch.nn.functional.cross_entropy, port


def _bce_with_logits() -> LossPair:
    """Binary cross-entropy of logits against targets from 0 to 1."""
    import jax.numpy as jnp
    import optax
    import torch

    def port(logits: Any, labels: Any) -> Any:
        return jnp.mean(optax.sigmoid_binary_cross_entropy(logits, labels))

    return torch.nn.functional.binary_cross_entropy_with_logits, port


PAIRS: dict[str, Callable[[], LossPair]] = {
    "mse": _mse,
    "cross_entropy": _cross_entropy,
    "bce_with_logits": _bce_with_logits,
}
"""`mse`; `cross_entropy` of logits (b, classes) against labels (b,); `bce_with_logits` against 0 to 1."""


def resolve(loss: Any) -> LossPair | None:
    """The pair that `verify(loss=...)` names: None, a name in `PAIRS`, or (reference loss, port loss).

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
    raise InputError("loss= takes None, a name, or (reference_loss, port_loss), each callable(outputs, *targets)")
