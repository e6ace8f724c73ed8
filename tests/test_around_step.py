"""What surrounds an optimizer's step, against torch's own loops: clipping, accumulation, averages, scaling, masks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.optim import swa_utils

from equivalence.errors import InputError
from equivalence.optimizers.accumulation import accumulate, per_micro_batch
from equivalence.optimizers.around_table import AROUND
from equivalence.optimizers.averaging import average_state, averaging, load_average_state, with_average
from equivalence.optimizers.clipping import clip_grad_norm, clip_grad_value, total_norm
from equivalence.optimizers.masking import decay_mask, freeze
from equivalence.optimizers.scaling import (
    ScaleState,
    load_scaler_state,
    scale_gradients,
    scale_loss,
    scaler_state,
    unscale,
)
from equivalence.runtimes.jax import environment
from tests.agreement import Arrays, Side, assert_agree

LEAVES: dict[str, tuple[int, ...]] = {"weight": (3, 5), "bias": (5,), "gain": (), "nothing": (0, 4), "ice": (2,)}
STEPS = 100
KINDS = {32: np.float32, 64: np.float64}
RATES = [0.01 * (1 + step % 7) for step in range(STEPS)]
SEEDS = st.integers(0, 2**32 - 1)
few = settings(max_examples=3)
"""A hundred steps of torch six times over: what an example costs."""

Tensors = dict[str, nn.Parameter]
Seen = dict[str, Any]


def data(seed: int, bad: bool = False) -> dict[str, np.ndarray]:
    """Parameters, and a hundred gradients of sizes from far below the clipping to far above; some infinite if `bad`."""
    rng = np.random.default_rng(seed)
    sizes = np.exp(rng.normal(-1, 1.5, STEPS))
    arrays = {leaf: rng.normal(size=shape) for leaf, shape in LEAVES.items()}
    for leaf, shape in LEAVES.items():
        arrays[f"grad.{leaf}"] = rng.normal(size=(STEPS, *shape)) * sizes.reshape(-1, *[1] * len(shape))
    if bad:
        arrays["grad.weight"][rng.random(STEPS) < 0.2, 1, 2] = np.inf
        arrays["grad.gain"][rng.random(STEPS) < 0.1] = np.nan
        arrays["grad.ice"][rng.random(STEPS) < 0.1] = -np.inf
    return arrays


@dataclass(frozen=True)
class Scenario:
    """One piece of training on both sides.

    `torch(params) -> step(grads) -> seen` and `optax() -> transformation`; `seen(state)` is what the port shows beside
    its parameters, and `arrive(grads, state)` the gradients as the port's backward pass would hand them over.
    """

    torch: Callable[[Tensors], Callable[[dict[str, torch.Tensor]], Seen]]
    optax: Callable[[], optax.GradientTransformation]
    seen: Callable[[Any], Seen] = lambda state: {}
    arrive: Callable[[Any, Any], Any] = lambda grads, state: grads
    bad: bool = False
    kept: dict[str, Side] = field(default_factory=dict)

    def reference(self, bits: int, arrays: Arrays) -> Arrays:
        params = {leaf: nn.Parameter(torch.from_numpy(np.array(arrays[leaf]))) for leaf in LEAVES}
        step = self.torch(params)
        trace: list[Seen] = []
        for number in range(STEPS):
            seen = step({leaf: torch.from_numpy(np.array(arrays[f"grad.{leaf}"][number])) for leaf in LEAVES})
            trace.append({**{leaf: value.detach().clone() for leaf, value in params.items()}, **seen})
        return {path: np.stack([np.asarray(row[path]) for row in trace]) for path in trace[0]}

    def port(self) -> Side:
        """Compiled once for all examples."""
        if "port" not in self.kept:
            self.kept["port"] = run(self.optax(), self.seen, self.arrive)
        return self.kept["port"]


def run(
    transformation: optax.GradientTransformation,
    seen: Callable[[Any], Seen] = lambda state: {},
    arrive: Callable[[Any, Any], Any] = lambda grads, state: grads,
) -> Side:
    """The port's side: one compiled loop over the gradients."""

    @jax.jit
    def program(params: Any, grads: Any) -> Any:
        def step(carry: Any, grads: Any) -> Any:
            params, state = carry
            updates, state = transformation.update(arrive(grads, state), state, params)
            params = optax.apply_updates(params, updates)
            return (params, state), {**params, **seen(state)}

        return jax.lax.scan(step, (params, transformation.init(params)), grads)[1]

    def side(bits: int, arrays: Arrays) -> Arrays:
        with environment(bits):
            trace = program({k: arrays[k] for k in LEAVES}, {k: arrays[f"grad.{k}"] for k in LEAVES})
            return {path: np.asarray(value) for path, value in trace.items()}

    return side


# --- the loops of the torch pages -------------------------------------------------------------------------------------


def given_to(params: Tensors, grads: Mapping[str, torch.Tensor]) -> None:
    for leaf, value in params.items():
        value.grad = grads[leaf].clone()


def clipped_adamw(params: Tensors) -> Callable[..., Seen]:
    optimizer = torch.optim.AdamW(params.values(), lr=0.01, weight_decay=1e-2)

    def step(grads: dict[str, torch.Tensor]) -> Seen:
        given_to(params, grads)
        norm = clip_grad_norm_(params.values(), 1.0)
        optimizer.step()
        return {"norm": norm.clone(), "clipped": params["weight"].grad.clone()}

    return step


def accumulated(every: int, mean: bool, per_micro: bool) -> Callable[[Tensors], Callable[..., Seen]]:
    def make(params: Tensors) -> Callable[..., Seen]:
        optimizer = torch.optim.AdamW(params.values(), lr=1.0, weight_decay=1e-2)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda count: RATES[min(count, STEPS - 1)])
        number = 0

        def step(grads: dict[str, torch.Tensor]) -> Seen:
            nonlocal number
            number += 1
            loss = sum(((value * grads[leaf]).sum() for leaf, value in params.items()), torch.zeros(()))
            (loss / every if mean else loss).backward()
            stepped = number % every == 0
            if stepped:
                clip_grad_norm_(params.values(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            else:
                optimizer._opt_called = True  # a scheduler stepped between two real updates warns otherwise
            if per_micro or stepped:
                scheduler.step()
            return {}

        return step

    return make


def rate(count: Any) -> Any:
    return jnp.take(jnp.asarray(RATES), count, mode="clip")


def accumulating(every: int, mean: bool, per_micro: bool) -> optax.GradientTransformation:
    inner = optax.adamw(per_micro_batch(rate, every) if per_micro else rate, weight_decay=1e-2)
    return accumulate(optax.chain(clip_grad_norm(1.0), inner), every, mean)


def frozen_loop(params: Tensors) -> Callable[..., Seen]:
    params["ice"].requires_grad_(False)
    optimizer = torch.optim.AdamW(params.values(), lr=0.01, weight_decay=1e-2)

    def step(grads: dict[str, torch.Tensor]) -> Seen:
        given_to({leaf: value for leaf, value in params.items() if value.requires_grad}, grads)
        norm = clip_grad_norm_(params.values(), 1.0)
        optimizer.step()
        return {"norm": norm.clone()}

    return step


def scaled_loop(params: Tensors) -> Callable[..., Seen]:
    optimizer = torch.optim.AdamW(params.values(), lr=0.01, weight_decay=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=4, growth_factor=3.0, backoff_factor=0.375)

    def step(grads: dict[str, torch.Tensor]) -> Seen:
        scaler.scale(torch.zeros(()))
        given_to(params, {leaf: grad * torch.tensor(scaler.get_scale()) for leaf, grad in grads.items()})
        scaler.unscale_(optimizer)
        clip_grad_norm_(params.values(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        return {"scale": scaler.get_scale(), "tracker": scaler._get_growth_tracker()}

    return step


def scaling(**options: Any) -> optax.GradientTransformation:
    inner = optax.chain(clip_grad_norm(1.0), optax.adamw(0.01, weight_decay=1e-2))
    chosen = {"init_scale": 1024.0, "growth_interval": 4, "growth_factor": 3.0, "backoff_factor": 0.375, **options}
    return scale_gradients(inner, **chosen)


def scaled_seen(state: Any) -> Seen:
    return {"scale": state.scale.astype(float), "tracker": state.growth_tracker.astype(int)}


def scaled_arrive(grads: Any, state: Any) -> Any:
    scale = optax.tree.get(state, "scale")
    return jax.tree.map(lambda grad: (grad * scale).astype(grad.dtype), grads)


class Tiny(nn.Module):
    """A model whose leaves are `LEAVES`, with a buffer of each sort."""

    def __init__(self, leaves: Mapping[str, Any], counter: int = 5) -> None:
        super().__init__()
        for leaf, value in leaves.items():
            self.register_parameter(leaf, value if isinstance(value, nn.Parameter) else nn.Parameter(value))
        self.register_buffer("running", torch.zeros(4, dtype=self.weight.dtype))
        self.register_buffer("counter", torch.tensor(counter))


def averaged_loop(
    average: Callable[[nn.Module], swa_utils.AveragedModel], start: int = -1
) -> Callable[[Tensors], Callable[..., Seen]]:
    def make(params: Tensors) -> Callable[..., Seen]:
        model = Tiny(params)
        averaged = average(model)
        optimizer = torch.optim.AdamW(params.values(), lr=0.01, weight_decay=1e-2)
        number = -1

        def step(grads: dict[str, torch.Tensor]) -> Seen:
            nonlocal number
            number += 1
            given_to(params, grads)
            optimizer.step()
            if number > start:
                averaged.update_parameters(model)
            values = {f"average.{leaf}": v.detach().clone() for leaf, v in averaged.module.named_parameters()}
            return {**values, "n": averaged.n_averaged.clone()}

        return step

    return make


def averaged_seen(state: Any) -> Seen:
    values = {f"average.{leaf}": value for leaf, value in state.average.average.items()}
    return {**values, "n": state.average.n_averaged.astype(int)}


def averaged_adamw(rule: Any, start: int | None = None) -> optax.GradientTransformation:
    when = None if start is None else (lambda step: step > start)
    return with_average(optax.adamw(0.01, weight_decay=1e-2), rule, when)


def everything_loop(params: Tensors) -> Callable[..., Seen]:
    """Scaled, accumulated over two, one leaf frozen, clipped, averaged: the order of the torch pages."""
    params["ice"].requires_grad_(False)
    moving = {leaf: value for leaf, value in params.items() if value.requires_grad}
    model = Tiny(params)
    averaged = swa_utils.AveragedModel(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.9))
    optimizer = torch.optim.AdamW(params.values(), lr=0.01, weight_decay=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=3)
    number = 0

    def step(grads: dict[str, torch.Tensor]) -> Seen:
        nonlocal number
        number += 1
        scaler.scale(torch.zeros(()))
        for leaf, value in moving.items():
            grad = grads[leaf] * torch.tensor(scaler.get_scale())
            value.grad = grad if value.grad is None else value.grad + grad
        if number % 2 == 0:
            scaler.unscale_(optimizer)
            clip_grad_norm_(params.values(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            averaged.update_parameters(model)
        values = {f"average.{leaf}": v.detach().clone() for leaf, v in averaged.module.named_parameters()}
        return {**values, "scale": scaler.get_scale()}

    return step


def everything() -> optax.GradientTransformation:
    inner = optax.chain(clip_grad_norm(1.0), optax.adamw(0.01, weight_decay=1e-2))
    scaled = scale_gradients(inner, init_scale=256.0, growth_interval=3)
    return accumulate(with_average(freeze(scaled, lambda path: path == "ice"), averaging("ema", 0.9)), 2)


def everything_seen(state: Any) -> Seen:
    values = {f"average.{leaf}": value for leaf, value in state.inner_state.average.average.items()}
    return {**values, "scale": optax.tree.get(state, "scale").astype(float)}


SCENARIOS: dict[str, Scenario] = {
    "clip": Scenario(
        clipped_adamw,
        lambda: optax.chain(clip_grad_norm(1.0), show(), optax.adamw(0.01, weight_decay=1e-2)),
        lambda state: {"norm": state[0].norm, "clipped": state[1]},
    ),
    "freeze": Scenario(
        frozen_loop,
        lambda: freeze(optax.chain(clip_grad_norm(1.0), optax.adamw(0.01, weight_decay=1e-2)), lambda p: p == "ice"),
        lambda state: {"norm": optax.tree.get(state, "norm")},
    ),
    "sum": Scenario(accumulated(3, False, False), lambda: accumulating(3, False, False)),
    "per micro-batch": Scenario(accumulated(4, True, True), lambda: accumulating(4, True, True)),
    "scale": Scenario(scaled_loop, scaling, scaled_seen, scaled_arrive, bad=True),
    "ema": Scenario(
        averaged_loop(lambda m: swa_utils.AveragedModel(m, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.9))),
        lambda: averaged_adamw(averaging("ema", 0.9)),
        averaged_seen,
    ),
    "swa": Scenario(
        averaged_loop(swa_utils.AveragedModel, start=20), lambda: averaged_adamw(averaging(), 20), averaged_seen
    ),
    "swa, multi": Scenario(
        averaged_loop(lambda m: swa_utils.AveragedModel(m, multi_avg_fn=swa_utils.get_swa_multi_avg_fn())),
        lambda: averaged_adamw(averaging("swa", multi=True)),
        averaged_seen,
    ),
    "everything": Scenario(everything_loop, everything, everything_seen, scaled_arrive, bad=True),
}


def show() -> optax.GradientTransformation:
    """Keeps the weight's gradient as it passes, for the eye of the test."""
    return optax.GradientTransformation(
        lambda params: jnp.zeros_like(params["weight"]), lambda grads, state, params=None: (grads, grads["weight"])
    )


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_hundred_steps_are_torchs(name):
    scenario = SCENARIOS[name]

    @few
    @given(SEEDS)
    def holds(seed: int) -> None:
        assert_agree(scenario.reference, scenario.port(), data(seed, scenario.bad))

    holds()


# --- clipping ---------------------------------------------------------------------------------------------------------

ORDERS = [2.0, 1.0, 3.0, 0.5, 0.0, float("inf"), float("-inf"), -1.0]


def clip_side(order: float, max_norm: float) -> Side:
    def side(bits: int, arrays: Arrays) -> Arrays:
        params = [nn.Parameter(torch.zeros(value.shape)) for value in arrays.values()]
        for param, value in zip(params, arrays.values(), strict=True):
            param.data, param.grad = torch.from_numpy(np.array(value)), torch.from_numpy(np.array(value))
        norm = clip_grad_norm_(params, max_norm, order)
        return {"norm": norm.numpy(), **{k: p.grad.numpy() for k, p in zip(arrays, params, strict=True)}}

    return side


def port_clip_side(clip: optax.GradientTransformation) -> Side:
    step = jax.jit(lambda grads: clip.update(grads, clip.init(grads)))

    def side(bits: int, arrays: Arrays) -> Arrays:
        with environment(bits):
            clipped, state = step(dict(arrays))
            return {"norm": np.asarray(state.norm), **{k: np.asarray(v) for k, v in clipped.items()}}

    return side


@pytest.mark.parametrize("order", ORDERS)
def test_the_norm_of_any_order_is_torchs(order):
    port = port_clip_side(clip_grad_norm(0.7, order))

    @given(SEEDS, st.floats(-4, 4))
    def holds(seed: int, size: float) -> None:
        rng = np.random.default_rng(seed)
        arrays = {leaf: rng.normal(size=shape) * 10**size for leaf, shape in LEAVES.items() if 0 not in shape}
        arrays["bias"][1] = 0.0 if order >= 0 else 1.0
        arrays["still"] = np.zeros(6) if order >= 0 else np.ones(6)
        assert_agree(clip_side(order, 0.7), port, arrays, moved=())

    holds()


@pytest.mark.parametrize("order", [2.0, 1.0, float("inf")])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30, 0.0])
def test_what_is_not_finite_is_clipped_as_in_torch(order, value):
    arrays = {"a": np.array([value, 1.0, -2.0], np.float32), "b": np.array(3.0, np.float32)}
    for path, ours in port_clip_side(clip_grad_norm(0.7, order))(32, arrays).items():
        theirs = clip_side(order, 0.7)(32, arrays)[path]
        np.testing.assert_array_equal(np.isfinite(ours), np.isfinite(theirs))
        np.testing.assert_array_equal(np.isnan(ours), np.isnan(theirs))
        np.testing.assert_array_equal(ours == 0, theirs == 0)


def test_leaves_that_are_none_or_masked_do_not_count():
    grads = {"a": jnp.array([3.0, 4.0]), "b": None, "c": optax.MaskedNode()}
    assert float(total_norm(grads)) == 5.0
    assert float(total_norm({"b": None})) == 0.0
    clipped, state = clip_grad_norm(1.0).update(grads, clip_grad_norm(1.0).init(grads))
    assert float(state.norm) == 5.0
    assert clipped["b"] is None
    outside = optax.masked(clip_grad_norm(1.0), {"a": True, "b": False})
    assert float(optax.tree.get(outside.init({"a": jnp.ones(2), "b": jnp.ones(3)}), "norm")) == 0.0


def test_each_leaf_keeps_its_dtype_and_the_norm_is_the_widest():
    grads = {"a": np.float32([3.0]), "b": jnp.array([4.0], jnp.bfloat16)}
    clipped, state = clip_grad_norm(1.0).update(grads, clip_grad_norm(1.0).init(grads))
    params = [nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))]
    params[0].grad, params[1].grad = torch.tensor([3.0]), torch.tensor([4.0], dtype=torch.bfloat16)
    norm = clip_grad_norm_(params, 1.0)
    assert (clipped["a"].dtype, clipped["b"].dtype, state.norm.dtype) == (jnp.float32, jnp.bfloat16, jnp.float32)
    assert [float(clipped["a"][0]), float(clipped["b"][0])] == [p.grad.item() for p in params]
    assert float(state.norm) == norm.item()


@given(SEEDS, st.sampled_from([32, 64]))
def test_clipping_by_value_is_bit_for_bit(seed, bits):
    value = np.random.default_rng(seed).normal(size=(3, 7)).astype(KINDS[bits])
    value.flat[:4] = [np.nan, np.inf, -np.inf, -0.0]
    param = nn.Parameter(torch.from_numpy(value.copy()))
    param.grad = torch.from_numpy(value.copy())
    clip_grad_value_([param], 0.3)
    with environment(bits):
        ours = np.asarray(clip_grad_value(0.3).update(jnp.asarray(value), optax.EmptyState())[0])
    np.testing.assert_array_equal(ours, param.grad.numpy())


# --- accumulation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("bits", [32, 64])
def test_the_sum_is_bit_for_bit_and_the_inner_state_rests(every, bits):
    grads = np.random.default_rng(every).normal(size=(7, 5)).astype(KINDS[bits])
    transformation = accumulate(optax.chain(optax.trace(0.0), optax.scale_by_schedule(lambda count: 1.0)), every)
    weight = nn.Parameter(torch.zeros(5, dtype=torch.from_numpy(grads).dtype))
    with environment(bits):
        update = jax.jit(transformation.update)
        state = transformation.init(jnp.zeros(5, grads.dtype))
        for number, grad in enumerate(grads, 1):
            updates, state = update(jnp.asarray(grad), state)
            (weight * torch.from_numpy(grad)).sum().backward()
            expected = weight.grad.numpy() if number % every == 0 else np.zeros(5)
            np.testing.assert_array_equal(np.asarray(updates), expected)
            assert updates.dtype == grads.dtype
            assert int(optax.tree.get(state, "count")) == number // every
            if number % every == 0:
                weight.grad = None


def test_a_mean_over_a_power_of_two_is_bit_for_bit():
    grads = np.random.default_rng(0).normal(size=(4, 5)).astype(np.float32)
    transformation = accumulate(optax.identity(), 4, mean=True)
    weight, state = nn.Parameter(torch.zeros(5)), transformation.init(jnp.zeros(5))
    for grad in grads:
        ((weight * torch.from_numpy(grad)).sum() / 4).backward()
        updates, state = transformation.update(jnp.asarray(grad), state)
    np.testing.assert_array_equal(np.asarray(updates), weight.grad.numpy())


def test_a_bad_gradient_does_not_outlive_its_step():
    transformation = accumulate(optax.identity(), 2)
    state = transformation.init(jnp.zeros(2))
    for value in (np.nan, 1.0, 2.0, 3.0):
        updates, state = transformation.update(jnp.full(2, value), state)
    assert np.asarray(updates).tolist() == [5.0, 5.0]


# --- averages ---------------------------------------------------------------------------------------------------------

AVERAGES: dict[str, tuple[Any, dict[str, Any]]] = {
    "ema": (averaging("ema", 0.97, multi=False), {"avg_fn": swa_utils.get_ema_avg_fn(0.97)}),
    "ema, buffers": (
        averaging("ema", 0.97, multi=False, use_buffers=True),
        {"avg_fn": swa_utils.get_ema_avg_fn(0.97), "use_buffers": True},
    ),
    "swa": (averaging(), {}),
    "swa, buffers": (averaging("swa", use_buffers=True), {"use_buffers": True}),
}


@pytest.mark.parametrize("name", AVERAGES)
@pytest.mark.parametrize("bits", [32, 64])
def test_averages_are_bit_for_bit(name, bits):
    rule, options = AVERAGES[name]
    update = jax.jit(rule.update)

    @few
    @given(SEEDS, st.integers(0, 10**6))
    def holds(seed: int, counter: int) -> None:
        rng = np.random.default_rng(seed)
        model = Tiny({leaf: torch.zeros(shape, dtype=torch_kind(bits)) for leaf, shape in LEAVES.items()}, counter)
        averaged = swa_utils.AveragedModel(model, **options)
        with environment(bits):
            state = rule.init(*leaves_of(model))
            for step in range(12):
                with torch.no_grad():
                    for value in (*model.parameters(), model.running):
                        value.copy_(torch.from_numpy(rng.normal(size=tuple(value.shape))))
                    model.counter += int(rng.integers(0, 50 * step + 2))
                averaged.update_parameters(model)
                params, buffers = leaves_of(model)
                state = update(params, state, buffers)
                same_state(state, average_state(averaged))

    holds()


@pytest.mark.parametrize("kind", ["ema", "swa"])
def test_integers_in_the_usual_ema_are_truncated_as_in_torch(kind):
    fn = swa_utils.get_ema_multi_avg_fn(0.999)
    rule = averaging("ema", 0.999, use_buffers=True)
    model = Tiny({"weight": torch.zeros(2)})
    averaged = swa_utils.AveragedModel(model, multi_avg_fn=fn, use_buffers=True)
    state, update = rule.init(*leaves_of(model)), jax.jit(rule.update)
    for _ in range(200):
        model.counter += 1
        averaged.update_parameters(model)
        state = update(*leaves_of(model)[:1], state, leaves_of(model)[1])
        assert int(state.buffers["counter"]) == averaged.module.counter.item()
    if kind == "swa":
        with pytest.raises(InputError, match="get_swa_multi_avg_fn has no average of int32"):
            averaging("swa", multi=True, use_buffers=True).update(*leaves_of(model)[:1], state, leaves_of(model)[1])


def torch_kind(bits: int) -> torch.dtype:
    return torch.float32 if bits == 32 else torch.float64


def leaves_of(model: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    return (
        {path: jnp.asarray(value.detach().numpy().copy()) for path, value in model.named_parameters()},
        {path: jnp.asarray(narrow(value.numpy().copy())) for path, value in model.named_buffers()},
    )


def narrow(value: np.ndarray) -> np.ndarray:
    return value.astype(np.int32) if value.dtype == np.int64 else value


def same_state(ours: Any, theirs: Any) -> None:
    assert int(ours.n_averaged) == int(theirs.n_averaged)
    for part in ("average", "buffers"):
        mine, other = getattr(ours, part), getattr(theirs, part)
        assert set(mine) == set(other)
        for path in other:
            np.testing.assert_array_equal(np.asarray(mine[path]), other[path], err_msg=path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_an_averaged_model_goes_both_ways_bit_for_bit(dtype):
    torch.manual_seed(0)
    model = Tiny({leaf: torch.randn(shape, dtype=dtype) for leaf, shape in LEAVES.items()})
    averaged = swa_utils.AveragedModel(model)
    for _ in range(3):
        averaged.update_parameters(model)
    state = average_state(averaged)
    other = swa_utils.AveragedModel(Tiny({leaf: torch.zeros(s, dtype=dtype) for leaf, s in LEAVES.items()}, 0))
    load_average_state(other, state)
    assert {k: v.dtype for k, v in other.state_dict().items()} == {k: v.dtype for k, v in averaged.state_dict().items()}
    for path, value in averaged.state_dict().items():
        assert torch.equal(other.state_dict()[path], value), path
    with pytest.raises(InputError, match="ice"):
        load_average_state(other, state._replace(average={k: v for k, v in state.average.items() if k != "ice"}))
    with pytest.raises(InputError, match=r"bias: \(2,\)"):
        load_average_state(other, state._replace(average={**state.average, "bias": np.zeros(2)}))


def test_an_average_goes_on_where_torch_stopped():
    model = Tiny({"weight": torch.ones(3)})
    averaged = swa_utils.AveragedModel(model)
    averaged.update_parameters(model)
    with torch.no_grad():
        model.weight.mul_(4)
    state = averaging().update(*leaves_of(model)[:1], average_state(averaged), leaves_of(model)[1])
    averaged.update_parameters(model)
    same_state(state, average_state(averaged))


# --- scaling ----------------------------------------------------------------------------------------------------------


@given(st.floats(2.0**-20, 2.0**100, width=32), SEEDS, st.sampled_from([32, 64]))
def test_unscaling_is_bit_for_bit(scale, seed, bits):
    value = np.random.default_rng(seed).normal(size=9).astype(KINDS[bits]) * KINDS[bits](scale)
    weight = nn.Parameter(torch.from_numpy(value.copy()))
    weight.grad = torch.from_numpy(value.copy())
    optimizer, scaler = torch.optim.SGD([weight]), torch.amp.GradScaler("cpu", init_scale=scale)
    scaler.scale(torch.zeros(()))
    scaler.unscale_(optimizer)
    with environment(bits):
        ours = np.asarray(unscale(jnp.asarray(value), jnp.asarray(scale, jnp.float32)))
    np.testing.assert_array_equal(ours, weight.grad.numpy())


@pytest.mark.parametrize("options", [{}, {"init_scale": 2.0**127, "growth_interval": 1}, {"growth_interval": 3}])
def test_the_scale_moves_bit_for_bit(options):
    weight = nn.Parameter(torch.zeros(2))
    optimizer, scaler = torch.optim.SGD([weight], lr=0.0), torch.amp.GradScaler("cpu", **options)
    transformation = scale_gradients(optax.sgd(0.0), **options)
    state, update = transformation.init(jnp.zeros(2)), jax.jit(transformation.update)
    assert float(state.scale) == scaler.get_scale()
    for bad in np.random.default_rng(0).random(60) < 0.15:
        grad = np.array([0.0, np.nan if bad else 0.0], np.float32)
        scaler.scale(torch.zeros(()))
        weight.grad = torch.from_numpy(grad.copy())
        scaler.step(optimizer)
        scaler.update()
        _, state = update(jnp.asarray(grad), state)
        assert (float(state.scale), int(state.growth_tracker)) == (scaler.get_scale(), scaler._get_growth_tracker())


def test_the_scaled_loss_is_torchs():
    state = ScaleState(jnp.asarray(3.0, jnp.float32), jnp.asarray(0))
    for value in (
        torch.tensor(0.3),
        torch.tensor(0.3, dtype=torch.float16),
        torch.full((3,), 0.3, dtype=torch.bfloat16),
    ):
        scaler = torch.amp.GradScaler("cpu", init_scale=3.0)
        theirs = scaler.scale(value)
        ours = scale_loss(jnp.asarray(value.float().numpy()).astype(str(value.dtype).removeprefix("torch.")), state)
        assert str(ours.dtype) == str(theirs.dtype).removeprefix("torch.")
        np.testing.assert_array_equal(np.asarray(ours, np.float32), theirs.float().numpy())


def test_a_scaler_goes_both_ways_bit_for_bit():
    scaler = torch.amp.GradScaler("cpu", init_scale=3.3, growth_interval=7)
    state = scaler_state(scaler, inner_state="inner")
    assert state == ScaleState(np.float32(3.3), np.int32(0), "inner")
    load_scaler_state(scaler, ScaleState(np.float32(0.1), np.int32(5)))
    assert scaler.state_dict() | {"scale": np.float32(0.1), "_growth_tracker": 5} == scaler.state_dict()
    scaler.scale(torch.zeros(()))
    assert scaler_state(scaler)[:2] == (np.float32(0.1), np.int32(5))
    off = torch.amp.GradScaler("cpu", enabled=False)
    assert scaler_state(off).scale is None
    load_scaler_state(off, ScaleState(None, None))
    with pytest.raises(InputError, match="enabled"):
        load_scaler_state(off, state)


def test_a_scaler_that_is_off_does_nothing():
    transformation = scale_gradients(optax.sgd(1.0), enabled=False)
    state = transformation.init(jnp.zeros(2))
    assert float(scale_loss(3.0, state)) == 3.0
    updates, state = transformation.update(jnp.array([np.inf, 1.0]), state)
    assert np.asarray(updates).tolist() == [-np.inf, -1.0]


# --- masks ------------------------------------------------------------------------------------------------------------


class Scale(nn.Module):
    """A norm of one's own, under a name that no rule by names knows."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.token = nn.Parameter(torch.ones(1, 2, width))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(4, 6)
        self.layer_norm, self.ln_f, self.rms = nn.LayerNorm(6), nn.GroupNorm(2, 6), nn.RMSNorm(6)
        self.bn, self.inst = nn.BatchNorm1d(6), nn.InstanceNorm1d(6, affine=True)
        self.norm_proj = nn.utils.parametrizations.weight_norm(nn.Linear(6, 3))
        self.conv, self.rnn, self.prelu = nn.Conv1d(6, 3, 2), nn.LSTM(6, 3), nn.PReLU(3)
        self.attn = nn.MultiheadAttention(6, 2, add_bias_kv=True)


DECAYED = {
    "embed.weight",
    "norm_proj.parametrizations.weight.original0",
    "norm_proj.parametrizations.weight.original1",
    "conv.weight",
    "rnn.weight_ih_l0",
    "rnn.weight_hh_l0",
    "prelu.weight",
    "attn.in_proj_weight",
    "attn.out_proj.weight",
}


def test_decay_goes_by_the_layers_type():
    mask = decay_mask(Model())
    assert list(mask) == [path for path, _ in Model().named_parameters()]
    assert {path for path, decays in mask.items() if decays} == DECAYED


def test_a_layer_of_ones_own_has_to_be_named():
    model = nn.Sequential(nn.Linear(6, 3), Scale())
    with pytest.raises(InputError, match=r"1\.weight \(Scale\)"):
        decay_mask(model)
    assert decay_mask(model, norms=(Scale,)) == {"0.weight": True, "0.bias": False, "1.weight": False, "1.token": False}
    assert decay_mask(model, layers=(Scale,)) == {"0.weight": True, "0.bias": False, "1.weight": True, "1.token": True}


def test_shapes_alone_spare_vectors():
    assert decay_mask({"a": (2, 3), "b": (3,), "c": ()}) == {"a": True, "b": False, "c": False}
    assert decay_mask({"a": np.zeros((2, 3)), "b": jnp.zeros(3)}) == {"a": True, "b": False}


def test_the_mask_means_the_same_in_both_worlds():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(5, 3), nn.LayerNorm(3))
    mask = decay_mask(model)
    before = {path: value.detach().numpy().copy() for path, value in model.named_parameters()}
    groups = [
        {"params": [value for path, value in model.named_parameters() if mask[path]]},
        {"params": [value for path, value in model.named_parameters() if not mask[path]], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.125, weight_decay=0.5)
    for value in model.parameters():
        value.grad = torch.zeros_like(value)
    optimizer.step()
    transformation = optax.adamw(0.125, weight_decay=0.5, mask=mask)
    updates, _ = transformation.update(jax.tree.map(np.zeros_like, before), transformation.init(before), before)
    for path, value in model.named_parameters():
        np.testing.assert_array_equal(np.asarray(before[path] + updates[path]), value.detach().numpy(), err_msg=path)


def test_a_frozen_leaf_has_no_state_and_no_update():
    params = {"a": {"w": jnp.ones(3)}, "b": {"w": jnp.ones(4)}}
    for frozen in (lambda path: path == "b.w", {"a": {"w": False}, "b": {"w": True}}, {"a": False, "b": True}):
        transformation = freeze(optax.adamw(0.1), frozen)
        state = transformation.init(params)
        assert sum(leaf.size for leaf in jax.tree.leaves(state)) == 2 * 3 + 1
        updates, _ = transformation.update(params, state, params)
        assert not np.asarray(updates["b"]["w"]).any()
        assert np.asarray(updates["a"]["w"]).all()


# --- what is refused, and the table -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: clip_grad_norm(1.0, error_if_nonfinite=True), "read `norm` from the state"),
        (lambda: total_norm({"a": jnp.zeros((0, 2))}, float("inf")), "without elements"),
        (lambda: accumulate(optax.sgd(1.0), 0), "at least one"),
        (lambda: averaging("swag"), "did you mean swa"),
        (lambda: averaging("ema", 1.5), r"\[0, 1\]"),
        (lambda: averaging().update(jnp.array(True), averaging().init(jnp.array(True))), "no average of bool"),
        (lambda: with_average(optax.sgd(1.0)).update(1.0, with_average(optax.sgd(1.0)).init(jnp.ones(1))), "params"),
        (lambda: scale_gradients(optax.sgd(1.0), growth_factor=1.0), "must be > 1"),
        (lambda: scale_gradients(optax.sgd(1.0), backoff_factor=1.0), "< 1"),
        (lambda: scale_gradients(optax.sgd(1.0), backoff_factor=0.7), "0.699999988079071"),
        (lambda: unscale(jnp.zeros(1, jnp.float16), jnp.float32(2.0)), "float16"),
    ],
)
def test_what_cannot_be_expressed_is_refused(call, words):
    with pytest.raises(InputError, match=words):
        call()


def test_the_table_names_what_is_here():
    forms = " ".join(row.form for row in AROUND)
    public = (clip_grad_norm, clip_grad_value, accumulate, per_micro_batch, averaging, with_average, decay_mask, freeze)
    assert all(function.__name__ in forms for function in (*public, scale_gradients))
    assert all(row.torch and row.naive and row.differs for row in AROUND)
