"""Small networks in torch and in JAX, right and with faults on purpose: what detection.py tries the statistic on.

Each is hard in its own way: six decades of weight scale, gradients that are zero by algebra (a key bias under softmax),
batch statistics, chaos (tanh layers of gain 3), routing (top-k), and losses that are exactly 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
import torch.nn.functional as F
from flax import nnx
from torch import Tensor, nn

import equivalence as eq
from equivalence.losses import PAIRS as loss_pairs
from equivalence.observation import Batch, Observation
from equivalence.sources import EXAMPLES

Rng = np.random.Generator
LossPair = tuple[Callable[..., Any], Callable[..., Any]]


@dataclass(frozen=True, eq=False)
class Network:
    """One network in both runtimes.

    `port(fault)` is the JAX side, right for None; `weights(rng, scale)` are leaves by reference path and
    `batch(rng)` is one batch, all representable in float32; `decades` are the powers of ten that scales come from.
    """

    name: str
    reference: Callable[[], nn.Module]
    port: Callable[[str | None], Any]
    weights: Callable[[Rng, float], Observation]
    batch: Callable[[Rng], Batch]
    losses: LossPair
    decades: tuple[float, float] = (0.0, 0.0)
    learning_rate: float = 1e-2
    mapping: eq.Mapping | None = None
    steps: tuple[Callable[..., Any], Callable[..., Any]] | None = None
    retarget: Callable[[Observation, Batch], Batch] | None = None
    """Targets that depend on the weights: for losses that are saturated."""
    group: int = EXAMPLES
    """Trials that are judged together."""
    every: int = 1
    """Rounds between two groups: the slow networks are tried less often."""


def _f32(array: Any) -> np.ndarray:
    return np.asarray(array, np.float32)


def _normal(rng: Rng, shape: tuple[int, ...], scale: float) -> np.ndarray:
    return _f32(rng.standard_normal(shape) * scale)


# --- a classifier of three layers ------------------------------------------------------------------------------------

MLP_SHAPES = {"w1": (32, 8), "b1": (32,), "w2": (16, 32), "b2": (16,), "w3": (1, 16)}


class Mlp(nn.Module):
    """Three linear layers with leaky ReLU."""

    def __init__(self) -> None:
        super().__init__()
        for name, shape in MLP_SHAPES.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)))

    def forward(self, x: Tensor) -> Tensor:
        p = dict(self.named_parameters())
        h = F.leaky_relu(F.linear(x, p["w1"], p["b1"]))
        h = F.leaky_relu(F.linear(h, p["w2"], p["b2"]))
        return F.linear(h, p["w3"])[:, 0]


def _mlp(p: Any, x: Any) -> Any:
    h = jax.nn.leaky_relu(x @ p["w1"].T + p["b1"])
    h = jax.nn.leaky_relu(h @ p["w2"].T + p["b2"])
    return (h @ p["w3"].T)[:, 0]


def _mlp_port(fault: str | None) -> Any:
    return eq.function(_mlp, {name: np.zeros(shape, np.float32) for name, shape in MLP_SHAPES.items()})


def _mlp_weights(rng: Rng, scale: float) -> Observation:
    return {name: _normal(rng, shape, scale / np.sqrt(shape[-1])) for name, shape in MLP_SHAPES.items()}


def _mlp_batch(rows: int) -> Callable[[Rng], Batch]:
    return lambda rng: Batch((_normal(rng, (rows, 8), 1.0),), (_f32(rng.random(rows) < 0.4),))


def _on_the_right_side(weights: Observation, batch: Batch) -> Batch:
    """Targets that the network already predicts: with large weights the loss is exactly 0 on many rows."""

    def leaky(h: np.ndarray) -> np.ndarray:
        return np.where(h > 0, h, 0.01 * h)

    h = leaky(batch.inputs[0] @ weights["w1"].T + weights["b1"])
    logits = leaky(h @ weights["w2"].T + weights["b2"]) @ weights["w3"][0]
    return replace(batch, targets=(_f32(logits > 0),))


# --- a transformer block ---------------------------------------------------------------------------------------------

WIDTH, HEADS, HIDDEN = 16, 2, 24
ATTENTION_SHAPES = {
    **{f"{n}.{leaf}": shape for n in "qkvo" for leaf, shape in (("w", (WIDTH, WIDTH)), ("b", (WIDTH,)))},
    **{"u.w": (HIDDEN, WIDTH), "u.b": (HIDDEN,), "d.w": (WIDTH, HIDDEN), "d.b": (WIDTH,)},
    **{"ln.s": (WIDTH,), "ln.b": (WIDTH,)},
}


class Attention(nn.Module):
    """Pre-norm causal attention with a key bias, then a GELU block."""

    def __init__(self) -> None:
        super().__init__()
        for name, shape in ATTENTION_SHAPES.items():
            owner, leaf = name.split(".")
            if owner not in dict(self.named_children()):
                self.add_module(owner, nn.Module())
            self.get_submodule(owner).register_parameter(leaf, nn.Parameter(torch.zeros(shape)))

    def forward(self, x: Tensor) -> Tensor:
        p, (b, s, _) = dict(self.named_parameters()), x.shape

        def linear(name: str, h: Tensor) -> Tensor:
            return F.linear(h, p[f"{name}.w"], p[f"{name}.b"])

        h = F.layer_norm(x, (WIDTH,), p["ln.s"], p["ln.b"], eps=1e-5)
        q, k, v = (linear(n, h).reshape(b, s, HEADS, WIDTH // HEADS).transpose(1, 2) for n in "qkv")
        scores = q @ k.transpose(-1, -2) / (WIDTH // HEADS) ** 0.5
        later = torch.ones(s, s, dtype=torch.bool).triu(1)
        heads = scores.masked_fill(later, -torch.inf).softmax(-1) @ v
        x = x + linear("o", heads.transpose(1, 2).reshape(b, s, WIDTH))
        return x + linear("d", F.gelu(linear("u", x)))


def _attention_port(fault: str | None) -> Any:
    eps = 1e-6 if fault == "LayerNorm eps" else 1e-5

    def attention(p: Any, x: Any) -> Any:
        b, s, _ = x.shape
        mean = x.mean(-1, keepdims=True)
        variance = jnp.square(x - mean).mean(-1, keepdims=True)
        h = (x - mean) / jnp.sqrt(variance + eps) * p["ln.s"] + p["ln.b"]
        q, k, v = (
            (h @ p[f"{n}.w"].T + p[f"{n}.b"]).reshape(b, s, HEADS, WIDTH // HEADS).transpose(0, 2, 1, 3) for n in "qkv"
        )
        scores = q @ k.swapaxes(-1, -2) / np.sqrt(WIDTH // HEADS).astype(x.dtype)
        heads = jax.nn.softmax(jnp.where(jnp.tril(jnp.ones((s, s), bool)), scores, -jnp.inf), -1) @ v
        x = x + heads.transpose(0, 2, 1, 3).reshape(b, s, WIDTH) @ p["o.w"].T + p["o.b"]
        up = jax.nn.gelu(x @ p["u.w"].T + p["u.b"], approximate=fault == "tanh GELU")
        return x + up @ p["d.w"].T + p["d.b"]

    return eq.function(attention, {name: np.zeros(shape, np.float32) for name, shape in ATTENTION_SHAPES.items()})


def _attention_weights(rng: Rng, scale: float) -> Observation:
    made = {}
    for name, shape in ATTENTION_SHAPES.items():
        if name.startswith("ln."):
            made[name] = _f32((name == "ln.s") + 0.3 * rng.standard_normal(shape))
        else:
            made[name] = _normal(rng, shape, scale / np.sqrt(shape[-1]) if len(shape) == 2 else 0.3 * scale)
    return made


# --- batch statistics ------------------------------------------------------------------------------------------------


class BatchNorm(nn.Module):
    """Linear, batch norm, ReLU, linear."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(7, 12), nn.Linear(12, 5)
        self.norm = nn.BatchNorm1d(12, eps=1e-5, momentum=0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.norm(self.first(x))))


class _Norm(nnx.Module):
    """Torch's batch norm: the running variance is the unbiased one, momentum 0.1 is the share of the new."""

    def __init__(self, width: int, eps: float) -> None:
        self.scale, self.bias = nnx.Param(jnp.ones(width)), nnx.Param(jnp.zeros(width))
        self.mean, self.var = nnx.BatchStat(jnp.zeros(width)), nnx.BatchStat(jnp.ones(width))
        self.eps, self.use_running_average = eps, False

    def __call__(self, x: Any) -> Any:
        mean, var = self.mean[...], self.var[...]
        if not self.use_running_average:
            rows, batch = x.shape[0], x.mean(0)
            spread = jnp.square(x - batch).mean(0)
            self.mean[...] = 0.9 * mean + 0.1 * batch
            self.var[...] = 0.9 * var + 0.1 * spread * (rows / (rows - 1))
            mean, var = batch, spread
        return (x - mean) / jnp.sqrt(var + self.eps) * self.scale[...] + self.bias[...]


class _BatchNorm(nnx.Module):
    def __init__(self, eps: float) -> None:
        rngs = nnx.Rngs(0)
        self.first, self.norm, self.last = nnx.Linear(7, 12, rngs=rngs), _Norm(12, eps), nnx.Linear(12, 5, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.last(jax.nn.relu(self.norm(self.first(x))))


def _batch_norm_weights(rng: Rng, scale: float) -> Observation:
    return {
        "first.weight": _normal(rng, (12, 7), scale / np.sqrt(7)),
        "first.bias": _normal(rng, (12,), scale),
        "norm.weight": _f32(1 + 0.3 * rng.standard_normal(12)),
        "norm.bias": _normal(rng, (12,), 0.3),
        "last.weight": _normal(rng, (5, 12), scale / np.sqrt(12)),
        "last.bias": _normal(rng, (5,), scale),
        "norm.running_mean": _normal(rng, (12,), 0.5),
        "norm.running_var": _f32(np.exp(0.5 * rng.standard_normal(12))),
        "norm.num_batches_tracked": np.array(0, np.int64),
    }


def _regression(inputs: tuple[int, ...], outputs: tuple[int, ...], offset: float = 0.0) -> Callable[[Rng], Batch]:
    return lambda rng: Batch((_f32(offset + rng.standard_normal(inputs)),), (_normal(rng, outputs, 1.0),))


# --- chaos -----------------------------------------------------------------------------------------------------------


class Deep(nn.Module):
    """Many tanh layers of gain 3: differences grow until they fill the range."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(11, 11) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def _deep_port(depth: int) -> Callable[[str | None], Any]:
    def port(fault: str | None) -> Any:
        off = np.zeros((depth, 1), np.float32)
        off[-1] = 1e-6 if fault == "last bias" else 0.0

        def deep(p: Any, x: Any) -> Any:
            def layer(h: Any, leaves: Any) -> Any:
                return jnp.tanh(h @ leaves["kernel"] + leaves["bias"]), None

            return jax.lax.scan(layer, x, {**p, "bias": p["bias"] * (1 + jnp.asarray(off, x.dtype))})[0]

        shapes = {"kernel": (depth, 11, 11), "bias": (depth, 11)}
        return eq.function(deep, {name: np.zeros(shape, np.float32) for name, shape in shapes.items()})

    return port


def _deep_weights(depth: int) -> Callable[[Rng, float], Observation]:
    def weights(rng: Rng, scale: float) -> Observation:
        made = {}
        for number in range(depth):
            made[f"layers.{number}.weight"] = _normal(rng, (11, 11), 3.0 * scale / np.sqrt(11))
            made[f"layers.{number}.bias"] = _normal(rng, (11,), 0.3)
        return made

    return weights


def _deep(depth: int, group: int, every: int) -> Network:
    rules = eq.Rule("layers.{i}.weight", "kernel", "i o k -> i k o"), eq.Rule("layers.{i}.bias", "bias", "i o -> i o")
    return Network(
        f"{depth} tanh layers",
        lambda: Deep(depth),
        _deep_port(depth),
        _deep_weights(depth),
        _regression((5, 11), (5, 11)),
        MSE,
        mapping=eq.Mapping(rules),
        group=group,
        every=every,
    )


# --- routing ---------------------------------------------------------------------------------------------------------

EXPERTS, PER_ROW = 8, 2


class Routed(nn.Module):
    """Each row goes to the two experts that a softmax prefers; which ones is an output too."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Parameter(torch.zeros(EXPERTS, 6))
        self.experts = nn.Parameter(torch.zeros(EXPERTS, 6, 5))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        share, chosen = torch.topk(torch.softmax(F.linear(x, self.router), -1), PER_ROW, -1)
        share = share / share.sum(-1, keepdim=True)
        every = torch.einsum("nd,edf->nef", x, self.experts)
        picked = torch.gather(every, 1, chosen[..., None].expand(-1, -1, every.shape[-1]))
        return (F.gelu(picked) * share[..., None]).sum(1), chosen


def _routed_port(fault: str | None) -> Any:
    extra = 1e-9 if fault == "routed output + 1e-9" else 0.0

    def routed(p: Any, x: Any) -> Any:
        share, chosen = jax.lax.top_k(jax.nn.softmax(x @ p["router"].T, -1), PER_ROW)
        share = share / (share.sum(-1, keepdims=True) + extra)
        every = jnp.einsum("nd,edf->nef", x, p["experts"])
        picked = jnp.take_along_axis(every, chosen[..., None], 1)
        return (jax.nn.gelu(picked, approximate=False) * share[..., None]).sum(1), chosen

    shapes = {"router": (EXPERTS, 6), "experts": (EXPERTS, 6, 5)}
    return eq.function(routed, {name: np.zeros(shape, np.float32) for name, shape in shapes.items()})


def _first_of(pair: LossPair) -> LossPair:
    ours, theirs = pair
    return lambda outputs, *targets: ours(outputs[0], *targets), lambda outputs, *targets: theirs(outputs[0], *targets)


# --- the Titanic network ---------------------------------------------------------------------------------------------


def _titanic(framework: str) -> Network:
    from equivalence.spec import load

    spec = load("titanic_mlp")
    config = spec.config
    ours, theirs = spec.implementation("torch"), spec.implementation(framework)
    shapes = {path: tuple(value.shape) for path, value in ours.build(config, 0).named_parameters()}

    def port(fault: str | None) -> Any:
        slope = config.negative_slope * (1 + 1e-6 if fault == "slope" else 1)
        return theirs.build(replace(config, negative_slope=slope), 0)

    def weights(rng: Rng, scale: float) -> Observation:
        return {path: _normal(rng, shape, scale / np.sqrt(shape[-1])) for path, shape in shapes.items()}

    def batch(rng: Rng) -> Batch:
        return Batch(*spec.example(replace(config, batch_size=64), rng, "ordinary"))

    return Network(
        f"titanic_mlp, {framework}",
        lambda: ours.build(config, 0),
        port,
        weights,
        batch,
        (ours.loss_fn, theirs.loss_fn),
        decades=(-3.0, 3.0),
        learning_rate=config.learning_rate,
        mapping=eq.Mapping(spec.rules[framework]),
        steps=(ours.train_step, theirs.train_step),
    )


MSE, BCE = loss_pairs["mse"](), loss_pairs["bce_with_logits"]()

MLP = Network("MLP, six decades", Mlp, _mlp_port, _mlp_weights, _mlp_batch(64), BCE, decades=(-3.0, 3.0))
MLP_OF_TWO = replace(MLP, name="MLP, two rows", batch=_mlp_batch(2))
SATURATED = replace(MLP, name="saturated loss", decades=(-1.0, 3.0), retarget=_on_the_right_side)
ALL_SATURATED = replace(SATURATED, name="saturated loss, every example", decades=(1.0, 3.0))
ATTENTION = Network(
    "attention, key bias",
    Attention,
    _attention_port,
    _attention_weights,
    _regression((3, 7, WIDTH), (3, 7, WIDTH)),
    MSE,
    decades=(-1.5, 1.0),
    learning_rate=1e-3,
)
BATCH_NORM = Network(
    "BatchNorm",
    BatchNorm,
    lambda fault: _BatchNorm(1e-3 if fault == "BatchNorm eps" else 1e-5),
    _batch_norm_weights,
    _regression((13, 7), (13, 5)),
    MSE,
    decades=(-2.0, 2.0),
)
BATCH_NORM_FAR = replace(BATCH_NORM, name="BatchNorm, input mean 1e4", batch=_regression((13, 7), (13, 5), 1e4))
DEEP30, DEEP100 = _deep(30, EXAMPLES, 4), _deep(100, EXAMPLES, 8)
DEEP100_OF_FOUR = replace(DEEP100, name="100 tanh layers, four examples", group=4)
ROUTED = Network(
    "top-k routing",
    Routed,
    _routed_port,
    lambda rng, scale: {
        "router": _normal(rng, (EXPERTS, 6), scale),
        "experts": _normal(rng, (EXPERTS, 6, 5), scale),
    },
    _regression((64, 6), (64, 5)),
    _first_of(MSE),
    decades=(-1.0, 1.0),
    learning_rate=1e-3,
)
TITANIC_NNX, TITANIC_LINEN = _titanic("nnx"), _titanic("linen")

RIGHT = (
    MLP,
    SATURATED,
    ALL_SATURATED,
    ATTENTION,
    BATCH_NORM,
    BATCH_NORM_FAR,
    DEEP30,
    DEEP100,
    DEEP100_OF_FOUR,
    ROUTED,
    TITANIC_NNX,
    TITANIC_LINEN,
)
"""The networks of the right trials."""


# --- faults ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Fault:
    """A difference on purpose, at one scale of weights.

    `port` names the change of the port's function, `rate` multiplies its learning rate, `adam_eps` is its Adam's, and
    `weight` is by how much, relative, one element of its weights is off. `certain`: every single trial must catch it.
    """

    name: str
    network: Network
    scale: float = 1.0
    port: str | None = None
    rate: float = 1.0
    adam_eps: float = 1e-8
    weight: float = 0.0
    certain: bool = True

    @property
    def program(self) -> tuple[Any, ...]:
        """What must be compiled for it."""
        return self.network.reference, self.network.name, self.port, self.rate, self.adam_eps


def transformation(fault: Fault | None) -> Callable[[Any], Any]:
    """The port's Adam for a schedule of learning rates: right for None, else off as the fault says."""
    factor, eps = (1.0, 1e-8) if fault is None else (fault.rate, fault.adam_eps)
    if factor == 1.0:
        return lambda rate: optax.adam(rate, eps=eps)
    return lambda rate: optax.adam(lambda count: rate(count) * factor, eps=eps)


FAULTS = (
    *(Fault(f"LayerNorm eps 1e-6, weights x {s:g}", ATTENTION, s, "LayerNorm eps") for s in (0.02, 1.0, 10.0)),
    *(Fault(f"tanh GELU, weights x {s:g}", ATTENTION, s, "tanh GELU", certain=s < 10) for s in (0.02, 1.0, 10.0)),
    *(Fault(f"MLP, learning rate + 1e-6, weights x {s:g}", MLP, s, rate=1 + 1e-6) for s in (1e-3, 1.0, 1e3)),
    Fault("attention, learning rate + 1e-6", ATTENTION, rate=1 + 1e-6),
    *(Fault(f"MLP, Adam eps 1e-7, weights x {s:g}", MLP, s, adam_eps=1e-7) for s in (1e-3, 1.0, 1e3)),
    Fault("attention, Adam eps 1e-7", ATTENTION, adam_eps=1e-7),
    Fault("BatchNorm eps 1e-3", BATCH_NORM, port="BatchNorm eps"),
    Fault("BatchNorm eps 1e-3, input mean 1e4", BATCH_NORM_FAR, port="BatchNorm eps"),
    Fault("routed output + 1e-9", ROUTED, port="routed output + 1e-9"),
    Fault("last bias + 1e-6 after 30 layers", DEEP30, port="last bias"),
    Fault("last bias + 1e-6 after 100 layers", DEEP100, port="last bias", certain=False),
    Fault("titanic_mlp, slope + 1e-6", TITANIC_NNX, port="slope"),
    Fault("one weight + 1e-9, 64 rows", MLP, weight=1e-9, certain=False),
    Fault("one weight + 1e-9, 2 rows", MLP_OF_TWO, weight=1e-9, certain=False),
    Fault("one weight + 6e-8, 64 rows", MLP, weight=6e-8, certain=False),
    Fault("one weight + 6e-8, 2 rows", MLP_OF_TWO, weight=6e-8, certain=False),
)
