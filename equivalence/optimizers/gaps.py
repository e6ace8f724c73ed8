"""How far a form of a torch optimizer or scheduler is from torch's, on a small fixed problem in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch

from equivalence.numerics import U64, ulp_twin
from equivalence.optimizers.rules.table import OptimizerRow
from equivalence.optimizers.schedule_table import LR, SchedulerRow
from equivalence.optimizers.schedules import to_schedule
from equivalence.optimizers.translate import rule_of, to_optax
from equivalence.runtimes import jax as jax_runtime
from equivalence.runtimes import torch_environment

Arrays = Mapping[str, np.ndarray]

SHAPES: dict[str, tuple[int, ...]] = {"kernel": (7, 5), "embedding": (4, 3), "bias": (11,)}
STEPS = 50
CLOSURE_STEPS = 3
"""Steps where torch asks for a closure and takes many inside each: so few that it has not arrived everywhere."""

COUNTS = 120
"""Counts at which schedules are compared."""


def optimizer_gap(row: OptimizerRow, form: str | None = None) -> tuple[float, float]:
    """The distance between the parameters that torch and `form` end with, and what rounding explains of it.

    Args:
        row: of the table of optimizers.
        form: an Optax expression; None takes ours, `to_optax`.

    Both are relative to the distance that torch went. Rounding: at every step of every parameter, once, the same way;
    where torch asks for a closure, what becomes of moving its start by one ulp, if that is more.
    Gradients are random, of another scale at every step, and the same on both sides; SparseAdam's hold half of the
    rows; LBFGS, which wants a closure, goes down a loss instead.
    """
    with torch_environment.environment(64, threads=1), jax_runtime.environment(64):
        rule = rule_of(row.make([torch.nn.Parameter(torch.zeros(1, 1))]))
        start, gradients, rows = _problem(matrices_only=rule.name == "Muon", sparse=rule.needs_rows)
        model = _model(start)
        optimizer = row.make(model.parameters())
        if form is None:
            port = to_optax(optimizer, model=model)
        else:
            port = optax.with_extra_args_support(eval(form, {"optax": optax, "jnp": jnp}))
        noise = 0.0
        if rule.whole:
            theirs, ours = _closed(optimizer, model), _closed_port(port, start)
            twin = _model({leaf: ulp_twin(value, np.random.default_rng(2), 2 * U64) for leaf, value in start.items()})
            noise = _apart(theirs, _closed(row.make(twin.parameters()), twin))
        else:
            theirs, ours = _stepped(optimizer, model, gradients, rows), _stepped_port(port, start, gradients, rows)
    travel = _apart(theirs, start)
    return _apart(theirs, ours) / travel, max(U64 * STEPS * _norm(start), noise) / travel


def _model(start: Arrays) -> Any:
    return torch.nn.ParameterDict({leaf: torch.tensor(value) for leaf, value in start.items()})


def _apart(one: Arrays, other: Arrays) -> float:
    return _norm({leaf: value - other[leaf] for leaf, value in one.items()})


def _norm(leaves: Arrays) -> float:
    return math.sqrt(sum(float(np.square(value).sum()) for value in leaves.values()))


def _problem(matrices_only: bool, sparse: bool) -> tuple[Arrays, Arrays, Arrays]:
    """Parameters, gradients of all steps, and where `sparse` the rows that each holds: the others are zero."""
    rng = np.random.default_rng(0)
    shapes = {leaf: shape for leaf, shape in SHAPES.items() if len(shape) == 2 or not matrices_only}
    scales = 10 ** rng.uniform(-2, 1, STEPS)
    start = {leaf: rng.standard_normal(shape) for leaf, shape in shapes.items()}
    gradients = {
        leaf: rng.standard_normal((STEPS, *shape)) * scales.reshape(-1, *(1 for _ in shape))
        for leaf, shape in shapes.items()
    }
    if not sparse:
        return start, gradients, {}
    rows = {leaf: rng.random((STEPS, shape[0])) < 0.5 for leaf, shape in shapes.items()}
    for leaf, held in rows.items():
        gradients[leaf][~held] = 0
    return start, gradients, rows


def _stepped(optimizer: Any, model: Any, gradients: Arrays, rows: Arrays) -> Arrays:
    for step in range(STEPS):
        for leaf, parameter in model.items():
            parameter.grad = torch.tensor(gradients[leaf][step])
            if rows:
                held = torch.tensor(np.flatnonzero(rows[leaf][step]))
                parameter.grad = torch.sparse_coo_tensor(
                    held[None], parameter.grad[held], parameter.shape, check_invariants=True
                )
        optimizer.step()
    return _values(model)


def _stepped_port(port: Any, start: Arrays, gradients: Arrays, rows: Arrays) -> Arrays:
    @jax.jit
    def step(params: Any, state: Any, gradient: Any, held: Any) -> Any:
        given = {"received": held} if rows else {}
        changes, state = port.update(gradient, state, params, **given)
        return optax.apply_updates(params, changes), state

    params: Any = {leaf: jnp.asarray(value) for leaf, value in start.items()}
    state = port.init(params)
    for number in range(STEPS):
        now = ({leaf: jnp.asarray(value[number]) for leaf, value in given.items()} for given in (gradients, rows))
        params, state = step(params, state, *now)
    return {leaf: np.asarray(value) for leaf, value in params.items()}


def _closed(optimizer: Any, model: Any) -> Arrays:
    loss = _loss(torch.tensor)

    def closure() -> Any:
        optimizer.zero_grad()
        value = loss(dict(model.items()))
        value.backward()
        return value

    for _ in range(CLOSURE_STEPS):
        optimizer.step(closure)
    return _values(model)


def _closed_port(port: Any, start: Arrays) -> Arrays:
    loss = _loss(jnp.asarray)

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        changes, state = port.update(jax.grad(loss)(params), state, params, value_fn=loss)
        return optax.apply_updates(params, changes), state

    params: Any = {leaf: jnp.asarray(value) for leaf, value in start.items()}
    state = port.init(params)
    for _ in range(CLOSURE_STEPS):
        params, state = step(params, state)
    return {leaf: np.asarray(value) for leaf, value in params.items()}


def _loss(array: Callable[[np.ndarray], Any]) -> Callable[[Mapping[str, Any]], Any]:
    """A smooth loss with one minimum, steep along some elements and flat along others."""
    rng = np.random.default_rng(1)
    steep = {leaf: array(10 ** rng.uniform(-2, 1, shape)) for leaf, shape in SHAPES.items()}
    return lambda params: sum((steep[leaf] * value**2 + value**4).sum() for leaf, value in params.items())


def _values(model: Any) -> Arrays:
    return {leaf: parameter.detach().numpy().copy() for leaf, parameter in model.items()}


def schedule_gap(row: SchedulerRow, form: str | None = None) -> tuple[float, float]:
    """The largest difference between torch's rates and those of `form`, and what rounding explains of it.

    Args:
        row: of the table of schedulers.
        form: an Optax schedule; None takes ours, `to_schedule`, and `to_optax` for what follows a metric.

    Both are relative to the largest rate; torch goes from rate to rate, and may round at each.
    """
    with torch_environment.environment(64, threads=1), jax_runtime.environment(64):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=LR, momentum=0.9)
        scheduler = row.make(optimizer)
        if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            ours = _plateau_rates(to_optax(optimizer, scheduler=scheduler))
        else:
            schedule = to_schedule(scheduler) if form is None else eval(form, {"optax": optax, "jnp": jnp})
            ours = _schedule_rates(schedule)
        theirs = _torch_rates(optimizer, scheduler)
    largest = float(np.abs(theirs).max())
    return float(np.abs(ours - theirs).max()) / largest, U64 * COUNTS


def _metric(count: int) -> float:
    """A metric that gets better for a while, then stays."""
    return max(1.0 - 0.1 * count, 0.0)


def _torch_rates(optimizer: Any, scheduler: Any) -> np.ndarray:
    follows_metric = isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
    rates = []
    for count in range(COUNTS):
        rates.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        scheduler.step(*([_metric(count)] if follows_metric else []))
    return np.array(rates)


def _schedule_rates(schedule: Callable[[Any], Any]) -> np.ndarray:
    """The rates at int32 counts, which Optax's own counters are."""
    program = jax.jit(schedule)
    return np.array([float(program(jnp.asarray(count, jnp.int32))) for count in range(COUNTS)])


def _plateau_rates(port: Any) -> np.ndarray:
    params = {"leaf": jnp.zeros(1)}
    state, rates = port.init(params), []
    update = jax.jit(lambda state, metric: port.update(params, state, params, value=metric)[1])
    for count in range(COUNTS):
        rates.append(float(state.plateau.lr[0]))
        state = update(state, _metric(count))
    return np.array(rates)
