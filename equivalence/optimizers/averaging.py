"""Averages of the weights: `torch.optim.swa_utils.AveragedModel` as functions on trees."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from equivalence.errors import InputError, unknown

KINDS = ("swa", "ema")


class AverageState(NamedTuple):
    """`n_averaged`: updates so far, int32; `average`: like the parameters; `buffers`: like the buffers, or None."""

    n_averaged: Any
    average: Any
    buffers: Any = None


class Averaging(NamedTuple):
    """`init(params, buffers=None)` and `update(params, state, buffers=None)`, both to an AverageState."""

    init: Callable[..., AverageState]
    update: Callable[..., AverageState]


def averaging(
    kind: str = "swa", decay: float = 0.999, *, multi: bool | None = None, use_buffers: bool = False
) -> Averaging:
    """`torch.optim.swa_utils.AveragedModel`: the equal ("swa") or the exponential ("ema") average of the weights.

    Args:
        kind: "swa" or "ema".
        decay: of the exponential average, in [0, 1].
        multi: the order of rounding. True is `multi_avg_fn=get_{swa,ema}_multi_avg_fn(...)`, a lerp; False is
            `avg_fn=get_{swa,ema}_avg_fn(...)`. None is what is usual: the multi form for "ema"; for "swa" avg_fn, which
            is AveragedModel's default on CPU (its default on CUDA is the multi form).
        use_buffers: average the buffers too; otherwise the latest ones are copied. Integers are truncated toward zero
            after each update: under "ema" BatchNorm's num_batches_tracked never leaves its first value.

    Returns `init(params, buffers=None)` and `update(params, state, buffers=None)`, to be called after the optimizer's
    step, with the new parameters. The first update copies. Raises InputError for another kind, a decay outside [0, 1]
    and for integer leaves where torch has no average (booleans under "swa", all integers under its multi form).

    Differs from optax.ema, which averages *updates*, from zero, and divides by 1 - decay^t. In the multi form of "swa"
    torch rounds 1 / (n + 1) to float32 also where the parameters are float64 (6e-8 relative).

    https://docs.pytorch.org/docs/stable/optim.html#weight-averaging-swa-and-ema
    """
    if kind not in KINDS:
        raise unknown("average", kind, KINDS)
    if not 0 <= decay <= 1:
        raise InputError(f"averaging(decay={decay}): a decay lies in [0, 1]")
    many = kind == "ema" if multi is None else multi

    def one(average: jax.Array, latest: jax.Array, n: jax.Array) -> jax.Array:
        latest = latest.astype(average.dtype)
        mixed = _ema(average, latest, n, decay, many) if kind == "ema" else _swa(average, latest, n, many)
        return jnp.where(n == 0, latest, mixed.astype(average.dtype))

    def init(params: Any, buffers: Any = None) -> AverageState:
        # copies: a step that donates both the parameters and this state must not donate one array twice
        return AverageState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.array, params), jax.tree.map(jnp.array, buffers))

    def update(params: Any, state: AverageState, buffers: Any = None) -> AverageState:
        n = jnp.asarray(state.n_averaged, jnp.int32)
        average = jax.tree.map(lambda old, new: one(jnp.asarray(old), jnp.asarray(new), n), state.average, params)
        if use_buffers:
            kept = jax.tree.map(lambda old, new: one(jnp.asarray(old), jnp.asarray(new), n), state.buffers, buffers)
        else:
            kept = jax.tree.map(jnp.array, buffers)
        return AverageState(n + 1, average, kept)

    return Averaging(init, update)


def _ema(average: jax.Array, latest: jax.Array, n: jax.Array, decay: float, multi: bool) -> jax.Array:
    inexact = jnp.issubdtype(average.dtype, jnp.inexact)
    if multi and inexact:
        wide = jnp.promote_types(average.dtype, jnp.float32)
        return _lerp(average.astype(wide), latest.astype(wide), jnp.asarray(1 - decay, wide))
    if not inexact:
        average, latest = average.astype(jnp.float32), latest.astype(jnp.float32)  # torch's default dtype
    return _rounded(average * decay, n) + _rounded(latest * (1 - decay), n)


def _swa(average: jax.Array, latest: jax.Array, n: jax.Array, multi: bool) -> jax.Array:
    if average.dtype == jnp.bool_ or (multi and not jnp.issubdtype(average.dtype, jnp.inexact)):
        form = "get_swa_multi_avg_fn" if multi else "get_swa_avg_fn"
        raise InputError(f"torch's {form} has no average of {average.dtype}: leave use_buffers off, or take kind='ema'")
    if multi:
        wide = jnp.promote_types(average.dtype, jnp.float32)
        weight = 1 / (n + 1).astype(jnp.float32)  # an integer tensor's reciprocal has torch's default dtype
        return _lerp(average.astype(wide), latest.astype(wide), weight.astype(wide))
    difference = latest - average
    real = difference.dtype if jnp.issubdtype(difference.dtype, jnp.inexact) else jnp.float32
    difference = difference.astype(real)
    # a divisor per element: XLA would turn a division by one scalar into a product with its rounded reciprocal
    divisor = jnp.where(difference == difference, (n + 1).astype(real), jnp.nan)
    return average + difference / divisor


def _lerp(start: jax.Array, end: jax.Array, weight: jax.Array) -> jax.Array:
    """torch.lerp: from the nearer end, so that the weights 0 and 1 give the ends exactly."""
    near = jnp.abs(weight) < 0.5
    return jnp.where(near, start + weight * (end - start), end - (end - start) * (1 - weight))


def _rounded(product: jax.Array, n: jax.Array) -> jax.Array:
    """The product rounded by itself, as torch does: a fused multiply-add moves integers that are truncated after it.

    n >= 0, so nothing is changed; the compiler does not know, and cannot fuse across.
    """
    if jnp.iscomplexobj(product):
        return product
    bits = {2: jnp.int16, 4: jnp.int32, 8: jnp.int64}[product.dtype.itemsize]
    mask = (n >> 31).astype(bits)
    return jax.lax.bitcast_convert_type(jax.lax.bitcast_convert_type(product, bits) ^ mask, product.dtype)


class WithAverageState(NamedTuple):
    """`step`: optimizer steps so far, int32; `average`: an AverageState; `inner_state`."""

    step: jax.Array
    average: AverageState
    inner_state: Any


def with_average(
    inner: optax.GradientTransformation,
    average: Averaging | None = None,
    when: Callable[[jax.Array], Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """`optimizer.step(); averaged_model.update_parameters(model)`: the average of the *new* parameters in the state.

    Args:
        inner: the whole optimizer: what it returns is what moves the parameters.
        average: `averaging(...)`; None is `averaging()`, the equal average.
        when: of the number of steps before this one (int32), whether the average takes part; None is always.
            `lambda i: i > swa_start` is the torch page's own.

    The updates are `inner`'s. It stands outside `scale_gradients` (torch averages also after a skipped step) and inside
    `accumulate`. Buffers are not the optimizer's to see: average those with `averaging` itself. Raises InputError when
    `update` gets no parameters.

    Differs from averaging before the step: the average is then one step old.

    https://docs.pytorch.org/docs/stable/optim.html#putting-it-all-together-ema
    """
    taken, rule = optax.with_extra_args_support(inner), average or averaging()

    def init(params: optax.Params) -> WithAverageState:
        return WithAverageState(jnp.zeros((), jnp.int32), rule.init(params), taken.init(params))

    def update(
        grads: optax.Updates, state: WithAverageState, params: optax.Params | None = None, **extra: Any
    ) -> tuple[optax.Updates, WithAverageState]:
        if params is None:
            raise InputError("with_average averages the new parameters: call update(grads, state, params)")
        updates, inner_state = taken.update(grads, state.inner_state, params, **extra)
        new = rule.update(optax.apply_updates(params, updates), state.average)
        if when is not None:
            wanted = when(state.step)
            new = jax.tree.map(lambda after, before: jnp.where(wanted, after, before), new, state.average)
        return updates, WithAverageState(optax.safe_increment(state.step), new, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def average_state(averaged_model: Any) -> AverageState:
    """The state of a torch AveragedModel, bit for bit: NumPy arrays by the torch paths of the model inside it."""
    module = averaged_model.module
    return AverageState(
        np.int32(averaged_model.n_averaged.item()),
        {path: _host(leaf) for path, leaf in module.named_parameters()},
        {path: _host(leaf) for path, leaf in module.named_buffers()},
    )


def load_average_state(averaged_model: Any, state: AverageState) -> None:
    """Put a state, by torch paths and in torch layouts, into a torch AveragedModel, bit for bit.

    Raises InputError when the paths or the shapes are not the model's.
    """
    import torch

    module = averaged_model.module
    pairs = [(dict(module.named_parameters()), state.average)]
    if state.buffers is not None:
        pairs.append((dict(module.named_buffers()), state.buffers))
    for ours, given in pairs:
        if wrong := sorted(set(ours) ^ set(given)):
            raise InputError(f"the average and the torch model do not have the same leaves: {', '.join(wrong)}")
        for path, leaf in ours.items():
            if tuple(leaf.shape) != np.shape(given[path]):
                raise InputError(f"{path}: {np.shape(given[path])} in the average, {tuple(leaf.shape)} in the model")
    with torch.no_grad():
        for ours, given in pairs:
            for path, leaf in ours.items():
                leaf.copy_(_tensor(given[path]))
        averaged_model.n_averaged.fill_(int(state.n_averaged))


def _host(leaf: Any) -> np.ndarray:
    import torch

    plain = leaf.detach().cpu()
    if plain.dtype == torch.bfloat16:
        return plain.view(torch.uint16).numpy().view(jnp.bfloat16).copy()
    return plain.numpy().copy()


def _tensor(leaf: Any) -> Any:
    import torch

    plain = np.array(leaf)
    if plain.dtype == jnp.bfloat16:
        return torch.from_numpy(plain.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(plain)
