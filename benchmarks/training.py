"""The whole-training program against the loops it replaces, and against a `lax.scan` written by hand.

All train titanic_mlp from the same weights on the same batches. The program records the loss and every parameter at
every step; so does the hand-written scan, which reads the same data, batch plan and dropout masks. That is the
binding line: at most 1.10 times its time. Every line is printed, held or not.

    python benchmarks/training.py [--epochs N] [--repeats N]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import _setup  # noqa: F401  first: it sets what the frameworks read when they are imported
import jax
import jax.numpy as jnp
import numpy as np
import optax
from _setup import interleaved, line

from equivalence.frameworks import adapt
from equivalence.loops import Loop, Task, loops
from equivalence.optimizers import OptimizerPair
from equivalence.runtimes.jax_training import WholeTraining
from equivalence.sources import Parts, compared
from equivalence.spec import REFERENCE, Spec, TrainingData, load
from equivalence.weights import Mapping

SEED = 0
BOUNDS = {"nnx, step not compiled": 500.0, "nnx, compiled step": 40.0, "torch with DataLoader": 25.0}
"""At least so many times the program's time an epoch."""
BY_HAND = 1.10
"""At most so many times the time of the hand-written scan."""


def whole(spec: Spec, data: TrainingData, framework: str, bits: int) -> tuple[WholeTraining, Any, Any]:
    """The engine's program, the weights it starts from and the draws of its steps."""
    ours, theirs = spec.implementation(REFERENCE), spec.implementation(framework)
    sides = adapt(ours.build(spec.config, SEED)), adapt(theirs.build(spec.config, SEED))
    pair = OptimizerPair(
        "own", "the implementations' own", spec.config.learning_rate,
        lambda params, rate: ours.make_optimizer(rate)(params), theirs.make_optimizer,
    )  # fmt: skip
    parts = Parts((ours.loss_fn, theirs.loss_fn), (ours.train_step, theirs.train_step), pair)
    _, comparison = compared(*sides, Mapping(spec.rules[framework]), parts, SEED)
    training = WholeTraining(comparison.stepping_port, pair, bits, data)
    weights = {path: value.astype(np.float32) for path, value in sides[0].params.items()}
    return training, weights, training.draws(weights)


def by_hand(spec: Spec, data: TrainingData, weights: Any, served: Any, bits: int) -> Callable[[], tuple[Any, Any]]:
    """The same training as one would write it in plain JAX and Optax for this one network."""
    config, plan, dtype = spec.config, data.plan, {32: np.float32, 64: np.float64}[bits]
    adam = optax.adam(config.learning_rate, b1=0.9, b2=0.999, eps=1e-8)
    keep, slope = 1 - config.dropout, config.negative_slope
    whole_rows = plan.order.shape[1] // plan.batch_size * plan.batch_size

    def loss(p: Any, x: Any, y: Any, masks: Any) -> Any:
        h = x @ p["linear1.weight"].T + p["linear1.bias"]
        h = jax.nn.leaky_relu(jnp.where(masks[0], h / keep, 0.0), slope)
        h = h @ p["linear2.weight"].T + p["linear2.bias"]
        h = jax.nn.leaky_relu(jnp.where(masks[1], h / keep, 0.0), slope)
        logits = (h @ p["linear3.weight"].T)[:, 0]
        return optax.sigmoid_binary_cross_entropy(logits, y).mean()

    @jax.jit
    def run(params: Any, x: Any, y: Any, order: Any, full: Any, short: Any) -> Any:
        def step(carry: Any, given: Any) -> Any:
            params, state = carry
            rows, masks = given
            value, gradients = jax.value_and_grad(loss)(params, x[rows], y[rows], masks)
            updates, state = adam.update(gradients, state, params)
            params = optax.apply_updates(params, updates)
            return (params, state), (value, params)

        def epoch(carry: Any, given: Any) -> Any:
            rows, full, short = given
            carry, seen = jax.lax.scan(step, carry, (rows[:whole_rows].reshape(-1, plan.batch_size), full))
            if whole_rows < rows.shape[0]:
                carry, last = step(carry, (rows[whole_rows:], short))
                seen = jax.tree.map(lambda many, one: jnp.concatenate([many, one[None]]), seen, last)
            return carry, seen

        return jax.lax.scan(epoch, (params, adam.init(params)), (order, full, short))[1]

    with jax.enable_x64(bits == 64):
        given = jax.tree.map(
            jnp.asarray,
            (
                {path: value.astype(dtype) for path, value in weights.items()},
                data.inputs[0].astype(dtype),
                data.targets[0].astype(dtype),
                plan.order,
                *served,
            ),
        )

    def ran() -> tuple[Any, Any]:
        with jax.enable_x64(bits == 64), jax.default_matmul_precision("highest"):
            values, params = run(*given)
            flat = {path: np.asarray(value).reshape(-1, *value.shape[2:]) for path, value in params.items()}
            return np.asarray(values).reshape(-1), flat

    return ran


def frameworks_loops(spec: Spec, data: TrainingData, weights: Any) -> dict[str, Loop]:
    """The loops a user writes: torch with a DataLoader, NNX not compiled, NNX compiled step by step."""
    found: dict[str, Loop] = {}
    reference = adapt(spec.implementation(REFERENCE).build(spec.config, SEED))
    for framework in (REFERENCE, "nnx"):
        implementation, subject, leaves = spec.implementation(framework), reference, dict(weights)
        if framework != REFERENCE:
            subject = adapt(implementation.build(spec.config, SEED))
            leaves = Mapping(spec.rules[framework]).bind(reference.leaves, subject.leaves).forward(leaves)
        task = Task(implementation, subject, leaves, {}, data, spec.config.learning_rate, SEED)
        found |= {loop.name: loop for loop in loops(framework, task) if loop.name in BOUNDS}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=500, help="epochs of the whole-training programs (500)")
    parser.add_argument("--repeats", type=int, default=7, help="how often everything takes its turn (7)")
    chosen = parser.parse_args()
    spec = load("titanic_mlp")
    assert spec.training is not None
    data = spec.training(spec.config, SEED)
    data = replace(data, plan=data.plan.first(chosen.epochs))
    runs: dict[str, Callable[[], Any]] = {}
    for bits in (32, 64):
        for framework in spec.ports:
            training, weights, draws = whole(spec, data, framework, bits)
            runs[f"{framework} program, float{bits}"] = training.prepare(weights, draws, SEED)
        runs[f"by hand, float{bits}"] = by_hand(spec, data, weights, training.serve(draws, SEED), bits)
    made = frameworks_loops(spec, data, weights)
    print(f"titanic_mlp, {data.plan.epochs} epochs of {data.plan.batches} batches, every step recorded")
    for name, run in runs.items():
        before = time.perf_counter()
        run()
        print(f"  {name + ', first call':34} {time.perf_counter() - before:8.3f} s")
    assert_same(runs)
    for name, loop in made.items():
        if loop.compile is not None:
            loop.compile()
        runs[name] = partial(loop.epoch, 0)
    seconds = interleaved(runs, chosen.repeats)
    epochs = {name: 1 if name in made else data.plan.epochs for name in runs}
    for name, taken in seconds.items():
        print(f"  {name:34} {1e3 * taken / epochs[name]:8.3f} ms an epoch")
    base = seconds["nnx program, float32"] / data.plan.epochs
    for name, bound in BOUNDS.items():
        print(line(f"the nnx program against {name}", seconds[name] / base, bound, at_least=True))
    for bits in (32, 64):
        for framework in spec.ports:
            name, hand = f"{framework} program, float{bits}", f"by hand, float{bits}"
            print(line(f"{name} / {hand}", seconds[name] / seconds[hand], BY_HAND))


def assert_same(runs: dict[str, Callable[[], Any]]) -> None:
    """The hand-written scan must train the same network: in float64 every loss agrees."""
    ours, theirs = runs["nnx program, float64"]()[0], runs["by hand, float64"]()[0]
    apart = float(np.max(np.abs(ours - theirs) / np.maximum(np.abs(theirs), 1e-3)))
    assert apart < 1e-3, f"the hand-written scan trains another network: losses part by {apart:.2g}"


if __name__ == "__main__":
    main()
