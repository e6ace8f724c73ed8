"""Mistakes around the optimizer's step, each planted in an otherwise right port, and seen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from torch.optim import swa_utils

from equivalence.optimizers.accumulation import accumulate
from equivalence.optimizers.averaging import AverageState, Averaging, average_state, averaging, with_average
from equivalence.optimizers.clipping import ClipNormState, clip_grad_norm, total_norm
from equivalence.optimizers.masking import freeze
from equivalence.optimizers.scaling import ScaleState, all_finite, scale_gradients, unscale
from tests.agreement import Arrays, Side, disagreements
from tests.test_around_step import (
    DECAYED,
    LEAVES,
    SCENARIOS,
    Model,
    Tiny,
    accumulating,
    averaged_adamw,
    data,
    leaves_of,
    rate,
    run,
    scaling,
    show,
)

ADAMW = optax.adamw(0.01, weight_decay=1e-2)
Transformation = optax.GradientTransformation


# --- clipping ---------------------------------------------------------------------------------------------------------


def clipping(
    coefficient: Callable[[Any], Any], norm: Callable[[Any], Any] = total_norm, after: Transformation = ADAMW
) -> Transformation:
    """Clipping by any coefficient of any norm, then the optimizer."""

    def update(grads: Any, state: Any, params: Any = None) -> Any:
        size = norm(grads)
        return jax.tree.map(lambda grad: grad * coefficient(size), grads), ClipNormState(size)

    clip = optax.GradientTransformation(lambda params: ClipNormState(norm(params)), update)
    return optax.chain(clip, show(), after)


def elementwise() -> Transformation:
    def update(grads: Any, state: Any, params: Any = None) -> Any:
        return jax.tree.map(lambda grad: jnp.clip(grad, -1, 1), grads), ClipNormState(total_norm(grads))

    clip = optax.GradientTransformation(lambda params: ClipNormState(total_norm(params)), update)
    return optax.chain(clip, show(), ADAMW)


def named(transformation: Transformation) -> Transformation:
    """One of Optax's own clips, with its norm on show."""

    def update(grads: Any, state: Any, params: Any = None) -> Any:
        return transformation.update(grads, optax.EmptyState())[0], ClipNormState(total_norm(grads))

    clip = optax.GradientTransformation(lambda params: ClipNormState(total_norm(params)), update)
    return optax.chain(clip, show(), ADAMW)


def squared(grads: Any) -> Any:
    return total_norm(grads) ** 2


def no_clip_of(leaf: str) -> Callable[[Any], Any]:
    return lambda grads: total_norm({path: grad for path, grad in grads.items() if path != leaf})


# --- accumulation -----------------------------------------------------------------------------------------------------


def scheduled(count: Any = rate) -> Transformation:
    return optax.chain(clip_grad_norm(1.0), optax.adamw(count, weight_decay=1e-2))


def moving_inside(every: int) -> Transformation:
    """The inner step is taken at every micro-batch and only its update is withheld."""
    inner = scheduled()

    def init(params: Any) -> Any:
        return jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, params), inner.init(params)

    def update(grads: Any, state: Any, params: Any = None) -> Any:
        micro, total, inside = state
        total = jax.tree.map(jnp.add, total, grads)
        full = micro % every == every - 1
        updates, inside = inner.update(total, inside, params)
        kept = jax.tree.map(lambda leaf: jnp.where(full, 0, leaf), total)
        return jax.tree.map(lambda leaf: jnp.where(full, leaf, 0), updates), (micro + 1, kept, inside)

    return optax.GradientTransformation(init, update)


def never_zeroed(every: int) -> Transformation:
    """zero_grad() forgotten."""
    inner = accumulate_last(scheduled(), every)

    def update(grads: Any, state: Any, params: Any = None) -> Any:
        total = jax.tree.map(jnp.add, state[0], grads)
        updates, inside = inner.update(total, state[1], params)
        return updates, (total, inside)

    return optax.GradientTransformation(
        lambda params: (jax.tree.map(jnp.zeros_like, params), inner.init(params)), update
    )


def accumulate_last(inner: Transformation, every: int) -> Transformation:
    """Only the last micro-batch's gradient counts."""
    apart = accumulate(inner, every)

    def update(grads: Any, state: Any, params: Any = None) -> Any:
        alone = state._replace(total=jax.tree.map(jnp.zeros_like, state.total))
        return apart.update(grads, alone, params)

    return optax.GradientTransformation(apart.init, update)


# --- averages ---------------------------------------------------------------------------------------------------------


def average(step: Callable[[Any, Any, Any], Any], first: int = 0) -> Averaging:
    """An average by `step(average, latest, n)`, whose first updates are copies up to n == `first` (-1: none)."""

    def update(params: Any, state: AverageState, buffers: Any = None) -> AverageState:
        n = state.n_averaged
        new = jax.tree.map(
            lambda old, new: jnp.where(n <= first, new, step(old, new, n).astype(new.dtype)), state.average, params
        )
        return AverageState(n + 1, new)

    return Averaging(averaging().init, update)


def ema(old: Any, new: Any, n: Any, decay: float = 0.9) -> Any:
    return decay * old + (1 - decay) * new


def debiased(old: Any, new: Any, n: Any) -> Any:
    """What optax.ema returns, from the debiased average before."""
    before, after = 1 - 0.9 ** (n.astype(new.dtype)), 1 - 0.9 ** (n.astype(new.dtype) + 1)
    return (0.9 * old * before + 0.1 * new) / after


def before_the_step() -> Transformation:
    rule = averaging("ema", 0.9)

    def update(grads: Any, state: Any, params: Any = None) -> Any:
        updates, after = with_average(ADAMW, rule).update(grads, state, params)
        return updates, after._replace(average=rule.update(params, state.average))

    return optax.GradientTransformation(with_average(ADAMW, rule).init, update)


# --- scaling ----------------------------------------------------------------------------------------------------------


def scaler(
    interval: int = 4,
    backoff: float = 0.375,
    growth: float = 3.0,
    reset: bool = True,
    skip: str = "all",
    unscaled: bool = True,
    tracked: bool = True,
) -> Transformation:
    """The rule with its parts to be got wrong one by one."""
    inner = optax.chain(clip_grad_norm(1.0), ADAMW)

    def init(params: Any) -> Any:
        return ScaleState(jnp.asarray(1024.0, jnp.float32), jnp.zeros((), jnp.int32), inner.init(params))

    def update(grads: Any, state: Any, params: Any = None) -> Any:
        finite = all_finite(grads)
        plain = unscale(grads, state.scale) if unscaled else grads
        if skip == "zero":
            plain = jax.tree.map(lambda grad: jnp.where(finite, grad, 0), plain)
        updates, inside = inner.update(plain, state.inner_state, params)
        if skip == "all":
            inside = jax.tree.map(lambda new, old: jnp.where(finite, new, old), inside, state.inner_state)
        if skip != "zero":
            updates = jax.tree.map(lambda leaf: jnp.where(finite, leaf, 0), updates)
        good = state.growth_tracker + 1
        full = good >= interval
        scale = jnp.where(finite, jnp.where(full, state.scale * growth, state.scale), state.scale * backoff)
        tracker = jnp.where(finite, jnp.where(full & tracked, 0, good), 0 if reset else state.growth_tracker)
        return updates, ScaleState(scale, tracker, inside)

    return optax.GradientTransformation(init, update)


def frozen_scaled() -> Transformation:
    inner = freeze(optax.chain(clip_grad_norm(1.0), ADAMW), lambda path: path == "ice")
    scaled = scale_gradients(inner, init_scale=256.0, growth_interval=3)
    return accumulate(with_average(scaled, averaging("ema", 0.9)), 2)


def averaged_outside() -> Transformation:
    inner = scale_gradients(optax.chain(clip_grad_norm(1.0), ADAMW), init_scale=256.0, growth_interval=3)
    whole = with_average(accumulate(freeze(inner, lambda path: path == "ice"), 2), averaging("ema", 0.9))

    def wrapped(state: Any) -> Any:
        return accumulate(optax.identity(), 2).init({})._replace(inner_state=state)

    def update(grads: Any, state: Any, params: Any = None) -> Any:
        updates, after = whole.update(grads, state.inner_state, params)
        return updates, wrapped(after)

    return optax.GradientTransformation(lambda params: wrapped(whole.init(params)), update)


def clipped_first() -> Transformation:
    clip = clip_grad_norm(1.0)
    inner = scale_gradients(ADAMW, init_scale=1024.0, growth_interval=4, growth_factor=3.0, backoff_factor=0.375)

    def update(grads: Any, state: Any, params: Any = None) -> Any:
        return inner.update(clip.update(grads, clip.init(params))[0], state, params)

    return optax.GradientTransformation(inner.init, update)


FAULTS: dict[tuple[str, str], Callable[[], Transformation]] = {
    ("clip", "1e-6 missing"): lambda: clipping(lambda norm: jnp.minimum(1 / norm, 1)),
    ("clip", "1e-6 ten times smaller"): lambda: clipping(lambda norm: jnp.minimum(1 / (norm + 1e-7), 1)),
    ("clip", "optax.clip_by_global_norm"): lambda: named(optax.clip_by_global_norm(1.0)),
    ("clip", "optax.clip"): elementwise,
    ("clip", "gradients enlarged too"): lambda: clipping(lambda norm: 1 / (norm + 1e-6)),
    ("clip", "the square of the norm"): lambda: clipping(lambda norm: jnp.minimum(1 / (norm + 1e-6), 1), squared),
    ("clip", "the scalar left out"): lambda: clipping(lambda n: jnp.minimum(1 / (n + 1e-6), 1), no_clip_of("gain")),
    ("freeze", "frozen leaves counted"): lambda: optax.chain(
        clip_grad_norm(1.0), freeze(ADAMW, lambda path: path == "ice")
    ),
    ("freeze", "gradients of zero"): lambda: optax.chain(
        optax.masked(optax.set_to_zero(), {leaf: leaf == "ice" for leaf in LEAVES}), clip_grad_norm(1.0), ADAMW
    ),
    ("freeze", "nothing frozen"): lambda: freeze(optax.chain(clip_grad_norm(1.0), ADAMW), lambda path: False),
    ("sum", "the mean"): lambda: accumulating(3, True, False),
    ("sum", "one micro-batch more"): lambda: accumulating(4, False, False),
    ("sum", "optax.MultiSteps"): lambda: optax.MultiSteps(scheduled(), 3),
    ("sum", "MultiSteps' float32 sum"): lambda: optax.MultiSteps(scheduled(), 3, use_grad_mean=False),
    ("sum", "the inner state moves"): lambda: moving_inside(3),
    ("sum", "zero_grad forgotten"): lambda: never_zeroed(3),
    ("sum", "only the last gradient"): lambda: accumulate_last(scheduled(), 3),
    ("sum", "each gradient clipped"): lambda: optax.chain(
        clip_grad_norm(1.0), accumulate(optax.adamw(rate, weight_decay=1e-2), 3)
    ),
    ("sum", "the schedule per micro-batch"): lambda: accumulating(3, False, True),
    ("per micro-batch", "the sum"): lambda: accumulating(4, False, True),
    ("per micro-batch", "the schedule per update"): lambda: accumulating(4, True, False),
    ("per micro-batch", "the schedule a group early"): lambda: accumulate(
        scheduled(lambda count: rate(count * 4)), 4, mean=True
    ),
    ("ema", "debiased"): lambda: averaged_adamw(average(debiased)),
    ("ema", "the first not copied"): lambda: averaged_adamw(average(ema, first=-1)),
    ("ema", "the decay warmed up"): lambda: averaged_adamw(
        average(lambda old, new, n: ema(old, new, n, jnp.minimum(0.9, (1 + n) / (10 + n)).astype(new.dtype)))
    ),
    ("ema", "the decay off by 1e-9"): lambda: averaged_adamw(averaging("ema", 0.9 + 1e-9)),
    ("ema", "before the step"): before_the_step,
    ("ema", "every second step"): lambda: with_average(ADAMW, averaging("ema", 0.9), lambda step: step % 2 == 0),
    ("swa", "one step early"): lambda: averaged_adamw(averaging(), 19),
    ("swa", "divided by n"): lambda: averaged_adamw(average(lambda old, new, n: old + (new - old) / n), 20),
    ("swa", "float32 weights"): lambda: averaged_adamw(averaging("swa", multi=True), 20),
    ("swa, multi", "float64 weights"): lambda: averaged_adamw(averaging("swa", multi=False)),
    ("scale", "growth one step late"): lambda: scaler(interval=5),
    ("scale", "the tracker stands after a bad step"): lambda: scaler(reset=False),
    ("scale", "the tracker stands after growth"): lambda: scaler(tracked=False),
    ("scale", "the inner state moves on a bad step"): lambda: scaler(skip="updates"),
    ("scale", "zero gradients on a bad step"): lambda: scaler(skip="zero"),
    ("scale", "the default backoff"): lambda: scaling(backoff_factor=0.5),
    ("scale", "the default growth"): lambda: scaling(growth_factor=2.0),
    ("scale", "never unscaled"): lambda: scaler(unscaled=False),
    ("scale", "clipped before it is unscaled"): clipped_first,
    ("everything", "a frozen leaf makes a step bad"): frozen_scaled,
    ("everything", "averaged every micro-batch"): averaged_outside,
}


KNOWN: dict[tuple[str, int, bytes], Arrays] = {}


def reference(scenario: str) -> Side:
    """torch's side, which all the faults of a scenario share: run once for each set of arrays."""

    def side(bits: int, arrays: Arrays) -> Arrays:
        key = scenario, bits, b"".join(value.tobytes() for value in arrays.values())
        if key not in KNOWN:
            KNOWN[key] = SCENARIOS[scenario].reference(bits, arrays)
        return KNOWN[key]

    return side


def seen(scenario: str, transformation: Transformation) -> dict[str, float]:
    """What is noticed of a port that is right in float32 and takes these steps in float64: half of the compiling."""
    right, ours = SCENARIOS[scenario], reference(scenario)
    port = run(transformation, right.seen, right.arrive)
    return disagreements(ours, lambda bits, arrays: (port if bits == 64 else ours)(bits, arrays), data(7, right.bad))


@pytest.mark.parametrize(("scenario", "fault"), FAULTS)
def test_a_planted_fault_is_seen(scenario, fault):
    assert seen(scenario, FAULTS[scenario, fault]())


def test_the_harness_of_the_faults_is_right():
    for scenario, transformation in {
        "clip": clipping(lambda norm: jnp.minimum(1 / (norm + 1e-6), 1)),
        "ema": averaged_adamw(average(ema)),
        "swa": averaged_adamw(average(lambda old, new, n: old + (new - old) / (n + 1)), 20),
        "scale": scaler(),
    }.items():
        assert seen(scenario, transformation) == {}


# --- what is judged bit for bit ---------------------------------------------------------------------------------------


def counters(step: Callable[[Any, Any, Any], Any]) -> list[tuple[int, int]]:
    """An integer buffer's average, ours and torch's, over steps whose counts make it move."""
    model = Tiny({"weight": torch.zeros(2)})
    averaged = swa_utils.AveragedModel(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.9), use_buffers=True)
    rule, pairs = jax.jit(average(step).update), []
    state = averaging().init(leaves_of(model)[1])
    for add in np.random.default_rng(0).integers(0, 10**4, 60):
        model.counter += int(add)
        averaged.update_parameters(model)
        state = rule(leaves_of(model)[1], state)
        pairs.append((int(state.average["counter"]), int(average_state(averaged).buffers["counter"])))
    return pairs


@pytest.mark.parametrize(
    ("step", "why"),
    [
        (lambda old, new, n: jnp.round(ema(old, new, n)), "rounded to the nearest"),
        (lambda old, new, n: new, "copied"),
        (lambda old, new, n: old, "left alone"),
        (lambda old, new, n: jnp.floor(old * 0.9) + jnp.floor(new * (1 - 0.9)), "truncated twice"),
    ],
)
def test_an_integer_averaged_otherwise_is_seen(step, why):
    assert any(ours != theirs for ours, theirs in counters(step)), why


def test_dividing_by_the_scale_is_seen():
    value, scale = np.random.default_rng(0).normal(size=100).astype(np.float32), np.float32(3.3)
    right = np.asarray(unscale(jnp.asarray(value), jnp.asarray(scale)))
    assert (right == value * (np.float32(1) / scale)).all()
    assert (right != value / scale).any()


def test_growth_into_infinity_is_seen():
    state = ScaleState(jnp.asarray(2.0**127, jnp.float32), jnp.asarray(0), ())
    right = scale_gradients(optax.sgd(0.0), init_scale=2.0**127, growth_interval=1)
    _, after = right.update(jnp.zeros(2), right.init(jnp.zeros(2)))
    assert float(after.scale) == 2.0**127
    assert not np.isfinite(float(state.scale * 2))


def by_names(*words: str) -> set[str]:
    return {path for path, _ in Model().named_parameters() if not any(word in path for word in words)}


@pytest.mark.parametrize(
    "wrong",
    [
        by_names("bias", "LayerNorm"),
        by_names("bias", "norm"),
        by_names("bias", "layer_norm", "ln_", "rms", "bn", "inst", "embed"),
        {path for path, value in Model().named_parameters() if value.ndim > 1},
        {path for path, _ in Model().named_parameters()} - DECAYED,
    ],
    ids=["transformers' names", "any norm in the name", "embeddings spared", "by rank", "inverted"],
)
def test_a_mask_by_anything_but_the_type_is_another(wrong):
    assert wrong != DECAYED
