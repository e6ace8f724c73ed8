"""Small torch/JAX pairs that tests and benchmarks share: right as they stand, and with one option turned, faulty.

Each maker returns a `Pair` whose fields are what `equivalence.verify` takes. Sizes are odd and pairwise distinct. The
keyword options of a maker go to the port alone: `attention(eps=1e-6)` is a port with another LayerNorm.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F
from flax import nnx
from torch import Tensor, nn

import equivalence as eq
from equivalence import losses
from equivalence.losses import LossPair
from equivalence.optimizers import PAIRS as OPTIMIZERS
from equivalence.optimizers.translate import to_optax
from equivalence.weights import Mapping, Rule

LINEAR = (
    Rule("{layer}.weight", "{layer}.kernel", "o i -> i o"),
    Rule("{layer}.bias", "{layer}.bias"),
)


class Pair(NamedTuple):
    """A reference, a port, and what `equivalence.verify` runs them with."""

    reference: nn.Module
    port: Any
    inputs: tuple[np.ndarray, ...]
    targets: tuple[np.ndarray, ...]
    loss: LossPair
    weights: Mapping


def seeded(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """What `make` builds from torch's generator at `seed`; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return make()


def normal(*shape: int, seed: int = 1) -> np.ndarray:
    """Standard normal float32."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def placeholders(reference: nn.Module) -> dict[str, Any]:
    """The reference's own weights as a nested dict in the port's names and axes."""
    leaves = {path: value.detach().numpy() for path, value in reference.named_parameters()}
    made: dict[str, Any] = {}
    for path, value in leaves.items():
        layer, _, leaf = path.rpartition(".")
        node = made
        for part in layer.split("."):
            node = node.setdefault(part, {})
        node["kernel" if leaf == "weight" and value.ndim == 2 else leaf] = value.T if value.ndim == 2 else value
    return made


def linear(params: Any, x: jax.Array) -> jax.Array:
    """x @ kernel + bias."""
    return x @ params["kernel"] + params["bias"]


# --- a perceptron with a cross-entropy that saturates at large weights -----------------------------------------------


class TorchMLP(nn.Module):
    def __init__(self, inputs: int, hidden: int, classes: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(inputs, hidden)
        self.linear2 = nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear2(F.gelu(self.linear1(x), approximate="none"))  # b c


def mlp_apply(params: Any, x: jax.Array, *, approximate: bool = False) -> jax.Array:
    return linear(params["linear2"], jax.nn.gelu(linear(params["linear1"], x), approximate=approximate))


def mlp(**options: Any) -> Pair:
    """Linear, exact GELU, linear; classes by cross-entropy. Options: `approximate`."""
    reference = seeded(lambda: TorchMLP(7, 13, 3))
    labels = np.random.default_rng(2).integers(0, 3, 11)
    port = eq.function(partial(mlp_apply, **options), placeholders(reference))
    return Pair(reference, port, (normal(11, 7),), (labels,), losses.resolve("cross_entropy"), Mapping(LINEAR))


# --- attention: LayerNorm, separate projections with bias, a key bias that is inert by algebra -----------------------


class TorchBlock(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, eps=1e-5)
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=1e-5)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # b h t d

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        q, k, v = self.split(self.query(h)), self.split(self.key(h)), self.split(self.value(h))
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + self.out(mixed)
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="none"))  # b t w


def layer_norm(params: Any, x: jax.Array, eps: float) -> jax.Array:
    centred = x - x.mean(-1, keepdims=True)
    variance = jnp.square(centred).mean(-1, keepdims=True)
    return centred / jnp.sqrt(variance + eps) * params["weight"] + params["bias"]


def attention_apply(
    params: Any, x: jax.Array, *, heads: int = 3, eps: float = 1e-5, approximate: bool = False
) -> jax.Array:
    def split(x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:2], heads, -1).swapaxes(1, 2)  # b h t d

    h = layer_norm(params["norm1"], x, eps)
    q, k, v = (split(linear(params[name], h)) for name in ("query", "key", "value"))
    scores = q @ k.swapaxes(-1, -2) / q.shape[-1] ** 0.5
    mixed = (jax.nn.softmax(scores) @ v).swapaxes(1, 2).reshape(x.shape)
    x = x + linear(params["out"], mixed)
    up = jax.nn.gelu(linear(params["up"], layer_norm(params["norm2"], x, eps)), approximate=approximate)
    return x + linear(params["down"], up)


NORMS = (Rule("norm{i}.weight", "norm{i}.weight"), Rule("norm{i}.bias", "norm{i}.bias"))


def attention(**options: Any) -> Pair:
    """A pre-norm transformer block. Options: `eps`, `approximate`, `heads`."""
    reference = seeded(lambda: TorchBlock(15, 3, 22))
    projections = tuple(
        rule
        for name in ("query", "key", "value", "out", "up", "down")
        for rule in (Rule(f"{name}.weight", f"{name}.kernel", "o i -> i o"), Rule(f"{name}.bias", f"{name}.bias"))
    )
    port = eq.function(partial(attention_apply, **options), placeholders(reference))
    inputs = (normal(2, 7, 15),)
    return Pair(
        reference, port, inputs, (normal(2, 7, 15, seed=2),), losses.resolve("mse"), Mapping(NORMS + projections)
    )


# --- BatchNorm: buffers, and torch's unbiased running variance -------------------------------------------------------


class TorchBatchNormMLP(nn.Module):
    def __init__(self, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(inputs, hidden)
        self.norm = nn.BatchNorm1d(hidden, eps=1e-5, momentum=0.1)
        self.linear2 = nn.Linear(hidden, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear2(torch.tanh(self.norm(self.linear1(x))))  # b o


class BatchNorm(nnx.Module):
    """torch's BatchNorm1d: normalises by the biased variance, keeps the unbiased one."""

    def __init__(self, width: int, momentum: float, unbiased: bool, updates: bool, eps: float) -> None:
        self.scale, self.bias = nnx.Param(jnp.ones(width)), nnx.Param(jnp.zeros(width))
        self.mean, self.var = nnx.BatchStat(jnp.zeros(width)), nnx.BatchStat(jnp.ones(width))
        self.momentum, self.unbiased, self.updates, self.eps = momentum, unbiased, updates, eps
        self.use_running_average = False

    def __call__(self, x: jax.Array) -> jax.Array:
        mean, var = self.mean[...], self.var[...]
        if not self.use_running_average:
            mean = x.mean(0)
            var = jnp.square(x - mean).mean(0)
            kept = var * len(x) / (len(x) - 1) if self.unbiased else var
            if self.updates:
                self.mean[...] = self.momentum * self.mean[...] + (1 - self.momentum) * mean
                self.var[...] = self.momentum * self.var[...] + (1 - self.momentum) * kept
        return (x - mean) / jnp.sqrt(var + self.eps) * self.scale[...] + self.bias[...]


class BatchNormMLP(nnx.Module):
    def __init__(self, sizes: tuple[int, int, int], rngs: nnx.Rngs, **options: Any) -> None:
        self.linear1 = nnx.Linear(sizes[0], sizes[1], rngs=rngs)
        self.norm = BatchNorm(sizes[1], **options)
        self.linear2 = nnx.Linear(sizes[1], sizes[2], rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.linear2(jnp.tanh(self.norm(self.linear1(x))))


def batchnorm(momentum: float = 0.9, unbiased: bool = True, updates: bool = True, eps: float = 1e-5) -> Pair:
    """Linear, BatchNorm, tanh, linear, in NNX; the first bias is inert by algebra in train mode."""
    reference = seeded(lambda: TorchBatchNormMLP(5, 9, 3))
    options = {"momentum": momentum, "unbiased": unbiased, "updates": updates, "eps": eps}
    port = BatchNormMLP((5, 9, 3), nnx.Rngs(0), **options)
    rules = (
        Rule("linear{i}.weight", "linear{i}.kernel", "o i -> i o"),
        Rule("linear{i}.bias", "linear{i}.bias"),
        Rule("norm.weight", "norm.scale"),
        Rule("norm.bias", "norm.bias"),
        Rule("norm.running_{s}", "norm.{s}", s=("mean", "var")),
        Rule("norm.num_batches_tracked", None),
    )
    return Pair(reference, port, (normal(12, 5),), (normal(12, 3, seed=2),), losses.resolve("mse"), Mapping(rules))


# --- a deep stack of tanh layers, stacked for scan in JAX ------------------------------------------------------------


class TorchDeep(nn.Module):
    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        with torch.no_grad():
            for layer in self.layers:
                layer.weight.mul_(3**0.5)  # what comes in neither dies out nor saturates on its way

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def deep_apply(params: Any, x: jax.Array, *, error: float = 0.0) -> jax.Array:
    def layer(x: jax.Array, weights: Any) -> tuple[jax.Array, None]:
        return jnp.tanh(linear(weights, x) + error), None

    return jax.lax.scan(layer, x, params)[0]


def deep(depth: int = 30, **options: Any) -> Pair:
    """`depth` layers of linear and tanh, chaotic at large weights. Options: `error` added in every layer."""
    reference = seeded(lambda: TorchDeep(11, depth))
    params = {"kernel": np.zeros((depth, 11, 11), np.float32), "bias": np.zeros((depth, 11), np.float32)}
    rules = (Rule("layers.{i}.weight", "kernel", "i o k -> i k o"), Rule("layers.{i}.bias", "bias", "i o -> i o"))
    port = eq.function(partial(deep_apply, **options), params)
    return Pair(reference, port, (normal(5, 11),), (normal(5, 11, seed=2),), losses.resolve("mse"), Mapping(rules))


# --- top-k routing: a choice that rounding can flip ------------------------------------------------------------------


class TorchRouter(nn.Module):
    def __init__(self, width: int, experts: int, chosen: int) -> None:
        super().__init__()
        self.chosen = chosen
        self.gate = nn.Linear(width, experts)
        self.experts = nn.Parameter(torch.randn(experts, width, width) / width**0.5)

    def forward(self, x: Tensor) -> Tensor:
        weights, index = self.gate(x).softmax(-1).topk(self.chosen)  # b k
        every = torch.einsum("bi,eio->beo", x, self.experts)
        chosen = every.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))  # b k o
        return (chosen * (weights / weights.sum(-1, keepdim=True))[..., None]).sum(1)


def router_apply(params: Any, x: jax.Array, *, chosen: int = 2, error: float = 0.0) -> jax.Array:
    weights, index = jax.lax.top_k(jax.nn.softmax(linear(params["gate"], x)), chosen)
    every = jnp.einsum("bi,eio->beo", x, params["experts"])
    picked = jnp.take_along_axis(every, index[..., None], axis=1)
    return (picked * (weights / weights.sum(-1, keepdims=True))[..., None]).sum(1) + error


def router(**options: Any) -> Pair:
    """Two of five experts a row, by softmax. Options: `chosen`, `error` added to the output."""
    reference = seeded(lambda: TorchRouter(9, 5, 2))
    gate = {"kernel": np.zeros((9, 5), np.float32), "bias": np.zeros(5, np.float32)}
    port = eq.function(partial(router_apply, **options), {"gate": gate, "experts": np.zeros((5, 9, 9), np.float32)})
    rules = (*LINEAR, Rule("experts", "experts"))
    return Pair(reference, port, (normal(13, 9),), (normal(13, 9, seed=2),), losses.resolve("mse"), Mapping(rules))


PAIRS: dict[str, Callable[..., Pair]] = {
    "mlp": mlp,
    "attention": attention,
    "batchnorm": batchnorm,
    "deep": deep,
    "router": router,
}


def translated(name: str) -> Any:
    """The port's side of a named pair of optimizers, to be put beside the reference of another."""

    def port(rate: Any) -> Any:
        optimizer = OPTIMIZERS[name].reference([torch.nn.Parameter(torch.zeros(1))], OPTIMIZERS[name].learning_rate)
        return to_optax(optimizer, scheduler=rate if callable(rate) else None)

    return port
