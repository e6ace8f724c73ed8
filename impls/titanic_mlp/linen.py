"""The Titanic network in Flax Linen: eight features in, one logit out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax.training import train_state
from jax import Array

from impls.titanic_mlp.config import Config

if TYPE_CHECKING:
    from equivalence.frameworks.linen import LinenModel


def linear(inputs: int, outputs: int, bias: bool) -> nn.Dense:
    """A linear layer, all of it uniform in ±1/sqrt(inputs)."""
    # differs: the weight is the kernel, stored as (inputs, outputs).
    bound = inputs**-0.5

    def uniform(key: Array, shape: Any, dtype: Any) -> Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return nn.Dense(
        outputs, use_bias=bias, kernel_init=uniform, bias_init=uniform
    )


class TitanicMLP(nn.Module):
    """Three linear layers; dropout, then leaky ReLU, between them."""

    config: Config

    def setup(self) -> None:
        config = self.config
        # differs: the call's train turns dropout on; it draws from a key.
        self.linear1 = linear(config.features, config.hidden1, True)
        self.dropout1 = nn.Dropout(config.dropout)
        self.linear2 = linear(config.hidden1, config.hidden2, True)
        self.dropout2 = nn.Dropout(config.dropout)
        self.linear3 = linear(config.hidden2, 1, False)
        self.slope = config.negative_slope

    def __call__(self, x: Array, train: bool = False) -> Array:
        # differs: at exactly 0 leaky ReLU has slope 1.
        h = self.dropout1(self.linear1(x), deterministic=not train)
        h = jax.nn.leaky_relu(h, self.slope)  # b h1
        h = self.dropout2(self.linear2(h), deterministic=not train)
        h = jax.nn.leaky_relu(h, self.slope)  # b h2
        return self.linear3(h).squeeze(-1)  # b


def build(config: Config, seed: int) -> LinenModel:
    """A freshly initialised network: a module and, apart, its arrays."""
    # differs: random numbers come from keys that are handed in.
    from equivalence.frameworks.linen import linen

    module = TitanicMLP(config)
    x = jnp.zeros((1, config.features))
    variables = module.init(jax.random.key(seed), x)
    return linen(module, variables, create_state=create_state)


def loss_fn(logits: Array, survived: Array) -> Array:
    """Binary cross-entropy, logits (b,) against 0 or 1 (b,), averaged."""
    # differs: computed as -y log σ(z) - (1 - y) log σ(-z).
    return optax.sigmoid_binary_cross_entropy(logits, survived).mean()


def make_optimizer(
    learning_rate: optax.ScalarOrSchedule,
) -> optax.GradientTransformation:
    """Adam, as two functions: its first state, and what a step adds."""
    # differs: the TrainState holds the optimizer's state.
    return optax.adam(learning_rate, b1=0.9, b2=0.999, eps=1e-8)


class TrainState(train_state.TrainState):
    """Parameters, optimizer state, step, and the key of dropout."""

    key: Array


def create_state(
    module: nn.Module,
    variables: Any,
    transformation: optax.GradientTransformation,
) -> TrainState:
    """The state before the first step."""
    return TrainState.create(
        apply_fn=module.apply,
        params=variables["params"],
        tx=transformation,
        key=jax.random.key(0),
    )


def train_step(
    state: TrainState, x: Array, survived: Array
) -> tuple[TrainState, Array]:
    """One step on one batch; returns the next state, the loss before it."""
    # differs: nothing changes in place; the caller compiles with jax.jit.
    rngs = {"dropout": jax.random.fold_in(state.key, state.step)}

    def mean_loss(params: Any) -> Array:
        logits = state.apply_fn({"params": params}, x, train=True, rngs=rngs)
        return loss_fn(logits, survived)

    loss, gradients = jax.value_and_grad(mean_loss)(state.params)
    return state.apply_gradients(grads=gradients), loss
