"""The port's train step, ours or the user's: pure functions of a carry, and a run of it one compiled step at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from equivalence.frameworks.subject import Flat, call
from equivalence.observation import Batch, Observation, Seen
from equivalence.optimizers import OptimizerPair
from equivalence.optimizers.trees import STEPS_TAKEN, Layout, entries, slots_in_reference
from equivalence.randomness import Draw, assert_same_draws
from equivalence.runtimes.draws import draws_of, with_draws
from equivalence.runtimes.jax import JaxRunner, array, environment, host
from equivalence.runtimes.jax_lift import lifted

VALUES = frozenset(("ax",))
"""Fields of optimizer state that move as parameters do: averages of them."""


class StepProgram:
    """A train step of the port, ours or the user's, as traceable functions of a carry."""

    def __init__(
        self, runner: JaxRunner, optimizer: OptimizerPair, rates: Sequence[float], bits: int, gradients: bool = True
    ) -> None:
        self.runner, self.bits = runner, bits
        made = optimizer.transformation(rates, runner.trained, runner.bound)
        self.transformation = optax.with_extra_args_support(optax.chain(_recorder(), made) if gradients else made)
        self._own = runner.subject.own_step if runner.own_step is not None else None
        # The old carry is given up: its memory serves the new one.
        self.compiled, self.start = jax.jit(self._observed, donate_argnums=1), jax.jit(self.init)
        self._known: dict[Any, list[Draw]] = {}
        # The carry in the dtypes of the user's code, which are those that its branches and loops agree on.
        self._held: Any = None

    def _in_float64(self, function: Callable[..., Any], *as_if: Any) -> Callable[..., Any]:
        return lifted(function, self.runner.lifted, as_if=as_if or None) if self.bits == 64 else function

    def init(self, weights: Flat) -> Any:
        """The carry at the start, from reference leaves."""
        self._held = jax.eval_shape(self._init, weights)
        return self._in_float64(self._init)(weights)

    def _init(self, weights: Flat) -> Any:
        params, buffers = self.runner.load(weights, self.bits)
        if self._own is not None:
            return self._own.init(params, buffers, self.transformation)
        native = self.runner.subject.native
        return {"params": params, "buffers": buffers, "optimizer": self.transformation.init(native(params))}

    def _step(self, carry: Any, inputs: Any, targets: Any) -> tuple[Any, Any]:
        if self._own is not None:
            assert self.runner.own_step is not None
            return self._own.step(self.runner.own_step, carry, inputs, targets)
        runner, subject = self.runner, self.runner.subject

        def objective(params: Flat) -> tuple[Any, Flat]:
            args, kwargs = call(inputs)
            outputs, after = subject.apply(params, carry["buffers"], args, kwargs, True)
            assert runner.loss is not None
            return runner.loss(runner.select(outputs), *targets), after

        (loss, after), gradients = jax.value_and_grad(objective, has_aux=True)(carry["params"])
        held = {path: after.pop(path, value) for path, value in carry["params"].items()}
        frozen = runner.bound_frozen()
        gradients = {p: jnp.zeros_like(g) if p in frozen else g for p, g in gradients.items()}
        native = subject.native(held)
        gradient = subject.native(gradients)
        updates, state = self.transformation.update(
            gradient,
            carry["optimizer"],
            native,
            value=loss,
            grad=gradient,
            value_fn=lambda moved: objective(subject.flat(moved))[0],
        )
        moved = subject.flat(optax.apply_updates(native, updates))
        params = {path: held[path] if path in frozen else moved[path] for path in held}
        return {"params": params, "buffers": after, "optimizer": state}, loss

    def run(self, draws: Sequence[Any], carry: Any, inputs: Any, targets: Any) -> tuple[Any, Any]:
        """One step with its draws served; traceable."""
        step = self._in_float64(with_draws(self._step), draws, self._held, inputs, targets)
        result: tuple[Any, Any] = step(draws, carry, inputs, targets)
        return result

    def _observed(self, draws: Sequence[Any], carry: Any, inputs: Any, targets: Any) -> tuple[Any, Any, Flat]:
        carry, loss = self.run(draws, carry, inputs, targets)
        seen = {
            "params": self.params(carry),
            "buffers": self.buffers(carry),
            "gradients": self.gradients(carry),
            "slots": self.slots(carry),
        }
        return carry, loss, seen

    def draws(self, carry: Any, inputs: Any, targets: Any) -> list[Draw]:
        """The draws that one step asks for; traced once for each shape of batch."""
        key = str(jax.tree_util.tree_map(lambda value: (value.shape, value.dtype), (inputs, targets)))
        if key not in self._known:
            self._known[key] = draws_of(self._step, self._held, inputs, targets)
        return self._known[key]

    def params(self, carry: Any) -> Flat:
        """The parameters in a carry, in the reference's terms."""
        return self.runner.back(self.port_params(carry))

    def port_params(self, carry: Any) -> Flat:
        """The parameters in a carry, in the port's terms."""
        flat: Flat = self._own.params(carry) if self._own is not None else carry["params"]
        return flat

    def outputs(self, carry: Any, inputs: Any) -> Any:
        """What the model in a carry returns in eval mode."""
        held = carry if self._own is None else {"params": self._own.params(carry), "buffers": self._own.buffers(carry)}

        def evaluate(params: Flat, buffers: Flat, inputs: Any) -> Any:
            outputs, _ = self.runner.subject.apply(params, buffers, *call(inputs), False)
            return self.runner.select(outputs)

        return self._in_float64(evaluate)(held["params"], held["buffers"], inputs)

    def gradients(self, carry: Any) -> Flat:
        """The gradients that the optimizer received last, in the reference's terms."""
        return self.slots(carry, gradient=True).get("received", {})

    def slots(self, carry: Any, gradient: bool = False) -> dict[str, Flat]:
        """The optimizer's state by Optax's field names, leaves in the reference's terms."""
        shapes = {path: tuple(value.shape) for path, value in self.runner.subject.params.items()}
        found = slots_in_reference(self.optimizer(carry), Layout(self.runner.bound), shapes, VALUES)
        return {slot: leaves for slot, leaves in found.items() if gradient == (slot == "received")}

    def optimizer(self, carry: Any) -> Any:
        """The Optax state in a carry."""
        return self._own.optimizer(carry) if self._own is not None else carry["optimizer"]

    def with_optimizer(self, carry: Any, state: Any) -> Any:
        """A carry with another Optax state."""
        return self._own.with_optimizer(carry, state) if self._own is not None else {**carry, "optimizer": state}

    def buffers(self, carry: Any) -> Flat:
        """The buffers in a carry that the reference has too, in its terms."""
        flat = self._own.buffers(carry) if self._own is not None else carry["buffers"]
        return {path: value for path, value in self.runner.back(flat).items() if path in self.runner.buffer_paths}


def _recorder() -> optax.GradientTransformation:
    """Remembers the gradients it is handed and passes them on: what a user's own step gave its optimizer."""

    def init(params: Any) -> dict[str, Any]:
        return {"received": jax.tree_util.tree_map(jnp.zeros_like, params)}

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del state, params
        return updates, {"received": updates}

    return optax.GradientTransformation(init, update)


class JaxStepper:
    """A training run of the port, one compiled step at a time."""

    def __init__(self, program: StepProgram, weights: Observation) -> None:
        self.program, self.bits = program, program.bits
        self._seen: dict[str, Any] = {}
        with environment(self.bits, self.program.runner.memory):
            self.carry = program.start(program.runner._given(weights, self.bits))
        held = entries(self.state(), program.runner.subject.params)
        self._owners = {(entry.owner, entry.field) for entry in held if not entry.translated}

    def step(self, batch: Batch, reference: Seen) -> Seen:
        """One step, fed the draws that the reference's step was served. Raises DrawsDiffer where it asks for others."""
        with environment(self.bits, self.program.runner.memory):
            moved = batch.map(lambda value: array(value, self.bits))
            asked = self.program.draws(self.carry, moved.inputs, moved.targets)
            assert_same_draws(reference.draws, asked, "train step")
            served = [jax.device_put(value) for value in reference.served]
            self.carry, loss, seen = self.program.compiled(served, self.carry, moved.inputs, moved.targets)
            self._seen = host(seen)
            return Seen({"loss": np.asarray(loss)})

    def resume(self, optimizer: Callable[[Any, Any], Any]) -> None:
        """Put the optimizer where `optimizer(Optax state, the port's params)` says; weights were given at the start."""
        runner = self.program.runner
        with environment(self.bits, self.program.runner.memory):
            state = self.program.optimizer(self.carry)
            self.carry = self.program.with_optimizer(self.carry, optimizer(state, runner.subject.params))

    def other(self, optimizer: Any, field: str) -> bool:
        """Whether a field of this state holds something else than the torch optimizer keeps under that name."""
        from equivalence.optimizers.moving import NOT_THE_SAME

        kind = type(optimizer).__name__
        return any((kind, *place) in NOT_THE_SAME for place in self._owners if place[1] == field)

    def moved_at(self, counts: Sequence[int]) -> list[bool]:
        """Whether the schedules of the transformation, set to each of these counts, make another change than at 0."""
        runner, program = self.program.runner, self.program
        with environment(self.bits, self.program.runner.memory):
            flat = program.port_params(self.carry)
            params, structure = runner.subject.native(flat), jax.tree_util.tree_structure(self.state())
            ones = jax.tree_util.tree_map(jnp.ones_like, params)

            def size(count: Any, state: Any) -> Any:
                held = list(entries(state, flat))
                places = [STEPS_TAKEN.get(entry.owner) == entry.field for entry in held]
                arrays = [
                    count.astype(e.array.dtype) if place else e.array for e, place in zip(held, places, strict=True)
                ]
                state = jax.tree_util.tree_unflatten(structure, arrays)
                extra = {"value": 0.0, "grad": ones, "value_fn": optax.tree.sum}
                return optax.tree.norm(program.transformation.update(ones, state, params, **extra)[0])

            first, state = jnp.asarray(0), program.optimizer(program._held)
            run = jax.jit(program._in_float64(size, first, state))
            found = [float(run(jnp.asarray(count), self.state())) for count in (0, *counts)]
        return [one != found[0] for one in found[1:]]

    def state(self) -> Any:
        """The Optax state now."""
        return self.program.optimizer(self.carry)

    def held_buffers(self) -> Observation:
        """The buffers after the last step that the reference has too, in its terms."""
        found: Observation = self._seen["buffers"]
        return found

    def parameters(self) -> Observation:
        """The parameters after the last step, in the reference's terms."""
        found: Observation = self._seen["params"]
        return found

    def seen_gradients(self) -> Observation:
        """The gradients that the optimizer received in the last step, in the reference's terms."""
        found: Observation = self._seen["gradients"]
        return found

    def optimizer_state(self) -> dict[str, Observation]:
        """The optimizer's state by Optax's field names, in the reference's terms."""
        found: dict[str, Observation] = self._seen["slots"]
        return found
