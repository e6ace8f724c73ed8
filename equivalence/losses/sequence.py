"""Connectionist temporal classification: the likelihood of labels under every alignment with the frames."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from equivalence.losses.arguments import demand, floats, labels, reduced


def ctc(
    log_probs: Any,
    targets: Any,
    input_lengths: Any,
    target_lengths: Any,
    *,
    blank: int = 0,
    zero_infinity: bool = False,
    reduction: str = "mean",
) -> jax.Array:
    """Minus the log-likelihood of the targets, summed over their alignments with the frames.

    Args:
        log_probs: (frames, b, classes) or (frames, classes).
        targets: integers (b, labels), padded by anything, or all rows one after another.
        input_lengths, target_lengths: integers (b,), or () without a batch. With targets one after another, give
            target_lengths as numbers: traced ones cost as if each row had all the labels.
        zero_infinity: rows without any alignment have loss and gradient 0, not inf and nan.

    "mean" divides each loss by its target's length (at least 1), then averages; `optax.ctc_loss` does not, takes
    (b, frames, classes) logits and paddings, and returns about 1e5 where torch returns inf. The gradient is torch's,
    which is not the derivative by log_probs but by the logits under them: exp(log_probs) - posterior. Behind a
    log_softmax both are the same. As in torch it is nan where a log-probability is -inf. A target must not hold the
    blank (torch does not notice, and drops a term of the gradient at the last frame).

    Raises InputError for shapes that do not fit. A label outside the classes makes nan (torch reads foreign memory);
    lengths beyond the arrays, at which torch raises, are not noticed.
    https://docs.pytorch.org/docs/stable/generated/torch.nn.CTCLoss.html
    """
    (x,), y = floats(log_probs), labels(targets)
    demand(x.ndim in (2, 3), f"ctc takes log_probs (frames, b, classes) or (frames, classes), got {x.shape}")
    batched = x.ndim == 3
    x = x if batched else x[:, None]
    demand(0 <= blank < x.shape[2], f"blank must be one of {x.shape[2]} classes, got {blank}")
    frames, lengths = (jnp.atleast_1d(labels(given)) for given in (input_lengths, target_lengths))
    b = (x.shape[1],)
    demand(frames.shape == b == lengths.shape, f"ctc takes {b[0]} lengths each, got {frames.shape} and {lengths.shape}")
    rows = _rows(y, lengths)
    loss = _nll(x, rows, frames, lengths, blank, zero_infinity)
    if reduction == "mean":
        loss = loss / jnp.maximum(lengths, 1).astype(loss.dtype)
    return reduced(loss if batched else loss[0], reduction)


def _rows(targets: jax.Array, lengths: jax.Array) -> jax.Array:
    """The targets as (b, labels)."""
    if targets.ndim == 2:
        demand(targets.shape[0] == lengths.size, f"targets {targets.shape} do not fit a batch of {lengths.size}")
        return targets
    demand(targets.ndim == 1, f"targets must be (b, labels) or one after another, got {targets.shape}")
    width = total = targets.size
    if not isinstance(lengths, jax.core.Tracer):
        total, width = int(lengths.sum()), int(lengths.max(initial=0))
    demand(targets.size == total, f"{targets.size} targets do not fit lengths whose sum is {total}")
    if width == 0:
        return jnp.zeros((lengths.size, 0), targets.dtype)
    index = (jnp.cumsum(lengths) - lengths)[:, None] + jnp.arange(width)
    return targets[jnp.minimum(index, targets.size - 1)]


@functools.partial(jax.custom_jvp, nondiff_argnums=(4, 5))
def _nll(
    x: jax.Array, rows: jax.Array, frames: jax.Array, lengths: jax.Array, blank: int, zero_infinity: bool
) -> jax.Array:
    _, skips, emitted = _lattice(x, rows, lengths, blank)
    loss, _ = _forward(emitted, skips, frames, lengths)
    return jnp.where(jnp.isposinf(loss), 0, loss) if zero_infinity else loss


@_nll.defjvp
def _nll_jvp(blank: int, zero_infinity: bool, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    x, rows, frames, lengths = primals
    states, skips, emitted = _lattice(x, rows, lengths, blank)
    loss, alphas = _forward(emitted, skips, frames, lengths)
    joint = alphas + _backward(emitted, skips, frames, lengths) - emitted
    # where a log-probability is -inf, joint is nan; those states carry no mass, and their classes are nan below
    mass = jnp.where(jnp.isneginf(emitted), 0, jnp.exp(joint + loss[None, :, None]))
    b = jnp.arange(x.shape[1])[None, :, None]
    t = jnp.arange(x.shape[0])[:, None, None]
    posterior = jnp.zeros_like(x).at[t, b, states[None]].add(mass)
    slope = jnp.where(jnp.isneginf(x) | jnp.isposinf(loss)[None, :, None], jnp.nan, jnp.exp(x) - posterior)
    slope = jnp.where(t < frames[None, :, None], slope, 0)
    if zero_infinity:
        infinite = jnp.isposinf(loss)
        slope, loss = jnp.where(infinite[None, :, None], 0, slope), jnp.where(infinite, 0, loss)
    return loss, jnp.sum(slope * tangents[0], axis=(0, 2))


def _lattice(x: jax.Array, rows: jax.Array, lengths: jax.Array, blank: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Labels with blanks between them (b, states), where a blank may be skipped, and their log-probabilities."""
    b, width = rows.shape
    used = jnp.arange(width) < lengths[:, None]
    states = jnp.full((b, 2 * width + 1), blank, rows.dtype).at[:, 1::2].set(jnp.where(used, rows, blank))
    earlier = jnp.pad(states, ((0, 0), (2, 0)), constant_values=blank)[:, :-2]
    skips = (states != earlier) & (jnp.arange(2 * width + 1) >= 2)
    known = (states >= 0) & (states < x.shape[2])
    index = jnp.broadcast_to(jnp.where(known, states, 0), (x.shape[0], *states.shape))
    emitted = jnp.where(known, jnp.take_along_axis(x, index, axis=2), jnp.nan)
    inside = jnp.arange(2 * width + 1) < 2 * lengths[:, None] + 1
    return jnp.where(known, states, 0), skips, jnp.where(inside, emitted, -jnp.inf)


def _summed(*terms: jax.Array) -> jax.Array:
    """log of the sum of exp, -inf where all are."""
    largest = functools.reduce(jnp.maximum, terms)
    safe = jnp.where(jnp.isneginf(largest), 0, largest)
    return jnp.log(sum((jnp.exp(term - safe) for term in terms), jnp.zeros_like(safe))) + safe


def _shifted(values: jax.Array, by: int) -> jax.Array:
    """Values moved along the states, -inf coming in; negative moves the other way."""
    edges = ((0, 0), (by, 0)) if by > 0 else ((0, 0), (0, -by))
    padded = jnp.pad(values, edges, constant_values=-jnp.inf)
    return padded[:, : values.shape[1]] if by > 0 else padded[:, -values.shape[1] :]


# jitted, so that a loss called outside of jit does not compile its scan again
@jax.jit
def _forward(
    emitted: jax.Array, skips: jax.Array, frames: jax.Array, lengths: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Minus the log-likelihood (b,) and the forward variables (frames, b, states)."""
    place = jnp.arange(emitted.shape[2])
    # before the first frame: as if at the state before the first, from where states 0 and 1 can be reached
    start = jnp.broadcast_to(jnp.where(place == 0, 0.0, -jnp.inf).astype(emitted.dtype), emitted.shape[1:])

    def advance(alpha: jax.Array, step: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        t, now = step
        skipped = jnp.where(skips, _shifted(alpha, 2), -jnp.inf)
        moved = _summed(alpha, _shifted(alpha, 1), skipped) + now
        alpha = jnp.where((t < frames)[:, None], moved, alpha)
        return alpha, alpha

    last, alphas = jax.lax.scan(advance, start, (jnp.arange(emitted.shape[0]), emitted))
    end = (place == 2 * lengths[:, None]) | (place == 2 * lengths[:, None] - 1)
    found = jnp.where(end, last, -jnp.inf)
    largest = jnp.max(found, axis=1)
    safe = jnp.where(jnp.isneginf(largest), 0, largest)
    return -(jnp.log(jnp.sum(jnp.exp(found - safe[:, None]), axis=1)) + safe), alphas


@jax.jit
def _backward(emitted: jax.Array, skips: jax.Array, frames: jax.Array, lengths: jax.Array) -> jax.Array:
    """The backward variables (frames, b, states), their own frame's log-probability included."""
    place = jnp.arange(emitted.shape[2])
    ends = (place == 2 * lengths[:, None]) | (place == 2 * lengths[:, None] - 1)
    leaps = jnp.pad(skips, ((0, 0), (0, 2)))[:, 2:]

    def advance(beta: jax.Array, step: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        t, now = step
        leapt = jnp.where(leaps, _shifted(beta, -2), -jnp.inf)
        moved = _summed(beta, _shifted(beta, -1), leapt) + now
        first = jnp.where(ends, now, -jnp.inf)
        beta = jnp.where((t < frames - 1)[:, None], moved, jnp.where((t == frames - 1)[:, None], first, beta))
        return beta, beta

    start = jnp.full(emitted.shape[1:], -jnp.inf, emitted.dtype)
    _, betas = jax.lax.scan(advance, start, (jnp.arange(emitted.shape[0]), emitted), reverse=True)
    return betas
