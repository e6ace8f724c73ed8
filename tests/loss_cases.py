"""Every loss with the calls and arrays its tests share: a call is one expression, evaluated on both sides.

All calls of a loss are one jitted program a precision, so that Hypothesis can draw many values for few compilations.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from equivalence import losses
from equivalence.runtimes.jax import environment
from tests.agreement import Arrays, Side
from tests.loss_arrays import (
    Drawn,
    Rng,
    apart,
    binary,
    classes,
    counts,
    divergences,
    layer,
    log_classes,
    logistic,
    normals,
    pair,
    probabilities,
    ranked,
    scores,
    sequences,
    signs,
    triplets,
    vectors,
)

COTANGENT = 256


@dataclass(frozen=True)
class Case:
    """A loss: torch's functional, the arrays of a kind, expressions with `loss`, and what torch has gradients by.

    `scale` 1 is that of slopes which are differences of two shares, logarithms or directions, however little is left.
    """

    functional: str
    draw: Callable[[Rng, str], Drawn]
    calls: tuple[str, ...]
    moving: tuple[str, ...] = ("x", "y")
    scale: float = 0.0


RANKS = tuple(f"loss(x{i}, y{i}, reduction='none')" for i in ("", "[0]", "[0, 0]", "[0, 0, 0]", "[0, 0, 0, 0]"))
WHOLE = ("loss(x, y)", "loss(x[0, 0], y[0, 0], reduction='sum')")
BROAD = ("loss(x[0], y[1, :1], reduction='none')", "loss(x[0, :, :1], y[1])")
DEEP = ("x", "y"), ("x[:, :, 0]", "y[:, 0]"), ("x[:, :, 0, 0]", "y[:, 0, 0]"), ("x[0, :, 0, 0]", "y[0, 0, 0]")
WAYS = ("", "mean"), (", weight=w", "mean"), ("", "sum"), (", weight=w", "none"), (", weight=w", "sum"), ("", "none")
BY_CLASS = tuple(
    f"loss({x}, {y}{weight}, ignore_index=-1, reduction='{reduction}')"
    for (x, y), (weight, reduction) in [*zip(DEEP, WAYS, strict=False), *zip(DEEP, WAYS[2:], strict=True)]
)
SMOOTH = tuple(call.replace(", reduction", ", label_smoothing=0.2, reduction") for call in BY_CLASS[::2])
SOFT = (
    "loss(x, s)",
    "loss(x[:, :, 0], s[:, :, 0], weight=w, reduction='sum')",
    "loss(x[:, :, 0, 0], s[:, :, 0, 0], weight=w, label_smoothing=0.3)",
    "loss(x[0, :, 0, 0], s[0, :, 0, 0], reduction='none')",
)
TRIPLET = tuple(
    f"loss(a, p, n, p={p}, eps={eps}, reduction='none')" for p, eps in ((2, 1e-6), (2, 0), (1, 0), ("INF", 0))
)
NORMS = tuple(f"loss(a, p, n, p={p}, eps={eps}, reduction='none')" for p, eps in ((3, 0), (0.5, 0.1), (1.5, 0)))
SWAP = "loss(a, p, n, margin=0.5, swap=True, reduction='none')"
SQUARES = "distance_function=lambda u, v: ((u - v) ** 2).sum(-1)"

CASES: dict[str, Case] = {
    "l1": Case("l1_loss", pair, (*RANKS, *WHOLE, *BROAD)),
    "mse": Case("mse_loss", pair, (*RANKS, *WHOLE, *BROAD)),
    "smooth_l1": Case(
        "smooth_l1_loss",
        pair,
        (*RANKS, *WHOLE, *BROAD, *(f"loss(x, y, beta={b}, reduction='none')" for b in (0, 0.5, 2))),
    ),
    "huber": Case(
        "huber_loss", pair, (*RANKS, *WHOLE, *BROAD, *(f"loss(x, y, delta={d}, reduction='none')" for d in (0.5, 2)))
    ),
    "poisson_nll": Case(
        "poisson_nll_loss",
        counts,
        (
            *RANKS[::2],
            *WHOLE,
            *BROAD[:1],
            "loss(x, y, full=True, reduction='none')",
            *tuple(f"loss(r, y, log_input=False, full={full}, eps=1e-3, reduction='none')" for full in (True, False)),
        ),
        ("x", "y", "r"),
    ),
    "gaussian_nll": Case(
        "gaussian_nll_loss",
        normals,
        (
            "loss(x, y, v)",
            "loss(x, y, v, reduction='none')",
            "loss(x, y, v[:, :, :1], full=True, reduction='none')",
            "loss(x, y, v[:, :, 0], eps=0.5, reduction='none')",
            "loss(x, y, v[:, :1], reduction='sum')",
            "loss(x, y, 2.0, reduction='none')",
            "loss(x[0], y[0], 1e-9)",
        ),
        ("x", "y", "v"),
    ),
    "kl_div": Case(
        "kl_div",
        divergences,
        (
            *RANKS[::2],
            *WHOLE,
            *BROAD[:1],
            "loss(x, y, reduction='batchmean')",
            "loss(x[0, 0, 0, 0], y[0, 0, 0, 0], reduction='batchmean')",
            "loss(x, y, log_target=True, reduction='none')",
        ),
    ),
    "bce": Case(
        "binary_cross_entropy",
        probabilities,
        (*RANKS, *WHOLE, "loss(x, y, weight=w, reduction='none')", "loss(x, y, weight=w)"),
        scale=1.0,
    ),
    "bce_with_logits": Case(
        "binary_cross_entropy_with_logits",
        binary,
        (
            *RANKS,
            *WHOLE,
            "loss(x, y, weight=w, pos_weight=v, reduction='none')",
            "loss(x, y, weight=w)",
            "loss(x, y, pos_weight=v[0])",
            "loss(x, y, pos_weight=v, reduction='none')",
        ),
    ),
    "soft_margin": Case("soft_margin_loss", logistic, (*RANKS, *WHOLE, *BROAD[:1]), ("x",)),
    "multi_label_soft_margin": Case(
        "multilabel_soft_margin_loss",
        binary,
        (*RANKS[:4], *WHOLE, "loss(x, y, weight=w, reduction='none')", "loss(x, y, weight=v[0])"),
        ("x", "y", "w"),
        1.0,
    ),
    "nll": Case("nll_loss", log_classes, BY_CLASS, ("x",)),
    "cross_entropy": Case("cross_entropy", classes, (*BY_CLASS, *SMOOTH), ("x",), 1.0),
    "cross_entropy, probabilities": Case("cross_entropy", classes, SOFT, ("x", "s", "w"), 1.0),
    "margin_ranking": Case(
        "margin_ranking_loss",
        ranked,
        (
            "loss(a, b, y)",
            "loss(a, b, y, margin=0.5, reduction='none')",
            "loss(a, b, y, margin=-1, reduction='sum')",
            "loss(a[0, 0], b[0, 0], y[0, 0], reduction='none')",
            "loss(a[0, 0, 0], b[0, 0, 0], y[0, 0, 0])",
            "loss(a, b[:1], y[:, :, :1], margin=0.5, reduction='none')",
        ),
        ("a", "b", "y"),
    ),
    "hinge_embedding": Case(
        "hinge_embedding_loss", signs, (*RANKS, *WHOLE, *BROAD[:1], "loss(x, y, margin=2, reduction='none')"), ("x",)
    ),
    "multi_margin": Case(
        "multi_margin_loss",
        scores,
        (
            *tuple(f"loss(x, y, p={p}, margin={m}, reduction='{r}')" for p, m, r in ((1, 1, "none"), (2, 0.5, "none"))),
            "loss(x, y, weight=w)",
            "loss(x, y, p=2, weight=w, reduction='sum')",
            "loss(x[0], y[0], reduction='none')",
            "loss(x[0], y[:1], reduction='none')",
        ),
        ("x",),
    ),
    "multi_label_margin": Case(
        "multilabel_margin_loss",
        scores,
        (
            "loss(x, l)",
            "loss(x, l, reduction='sum')",
            "loss(x, l, reduction='none')",
            "loss(x[0], l[0], reduction='none')",
        ),
        ("x",),
    ),
    "cosine_embedding": Case(
        "cosine_embedding_loss",
        vectors,
        (
            "loss(a, b, y)",
            *(f"loss(a, b, y, margin={m}, reduction='none')" for m in (0, 0.5, -0.5)),
            "loss(a[0], b[0], y[0], reduction='none')",
        ),
        ("a", "b"),
        1.0,
    ),
    "triplet_margin": Case(
        "triplet_margin_loss",
        triplets,
        (
            *TRIPLET,
            "loss(a, p, n)",
            "loss(a, p, n, p=1, eps=0, margin=0.5, swap=True, reduction='none')",
            "loss(a, p[:1], n, reduction='sum')",
            "loss(a[0], p[0], n[0], reduction='none')",
        ),
        ("a", "p", "n"),
        1.0,
    ),
    "triplet_margin, other norms": Case("triplet_margin_loss", apart, (*NORMS, SWAP), ("a", "p", "n"), 1.0),
    "triplet_margin_with_distance": Case(
        "triplet_margin_with_distance_loss",
        triplets,
        ("loss(a, p, n)", f"loss(a, p, n, {SQUARES}, reduction='sum')", f"loss(a, p, n, {SQUARES}, swap=True)"),
        ("a", "p", "n"),
        1.0,
    ),
    "triplet_margin_with_distance, torch's own": Case(
        "triplet_margin_with_distance_loss", apart, (SWAP,), ("a", "p", "n"), 1.0
    ),
    "ctc": Case(
        "ctc_loss",
        sequences,
        (
            "loss(x, y, t, s)",
            "loss(x, y, t, s, reduction='none')",
            "loss(x, y, t, s, zero_infinity=True, reduction='sum')",
            "loss(x, y - 1, t, s, blank=4, reduction='none')",
            "loss(x[:, 0], y[0], (6,), (4,))",
            "loss(x, y[:, :2].reshape(-1), (7, 5, 6), (2, 3, 1), reduction='none')",
        ),
        ("x",),
    ),
    "linear_cross_entropy": Case(
        "linear_cross_entropy",
        layer,
        (
            "loss(x, w[:, 0], y[:, 0])",
            "loss(x, w, y, linear_bias=b, weight=v, ignore_index=1, label_smoothing=0.1)",
            "loss(x[0], w[:, 1], y[0, 0], linear_bias=b[:, 1], reduction='none')",
        ),
        ("x", "w", "b"),
        1.0,
    ),
}


def value_of(call: str, loss: Any, arrays: Any) -> Any:
    """The loss that a call computes."""
    return eval(call, {"loss": loss, "INF": float("inf"), **arrays})


def weighed(value: Any, cotangent: Any) -> Any:
    """One number of a loss of any shape."""
    flat = value.reshape(-1)
    return (flat * cotangent[: flat.shape[0]]).sum()


def torch_side(case: Case, calls: tuple[str, ...]) -> Side:
    loss = getattr(torch.nn.functional, case.functional)

    def run(bits: int, arrays: Arrays) -> Arrays:
        found: Drawn = {}
        for call in calls:
            tensors = {k: torch.tensor(v, requires_grad=k in case.moving) for k, v in arrays.items()}
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of broadcasting, and of kl_div's default
                value = value_of(call, loss, tensors)
            weighed(value, tensors["cotangent"]).backward()
            found[call] = value.detach().numpy()
            for name in case.moving:
                slope = tensors[name].grad
                found[f"{call} by {name}"] = np.zeros_like(arrays[name]) if slope is None else slope.numpy()
        return found

    return run


def jax_side(case: Case, calls: tuple[str, ...], loss: Any) -> Side:
    @functools.partial(jax.jit, static_argnames="bits")
    def program(arrays: Any, bits: int) -> Any:
        found = {}
        for call in calls:

            def scalar(moving: Any, call: str = call) -> Any:
                value = value_of(call, loss, {**arrays, **moving})
                return weighed(value, arrays["cotangent"]), value

            moving = {name: arrays[name] for name in case.moving}
            slopes, value = jax.grad(scalar, has_aux=True)(moving)
            found[call] = value
            found |= {f"{call} by {name}": slope for name, slope in slopes.items()}
        return found

    def run(bits: int, arrays: Arrays) -> Arrays:
        with environment(bits):
            found = program({k: jnp.asarray(v) for k, v in arrays.items()}, bits)
            return {k: np.asarray(v) for k, v in found.items()}

    return run


@functools.cache
def sides(name: str) -> tuple[Side, Side]:
    """Both sides of a case, all its calls; compiled once a process."""
    case = CASES[name]
    return torch_side(case, case.calls), jax_side(case, case.calls, getattr(losses, name.partition(",")[0]))


def drawn(name: str, kind: str, seed: int) -> Drawn:
    """The arrays of a case, and a cotangent."""
    rng = np.random.default_rng(seed)
    return {**CASES[name].draw(rng, kind), "cotangent": rng.standard_normal(COTANGENT)}
