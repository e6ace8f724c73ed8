"""Distances between two inputs: CosineSimilarity and PairwiseDistance."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from equivalence.layers.form import Carrier, Form
from equivalence.layers.registry import Example, layer
from equivalence.losses.arguments import floats
from equivalence.losses.kinks import clamped_straight_through, norm

Inside = Callable[[Any], Form]


@layer(
    "CosineSimilarity",
    Example("nn.CosineSimilarity(dim=1, eps=0.5)", ((4, 5), (4, 5))),
    "each length is clamped at eps on its own, in value but not in slope; a zero vector has a finite gradient, which"
    " optax.cosine_similarity makes nan",
)
def cosine_similarity_form(module: Any, inside: Inside) -> Form:
    """nn.CosineSimilarity."""
    dim, eps = module.dim, module.eps

    def call(m: Carrier, x1: Any, x2: Any) -> jax.Array:
        return cosine_similarity(x1, x2, axis=dim, eps=eps)

    return Form("CosineSimilarity", call, text=f"cosine_similarity(x1, x2, axis={dim}, eps={eps})")


@layer(
    "PairwiseDistance",
    Example("nn.PairwiseDistance(p=2.0, eps=0.5)", ((4, 5), (4, 5))),
    "eps is added to every difference before the norm, so that equal vectors are sqrt(n) eps apart; where the norm is 0"
    " its gradient is 0 (jnp.linalg.norm: nan)",
)
def pairwise_distance_form(module: Any, inside: Inside) -> Form:
    """nn.PairwiseDistance."""
    p, eps, keep = float(module.norm), module.eps, module.keepdim

    def call(m: Carrier, x1: Any, x2: Any) -> jax.Array:
        return pairwise_distance(x1, x2, p=p, eps=eps, keepdims=keep)

    text = f"jnp.linalg.norm(x1 - x2 + {eps}, ord={p}, axis=-1, keepdims={keep})"
    return Form("PairwiseDistance", call, text=text)


def cosine_similarity(x1: Any, x2: Any, *, axis: int = 1, eps: float = 1e-8) -> jax.Array:
    """The cosine of the angle between vectors along `axis`, of arrays that broadcast.

    Each length is at least eps, a clamp through which gradients pass as if it were not there.
    https://docs.pytorch.org/docs/stable/generated/torch.nn.CosineSimilarity.html
    """
    x1, x2 = (jnp.moveaxis(x, axis, -1) for x in jnp.broadcast_arrays(*floats(x1, x2)))
    first, second = (x / clamped_straight_through(norm(x, 2.0), eps)[..., None] for x in (x1, x2))
    return jnp.sum(first * second, axis=-1)


def pairwise_distance(x1: Any, x2: Any, *, p: float = 2.0, eps: float = 1e-6, keepdims: bool = False) -> jax.Array:
    """The p-norm of x1 - x2 + eps over the last axis, of arrays that broadcast.

    https://docs.pytorch.org/docs/stable/generated/torch.nn.PairwiseDistance.html
    """
    x1, x2 = floats(x1, x2)
    distance = norm(x1 - x2 + eps, p)
    return distance[..., None] if keepdims else distance
