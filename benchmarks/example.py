"""What a verify example costs beyond the runs it makes, once compiled: at most 1.3 times their bare compute.

titanic_mlp with hidden sizes 2048 and 2048 on batches of 256. The engine's side is the pipeline's own: both modes
observed, five optimizer steps, everything judged, the plants of the resolution. Every run it makes is counted, and then
made again by hand: torch on tensors that are already there, JAX compiled on arrays that are already there, the same
outputs computed and left unread. The uncompiled run of `jit` is left out of both.

    python benchmarks/example.py [--repeats N] [--hidden N] [--batch N] [--port NAME] [--profile]
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import _setup  # noqa: F401  before the frameworks: it sets what they read when they are imported
import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
import torch.nn.functional as F
from _setup import interleaved, line

from equivalence.checks import REGISTRY
from equivalence.events import PortFinished
from equivalence.frameworks import adapt
from equivalence.observation import Batch
from equivalence.optimizers import resolve
from equivalence.pipeline import run
from equivalence.runs import Example
from equivalence.runtimes.jax import JaxRunner
from equivalence.runtimes.jax_steps import JaxStepper
from equivalence.runtimes.torch import TorchRunner
from equivalence.runtimes.torch_steps import TorchStepper
from equivalence.search import moved
from equivalence.sources import BATCHES, Parts, compared
from equivalence.spec import REFERENCE, Spec, load
from equivalence.verdict import PortReport
from equivalence.weights import Mapping
from equivalence.work import Plan, Structure

BOUND = 1.3
CHECKS = tuple(name for name, check in REGISTRY.items() if check.run in ("observe", "state", "steps"))
Kind = tuple[str, str, int]
"""A kind of run: which side made it (torch, jax), what it was (observe, step) and in how many bits."""


class OneExample:
    """A source of one example of one structure, whose programs stay compiled from one verdict to the next."""

    target, reference, reproduce = "titanic_mlp", REFERENCE, ""

    def __init__(self, spec: Spec, port: str, seed: int) -> None:
        ours, theirs = spec.implementation(REFERENCE), spec.implementation(port)
        sides = adapt(ours.build(spec.config, 0)), adapt(theirs.build(spec.config, 0))
        parts = Parts((ours.loss_fn, theirs.loss_fn), (ours.train_step, theirs.train_step), resolve("adam"))
        bound, comparison = compared(*sides, Mapping(spec.rules[port]), parts, 0)
        weights = moved(sides[0].params, sides[0].buffers, sides[0].layers, 1.0, seed)
        batches = tuple(
            Batch(*spec.example(spec.config, np.random.default_rng((seed, number)), "ordinary"))
            for number in range(BATCHES)
        )
        example = Example(0, "ordinary", True, weights, batches, seed, "")
        self.ports, self.example = (port,), example
        self.structure = Structure(*sides, bound, comparison, [example])

    def structures(self, port: str) -> Iterator[Structure]:
        """The one structure."""
        yield self.structure

    def count(self, port: str) -> int:
        """One example."""
        return 1

    def training(self, structure: Structure) -> None:
        """Nothing to train on."""

    def smaller(self, port: str, fails: Any) -> None:
        """Nothing smaller."""

    def notes(self, port: str) -> list[str]:
        """Nothing to say."""
        return []

    def verdict(self) -> PortReport:
        """Everything that `verify` does with one example."""
        self.structure.comparison._draws.clear()  # kept from one call to the next otherwise
        for event in run(self, Plan(CHECKS)):
            if isinstance(event, PortFinished):
                return event.report
        raise AssertionError("a run ends with a report")


def judged(spec: Spec, port: str) -> OneExample:
    """The first example that is found equivalent, so that no run is left out; the others are named."""
    for seed in range(1, 8):
        source = OneExample(spec, port, seed)
        report = source.verdict()
        if report.verdict == "equivalent":
            return source
        said = [f"{check.name}: {check.message}" for check in report.checks if check.verdict == report.verdict]
        print(f"  seed {seed} was called {report.verdict}: {'; '.join(said)}")
    raise SystemExit("no example was found equivalent")


@contextmanager
def counted() -> Iterator[Counter[Kind]]:
    """Every run of either side while the block lasts."""
    runs: Counter[Kind] = Counter()
    places = (
        (TorchRunner, "torch", "observe"),
        (TorchStepper, "torch", "step"),
        (JaxRunner, "jax", "observe"),
        (JaxStepper, "jax", "step"),
    )
    before = [getattr(owner, kind) for owner, _, kind in places]

    def counting(side: str, kind: str, run: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(self: Any, *arguments: Any, **options: Any) -> Any:
            runs[side, kind, arguments[0] if kind == "observe" else self.bits] += 1
            return run(self, *arguments, **options)

        return wrapped

    try:
        for (owner, side, kind), run in zip(places, before, strict=True):
            setattr(owner, kind, counting(side, kind, run))
        yield runs
    finally:
        for (owner, _, kind), run in zip(places, before, strict=True):
            setattr(owner, kind, run)


class ByHand:
    """The bare runs, in plain torch and plain JAX, on arrays that are already where they are needed."""

    def __init__(self, spec: Spec, example: Example, threads: int | None) -> None:
        config, self.threads = spec.config, threads
        (x,), (y,) = example.batches[0].inputs, example.batches[0].targets
        rng, self.keep, self.slope, self.rate = (
            np.random.default_rng(0),
            1 - config.dropout,
            config.negative_slope,
            1e-2,
        )
        masks = tuple(rng.random((len(x), size)) < self.keep for size in (config.hidden1, config.hidden2))
        arrays = {**example.weights, "x": x, "y": y, "cotangent": rng.standard_normal(len(x)).astype(np.float32)}
        adam = optax.adam(self.rate)
        self.torch: dict[int, Any] = {}
        self.jax: dict[int, Any] = {}
        for bits in (32, 64):
            made = {n: torch.tensor(v, dtype={32: torch.float32, 64: torch.float64}[bits]) for n, v in arrays.items()}
            leaves = {name: made[name].requires_grad_() for name in (*example.weights, "x")}
            stepped = {name: made[name].detach().clone().requires_grad_() for name in example.weights}
            optimizer = torch.optim.Adam(stepped.values(), lr=self.rate)
            self.torch[bits] = made, leaves, [torch.tensor(mask) for mask in masks], stepped, optimizer
            with jax.enable_x64(bits == 64):
                dtype = {32: jnp.float32, 64: jnp.float64}[bits]
                given = {n: jnp.asarray(v, dtype) for n, v in arrays.items()}
                params = {name: given[name] for name in example.weights}
                self.jax[bits] = given, params, [jnp.asarray(mask) for mask in masks], adam.init(params)
        self._observe = jax.jit(self._jax_observe)
        self._step = jax.jit(partial(self._jax_step, adam))

    def torch_logits(self, p: Any, x: Any, masks: Any) -> Any:
        h = F.leaky_relu(F.linear(x, p["linear1.weight"], p["linear1.bias"]) * masks[0] / self.keep, self.slope)
        h = F.leaky_relu(F.linear(h, p["linear2.weight"], p["linear2.bias"]) * masks[1] / self.keep, self.slope)
        return F.linear(h, p["linear3.weight"])[:, 0]

    def torch_observe(self, bits: int) -> None:
        made, leaves, masks, _, _ = self.torch[bits]
        logits = self.torch_logits(leaves, leaves["x"], masks)
        loss = F.binary_cross_entropy_with_logits(logits, made["y"])
        slope = torch.autograd.grad(loss, logits, retain_graph=True)[0]
        torch.autograd.grad(logits, list(leaves.values()), made["cotangent"], retain_graph=True)
        torch.autograd.grad(logits, list(leaves.values()), slope)

    def torch_step(self, bits: int) -> None:
        made, _, masks, stepped, optimizer = self.torch[bits]
        optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(self.torch_logits(stepped, made["x"].detach(), masks), made["y"]).backward()
        optimizer.step()

    def jax_logits(self, p: Any, x: Any, masks: Any) -> Any:
        h = x @ p["linear1.weight"].T + p["linear1.bias"]
        h = jax.nn.leaky_relu(jnp.where(masks[0], h / self.keep, 0.0), self.slope)
        h = h @ p["linear2.weight"].T + p["linear2.bias"]
        h = jax.nn.leaky_relu(jnp.where(masks[1], h / self.keep, 0.0), self.slope)
        return (h @ p["linear3.weight"].T)[:, 0]

    def jax_loss(self, logits: Any, y: Any) -> Any:
        return optax.sigmoid_binary_cross_entropy(logits, y).mean()

    def _jax_observe(self, params: Any, given: Any, masks: Any) -> Any:
        logits, pull = jax.vjp(lambda p, x: self.jax_logits(p, x, masks), params, given["x"])
        loss, slope = jax.value_and_grad(self.jax_loss)(logits, given["y"])
        return logits, loss, slope, pull(given["cotangent"]), pull(slope)

    def _jax_step(self, adam: Any, params: Any, state: Any, given: Any, masks: Any) -> Any:
        def objective(p: Any) -> Any:
            return self.jax_loss(self.jax_logits(p, given["x"], masks), given["y"])

        loss, gradients = jax.value_and_grad(objective)(params)
        updates, state = adam.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, loss, gradients

    def jax_run(self, kind: str, bits: int) -> None:
        given, params, masks, state = self.jax[bits]
        with jax.enable_x64(bits == 64), jax.default_matmul_precision("highest"):
            made = self._observe(params, given, masks) if kind == "observe" else self._step(params, state, given, masks)
            jax.block_until_ready(made)

    def make(self, runs: Counter[Kind]) -> None:
        """Every run of a count, nothing read, on as many threads as the engine gives torch."""
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads or before)
        for (side, kind, bits), times in runs.items():
            of_torch = self.torch_observe if kind == "observe" else self.torch_step
            one = of_torch if side == "torch" else partial(self.jax_run, kind)
            for _ in range(times):
                one(bits)
        torch.set_num_threads(before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="how often each takes its turn (3)")
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--port", default="nnx", help="which port (nnx)")
    parser.add_argument("--profile", action="store_true", help="print where the engine spends its time")
    chosen = parser.parse_args()
    spec = load("titanic_mlp")
    config = replace(spec.config, hidden1=chosen.hidden, hidden2=chosen.hidden, batch_size=chosen.batch)
    spec = replace(spec, config=config)
    source = judged(spec, chosen.port)
    hand = ByHand(spec, source.example, source.structure.comparison.reference.threads)
    with counted() as runs:
        source.verdict()
    print("runs of one example: " + ", ".join(f"{n} x {s} {k} float{b}" for (s, k, b), n in sorted(runs.items())))
    if chosen.profile:
        profile = cProfile.Profile()
        profile.runcall(source.verdict)
        pstats.Stats(profile).sort_stats("tottime").print_stats(25)
    hand.make(runs)
    parts = {key: Counter({key: count}) for key, count in runs.items()}
    bare = {f"bare: {count} x {' '.join(map(str, key))}": partial(hand.make, parts[key]) for key, count in runs.items()}
    seconds = interleaved({"verify": source.verdict, **bare}, chosen.repeats)
    for name, taken in seconds.items():
        print(f"  {name:32} {taken:8.3f} s")
    alone = sum(seconds[name] for name in bare)
    print(line("one example / bare compute of its runs", seconds["verify"] / alone, BOUND))


if __name__ == "__main__":
    main()
