"""The table of faults planted in the Titanic ports and their training."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array

import impls.titanic_mlp.linen as linen_titanic
import impls.titanic_mlp.nnx as nnx_titanic
from equivalence.optimizers import PAIRS, OptimizerPair
from equivalence.spec import BatchPlan, TrainingData
from equivalence.weights import Rule
from impls.titanic_mlp.config import Config
from tests.faults.planting import EPOCHS, Body, Fault, Parts, finish, right
from tests.pairs import translated

SQUARE = Config(hidden1=16, hidden2=16, epochs=EPOCHS)
"""The second kernel is square."""
EQUAL = Config(hidden1=8, hidden2=8, epochs=EPOCHS)
"""The first two layers have equal shapes."""

leaky = jax.nn.leaky_relu


# --- the forward pass ------------------------------------------------------------------------------------------------


def dropped_bias(parts: Parts, x: Array) -> Array:
    return finish(parts, parts.drop(1, x @ parts.leaf("linear1.kernel")))


def doubled_bias(parts: Parts, x: Array) -> Array:
    return finish(parts, parts.drop(1, parts.linear(1, x) + parts.leaf("linear1.bias")))


def other_slope(parts: Parts, x: Array) -> Array:
    h = leaky(parts.drop(1, parts.linear(1, x)), parts.module.slope)
    h = leaky(parts.drop(2, parts.linear(2, h)), 2 * parts.module.slope)
    return parts.linear(3, h).squeeze(-1)


def missing_activation(parts: Parts, x: Array) -> Array:
    h = leaky(parts.drop(1, parts.linear(1, x)), parts.module.slope)
    return parts.linear(3, parts.drop(2, parts.linear(2, h))).squeeze(-1)


def activation_before_second_layer_only_when_training(parts: Parts, x: Array) -> Array:
    h = parts.drop(1, parts.linear(1, x))
    h = leaky(h, parts.module.slope) if parts.train else h
    return parts.linear(3, leaky(parts.drop(2, parts.linear(2, h)), parts.module.slope)).squeeze(-1)


def dropout_before_linear(parts: Parts, x: Array) -> Array:
    return finish(parts, parts.linear(1, parts.drop(1, x)))


def dropout_not_rescaled(parts: Parts, x: Array) -> Array:
    keep = 1.0 - parts.module.dropout1.rate if parts.train else 1.0
    return finish(parts, parts.drop(1, parts.linear(1, x)) * keep)


def dropout_in_eval(parts: Parts, x: Array) -> Array:
    return finish(parts, parts.drop(1, parts.linear(1, x), deterministic=False))


def dropout_missing(parts: Parts, x: Array) -> Array:
    return finish(parts, parts.linear(1, x))


def dropout_on_logits(parts: Parts, x: Array) -> Array:
    h = leaky(parts.drop(1, parts.linear(1, x)), parts.module.slope)
    h = leaky(parts.linear(2, h), parts.module.slope)
    return parts.drop(2, parts.linear(3, h)).squeeze(-1)


def dropout_mask_shared_by_rows(parts: Parts, x: Array) -> Array:
    h = parts.linear(1, x)
    return finish(parts, h * parts.drop(1, jnp.ones_like(h[:1])))


def not_squeezed(parts: Parts, x: Array) -> Array:
    return right(parts, x)[:, None]


def returns_more(parts: Parts, x: Array) -> tuple[Array, Array]:
    return right(parts, x), parts.linear(1, x)


def columns_swapped(parts: Parts, x: Array) -> Array:
    return right(parts, x[:, jnp.array([1, 0, 2, 3, 4, 5, 6, 7])])


def rows_reversed(parts: Parts, x: Array) -> Array:
    return right(parts, x[::-1])


def tempered(parts: Parts, x: Array) -> Array:
    return right(parts, x) * (1.0 + 1e-9)


def clipped_logits(parts: Parts, x: Array) -> Array:
    return jnp.clip(right(parts, x), -30.0, 30.0)


def bfloat16_inside(parts: Parts, x: Array) -> Array:
    h = parts.linear(1, x)
    return finish(parts, parts.drop(1, h.astype(jnp.bfloat16).astype(h.dtype)))


def half_when_single(parts: Parts, x: Array, half: Any) -> Array:
    """Low precision only where the run is float32: the functions are the same, one is computed badly."""
    h = parts.linear(1, x)
    low = h.astype(half).astype(h.dtype) if h.dtype == jnp.float32 else h
    return finish(parts, parts.drop(1, low))


def bfloat16_when_single(parts: Parts, x: Array) -> Array:
    return half_when_single(parts, x, jnp.bfloat16)


def float16_when_single(parts: Parts, x: Array) -> Array:
    return half_when_single(parts, x, jnp.float16)


def single_inside(parts: Parts, x: Array) -> Array:
    h = parts.linear(1, x)
    return finish(parts, parts.drop(1, h.astype(jnp.float32).astype(h.dtype)))


def scaled_gradient(value: Array, factor: float) -> Array:
    """The value itself, with its gradient times `factor`."""
    return jax.lax.stop_gradient(value) + factor * (value - jax.lax.stop_gradient(value))


def stopped_gradient(parts: Parts, x: Array) -> Array:
    return finish(parts, parts.drop(1, jax.lax.stop_gradient(parts.linear(1, x))))


def input_gradient_scaled(parts: Parts, x: Array) -> Array:
    return right(parts, scaled_gradient(x, 1.0 + 1e-6))


def bias_gradient_stopped(parts: Parts, x: Array) -> Array:
    h = x @ parts.leaf("linear1.kernel") + jax.lax.stop_gradient(parts.leaf("linear1.bias"))
    return finish(parts, parts.drop(1, h))


def kernel_gradient_scaled(parts: Parts, x: Array) -> Array:
    kernel = scaled_gradient(parts.leaf("linear1.kernel"), 1.0 + 1e-6)
    # inputs keep their own gradient: only the kernel's is off
    h = x @ jax.lax.stop_gradient(kernel) + jax.lax.stop_gradient(x) @ (kernel - jax.lax.stop_gradient(kernel))
    return finish(parts, parts.drop(1, h + parts.leaf("linear1.bias")))


def straight_through(parts: Parts, x: Array) -> Array:
    h = parts.drop(1, parts.linear(1, x))
    active = h + jax.lax.stop_gradient(leaky(h, parts.module.slope) - h)
    return parts.linear(3, leaky(parts.drop(2, parts.linear(2, active)), parts.module.slope)).squeeze(-1)


def traced_or_not(parts: Parts, x: Array) -> Array:
    """A branch of Python on whether values are there: compiled, they never are."""
    value: Any = x
    while hasattr(value, "primal"):  # a derivative is taken: what it is taken of lies beneath
        value = value.primal
    return right(parts, x) * (1.0 if isinstance(value, jax.core.Tracer) else 1.0 + 1e-9)


def counts_its_calls(limit: int) -> Body:
    """A factor that follows a Python counter: a compiled program keeps what it was when it was traced.

    `limit` is one more than the calls by which everything compiled has been traced.
    """
    calls = [0]

    def body(parts: Parts, x: Array) -> Array:
        calls[0] += 1
        return right(parts, x) * (1.0 if calls[0] <= limit else 1.001)

    return body


# --- the loss --------------------------------------------------------------------------------------------------------


def entropy(logits: Array, survived: Array) -> Array:
    return optax.sigmoid_binary_cross_entropy(logits, survived)


def summed(logits: Array, survived: Array) -> Array:
    return entropy(logits, survived).sum()


def last_row_left_out(logits: Array, survived: Array) -> Array:
    return entropy(logits, survived)[:-1].mean()


def smoothed(logits: Array, survived: Array) -> Array:
    return entropy(logits, survived * (1 - 1e-6) + 0.5e-6).mean()


def negated_gradient(logits: Array, survived: Array) -> Array:
    return scaled_gradient(nnx_titanic.loss_fn(logits, survived), -1.0)


def doubled_gradient(logits: Array, survived: Array) -> Array:
    return scaled_gradient(nnx_titanic.loss_fn(logits, survived), 2.0)


def sigmoid_then_log(logits: Array, survived: Array) -> Array:
    p = jax.nn.sigmoid(logits)
    return -(survived * jnp.log(p) + (1 - survived) * jnp.log(1 - p)).mean()


def averaged_over_a_full_batch(logits: Array, survived: Array) -> Array:
    """Right for every batch but the short last one."""
    return entropy(logits, survived).sum() / 64


# --- the step and its optimizer --------------------------------------------------------------------------------------


def adam(**options: Any) -> dict[str, Any]:
    """`make_optimizer` with other options than Adam's in the reference."""
    given = {"b1": 0.9, "b2": 0.999, "eps": 1e-8, **options}
    return {"make_optimizer": lambda learning_rate: optax.adam(learning_rate, **given)}


def after(*first: optax.GradientTransformation) -> dict[str, Any]:
    """`make_optimizer` with transformations of the gradient before the right Adam."""
    return {"make_optimizer": lambda rate: optax.chain(*first, nnx_titanic.make_optimizer(rate))}


def rate(change: Callable[[Callable[[Any], Any], Any], Any]) -> dict[str, Any]:
    """`make_optimizer` whose rate at a step is `change(schedule, count)`."""

    def make(learning_rate: Any) -> optax.GradientTransformation:
        plain = learning_rate if callable(learning_rate) else (lambda count: learning_rate)
        return nnx_titanic.make_optimizer(lambda count: change(plain, count))

    return {"make_optimizer": make}


def uncorrected(learning_rate: Any) -> optax.GradientTransformation:
    """Adam without bias correction."""

    def init(params: Any) -> Any:
        return optax.scale_by_adam().init(params)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        mu = jax.tree_util.tree_map(lambda m, g: 0.9 * m + 0.1 * g, state.mu, updates)
        nu = jax.tree_util.tree_map(lambda v, g: 0.999 * v + 0.001 * g * g, state.nu, updates)
        new = jax.tree_util.tree_map(lambda m, v: m / (jnp.sqrt(v) + 1e-8), mu, nu)
        return new, optax.ScaleByAdamState(state.count + 1, mu, nu)

    return optax.chain(optax.GradientTransformation(init, update), optax.scale_by_learning_rate(learning_rate))


def amsgrad(learning_rate: Any) -> optax.GradientTransformation:
    return optax.chain(optax.scale_by_amsgrad(b1=0.9, b2=0.999, eps=1e-8), optax.scale_by_learning_rate(learning_rate))


def unscaled_moment(learning_rate: Any) -> optax.GradientTransformation:
    """Adam's steps exactly, with the first moment kept without its factor 1 - b1."""
    right_adam = optax.scale_by_adam(b1=0.9, b2=0.999, eps=1e-8)

    def scaled(state: Any, factor: float) -> Any:
        return state._replace(mu=jax.tree_util.tree_map(lambda m: m * factor, state.mu))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = right_adam.update(updates, scaled(state, 0.125), params)
        return updates, scaled(state, 8.0)

    return optax.chain(
        optax.GradientTransformation(right_adam.init, update), optax.scale_by_learning_rate(learning_rate)
    )


def decay_after_momentum(learning_rate: Any) -> optax.GradientTransformation:
    """Weight decay added to what momentum made: right at the first step."""
    return optax.chain(optax.trace(0.9), optax.add_decayed_weights(0.01), optax.scale_by_learning_rate(learning_rate))


def swapped(reference: str, port: str) -> OptimizerPair:
    """The reference of one pair with the port of another."""
    return dataclasses.replace(PAIRS[reference], port=translated(port))


def no_update(model: Any, optimizer: nnx.Optimizer, x: Array, survived: Array) -> Array:
    loss, _ = nnx.value_and_grad(lambda model: nnx_titanic.loss_fn(model(x), survived))(model)
    return loss


def loss_after_update(model: Any, optimizer: nnx.Optimizer, x: Array, survived: Array) -> Array:
    nnx_titanic.train_step(model, optimizer, x, survived)
    return nnx_titanic.loss_fn(model(x), survived)


def one_layer_left_out(state: Any, x: Array, survived: Array) -> tuple[Any, Array]:
    new, loss = linen_titanic.train_step(state, x, survived)
    return new.replace(params={**new.params, "linear2": state.params["linear2"]}), loss


def step_in_eval_mode(state: Any, x: Array, survived: Array) -> tuple[Any, Array]:
    def mean_loss(params: Any) -> Array:
        return linen_titanic.loss_fn(state.apply_fn({"params": params}, x), survived)

    loss, gradients = jax.value_and_grad(mean_loss)(state.params)
    return state.apply_gradients(grads=gradients), loss


def short_batch_skipped_nnx(model: Any, optimizer: nnx.Optimizer, x: Array, survived: Array) -> Array:
    step = nnx_titanic.train_step if len(x) == 64 else no_update
    return step(model, optimizer, x, survived)


def short_batch_skipped_linen(state: Any, x: Array, survived: Array) -> tuple[Any, Array]:
    new, loss = linen_titanic.train_step(state, x, survived)
    return (new if len(x) == 64 else state), loss


def short_batch_scaled(state: Any, x: Array, survived: Array) -> tuple[Any, Array]:
    """The loss of the short last batch averaged as if it were full."""
    rngs = {"dropout": state.key}

    def mean_loss(params: Any) -> Array:
        return averaged_over_a_full_batch(state.apply_fn({"params": params}, x, train=True, rngs=rngs), survived)

    loss, gradients = jax.value_and_grad(mean_loss)(state.params)
    return state.apply_gradients(grads=gradients), loss


# --- what training reads ---------------------------------------------------------------------------------------------


def other_order(data: TrainingData) -> TrainingData:
    """Two batches of the second epoch change places."""
    order = data.plan.order.copy()
    order[1, :128] = np.roll(order[1, :128], 64)
    return dataclasses.replace(data, plan=BatchPlan(order, data.plan.batch_size))


def epoch_repeated(data: TrainingData) -> TrainingData:
    """The second epoch is the first once more: nothing was shuffled."""
    order = np.stack([data.plan.order[0]] * data.plan.epochs)
    return dataclasses.replace(data, plan=BatchPlan(order, data.plan.batch_size))


def features_swapped(data: TrainingData) -> TrainingData:
    return dataclasses.replace(data, inputs=(data.inputs[0][:, [0, 1, 2, 3, 5, 4, 6, 7]],))


def one_label_flipped(data: TrainingData) -> TrainingData:
    survived = data.targets[0].copy()
    survived[data.plan.order[0, 700]] = 1 - survived[data.plan.order[0, 700]]
    return dataclasses.replace(data, targets=(survived,))


def standardised_in_half(data: TrainingData) -> TrainingData:
    return dataclasses.replace(data, inputs=(data.inputs[0].astype(np.float16).astype(np.float32),))


# --- weights ---------------------------------------------------------------------------------------------------------


def linear_rules(second: str = "o i -> i o") -> tuple[Rule, ...]:
    return (
        Rule("linear1.weight", "linear1.kernel", "o i -> i o"),
        Rule("linear2.weight", "linear2.kernel", second),
        Rule("linear3.weight", "linear3.kernel", "o i -> i o"),
        Rule("linear{i}.bias", "linear{i}.bias"),
    )


def crossed(leaf: str) -> tuple[Rule, ...]:
    """Rules that carry one kind of leaf of layer 1 to layer 2 and of layer 2 to layer 1."""
    ends = {"weight": ("kernel", "o i -> i o"), "bias": ("bias", None)}
    rules = [Rule("linear3.weight", "linear3.kernel", "o i -> i o")]
    for source, (target, axes) in ends.items():
        one, two = ("linear2", "linear1") if source == leaf else ("linear1", "linear2")
        rules.append(Rule(f"linear1.{source}", f"{one}.{target}", axes))
        rules.append(Rule(f"linear2.{source}", f"{two}.{target}", axes))
    return tuple(rules)


def bias_is_no_parameter(config: Config, seed: int) -> nnx.Module:
    model = nnx_titanic.build(config, seed)
    model.linear1.bias = nnx.BatchStat(model.linear1.bias[...])
    return model


def bias_too_many(config: Config, seed: int) -> nnx.Module:
    model = nnx_titanic.build(config, seed)
    model.linear3 = nnx_titanic.linear(config.hidden2, 1, True, nnx.Rngs(seed))
    return model


def other_rate(port: Any, factor: float) -> dict[str, Any]:
    """A port built with another dropout rate than the configuration's."""

    def build(config: Config, seed: int) -> Any:
        return port.build(dataclasses.replace(config, dropout=factor * config.dropout), seed)

    return {"build": build}


FAULTS: tuple[Fault, ...] = (
    # structure
    Fault("output not squeezed", "nnx", "structure", not_squeezed),
    Fault("a second output", "linen", "structure", returns_more),
    Fault("a bias that is no parameter", "nnx", "structure", changes={"build": bias_is_no_parameter}),
    Fault(
        "a bias too many",
        "nnx",
        "structure",
        changes={"build": bias_too_many},
        rules=(*linear_rules(), Rule(None, "linear3.bias")),
    ),
    # outputs
    Fault("bias dropped", "nnx", "outputs", dropped_bias),
    Fault("bias added twice", "linen", "outputs", doubled_bias),
    Fault("square kernel not transposed", "linen", "outputs", rules=linear_rules("o i -> o i"), config=SQUARE),
    Fault("kernels of equal layers swapped", "nnx", "outputs", rules=crossed("weight"), config=EQUAL),
    Fault("biases of equal layers swapped", "linen", "outputs", rules=crossed("bias"), config=EQUAL),
    Fault("slope 0.02", "nnx", "outputs", other_slope),
    Fault("activation missing", "linen", "outputs", missing_activation),
    Fault("activation in train mode only", "nnx", "outputs", activation_before_second_layer_only_when_training),
    Fault("dropout before linear", "nnx", "outputs", dropout_before_linear),
    Fault("dropout at twice the rate", "linen", "outputs", changes=other_rate(linen_titanic, 2.0)),
    Fault("dropout rate off by 1e-6", "nnx", "outputs", changes=other_rate(nnx_titanic, 1 + 1e-4)),
    Fault("dropout not rescaled", "linen", "outputs", dropout_not_rescaled),
    Fault("dropout on in eval mode", "nnx", "outputs", dropout_in_eval),
    Fault("dropout missing", "linen", "outputs", dropout_missing),
    Fault("dropout on the logits", "nnx", "outputs", dropout_on_logits),
    Fault("one dropout mask for all rows", "linen", "outputs", dropout_mask_shared_by_rows),
    Fault("feature columns swapped inside", "linen", "outputs", columns_swapped),
    Fault("rows reversed", "nnx", "outputs", rows_reversed),
    Fault("logits times 1 + 1e-9", "linen", "outputs", tempered),
    Fault("logits clipped at 30", "nnx", "outputs", clipped_logits, examples=8),
    Fault("bfloat16 inside", "nnx", "outputs", bfloat16_inside),
    Fault("bfloat16 where float32 is asked for", "linen", "outputs", bfloat16_when_single),
    Fault("float16 where float32 is asked for", "nnx", "outputs", float16_when_single),
    # loss
    Fault("loss summed", "nnx", "loss", changes={"loss_fn": summed}),
    Fault("last row left out of the loss", "linen", "loss", changes={"loss_fn": last_row_left_out}),
    Fault("labels smoothed by 1e-6", "nnx", "loss", changes={"loss_fn": smoothed}),
    Fault("loss with a negated gradient", "linen", "loss", changes={"loss_fn": negated_gradient}),
    Fault("loss with a doubled gradient", "nnx", "loss", changes={"loss_fn": doubled_gradient}),
    Fault("sigmoid, then log", "linen", "loss", changes={"loss_fn": sigmoid_then_log}, examples=8),
    # gradients
    Fault("gradient stopped at the first layer", "linen", "input_gradients", stopped_gradient),
    Fault("input gradient times 1 + 1e-6", "nnx", "input_gradients", input_gradient_scaled),
    Fault("activation passed straight through backwards", "linen", "input_gradients", straight_through),
    Fault("gradient of a bias stopped", "nnx", "parameter_gradients", bias_gradient_stopped),
    Fault("gradient of a kernel times 1 + 1e-6", "linen", "parameter_gradients", kernel_gradient_scaled),
    # steps
    Fault("Adam eps 1e-7", "nnx", "step", changes=adam(eps=1e-7)),
    Fault("Adam betas swapped", "linen", "step", changes=adam(b1=0.999, b2=0.9)),
    Fault("Adam without bias correction", "nnx", "step", changes={"make_optimizer": uncorrected}),
    Fault("Adam eps inside the root", "linen", "step", changes=adam(eps=0.0, eps_root=1e-8)),
    Fault("Adam with Nesterov momentum", "nnx", "step", changes=adam(nesterov=True)),
    Fault("AMSGrad", "linen", "step", changes={"make_optimizer": amsgrad}),
    Fault("learning rate times 1 + 1e-6", "linen", "step", changes=rate(lambda plain, n: plain(n) * (1 + 1e-6))),
    Fault("learning rate of the next step", "nnx", "step", changes=rate(lambda plain, n: plain(n + 1))),
    Fault("gradient negated", "nnx", "step", changes=after(optax.scale(-1.0))),
    Fault("gradient never cleared", "linen", "step", changes=after(optax.trace(1.0))),
    Fault("gradient clipped", "nnx", "step", changes=after(optax.clip_by_global_norm(1e-2))),
    Fault("parameters not updated", "nnx", "step", changes={"train_step": no_update}),
    Fault("one layer not updated", "linen", "step", changes={"train_step": one_layer_left_out}),
    Fault(
        "loss taken after the update",
        "nnx",
        "step",
        changes={"train_step": loss_after_update},
        config=Config(dropout=0.0, epochs=EPOCHS),
    ),
    Fault("step in eval mode", "linen", "step", changes={"train_step": step_in_eval_mode}),
    Fault("decay coupled for decoupled", "nnx", "step", optimizer=swapped("adamw", "adam_decay")),
    Fault("decay decoupled for coupled", "linen", "step", optimizer=swapped("adam_decay", "adamw")),
    Fault("decay left out", "nnx", "step", optimizer=swapped("adamw", "adam")),
    Fault("Nesterov off", "linen", "step", optimizer=swapped("nesterov", "momentum")),
    Fault(
        "decay after momentum",
        "nnx",
        "step",
        optimizer=dataclasses.replace(PAIRS["sgd_decay"], port=decay_after_momentum),
    ),
    Fault("first moment kept unscaled", "linen", "optimizer_state", changes={"make_optimizer": unscaled_moment}),
    # jit
    Fault("a branch on whether values are traced", "nnx", "jit", traced_or_not),
    Fault("a counter of calls frozen by tracing", "linen", "jit", counts_its_calls(14)),
    # training
    Fault("short last batch skipped", "nnx", "training", changes={"train_step": short_batch_skipped_nnx}),
    Fault("last batch dropped", "linen", "training", changes={"train_step": short_batch_skipped_linen}),
    Fault("short batch averaged as a full one", "linen", "training", changes={"train_step": short_batch_scaled}),
    Fault(
        "rate lower from the tenth step on",
        "nnx",
        "training",
        changes=rate(lambda plain, n: plain(n) * jnp.where(n < 10, 1.0, 1 - 1e-6)),
    ),
    Fault("batches in another order", "nnx", "training", data=other_order),
    Fault("epochs not shuffled", "linen", "training", data=epoch_repeated),
    Fault("feature columns swapped in the data", "linen", "training", data=features_swapped),
    Fault("one label flipped", "nnx", "training", data=one_label_flipped),
    Fault("features rounded to float16", "linen", "training", data=standardised_in_half),
)
