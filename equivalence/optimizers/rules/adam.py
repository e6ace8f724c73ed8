"""Adam, AdamW, Adamax, SparseAdam: https://docs.pytorch.org/docs/stable/optim.html#algorithms"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from equivalence.errors import InputError
from equivalence.optimizers.rules.common import (
    STEP,
    Options,
    Rule,
    Slot,
    add_decoupled_decay,
    descend,
    gradient_of,
    lerp,
    like,
    mean_square,
    one_minus_power,
    zeros,
)


def scale_by_torch_adam(
    b1: Any = 0.9, b2: float = 0.999, eps: float = 1e-8, amsgrad: bool = False
) -> optax.GradientTransformation:
    """Adam's direction as torch computes it, in Optax's state.

    Differs from `optax.scale_by_adam` in float32 only: the bias corrections keep float64's accuracy (Optax's second
    one is off by 2e-5 of itself at the first steps). Differs from `optax.scale_by_amsgrad` in both precisions: torch
    takes the maximum of the second moments as they are and corrects the bias afterwards, Optax corrects first.

    Args:
        b1, b2: decay of the first and second moment; b1 may be traced.
        eps: added to the root of the second moment after its bias is corrected.
        amsgrad: divide by the largest second moment so far.
    """

    def init(params: Any) -> Any:
        kind = optax.ScaleByAmsgradState if amsgrad else optax.ScaleByAdamState
        return kind(jnp.zeros([], jnp.int32), *zeros(params, 3 if amsgrad else 2))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        count = optax.safe_increment(state.count)
        mu = jax.tree.map(lambda m, g: lerp(m, g, 1 - b1), state.mu, updates)
        nu = jax.tree.map(lambda v, g: mean_square(v, g, b2), state.nu, updates)
        largest = jax.tree.map(jnp.maximum, state.nu_max, nu) if amsgrad else nu
        first, root = one_minus_power(b1, count), jnp.sqrt(one_minus_power(b2, count))

        def direction(m: jax.Array, v: jax.Array) -> jax.Array:
            return m / like(first, m) / (jnp.sqrt(v) / like(root, v) + eps)

        after = state._replace(count=count, mu=mu, nu=nu, **({"nu_max": largest} if amsgrad else {}))
        return jax.tree.map(direction, mu, largest), after

    return optax.GradientTransformation(init, update)


def _moments(options: Options) -> dict[str, Slot]:
    slots = STEP | {"exp_avg": Slot("mu", "moment"), "exp_avg_sq": Slot("nu", "moment")}
    return slots | ({"max_exp_avg_sq": Slot("nu_max", "moment")} if options.get("amsgrad") else {})


def adam(options: Options) -> optax.GradientTransformation:
    """torch.optim.Adam, whose weight decay is added to the gradient unless `decoupled_weight_decay`."""
    decoupled = bool(options.get("decoupled_weight_decay"))
    b1, b2 = options["betas"]
    return optax.chain(
        *gradient_of(options, decay=not decoupled),
        scale_by_torch_adam(b1, b2, options["eps"], bool(options.get("amsgrad"))),
        add_decoupled_decay(options["weight_decay"] if decoupled else 0),
        descend(options["lr"]),
    )


def adamw(options: Options) -> optax.GradientTransformation:
    """torch.optim.AdamW: Adam with decoupled weight decay, 1e-2 unless said (`optax.adamw`: 1e-4)."""
    return adam({**options, "decoupled_weight_decay": True})


def scale_by_torch_adamax(b1: Any = 0.9, b2: float = 0.999, eps: float = 1e-8) -> optax.GradientTransformation:
    """Adamax's direction; `optax.scale_by_adamax` with a bias correction that float32 does not cancel."""

    def init(params: Any) -> Any:
        return optax.ScaleByAdamState(jnp.zeros([], jnp.int32), *zeros(params, 2))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        count = optax.safe_increment(state.count)
        mu = jax.tree.map(lambda m, g: lerp(m, g, 1 - b1), state.mu, updates)
        nu = jax.tree.map(lambda v, g: jnp.maximum(b2 * v, jnp.abs(g) + eps), state.nu, updates)
        first = one_minus_power(b1, count)
        direction = jax.tree.map(lambda m, v: m / like(first, m) / v, mu, nu)
        return direction, optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformation(init, update)


def adamax(options: Options) -> optax.GradientTransformation:
    """torch.optim.Adamax; eps is added to every gradient's size, not to the maximum."""
    b1, b2 = options["betas"]
    return optax.chain(*gradient_of(options), scale_by_torch_adamax(b1, b2, options["eps"]), descend(options["lr"]))


def scale_by_torch_sparse_adam(
    b1: Any = 0.9, b2: float = 0.999, eps: float = 1e-8
) -> optax.GradientTransformationExtraArgs:
    """SparseAdam's direction: the rows that the gradient held move, with their moments; the others stay as they are.

    Differs from Adam also on the rows that move: eps is added before the second moment's bias is corrected. `update`
    takes `rows`, a boolean array over a leaf's first axis (a tree of them for a tree): which rows torch's sparse
    gradient holds. A row held with a zero gradient is not a row left out: its moments decay.

    Raises InputError where `rows` is missing or does not run over the first axis.
    """

    def init(params: Any) -> Any:
        return optax.ScaleByAdamState(jnp.zeros([], jnp.int32), *zeros(params, 2))

    def update(
        updates: Any, state: Any, params: Any = None, *, rows: Any = None, **extra: Any
    ) -> tuple[Any, optax.ScaleByAdamState]:
        if rows is None:
            raise InputError("SparseAdam needs rows=: which rows of the parameter torch's sparse gradient holds")
        count = optax.safe_increment(state.count)
        held = jax.tree.map(_over_rows, rows, updates)
        mu = jax.tree.map(lambda m, g, h: jnp.where(h, m + (1 - b1) * (g - m), m), state.mu, updates, held)
        nu = jax.tree.map(lambda v, g, h: jnp.where(h, v + (1 - b2) * (g * g - v), v), state.nu, updates, held)
        size = jnp.sqrt(one_minus_power(b2, count)) / one_minus_power(b1, count)
        direction = jax.tree.map(
            lambda m, v, h: jnp.where(h, like(size, m) * (m / (jnp.sqrt(v) + eps)), 0), mu, nu, held
        )
        return direction, optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformationExtraArgs(init, update)


def _over_rows(rows: Any, leaf: jax.Array) -> jax.Array:
    held = jnp.asarray(rows, bool)
    if held.ndim != 1 or held.shape != leaf.shape[:1]:
        raise InputError(
            f"SparseAdam: rows= has shape {held.shape} for a leaf of shape {leaf.shape}; it runs over the first axis,"
            " for a torch gradient sparse in more axes (sparse_dim > 1) moves single elements"
        )
    return held.reshape(held.shape + (1,) * (leaf.ndim - 1))


def sparse_adam(options: Options) -> optax.GradientTransformationExtraArgs:
    """torch.optim.SparseAdam for a gradient sparse in its first axis, as nn.Embedding(sparse=True) makes it."""
    b1, b2 = options["betas"]
    return optax.chain(
        *gradient_of(options, decay=False),
        scale_by_torch_sparse_adam(b1, b2, options["eps"]),
        descend(options["lr"]),
    )


def _sparse(options: Options) -> dict[str, Slot]:
    return _moments(options) | {"step": Slot("count", "count", python=True)}


RULES = {
    "Adam": Rule("Adam", adam, _moments),
    "AdamW": Rule("AdamW", adamw, _moments),
    "Adamax": Rule(
        "Adamax", adamax, lambda _: STEP | {"exp_avg": Slot("mu", "moment"), "exp_inf": Slot("nu", "moment")}
    ),
    "SparseAdam": Rule("SparseAdam", sparse_adam, _sparse, needs_rows=True),
}
