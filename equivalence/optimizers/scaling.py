"""Loss scaling: `torch.amp.GradScaler` as an Optax transformation."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from equivalence.errors import InputError
from equivalence.optimizers.accumulation import step_if


class ScaleState(NamedTuple):
    """`scale`: float32, None when not enabled; `growth_tracker`: good steps since it moved, int32; `inner_state`."""

    scale: Any
    growth_tracker: Any
    inner_state: Any = ()


def scale_gradients(
    inner: optax.GradientTransformation,
    init_scale: float = 2.0**16,
    growth_factor: float = 2.0,
    backoff_factor: float = 0.5,
    growth_interval: int = 2000,
    enabled: bool = True,
) -> optax.GradientTransformationExtraArgs:
    """`torch.amp.GradScaler`: `scaler.step(optimizer); scaler.update()` on gradients of `scale_loss(loss, state)`.

    Args:
        inner: takes the step with the unscaled gradients; clipping goes in here, where torch calls `scaler.unscale_`.
        init_scale, growth_factor, backoff_factor, growth_interval, enabled: GradScaler's own.

    A step with any gradient that is not finite is skipped: updates of zero, `inner` unmoved, scale * backoff_factor.
    After `growth_interval` good steps in a row, scale * growth_factor unless that overflows float32. Gradients are
    judged as they arrive and multiplied by the scale's float32 reciprocal. `accumulate`, `with_average` and `freeze` go
    outside: a frozen leaf has no gradient in torch, and must not make a step bad.

    Raises InputError for growth_factor <= 1, backoff_factor >= 1, a factor that float32 cannot hold (torch multiplies
    in float64 and rounds, which float32 repeats only for the factors it holds), and float16 gradients (as torch).

    Differs from optax.apply_if_finite, which has no scale and lets a bad step through after max_consecutive_errors, and
    from hand-written rules that grow at count > interval or leave the tracker standing after a bad step.

    https://docs.pytorch.org/docs/stable/amp.html#gradient-scaling
    """
    if enabled:
        _refuse(growth_factor, backoff_factor)
    taken = optax.with_extra_args_support(inner)

    def init(params: optax.Params) -> ScaleState:
        if not enabled:
            return ScaleState(None, None, taken.init(params))
        return ScaleState(jnp.asarray(init_scale, jnp.float32), jnp.zeros((), jnp.int32), taken.init(params))

    def update(
        grads: optax.Updates, state: ScaleState, params: optax.Params | None = None, **extra: Any
    ) -> tuple[optax.Updates, ScaleState]:
        if not enabled:
            updates, inner_state = taken.update(grads, state.inner_state, params, **extra)
            return updates, ScaleState(None, None, inner_state)
        finite = all_finite(grads)
        updates, inner_state = step_if(finite, taken, unscale(grads, state.scale), state.inner_state, params, extra)
        good = state.growth_tracker + 1
        full = good == growth_interval
        grown = state.scale * growth_factor
        larger = jnp.where(full & jnp.isfinite(grown), grown, state.scale)
        return updates, ScaleState(
            jnp.where(finite, larger, state.scale * backoff_factor),
            jnp.where(finite & ~full, good, 0),
            inner_state,
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _refuse(growth_factor: float, backoff_factor: float) -> None:
    if growth_factor <= 1 or backoff_factor >= 1:
        raise InputError(
            f"growth_factor={growth_factor} must be > 1 and backoff_factor={backoff_factor} < 1, as in torch"
        )
    for name, factor in (("growth_factor", growth_factor), ("backoff_factor", backoff_factor)):
        if float(np.float32(factor)) != factor:
            raise InputError(
                f"{name}={factor} is no float32 number, and torch multiplies the scale in float64: give both sides"
                f" {name}={float(np.float32(factor))!r}"
            )


def scale_loss(loss: Any, state: ScaleState) -> jax.Array:
    """`scaler.scale(loss)`: the loss times the scale; take the gradient of this one.

    A float16 or bfloat16 scalar becomes float32, as in torch; an array keeps its dtype.
    """
    loss = jnp.asarray(loss)
    if state.scale is None:
        return loss
    scaled = loss * state.scale
    return scaled.astype(loss.dtype) if loss.ndim else scaled


def unscale(grads: Any, scale: jax.Array) -> Any:
    """`scaler.unscale_`: every gradient times the scale's float32 reciprocal (not divided by it).

    Raises InputError for float16 gradients, as torch does: keep float32 parameters and cast inside the model.
    """
    if any(leaf.dtype == jnp.float16 for leaf in jax.tree.leaves(grads)):
        raise InputError("float16 gradients cannot be unscaled: keep the parameters in float32 and cast in the model")
    inverse = 1 / scale
    return jax.tree.map(lambda grad: (grad * inverse).astype(grad.dtype), grads)


def all_finite(grads: Any) -> jax.Array:
    """Whether no gradient has a NaN or an infinity: a boolean scalar."""
    return jnp.all(jnp.asarray([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(grads)], bool))


def scaler_state(scaler: Any, inner_state: Any = ()) -> ScaleState:
    """The state of a torch GradScaler, bit for bit, around the state of the optimizer in it."""
    state = scaler.state_dict()
    if not state:
        return ScaleState(None, None, inner_state)
    return ScaleState(np.float32(state["scale"]), np.int32(state["_growth_tracker"]), inner_state)


def load_scaler_state(scaler: Any, state: ScaleState) -> None:
    """Put a state's scale and growth tracker into a torch GradScaler, bit for bit; its factors stay its own.

    Raises InputError when one of the two is enabled and the other is not.
    """
    if scaler.is_enabled() != (state.scale is not None):
        raise InputError("one of the scaler and the state is enabled and the other is not")
    if state.scale is not None:
        moved = {"scale": float(state.scale), "_growth_tracker": int(state.growth_tracker)}
        scaler.load_state_dict({**scaler.state_dict(), **moved})
