"""Losses of distances between vectors: two of them, or an anchor and what it should be near to and far from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from equivalence.losses.arguments import demand, floats, reduced
from equivalence.losses.kinks import EPSILON, clamp_min, norm


def cosine_embedding(
    input1: Any, input2: Any, target: Any, *, margin: float = 0.0, reduction: str = "mean"
) -> jax.Array:
    """1 - cos where target is 1, max(0, cos - margin) where it is -1, of vectors (features,) or (b, features).

    Args:
        target: () or (b,); a row whose target is neither 1 nor -1 counts 0.

    Both squared lengths have 1e-12 added (`optax.cosine_similarity` clamps the lengths instead: nan gradients at a zero
    vector, at eps 0). The slope where cos == margin is 1 (`jnp.maximum`: 1/2). Raises InputError for other shapes.
    https://docs.pytorch.org/docs/stable/generated/torch.nn.CosineEmbeddingLoss.html
    """
    x1, x2, y = floats(input1, input2, target)
    fits = y.ndim <= 1 and x1.ndim == x2.ndim == y.ndim + 1
    demand(fits, f"vectors of shapes {x1.shape} and {x2.shape} do not take a target of shape {y.shape}")
    squares = (jnp.sum(x1 * x1, axis=-1) + EPSILON) * (jnp.sum(x2 * x2, axis=-1) + EPSILON)
    cos = jnp.sum(x1 * x2, axis=-1) / jnp.sqrt(squares)
    return reduced(jnp.where(y == 1, 1 - cos, 0) + jnp.where(y == -1, clamp_min(cos - margin, 0), 0), reduction)


def _pairwise(x1: jax.Array, x2: jax.Array, p: float = 2.0, eps: float = 1e-6) -> jax.Array:
    return norm(x1 - x2 + eps, p)


def _triplet(
    anchor: Any,
    positive: Any,
    negative: Any,
    distance: Callable[[jax.Array, jax.Array], jax.Array],
    margin: float,
    swap: bool,
    reduction: str,
) -> jax.Array:
    a, p, n = floats(anchor, positive, negative)
    demand(margin > 0, f"a triplet loss takes margin > 0, got {margin}")
    demand(a.ndim == p.ndim == n.ndim, f"a triplet takes as many axes each, got {a.shape}, {p.shape}, {n.shape}")
    far = distance(a, n)
    if swap:
        far = jnp.minimum(far, distance(p, n))
    return reduced(clamp_min(margin + distance(a, p) - far, 0), reduction)


def triplet_margin(
    anchor: Any,
    positive: Any,
    negative: Any,
    *,
    margin: float = 1.0,
    p: float = 2.0,
    eps: float = 1e-6,
    swap: bool = False,
    reduction: str = "mean",
) -> jax.Array:
    """max(0, margin + d(anchor, positive) - d(anchor, negative)), d the p-norm of a - b + eps over the last axis.

    Args:
        anchor, positive, negative: (..., features), of as many axes, that broadcast.
        swap: take d(positive, negative) for the last distance where it is smaller (equal: half the gradient each).

    eps is added to every *difference*, so equal vectors are sqrt(features) * eps apart;
    `optax.losses.triplet_margin_loss` adds it under the root, to the sum. The gradient of a distance that is 0 is 0
    (JAX: nan), and where the margin is just met the slope is that of the violated side. Raises InputError for
    margin <= 0 and unequal numbers of axes.
    https://docs.pytorch.org/docs/stable/generated/torch.nn.TripletMarginLoss.html
    """

    def distance(x1: jax.Array, x2: jax.Array) -> jax.Array:
        return _pairwise(x1, x2, float(p), eps)

    return _triplet(anchor, positive, negative, distance, margin, swap, reduction)


def triplet_margin_with_distance(
    anchor: Any,
    positive: Any,
    negative: Any,
    *,
    distance_function: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
    margin: float = 1.0,
    swap: bool = False,
    reduction: str = "mean",
) -> jax.Array:
    """`triplet_margin` with a distance of one's own, a JAX function of two arrays; None is torch.nn.PairwiseDistance().

    Optax's has a fixed distance. Raises InputError as triplet_margin does.
    https://docs.pytorch.org/docs/stable/generated/torch.nn.TripletMarginWithDistanceLoss.html
    """
    return _triplet(anchor, positive, negative, distance_function or _pairwise, margin, swap, reduction)
