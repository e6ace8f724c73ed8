"""The whole training of a port as one compiled program: a scan over the batch plan, recorded at every step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from equivalence.frameworks.subject import Flat
from equivalence.observation import Observation
from equivalence.optimizers import OptimizerPair
from equivalence.randomness import Draw, Tape, assert_same_draws
from equivalence.runtimes.jax import JaxRunner, array, environment, host
from equivalence.spec import TrainingData

MEMORY = 512 * 2**20
"""Bytes of recorded parameters that one program may return; longer runs take several calls of the same program."""


class WholeTraining:
    """All steps of a plan in one program. Data stays on the device; batches are gathered inside."""

    def __init__(self, runner: JaxRunner, optimizer: OptimizerPair, bits: int, data: TrainingData) -> None:
        self.runner, self.bits, self.data, self.plan = runner, bits, data, data.plan
        self.program = runner.program(optimizer, [optimizer.learning_rate], bits, gradients=False)
        rows = int(self.plan.order.shape[1])
        self.full, self.short = divmod(rows, self.plan.batch_size)
        size = sum(value.size for value in runner.subject.params.values()) * bits // 8 * self.plan.batches
        self.chunk = max(1, min(self.plan.epochs, MEMORY // max(1, size)))
        self._compiled = jax.jit(self._epochs)

    def draws(self, weights: Observation) -> dict[int, list[Draw]]:
        """The draws that a step asks for, by batch length; nothing is computed."""
        found = {}
        with environment(self.bits, self.runner.memory):
            carry = jax.eval_shape(self.program.init, self.runner._given(weights, self.bits))
            for length in {self.plan.batch_size if self.full else 0, self.short} - {0}:
                inputs, targets = self._abstract(length)
                found[length] = self.program.draws(carry, inputs, targets)
        return found

    def _abstract(self, length: int) -> tuple[Any, Any]:
        dtype = {32: jnp.float32, 64: jnp.float64}[self.bits]

        def one(value: np.ndarray) -> Any:
            shape = value.shape[1:] if self.data.rows_are_batches else (length, *value.shape[1:])
            kind = dtype if value.dtype.kind == "f" else jnp.asarray(value[:0]).dtype
            return jax.ShapeDtypeStruct(shape, kind)

        return self.data.named(tuple(map(one, self.data.inputs))), tuple(map(one, self.data.targets))

    def _epochs(self, carry: Any, order: Any, served: Any, inputs: Any, targets: Any) -> tuple[Any, Any]:
        def batch(rows: Any) -> tuple[Any, Any]:
            pick = rows[0] if self.data.rows_are_batches else rows
            return self.data.named(tuple(a[pick] for a in inputs)), tuple(a[pick] for a in targets)

        def step(carry: Any, given: Any) -> tuple[Any, Any]:
            rows, draws = given
            carry, loss = self.program.run(draws, carry, *batch(rows))
            return carry, (loss, self.program.params(carry))

        def epoch(carry: Any, given: Any) -> tuple[Any, Any]:
            rows, (draws, last) = given
            seen = None
            if self.full:
                split = rows[: self.full * self.plan.batch_size].reshape(self.full, self.plan.batch_size)
                carry, seen = jax.lax.scan(step, carry, (split, draws))
            if self.short:
                carry, end = step(carry, (rows[self.full * self.plan.batch_size :], last))
                end = jax.tree_util.tree_map(lambda value: value[None], end)
                seen = end if seen is None else jax.tree_util.tree_map(lambda *v: jnp.concatenate(v), seen, end)
            return carry, seen

        return jax.lax.scan(epoch, carry, (order, served))

    def serve(self, draws: Mapping[int, Sequence[Draw]], seed: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """The tape's arrays for every step: those of full batches (epochs, batches, ...), and of short ones."""
        epochs, size = self.plan.epochs, self.plan.batch_size
        full: list[np.ndarray] = (
            [np.zeros((epochs, self.full, *d.shape), _dtype(d)) for d in draws.get(size, ())] if self.full else []
        )
        short: list[np.ndarray] = (
            [np.zeros((epochs, *d.shape), _dtype(d)) for d in draws.get(self.short, ())] if self.short else []
        )
        for step in range(self.plan.steps):
            epoch, number = divmod(step, self.plan.batches)
            whole = number < self.full
            tape = Tape((seed + step, 1))
            for place, draw in enumerate(draws.get(size if whole else self.short, ())):
                if whole:
                    full[place][epoch, number] = tape.take(draw)
                else:
                    short[place][epoch] = tape.take(draw)
        return full, short

    def run(
        self, weights: Observation, reference_draws: dict[int, tuple[Draw, ...]], seed: int
    ) -> tuple[np.ndarray, Observation]:
        """Losses (steps,) and parameters after every step (steps, *shape), in the reference's terms.

        Raises DrawsDiffer where a step asks for other draws than the reference's.
        """
        losses, recorded, _ = self.prepare(weights, reference_draws, seed)()
        return losses, recorded

    def prepare(
        self, weights: Observation, reference_draws: Mapping[int, Sequence[Draw]], seed: int
    ) -> Callable[[], tuple[np.ndarray, Observation, Any]]:
        """The run with everything it reads on the device, to be called: losses, parameters, and the carry at its end.

        Raises DrawsDiffer where a step asks for other draws than the reference's.
        """
        for length, asked in self.draws(weights).items():
            assert_same_draws(reference_draws.get(length, ()), asked, f"training step of {length} rows")
        served = self.serve(reference_draws, seed)
        parts = [slice(first, first + self.chunk) for first in range(0, self.plan.epochs, self.chunk)]
        with environment(self.bits, self.runner.memory):
            start = self.runner._given(weights, self.bits)
            inputs = tuple(array(value, self.bits) for value in self.data.inputs)
            targets = tuple(array(value, self.bits) for value in self.data.targets)
            orders = [jnp.asarray(self.plan.order[part]) for part in parts]
            given = [
                jax.tree_util.tree_map(lambda value, part=part: jnp.asarray(value[part]), served) for part in parts
            ]

        def run() -> tuple[np.ndarray, Observation, Any]:
            losses, recorded = [], []
            with environment(self.bits, self.runner.memory):
                carry = self.program.start(start)
                for order, draws in zip(orders, given, strict=True):
                    carry, (loss, params) = self._compiled(carry, order, draws, inputs, targets)
                    losses.append(np.asarray(loss).reshape(-1))
                    recorded.append({p: np.asarray(v).reshape(-1, *v.shape[2:]) for p, v in params.items()})
            return np.concatenate(losses), _joined(recorded), carry

        return run

    def outputs(self, carry: Any, inputs: tuple[np.ndarray, ...]) -> Any:
        """What the model in a carry returns in eval mode, a tree of NumPy arrays."""
        with environment(self.bits, self.runner.memory):
            given = self.data.named(tuple(array(value, self.bits) for value in inputs))
            return host(self.program.outputs(carry, given))


def _joined(parts: list[Flat]) -> Observation:
    return parts[0] if len(parts) == 1 else {path: np.concatenate([p[path] for p in parts]) for path in parts[0]}


def _dtype(draw: Draw) -> type:
    return bool if draw.kind == "bernoulli" else float
