"""torch.optim.LBFGS as an Optax transformation: one update is one whole `optimizer.step(closure)`.

Source: https://docs.pytorch.org/docs/stable/generated/torch.optim.LBFGS.html and the installed torch/optim/lbfgs.py.
Differs from `optax.lbfgs`, whose update is one iteration: torch runs up to `max_iter` of them, takes a first step of
length min(1, 1/|g|_1) * lr, keeps a pair only if y.s > 1e-10, scales by y.s/y.y of the last kept pair, and stops
by five conditions. Inner products run over the whole tree, which is torch's flat vector up to the order of the sum.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from equivalence.errors import InputError
from equivalence.optimizers.wolfe import Point, strong_wolfe

Array = Any
LEAST_CURVATURE = 1e-10
SMALLEST_BRACKET = 1e-9
"""Of the line search; torch's step does not hand its own tolerance_change on."""


class TorchLbfgsState(NamedTuple):
    """Torch's state; a history has a leading axis of `history_size`, oldest first, of which `held` rows are in use."""

    d: Any
    t: Array
    old_dirs: Any
    old_stps: Any
    ro: Array
    al: Array
    H_diag: Array
    prev_grad: Any
    prev_loss: Array
    func_evals: Array
    n_iter: Array
    held: Array


class _Walk(NamedTuple):
    """What one iteration hands to the next."""

    params: Any
    loss: Array
    gradient: Any
    state: TorchLbfgsState
    evals: Array
    iterations: Array
    stop: Array


def scale_by_torch_lbfgs(options: Mapping[str, Any]) -> optax.GradientTransformationExtraArgs:
    """One `torch.optim.LBFGS.step(closure)` an update, number of evaluations included.

    Formula: https://docs.pytorch.org/docs/stable/generated/torch.optim.LBFGS.html.

    `update(gradient, state, params, *, value_fn)` returns the change of the parameters and the new state. `value_fn`,
    from params to a scalar loss, is torch's closure; it must be deterministic. `gradient`, its gradient at `params`, is
    taken as the closure's first call and counted as such; later gradients are taken inside, so that a transformation
    chained before this one (a clip) would see the first only: it belongs into `value_fn`.
    All leaves of `params` are torch's one flat vector: leave out what the torch optimizer does not hold, and stop the
    gradient of what is frozen inside `value_fn`.
    The change is `after - params`: torch's parameters to one rounding of the larger of the two.

    Args:
        options: torch's param group: lr, max_iter, max_eval, tolerance_grad, tolerance_change (numbers, traced ones
            too), history_size, line_search_fn (None or "strong_wolfe").

    Raises InputError for options under which torch itself fails, for a tensor lr with a line search, for parameters
    that are not real floating, and where `params` or `value_fn` is missing.
    """
    _check(options)
    if type(options["lr"]).__module__.startswith("torch"):
        options = {**options, "lr": float(options["lr"])}

    def init(params: Any) -> TorchLbfgsState:
        kind, size = _kind(params), options["history_size"]
        zeros = jax.tree.map(lambda p: jnp.zeros(jnp.shape(p), kind), params)
        rows = jax.tree.map(lambda p: jnp.zeros((size, *jnp.shape(p)), kind), params)
        zero, column, none = jnp.zeros((), kind), jnp.zeros(size, kind), jnp.zeros((), jnp.int32)
        # torch keeps losses as Python floats: float64 wherever jax has it
        loss = jnp.zeros((), jnp.result_type(float))
        return TorchLbfgsState(zeros, zero, rows, rows, column, column, zero, zeros, loss, none, none, none)

    def update(
        gradient: Any, state: TorchLbfgsState, params: Any = None, *, value_fn: Any = None, **extra: Any
    ) -> tuple[Any, TorchLbfgsState]:
        del extra
        if params is None or value_fn is None:
            missing = "params" if params is None else "value_fn"
            raise InputError(f"LBFGS needs {missing}: update(gradient, state, params, value_fn=params -> loss)")
        after, state = _step(options, value_fn, gradient, state, params)
        return jax.tree.map(lambda new, old: new - old, after, params), state

    return optax.GradientTransformationExtraArgs(init, update)


def _check(options: Mapping[str, Any]) -> None:
    search = options["line_search_fn"]
    if search not in (None, "strong_wolfe"):
        raise InputError(f"LBFGS line_search_fn={search!r}: torch has None and 'strong_wolfe' only")
    if options["history_size"] < 1:
        raise InputError(f"LBFGS history_size={options['history_size']}: torch fails on it; take 1 or more")
    evals = options["max_eval"]
    if search and isinstance(evals, int) and evals < 1 <= options["max_iter"]:
        raise InputError(f"LBFGS max_eval={evals} with strong_wolfe: torch fails on it; take 1 or more")
    if search and type(options["lr"]).__module__.startswith("torch"):
        raise InputError(
            "LBFGS lr as a tensor with strong_wolfe: torch searches in the tensor's own precision; give float(lr)"
        )


def _kind(params: Any) -> Any:
    """The dtype of torch's flat vector."""
    kind = jnp.result_type(*jax.tree.leaves(params))
    if not jnp.issubdtype(kind, jnp.floating):
        raise InputError(f"LBFGS parameters of dtype {kind}: torch's are real and floating; split a complex one")
    return kind


def _step(
    options: Mapping[str, Any], value_fn: Any, gradient: Any, state: TorchLbfgsState, params: Any
) -> tuple[Any, TorchLbfgsState]:
    kind = state.t.dtype

    def flat(gradient: Any) -> Any:
        return jax.tree.map(lambda g: g.astype(kind), gradient)

    def evaluate(params: Any) -> tuple[Array, Any]:
        loss, gradient = jax.value_and_grad(value_fn)(params)
        return loss.astype(state.prev_loss.dtype), flat(gradient)

    loss, gradient = jnp.asarray(value_fn(params)).astype(state.prev_loss.dtype), flat(gradient)
    stop = (_largest(gradient) <= options["tolerance_grad"]) | (options["max_iter"] < 1)
    one = jnp.ones((), jnp.int32)
    state = state._replace(func_evals=state.func_evals + 1)
    walk = _Walk(params, loss, gradient, state, one, jnp.zeros_like(one), stop)
    end = jax.lax.while_loop(lambda walk: ~walk.stop, lambda walk: _iterate(options, evaluate, walk), walk)
    return end.params, end.state


def _iterate(options: Mapping[str, Any], evaluate: Callable[[Any], tuple[Array, Any]], walk: _Walk) -> _Walk:
    """One of torch's inner iterations: a direction, a step along it, the conditions to stop."""
    first = walk.state.n_iter == 0
    state = jax.lax.cond(first, _descent, _quasi_newton, walk.state, walk.gradient)
    state = state._replace(
        n_iter=state.n_iter + 1,
        prev_grad=walk.gradient,
        prev_loss=walk.loss,
        t=_first_trial(first, walk.gradient, options["lr"]).astype(state.t.dtype),
    )
    slope = optax.tree_utils.tree_vdot(walk.gradient, state.d)
    walk = walk._replace(state=state, iterations=walk.iterations + 1)
    return jax.lax.cond(
        slope > -options["tolerance_change"],
        lambda walk: walk._replace(stop=jnp.array(True)),
        lambda walk: _advance(options, evaluate, walk, slope),
        walk,
    )


def _advance(
    options: Mapping[str, Any], evaluate: Callable[[Any], tuple[Array, Any]], walk: _Walk, slope: Array
) -> _Walk:
    """Move along the direction and say whether torch would stop there."""
    state, last = walk.state, walk.iterations == options["max_iter"]
    if options["line_search_fn"] is None:
        params, t = _moved(walk.params, state.t, state.d), state.t
        # what torch leaves out in its last iteration is not evaluated here either
        loss, gradient = jax.lax.cond(last, lambda _: (walk.loss, walk.gradient), evaluate, params)
        used = jnp.where(last, 0, 1)
    else:

        def trial(t: Array) -> Point:
            loss, gradient = evaluate(_moved(walk.params, t, state.d))
            return Point(t, loss, gradient, optax.tree_utils.tree_vdot(gradient, state.d))

        start = Point(jnp.zeros_like(state.t), walk.loss, walk.gradient, slope)
        most = options["max_eval"] - walk.evals
        found, used = strong_wolfe(trial, start, state.t, _largest(state.d), SMALLEST_BRACKET, most)
        params, t, loss, gradient = _moved(walk.params, found.t, state.d), found.t, found.loss, found.gradient
    state = state._replace(t=t, func_evals=state.func_evals + used)
    walk = walk._replace(params=params, loss=loss, gradient=gradient, state=state, evals=walk.evals + used)
    return walk._replace(stop=last | _stops(options, walk))


def _stops(options: Mapping[str, Any], walk: _Walk) -> Array:
    """Out of evaluations, gradient small, parameters hardly moved, or loss hardly moved."""
    state, tolerance = walk.state, options["tolerance_change"]
    return (
        (walk.evals >= options["max_eval"])
        | (_largest(walk.gradient) <= options["tolerance_grad"])
        | (_largest(jax.tree.map(lambda d: d * state.t, state.d)) <= tolerance)
        | (jnp.abs(walk.loss - state.prev_loss) < tolerance)
    )


def _first_trial(first: Array, gradient: Any, lr: Array) -> Array:
    """The step length to try: lr, shortened in the very first iteration for a gradient longer than 1."""
    inverse = 1 / sum(jnp.sum(jnp.abs(g)) for g in jax.tree.leaves(gradient))
    # Python's min: 1 where the inverse is NaN
    return jnp.where(first & (inverse < 1), inverse, 1) * lr


def _descent(state: TorchLbfgsState, gradient: Any) -> TorchLbfgsState:
    return state._replace(d=jax.tree.map(jnp.negative, gradient), H_diag=jnp.ones_like(state.H_diag))


def _quasi_newton(state: TorchLbfgsState, gradient: Any) -> TorchLbfgsState:
    """Keep the last step if its curvature is positive, then the two-loop recursion."""
    y = jax.tree.map(jnp.subtract, gradient, state.prev_grad)
    s = jax.tree.map(lambda d: d * state.t, state.d)
    curvature = optax.tree_utils.tree_vdot(y, s)
    state = jax.lax.cond(curvature > LEAST_CURVATURE, _remember, lambda state, *_: state, state, y, s, curvature)

    def older(i: Array, carry: tuple[Any, Array]) -> tuple[Any, Array]:
        q, al = carry
        row = state.held - 1 - i
        share = optax.tree_utils.tree_vdot(_row(state.old_stps, row), q) * state.ro[row]
        return _moved(q, -share, _row(state.old_dirs, row)), al.at[row].set(share)

    def newer(row: Array, r: Any) -> Any:
        share = optax.tree_utils.tree_vdot(_row(state.old_dirs, row), r) * state.ro[row]
        return _moved(r, al[row] - share, _row(state.old_stps, row))

    q, al = jax.lax.fori_loop(0, state.held, older, (jax.tree.map(jnp.negative, gradient), state.al))
    r = jax.tree.map(lambda q: q * state.H_diag, q)
    return state._replace(d=jax.lax.fori_loop(0, state.held, newer, r), al=al)


def _remember(state: TorchLbfgsState, y: Any, s: Any, curvature: Array) -> TorchLbfgsState:
    """Append a pair; a full history loses its oldest."""
    size = state.ro.shape[0]
    row, full = jnp.minimum(state.held, size - 1), state.held == size

    def append(rows: Array, new: Array) -> Array:
        return jnp.where(full, jnp.roll(rows, -1, 0), rows).at[row].set(new)

    return state._replace(
        old_dirs=jax.tree.map(append, state.old_dirs, y),
        old_stps=jax.tree.map(append, state.old_stps, s),
        ro=append(state.ro, 1 / curvature),
        H_diag=curvature / optax.tree_utils.tree_vdot(y, y),
        held=row + 1,
    )


def _moved(tree: Any, t: Array, direction: Any) -> Any:
    return jax.tree.map(lambda x, d: (x + t * d).astype(x.dtype), tree, direction)


def _row(tree: Any, row: Array) -> Any:
    return jax.tree.map(lambda rows: rows[row], tree)


def _largest(tree: Any) -> Array:
    """The largest absolute element; NaN if there is one."""
    return jnp.max(jnp.stack([jnp.max(jnp.abs(leaf), initial=0) for leaf in jax.tree.leaves(tree)]))
