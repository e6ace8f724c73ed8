"""The JAX runtime: one compiled program a structure and precision, fed reference leaves and answering in them.

The mapping runs inside the program, so weights arrive and observations leave in the reference's names and layouts:
what is compared needs no further moving, and XLA folds the transposes into its own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from equivalence.frameworks.subject import Flat, Subject, call
from equivalence.observation import Batch, Observation, Seen, cotangent
from equivalence.optimizers import OptimizerPair
from equivalence.optimizers.pairs import schedule
from equivalence.paths import flatten, rebuild
from equivalence.randomness import Draw, assert_same_draws
from equivalence.runtimes.draws import draws_of, with_draws
from equivalence.weights import Bound

DTYPES: dict[int, Any] = {32: jnp.float32, 64: jnp.float64}


@contextlib.contextmanager
def environment(bits: int) -> Iterator[None]:
    """x64 on for float64 and off for float32, matmul at its highest precision, for this thread and this block only."""
    with jax.enable_x64(bits == 64), jax.default_matmul_precision("highest"):
        if bits == 64:
            with _pinned():
                yield
        else:
            yield


@contextlib.contextmanager
def _pinned() -> Iterator[None]:
    """Tell code that asks for float64's limits those of float32: it must stay the function that it is in float32."""
    ours = jnp.finfo

    def finfo(dtype: Any) -> Any:
        kind = np.dtype(dtype) if not hasattr(dtype, "dtype") else np.dtype(dtype.dtype)
        return ours(jnp.float32 if kind == np.float64 else dtype)

    jnp.finfo = finfo  # type: ignore[assignment]
    try:
        yield
    finally:
        jnp.finfo = ours


def keep_programs(folder: Path) -> None:
    """Keep compiled programs in JAX's persistent cache in `folder`, unless the process already has one elsewhere."""
    config: Any = jax.config
    if config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def array(value: np.ndarray, bits: int) -> Any:
    """A NumPy array as a JAX array: floats in the run's precision, others as x64 allows."""
    plain = np.asarray(value)
    return jnp.asarray(plain.astype(DTYPES[bits])) if plain.dtype.kind == "f" else jnp.asarray(plain)


def host(tree: Any) -> Any:
    """Every array of a tree as NumPy; low precision, which NumPy lacks, as float32."""

    def one(value: Any) -> np.ndarray:
        plain = np.asarray(value)
        return (
            plain.astype(np.float32) if plain.dtype.kind == "V" or (plain.dtype.itemsize < 4 and _low(plain)) else plain
        )

    return jax.tree_util.tree_map(one, tree)


def _low(plain: np.ndarray) -> bool:
    return bool(jnp.issubdtype(plain.dtype, jnp.floating))


def projection(seed: int) -> Callable[..., Any]:
    """A loss where none was given: the mean of the outputs against a fixed random cotangent."""

    def loss(outputs: Any, *targets: Any) -> Any:
        del targets
        flat = {path: jnp.asarray(value) for path, value in flatten(outputs).items()}
        return sum(
            jnp.mean(value * jnp.asarray(cotangent(seed, path, value.shape), value.dtype))
            for path, value in flat.items()
            if jnp.issubdtype(value.dtype, jnp.floating)
        )

    return loss


class JaxRunner:
    """Runs one JAX subject through the mapping that binds it to the reference."""

    def __init__(
        self,
        subject: Subject,
        bound: Bound,
        loss: Callable[..., Any] | None,
        select: Callable[[Any], Any],
        own_step: Callable[..., Any] | None = None,
        frozen: frozenset[str] = frozenset(),
    ) -> None:
        self.frozen = frozen
        self.subject, self.bound, self.loss, self.select, self.own_step = subject, bound, loss, select, own_step
        self._compiled = jax.jit(self._program, static_argnames=("train", "bits"))
        self._advanced = jax.jit(self._buffers_after, static_argnames=("train", "bits"))
        self._known: dict[Any, Any] = {}

    def load(self, weights: Flat, bits: int) -> tuple[Flat, Flat]:
        """Reference leaves as the port's params and buffers; leaves that only the port has keep their own values."""
        made = self.bound.forward(weights, stack=jnp.stack)
        dtype = DTYPES[bits]

        def own(value: np.ndarray) -> Any:
            return jnp.asarray(value, dtype) if jnp.issubdtype(value.dtype, jnp.floating) else jnp.asarray(value)

        params = {path: made[path] if path in made else own(value) for path, value in self.subject.params.items()}
        buffers = {path: made[path] if path in made else own(value) for path, value in self.subject.buffers.items()}
        return params, buffers

    def back(self, leaves: Flat, gradient: bool = False) -> Flat:
        """Port leaves in the reference's names and layouts."""
        return self.bound.backward(leaves, gradient=gradient, stack=jnp.stack)

    def _forward(self, params: Flat, buffers: Flat, inputs: Any, draws: Sequence[Any], train: bool) -> tuple[Any, Flat]:
        args, kwargs = call(inputs)

        def run(params: Flat, buffers: Flat, args: Any, kwargs: Any) -> tuple[Any, Flat]:
            outputs, after = self.subject.apply(params, buffers, args, kwargs, train)
            return self.select(outputs), after

        outputs, after = with_draws(run)(draws, params, buffers, args, kwargs)
        return outputs, after

    def _program(
        self, weights: Flat, inputs: Any, targets: Any, cotangents: Any, draws: Any, *, train: bool, bits: int
    ) -> Flat:
        params, buffers = self.load(weights, bits)
        names = list(Batch(inputs).arrays())
        moving = {n: v for n, v in Batch(inputs).arrays().items() if jnp.issubdtype(v.dtype, jnp.floating)}

        def forward(params: Flat, moving: Flat) -> tuple[Flat, Any]:
            whole = {**Batch(inputs).arrays(), **moving}
            given = whole if isinstance(inputs, dict) else tuple(whole[name] for name in names)
            outputs, after = self._forward(params, buffers, given, draws, train)
            flat = {path: jnp.asarray(value) for path, value in flatten(outputs).items()}
            smooth = {path: value for path, value in flat.items() if jnp.issubdtype(value.dtype, jnp.inexact)}
            return smooth, (outputs, {path: flat[path] for path in flat if path not in smooth}, after)

        smooth, pull, (outputs, exact, after) = jax.vjp(forward, params, moving, has_aux=True)
        seen: Flat = {f"outputs.{path}": value for path, value in {**smooth, **exact}.items()}
        families = {"cotangent": {path: cotangents[path].astype(value.dtype) for path, value in smooth.items()}}
        if self.loss is not None:
            loss_function = self.loss

            def loss_of(flat: Flat) -> Any:
                whole = {**flat, **exact}
                return loss_function(rebuild(outputs, lambda path, _: whole[path]), *targets)

            seen["loss"], slopes = jax.value_and_grad(loss_of)(smooth)
            seen |= {f"output_gradients.{path}": slope for path, slope in slopes.items()}
            families["loss"] = slopes
        for family, slopes in families.items():
            gradients, of_inputs = pull(slopes)
            back = self.back(gradients, gradient=True)
            seen |= {f"parameter_gradients.{family}.{path}": value for path, value in back.items()}
            seen |= {f"input_gradients.{family}.{name}": value for name, value in of_inputs.items()}
        if train:
            seen |= {f"buffers.{path}": value for path, value in self.back(after).items() if path in self.buffer_paths}
        return seen

    def bound_frozen(self) -> set[str]:
        """Port params whose reference leaf is frozen."""
        return {path for source in self.frozen for path in self.bound.targets_of(source)}

    @property
    def buffer_paths(self) -> set[str]:
        """The reference's buffers that the port keeps too."""
        return {
            path for move in self.bound.moves for path in move.sources if set(move.targets) & set(self.subject.buffers)
        }

    def _buffers_after(self, weights: Flat, inputs: Any, draws: Any, *, train: bool, bits: int) -> Flat:
        params, buffers = self.load(weights, bits)
        after = self._forward(params, buffers, inputs, draws, train)[1]
        return {path: value for path, value in self.back(after).items() if path in self.buffer_paths}

    def _given(self, weights: Observation, bits: int) -> Flat:
        needed = {path for move in self.bound.moves if move.targets for path in move.sources}
        return {path: array(weights[self.bound.source.canonical(path)], bits) for path in needed}

    def _batch(self, batch: Batch, bits: int) -> Batch:
        return batch.map(lambda value: array(value, bits))

    def _check_draws(self, weights: Flat, batch: Batch, train: bool, reference: Sequence[Draw], bits: int) -> None:
        """Raise DrawsDiffer unless the port asks for the reference's draws; asked once a structure."""
        key = (train, bits, str(jax.tree_util.tree_map(lambda v: (v.shape, v.dtype), batch.inputs)))
        if key not in self._known:

            def run(weights: Flat, inputs: Any) -> Any:
                params, buffers = self.load(weights, bits)
                args, kwargs = call(inputs)
                return self.subject.apply(params, buffers, args, kwargs, train)[1]

            self._known[key] = draws_of(run, weights, batch.inputs)
        assert_same_draws(reference, self._known[key], "train mode" if train else "eval mode")

    def outputs_of(self, bits: int, weights: Observation, batch: Batch) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and kind of dtype of every output in eval mode; nothing is computed."""
        with environment(bits):
            given, moved = self._given(weights, bits), self._batch(batch, bits)

            def run(weights: Flat, inputs: Any) -> Any:
                params, buffers = self.load(weights, bits)
                args, kwargs = call(inputs)
                outputs, _ = self.subject.apply(params, buffers, args, kwargs, False)
                return {path: jnp.asarray(value) for path, value in flatten(self.select(outputs)).items()}

            shapes = jax.eval_shape(run, given, moved.inputs)
            return {path: (tuple(value.shape), np.dtype(value.dtype).kind) for path, value in shapes.items()}

    def observe(
        self,
        bits: int,
        weights: Observation,
        batch: Batch,
        train: bool,
        seed: int,
        reference: Seen,
        compiled: bool = True,
    ) -> Seen:
        """The observation that `TorchRunner.observe` makes, of the port, fed the draws that `reference` was served."""
        with environment(bits):
            given, moved = self._given(weights, bits), self._batch(batch, bits)
            self._check_draws(given, moved, train, reference.draws, bits)
            cotangents = {
                path.removeprefix("outputs."): array(cotangent(seed, path.removeprefix("outputs."), value.shape), bits)
                for path, value in reference.values.items()
                if path.startswith("outputs.") and value.dtype.kind == "f"
            }
            program = self._compiled if compiled else self._program
            served = [jnp.asarray(value) for value in reference.served]
            found = program(given, moved.inputs, moved.targets, cotangents, served, train=train, bits=bits)
            return Seen(host(found))

    def advance(self, bits: int, weights: Observation, batch: Batch, reference: Seen) -> Observation:
        """The buffers after one training-mode call."""
        with environment(bits):
            given, moved = self._given(weights, bits), self._batch(batch, bits)
            served = [jnp.asarray(value) for value in reference.served]
            found: Observation = host(self._advanced(given, moved.inputs, served, train=True, bits=bits))
            return found

    def program(
        self, optimizer: OptimizerPair, rates: Sequence[float], bits: int, gradients: bool = True
    ) -> StepProgram:
        """The port's train step as a pure function of a carry, which keeps the last gradients if asked to."""
        return StepProgram(self, optimizer, rates, bits, gradients)


class StepProgram:
    """A train step of the port, ours or the user's, as traceable functions of a carry."""

    def __init__(
        self, runner: JaxRunner, optimizer: OptimizerPair, rates: Sequence[float], bits: int, gradients: bool = True
    ) -> None:
        self.runner, self.bits = runner, bits
        rate = schedule(rates) if optimizer.changes_rate else optimizer.learning_rate
        self.transformation = optax.chain(_recorder(), optimizer.port(rate)) if gradients else optimizer.port(rate)
        self._own = runner.subject.own_step if runner.own_step is not None else None
        # The old carry is given up: its memory serves the new one.
        self.compiled, self.start = jax.jit(self._observed, donate_argnums=1), jax.jit(self.init)
        self._known: dict[Any, list[Draw]] = {}

    def init(self, weights: Flat) -> Any:
        """The carry at the start, from reference leaves."""
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
        frozen = runner.bound_frozen()
        gradients = {p: jnp.zeros_like(g) if p in frozen else g for p, g in gradients.items()}
        native = subject.native(carry["params"])
        updates, state = self.transformation.update(subject.native(gradients), carry["optimizer"], native)
        moved = subject.flat(optax.apply_updates(native, updates))
        params = {path: carry["params"][path] if path in frozen else moved[path] for path in carry["params"]}
        return {"params": params, "buffers": after, "optimizer": state}, loss

    def run(self, draws: Sequence[Any], carry: Any, inputs: Any, targets: Any) -> tuple[Any, Any]:
        """One step with its draws served; traceable."""
        result: tuple[Any, Any] = with_draws(self._step)(draws, carry, inputs, targets)
        return result

    def _observed(self, draws: Sequence[Any], carry: Any, inputs: Any, targets: Any) -> tuple[Any, Any, Flat]:
        carry, loss = self.run(draws, carry, inputs, targets)
        seen = {"params": self.params(carry), "gradients": self.gradients(carry), "slots": self.slots(carry)}
        return carry, loss, seen

    def draws(self, carry: Any, inputs: Any, targets: Any) -> list[Draw]:
        """The draws that one step asks for; traced once for each shape of batch."""
        key = str(jax.tree_util.tree_map(lambda value: (value.shape, value.dtype), (inputs, targets)))
        if key not in self._known:
            self._known[key] = draws_of(self._step, carry, inputs, targets)
        return self._known[key]

    def params(self, carry: Any) -> Flat:
        """The parameters in a carry, in the reference's terms."""
        flat = self._own.params(carry) if self._own is not None else carry["params"]
        return self.runner.back(flat)

    def outputs(self, carry: Any, inputs: Any) -> Any:
        """What the model in a carry returns in eval mode."""
        held = carry if self._own is None else {"params": self._own.params(carry), "buffers": self._own.buffers(carry)}
        outputs, _ = self.runner.subject.apply(held["params"], held["buffers"], *call(inputs), False)
        return self.runner.select(outputs)

    def gradients(self, carry: Any) -> Flat:
        """The gradients that the optimizer received last, in the reference's terms."""
        return self.slots(carry, gradient=True).get("received", {})

    def slots(self, carry: Any, gradient: bool = False) -> dict[str, Flat]:
        """The optimizer's state by Optax's field names, leaves in the reference's terms."""
        state = self._own.optimizer(carry) if self._own is not None else carry["optimizer"]
        return {
            slot: leaves if "" in leaves else self.runner.back(leaves, gradient=True)
            for slot, leaves in slots_of(state, set(self.runner.subject.params)).items()
            if gradient == (slot == "received")
        }


def slots_of(state: Any, paths: set[str]) -> dict[str, Flat]:
    """An Optax state as slot -> leaf path -> array; a scalar of the whole state has the path ''.

    A slot is named by the field that holds a tree shaped like the parameters (`mu`, `nu`, `trace`).
    """
    found: dict[str, Flat] = {}
    for keys, value in jax.tree_util.tree_flatten_with_path(state)[0]:
        parts = [_plain(key) for key in keys]
        while parts and parts[-1] in ("value", "raw_value"):
            parts.pop()
        for cut in range(len(parts)):
            leaf = ".".join(parts[cut:])
            if leaf in paths and cut > 0:
                found.setdefault(parts[cut - 1], {}).setdefault(leaf, value)
                break
        else:
            if parts and np.ndim(value) == 0:
                found.setdefault(parts[-1], {}).setdefault("", value)
    return found


def _plain(key: Any) -> str:
    for name in ("key", "name", "idx"):
        if hasattr(key, name):
            return str(getattr(key, name))
    return str(key)


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
        with environment(self.bits):
            self.carry = program.start(program.runner._given(weights, self.bits))

    def step(self, batch: Batch, reference: Seen) -> Seen:
        """One step, fed the draws that the reference's step was served. Raises DrawsDiffer where it asks for others."""
        with environment(self.bits):
            moved = batch.map(lambda value: array(value, self.bits))
            asked = self.program.draws(self.carry, moved.inputs, moved.targets)
            assert_same_draws(reference.draws, asked, "train step")
            served = [jnp.asarray(value) for value in reference.served]
            self.carry, loss, seen = self.program.compiled(served, self.carry, moved.inputs, moved.targets)
            self._seen = host(seen)
            return Seen({"loss": np.asarray(loss)})

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
