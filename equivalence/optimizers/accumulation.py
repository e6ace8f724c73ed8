"""Gradient accumulation: backward() several times, one optimizer step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from equivalence.errors import InputError


class AccumulateState(NamedTuple):
    """`micro`: gradients seen since the last step, int32; `total`: their sum (torch's `.grad`); `inner_state`."""

    micro: jax.Array
    total: Any
    inner_state: Any


def step_if(
    wanted: jax.Array,
    inner: optax.GradientTransformationExtraArgs,
    grads: optax.Updates,
    state: Any,
    params: optax.Params | None,
    extra: dict[str, Any],
) -> tuple[optax.Updates, Any]:
    """The inner step where `wanted` (a boolean scalar); else updates of zero and the state unmoved."""

    def step() -> tuple[optax.Updates, Any]:
        return inner.update(grads, state, params, **extra)

    def rest() -> tuple[optax.Updates, Any]:
        updates, _ = jax.eval_shape(step)
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), updates), state

    return jax.lax.cond(wanted, step, rest)


def accumulate(
    inner: optax.GradientTransformation, every: int, mean: bool = False
) -> optax.GradientTransformationExtraArgs:
    """`loss.backward()` on `every` micro-batches, then `optimizer.step()` and `zero_grad()`.

    Args:
        inner: takes the step, with the *sum* of the gradients; clipping goes in here, as in torch it runs before step.
        every: micro-batches a step, at least 1.
        mean: for `(loss / every).backward()`: each gradient is divided before it is added. The loss that the gradients
            come from is then the undivided one; where `every` is a power of two this is exact, else within rounding.

    Updates in between are zero and `inner`'s state does not move, so that Adam's step and a schedule count real
    updates; a torch scheduler that is stepped every micro-batch is `per_micro_batch(schedule, every)`. Gradients left
    over at the end of an epoch stay in the state, as they stay in `.grad` until `zero_grad()`.

    Differs from optax.MultiSteps, which takes the mean unless told `use_grad_mean=False` (as a running mean, which
    rounds otherwise), adds in float32 also where gradients are float64, and computes the inner step at every call.

    https://docs.pytorch.org/docs/stable/notes/amp_examples.html#gradient-accumulation

    >>> twice = accumulate(optax.sgd(1.0), every=2)
    >>> state = twice.init(jnp.zeros(()))
    >>> for grad in (1.0, 2.0):
    ...     updates, state = twice.update(jnp.asarray(grad), state)
    ...     print(float(updates))
    0.0
    -3.0
    """
    if every < 1:
        raise InputError(f"accumulate(every={every}): at least one micro-batch makes a step")
    taken = optax.with_extra_args_support(inner)

    def init(params: optax.Params) -> AccumulateState:
        return AccumulateState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, params), taken.init(params))

    def update(
        grads: optax.Updates, state: AccumulateState, params: optax.Params | None = None, **extra: Any
    ) -> tuple[optax.Updates, AccumulateState]:
        shares = jax.tree.map(lambda grad: grad / every, grads) if mean else grads
        # the first gradient is taken as it is, so that nothing of the last step is left, NaN included
        total = jax.tree.map(
            lambda share, sofar: jnp.where(state.micro == 0, share, sofar + share).astype(sofar.dtype),
            shares,
            state.total,
        )
        full = state.micro + 1 == every
        updates, inner_state = step_if(full, taken, total, state.inner_state, params, extra)
        return updates, AccumulateState(jnp.where(full, 0, state.micro + 1), total, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def per_micro_batch(schedule: Callable[[Any], Any], every: int) -> Callable[[Any], Any]:
    """The learning rate at each real update when torch's `scheduler.step()` runs once every micro-batch.

    `schedule` counts micro-batches; the step at the end of the k-th group has seen k * every + every - 1 of them.
    """
    return lambda count: schedule(count * every + every - 1)
