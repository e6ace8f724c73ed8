"""The Titanic network in Flax NNX: eight features in, one logit out."""

from __future__ import annotations

from typing import Any

import jax
import optax
from flax import nnx
from jax import Array

from impls.titanic_mlp.config import Config


def linear(
    inputs: int, outputs: int, bias: bool, rngs: nnx.Rngs
) -> nnx.Linear:
    """A linear layer, all of it uniform in ±1/sqrt(inputs)."""
    # differs: the weight is the kernel, stored as (inputs, outputs).
    bound = inputs**-0.5

    def uniform(key: Array, shape: Any, dtype: Any) -> Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return nnx.Linear(
        inputs,
        outputs,
        use_bias=bias,
        kernel_init=uniform,
        bias_init=uniform,
        rngs=rngs,
    )


class TitanicMLP(nnx.Module):
    """Three linear layers; dropout, then leaky ReLU, between them."""

    def __init__(self, config: Config, rngs: nnx.Rngs) -> None:
        # differs: train() turns dropout on; it draws from a stream of rngs.
        self.linear1 = linear(config.features, config.hidden1, True, rngs)
        self.dropout1 = nnx.Dropout(config.dropout, rngs=rngs)
        self.linear2 = linear(config.hidden1, config.hidden2, True, rngs)
        self.dropout2 = nnx.Dropout(config.dropout, rngs=rngs)
        self.linear3 = linear(config.hidden2, 1, False, rngs)
        self.slope = config.negative_slope

    def __call__(self, x: Array) -> Array:
        # differs: at exactly 0 leaky ReLU has slope 1.
        h = self.dropout1(self.linear1(x))
        h = jax.nn.leaky_relu(h, self.slope)  # b h1
        h = self.dropout2(self.linear2(h))
        h = jax.nn.leaky_relu(h, self.slope)  # b h2
        return self.linear3(h).squeeze(-1)  # b


def build(config: Config, seed: int) -> TitanicMLP:
    """A freshly initialised network."""
    # differs: random numbers come from keys that are handed in.
    return TitanicMLP(config, rngs=nnx.Rngs(seed))


def loss_fn(logits: Array, survived: Array) -> Array:
    """Binary cross-entropy, logits (b,) against 0 or 1 (b,), averaged."""
    # differs: computed as -y log σ(z) - (1 - y) log σ(-z).
    return optax.sigmoid_binary_cross_entropy(logits, survived).mean()


def make_optimizer(
    learning_rate: optax.ScalarOrSchedule,
) -> optax.GradientTransformation:
    """Adam, as two functions: its first state, and what a step adds."""
    # differs: nnx.Optimizer(model, adam, wrt=nnx.Param) holds the state.
    return optax.adam(learning_rate, b1=0.9, b2=0.999, eps=1e-8)


def train_step(
    model: TitanicMLP,
    optimizer: nnx.Optimizer,
    x: Array,
    survived: Array,
) -> Array:
    """One step on one batch; returns the loss before it."""
    # differs: gradients are values; the caller compiles with nnx.jit.

    def mean_loss(model: TitanicMLP) -> Array:
        return loss_fn(model(x), survived)

    loss, gradients = nnx.value_and_grad(mean_loss)(model)
    optimizer.update(model, gradients)
    return loss
