"""A translated optimizer's compiled step against the nearest plain Optax optimizer's, on ten million parameters.

Both move the same 37 leaves by the same gradients, parameters and state donated; they take turns. The nearest plain
optimizer is the one a person would write in its stead, whether or not it takes torch's steps. The bound is 1.10.

    python benchmarks/optimizers.py [--repeats N] [--only NAME]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

import _setup  # noqa: F401  first: it sets what the frameworks read when they are imported
import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from _setup import interleaved, line

import equivalence as eq

BOUND = 1.10
STEPS = 5
"""Steps in one timing."""

SHAPES = {f"block{i}.{name}": shape for i in range(12) for name, shape in
          {"mlp": (896, 901), "norm": (896,), "bias": (901,)}.items()} | {"head": (896, 353)}  # fmt: skip

PAIRS: dict[str, tuple[Callable[[Any], Any], Callable[[], Any]]] = {
    "SGD": (lambda p: torch.optim.SGD(p, 0.1), lambda: optax.sgd(0.1)),
    "SGD, momentum and decay": (
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=1e-4),
        lambda: optax.chain(optax.add_decayed_weights(1e-4), optax.sgd(0.1, momentum=0.9)),
    ),
    "Adam": (lambda p: torch.optim.Adam(p, 1e-3), lambda: optax.adam(1e-3)),
    "Adam, amsgrad": (lambda p: torch.optim.Adam(p, 1e-3, amsgrad=True), lambda: optax.amsgrad(1e-3)),
    "AdamW": (lambda p: torch.optim.AdamW(p, 1e-3), lambda: optax.adamw(1e-3, weight_decay=1e-2)),
    "Adamax": (lambda p: torch.optim.Adamax(p, 1e-3), lambda: optax.adamax(1e-3)),
    "NAdam": (lambda p: torch.optim.NAdam(p, 1e-3), lambda: optax.nadam(1e-3)),
    "RAdam": (lambda p: torch.optim.RAdam(p, 1e-3), lambda: optax.radam(1e-3)),
    "RMSprop": (lambda p: torch.optim.RMSprop(p, 1e-3), lambda: optax.rmsprop(1e-3, decay=0.99)),
    "Adagrad": (lambda p: torch.optim.Adagrad(p, 1e-2), lambda: optax.adagrad(1e-2)),
    "Adadelta": (lambda p: torch.optim.Adadelta(p, 1.0), lambda: optax.adadelta(1.0)),
    "Rprop": (lambda p: torch.optim.Rprop(p, 1e-3), lambda: optax.rprop(1e-3)),
    "Adafactor": (
        lambda p: torch.optim.Adafactor(p, 1e-2),
        lambda: optax.adafactor(1e-2, multiply_by_parameter_scale=True),
    ),
}
"""torch's optimizer, and the plain Optax one. ASGD, SparseAdam, Muon and LBFGS have none of their kind to be held
against: Optax has no ASGD and no sparse rows, and the other two spend their time in matrix products and closures."""


def stepping(transformation: Any, gradients: Any) -> Callable[[], None]:
    """Some compiled steps, from a state of its own."""

    def step(params: Any, state: Any, gradients: Any) -> Any:
        updates, state = transformation.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    compiled = jax.jit(step, donate_argnums=(0, 1))
    params = {name: jnp.full(shape, 0.1, jnp.float32) for name, shape in SHAPES.items()}
    held = [params, transformation.init(params)]
    # a state that holds an array twice cannot be donated
    held = jax.tree_util.tree_map(jnp.array, held)

    def run() -> None:
        for _ in range(STEPS):
            held[:] = compiled(*held, gradients)
        jax.block_until_ready(held)

    run()
    return run


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--only", help="one optimizer by its name here")
    chosen = parser.parse_args()
    rng = np.random.default_rng(0)
    gradients = {n: jnp.asarray(rng.standard_normal(s, dtype=np.float32)) for n, s in SHAPES.items()}
    print(f"{sum(g.size for g in gradients.values()):,} parameters in {len(SHAPES)} leaves, float32")
    failed = False
    for name, (reference, plain) in PAIRS.items():
        if chosen.only not in (None, name):
            continue
        names = {n: n.replace(".", "_") for n in SHAPES}
        model = torch.nn.ParameterDict({names[n]: torch.nn.Parameter(torch.zeros(s)) for n, s in SHAPES.items()})
        mapping = eq.Mapping([eq.Rule(names[n], n) for n in SHAPES])
        translated = eq.to_optax(reference(model.parameters()), model=model, mapping=mapping)
        runs = {"translated": stepping(translated, gradients), "plain": stepping(plain(), gradients)}
        seconds = interleaved(runs, chosen.repeats)
        ratio = seconds["translated"] / seconds["plain"]
        failed |= ratio > BOUND
        print(f"{line(name, ratio, BOUND)}  {1e3 * seconds['translated'] / STEPS:.1f} ms a step", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
