"""Small pairs of models written by hand, as a user would: torch first, then its ports. For the tests of `verify`."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import linen, nnx

import equivalence as eq


class TorchMLP(torch.nn.Module):
    """Linear 5 -> 7, dropout, ReLU, linear 7 -> 3."""

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        self.fc1 = torch.nn.Linear(5, 7)
        self.drop = torch.nn.Dropout(rate)
        self.fc2 = torch.nn.Linear(7, 3)

    def forward(self, x: Any) -> Any:
        return self.fc2(torch.relu(self.drop(self.fc1(x))))


class NnxMLP(nnx.Module):
    def __init__(self, rate: float = 0.0, seed: int = 0) -> None:
        rngs = nnx.Rngs(seed)
        self.fc1 = nnx.Linear(5, 7, rngs=rngs)
        self.drop = nnx.Dropout(rate, rngs=rngs)
        self.fc2 = nnx.Linear(7, 3, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.fc2(jax.nn.relu(self.drop(self.fc1(x))))


class LinenMLP(linen.Module):
    rate: float = 0.0

    @linen.compact
    def __call__(self, x: Any, train: bool = False) -> Any:
        x = linen.Dense(7, name="fc1")(x)
        x = linen.Dropout(self.rate, deterministic=not train)(x)
        return linen.Dense(3, name="fc2")(jax.nn.relu(x))


def torch_mlp(rate: float = 0.0, seed: int = 0) -> TorchMLP:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return TorchMLP(rate)


def linen_mlp(rate: float = 0.0, **options: Any) -> Any:
    module = LinenMLP(rate)
    return eq.linen(module, module.init(jax.random.key(0), jnp.zeros((1, 5))), **options)


def rows(seed: int = 0, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape or (6, 5)).astype(np.float32)


class TorchNorm(torch.nn.Module):
    """Linear 5 -> 7, batch norm with running statistics, linear 7 -> 3."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = torch.nn.Linear(5, 7)
        self.bn = torch.nn.BatchNorm1d(7, eps=1e-5, momentum=0.1)
        self.fc2 = torch.nn.Linear(7, 3)

    def forward(self, x: Any) -> Any:
        return self.fc2(torch.relu(self.bn(self.fc1(x))))


class BatchNorm(nnx.Module):
    """torch's batch norm: the running variance is the unbiased one, which Flax's own is not."""

    def __init__(self, size: int, momentum: float, unbiased: bool = True) -> None:
        self.scale, self.bias = nnx.Param(jnp.ones(size)), nnx.Param(jnp.zeros(size))
        self.mean, self.var = nnx.BatchStat(jnp.zeros(size)), nnx.BatchStat(jnp.ones(size))
        self.momentum, self.unbiased, self.use_running_average = momentum, unbiased, False

    def __call__(self, x: Any) -> Any:
        mean, var = self.mean[...], self.var[...]
        if not self.use_running_average:
            mean, var = x.mean(0), x.var(0)
            wide = var * len(x) / (len(x) - 1) if self.unbiased else var
            self.mean[...] = (1 - self.momentum) * self.mean[...] + self.momentum * mean
            self.var[...] = (1 - self.momentum) * self.var[...] + self.momentum * wide
        return (x - mean) * jax.lax.rsqrt(var + 1e-5) * self.scale[...] + self.bias[...]


class NnxNorm(nnx.Module):
    def __init__(self, momentum: float = 0.1, unbiased: bool = True) -> None:
        rngs = nnx.Rngs(0)
        self.fc1 = nnx.Linear(5, 7, rngs=rngs)
        self.bn = BatchNorm(7, momentum, unbiased)
        self.fc2 = nnx.Linear(7, 3, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.fc2(jax.nn.relu(self.bn(self.fc1(x))))


class TorchTied(torch.nn.Module):
    """An embedding that is also the head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(11, 5)
        self.fc = torch.nn.Linear(5, 5)
        self.head = torch.nn.Linear(5, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Any) -> Any:
        return self.head(torch.relu(self.fc(self.embed(tokens))))


class NnxTied(nnx.Module):
    def __init__(self, tied: bool = True) -> None:
        rngs = nnx.Rngs(0)
        self.embed = nnx.Embed(11, 5, rngs=rngs)
        self.fc = nnx.Linear(5, 5, rngs=rngs)
        if not tied:
            self.head = nnx.Linear(5, 11, use_bias=False, rngs=rngs)

    def __call__(self, tokens: Any) -> Any:
        table = self.embed.embedding[...]
        h = jax.nn.relu(self.fc(table[tokens]))
        return self.head(h) if hasattr(self, "head") else h @ table.T


def torch_step(model: Any, optimizer: Any, x: Any, target: Any) -> Any:
    """A user's own step: squared error, gradients clipped by value."""
    optimizer.zero_grad()
    loss = ((model(x) - target) ** 2).mean()
    loss.backward()
    torch.nn.utils.clip_grad_value_(model.parameters(), 0.05)
    optimizer.step()
    return loss.detach()


def nnx_step(model: Any, optimizer: Any, x: Any, target: Any, bound: float = 0.05) -> Any:
    loss, gradients = nnx.value_and_grad(lambda model: jnp.mean((model(x) - target) ** 2))(model)
    optimizer.update(model, jax.tree.map(lambda g: jnp.clip(g, -bound, bound), gradients))
    return loss


def linen_step(state: Any, x: Any, target: Any, bound: float = 0.05) -> Any:
    def mean(params: Any) -> Any:
        outputs = state.apply_fn({"params": params}, x, train=True, rngs={"dropout": jax.random.key(1)})
        return jnp.mean((outputs - target) ** 2)

    loss, gradients = jax.value_and_grad(mean)(state.params)
    return state.apply_gradients(grads=jax.tree.map(lambda g: jnp.clip(g, -bound, bound), gradients)), loss


def seeded(make: Any, seed: int = 0) -> Any:
    """What `make` builds from torch's generator at `seed`; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()
