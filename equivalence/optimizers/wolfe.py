"""The strong Wolfe line search of torch.optim.LBFGS, along one direction, as two `lax.while_loop`s.

Source: https://docs.pytorch.org/docs/stable/generated/torch.optim.LBFGS.html and the installed torch/optim/lbfgs.py.
Differs from `optax.scale_by_zoom_linesearch` (Hager and Zhang's variant, other constants, other initial step): torch
brackets by cubic extrapolation, then zooms, and may end at a step of length 0.

Torch compares Python numbers, where every comparison with NaN is False; so do these, `min` and `max` included.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Array = Any

SUFFICIENT_DECREASE = 1e-4
CURVATURE = 0.9


class Point(NamedTuple):
    """A trial: step length, loss there, gradient there (a tree), slope along the direction."""

    t: Array
    loss: Array
    gradient: Any
    slope: Array


def strong_wolfe(
    evaluate: Callable[[Array], Point], start: Point, t: Array, reach: Array, tolerance_change: Array, max_trials: Array
) -> tuple[Point, Array]:
    """The point that torch's line search settles on, and how often it evaluated the loss.

    Args:
        evaluate: the point at a step length, of the dtypes of `start`.
        start: the point at step length 0.
        t: the first step length to try, of `start.t`'s dtype.
        reach: the largest absolute element of the direction.
        tolerance_change: a bracket shorter than this, measured in parameters, is not refined.
        max_trials: evaluations beyond the first, at least 0.
    """
    bracket, trials, done = _bracket(evaluate, start, t, max_trials)
    zoomed = _zoom(evaluate, start, bracket, trials, done, reach, tolerance_change, max_trials)
    return _row(zoomed.bracket, zoomed.low), zoomed.trials + 1


class _Bracketing(NamedTuple):
    t: Array  # where to evaluate next
    before: Point
    here: Point
    trials: Array
    stop: Array
    done: Array  # `here` meets both conditions
    spent: Array  # stopped by the number of evaluations


def _bracket(
    evaluate: Callable[[Array], Point], start: Point, t: Array, max_trials: Array
) -> tuple[Point, Array, Array]:
    """Walk outwards until two points hold an acceptable one between them, or one is acceptable itself."""

    def body(at: _Bracketing) -> _Bracketing:
        here = evaluate(at.t)
        spent = at.trials >= max_trials
        high = _too_high(here, start) | ((at.trials > 1) & (here.loss >= at.before.loss))
        done = ~spent & ~high & _flat(here, start)
        stop = spent | high | done | (here.slope >= 0)
        further = interpolate(at.before, here, (here.t + 0.01 * (here.t - at.before.t), here.t * 10))
        before = _where(stop, at.before, here)
        return _Bracketing(further, before, here, at.trials + jnp.where(stop, 0, 1), stop, done, spent)

    no, none = jnp.array(False), jnp.zeros((), jnp.int32)
    end = jax.lax.while_loop(lambda at: ~at.stop, body, _Bracketing(t, start, start, none, no, no, no))
    left = _where(end.done, end.here, _where(end.spent, start, end.before))
    return jax.tree.map(lambda a, b: jnp.stack([a, b]), left, end.here), end.trials, end.done


class _Zoom(NamedTuple):
    bracket: Point  # both ends, stacked
    low: Array  # the end with the smaller loss
    trials: Array
    close: Array  # the last trial was close to an end
    done: Array


def _zoom(
    evaluate: Callable[[Array], Point],
    start: Point,
    bracket: Point,
    trials: Array,
    done: Array,
    reach: Array,
    tolerance_change: Array,
    max_trials: Array,
) -> _Zoom:
    """Shrink a bracket until its lower end is acceptable, the bracket tiny or the evaluations used up."""

    def goes_on(at: _Zoom) -> Array:
        tiny = jnp.abs(at.bracket.t[1] - at.bracket.t[0]) * reach < tolerance_change
        return ~at.done & (at.trials < max_trials) & ~tiny

    def body(at: _Zoom) -> _Zoom:
        t, close = _trial(at.bracket, at.close)
        here = evaluate(t)
        low, high = _row(at.bracket, at.low), _row(at.bracket, 1 - at.low)
        worse = _too_high(here, start) | (here.loss >= low.loss)
        done = ~worse & _flat(here, start)
        swaps = ~done & (here.slope * (high.t - low.t) >= 0)
        bracket = _put(at.bracket, 1 - at.low, _where(worse, here, _where(swaps, low, high)))
        bracket = _put(bracket, at.low, _where(worse, low, here))
        return _Zoom(bracket, jnp.where(worse, _lower(bracket), at.low), at.trials + 1, close, done)

    return jax.lax.while_loop(goes_on, body, _Zoom(bracket, _lower(bracket), trials, jnp.array(False), done))


def _trial(bracket: Point, close: Array) -> tuple[Array, Array]:
    """Where to try next: the cubic's minimum, moved off an end that two trials in a row came close to."""
    t = interpolate(_row(bracket, 0), _row(bracket, 1))
    small, large = _min(*bracket.t), _max(*bracket.t)
    margin = 0.1 * (large - small)
    near = _min(large - t, t - small) < margin
    moves = near & (close | (t >= large) | (t <= small))
    moved = jnp.where(jnp.abs(t - large) < jnp.abs(t - small), large - margin, small + margin)
    return jnp.where(moves, moved, t), near & ~moves


def interpolate(a: Point, b: Point, bounds: tuple[Array, Array] | None = None) -> Array:
    """The minimum of the cubic through two points with their slopes, within bounds; their middle where it has none.

    Args:
        a, b: two points, in either order.
        bounds: the smallest and the largest answer; None is between the points.
    """
    left, right = _where(a.t <= b.t, a, b), _where(a.t <= b.t, b, a)
    smallest, largest = (left.t, right.t) if bounds is None else bounds
    kind = left.t.dtype
    mean = left.slope + right.slope - 3 * (left.loss - right.loss).astype(kind) / (left.t - right.t)
    square = mean**2 - left.slope * right.slope
    root = jnp.sqrt(jnp.where(square >= 0, square, 0))
    share = (right.slope + root - mean) / (right.slope - left.slope + 2 * root)
    minimum = right.t - (right.t - left.t) * share
    return jnp.where(square >= 0, _min(_max(minimum, smallest), largest), (smallest + largest) / 2)


def _too_high(here: Point, start: Point) -> Array:
    """Whether the loss has not fallen enough (Armijo), in the gradient's precision as in torch."""
    kind = here.t.dtype
    return here.loss.astype(kind) > start.loss.astype(kind) + SUFFICIENT_DECREASE * here.t * start.slope


def _flat(here: Point, start: Point) -> Array:
    return jnp.abs(here.slope) <= -CURVATURE * start.slope


def _lower(bracket: Point) -> Array:
    return jnp.where(bracket.loss[0] <= bracket.loss[1], 0, 1)


def _min(a: Array, b: Array) -> Array:
    """Python's `min`: the first unless the second is smaller."""
    return jnp.where(b < a, b, a)


def _max(a: Array, b: Array) -> Array:
    return jnp.where(b > a, b, a)


def _where(condition: Array, yes: Point, no: Point) -> Point:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), yes, no)


def _row(bracket: Point, end: Array) -> Point:
    return jax.tree.map(lambda a: a[end], bracket)


def _put(bracket: Point, end: Array, point: Point) -> Point:
    return jax.tree.map(lambda rows, row: rows.at[end].set(row), bracket, point)
