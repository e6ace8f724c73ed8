"""The JAX runtime: one compiled program a structure and precision, fed reference leaves and answering in them.

The mapping runs inside the program, so weights arrive and observations leave in the reference's names and layouts:
what is compared needs no further moving, and XLA folds the transposes into its own.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from equivalence.frameworks.subject import Flat, Subject, call
from equivalence.observation import Batch, Observation, Seen, cotangent
from equivalence.optimizers import OptimizerPair
from equivalence.paths import flatten, rebuild
from equivalence.randomness import Draw, assert_same_draws
from equivalence.runtimes.draws import draws_of, with_draws
from equivalence.runtimes.jax_constants import Memory, watched
from equivalence.runtimes.jax_lift import Lifted, lifted
from equivalence.runtimes.pinned import pinned
from equivalence.weights import Bound

if TYPE_CHECKING:
    from equivalence.runtimes.jax_steps import StepProgram

LIBRARIES = frozenset(("numpy", "jax", "jaxlib", "ml_dtypes", "scipy", "equivalence"))
"""Packages that ask NumPy for float64's limits on their own account."""

DTYPES: dict[int, Any] = {32: jnp.float32, 64: jnp.float64}


@contextlib.contextmanager
def environment(bits: int, memory: Memory | None = None) -> Iterator[None]:
    """x64 on for float64 and off for float32, matmul at its highest precision, for this thread and this block only.

    In float64 the doubles that JAX rounds are put into `memory`; None is one that all such blocks share.
    """
    with jax.enable_x64(bits == 64), jax.default_matmul_precision("highest"):
        if bits == 64:
            with pinned(jnp, _told), pinned(np, _told, LIBRARIES), watched(memory):
                yield
        else:
            yield


def _told(dtype: Any) -> Any:
    """The dtype whose limits a float64 run tells."""
    kind = dtype.dtype if isinstance(getattr(dtype, "dtype", None), np.dtype) else dtype
    return dtype if kind is None or np.dtype(kind) != np.float64 else np.float32


def keep_programs(folder: Path) -> None:
    """Keep compiled programs in JAX's persistent cache in `folder`, unless the process already has one elsewhere."""
    config: Any = jax.config
    if config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def array(value: np.ndarray, bits: int) -> Any:
    """A NumPy array as a JAX array: floats in the run's precision, others as x64 allows."""
    plain = np.asarray(value)
    # Put, not converted by `jnp.asarray`: that compiles a program for every shape.
    return jax.device_put(plain.astype(DTYPES[bits]) if plain.dtype.kind == "f" else plain)


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


def _shake(bits: int, seed: int | None) -> tuple[np.uint32, np.float64] | None:
    """What lifted programs take as a seed and a size; numbers, so that one program serves all seeds and none."""
    return (np.uint32((seed or 0) % 2**32), np.float64(seed is not None)) if bits == 64 else None


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
        trained: Sequence[str] = (),
    ) -> None:
        self.frozen = frozen
        self.trained = {path: tuple(bound.source.shape(path)) for path in trained}
        self.subject, self.bound, self.loss, self.select, self.own_step = subject, bound, loss, select, own_step
        self.lifted, self.memory = Lifted(), Memory()
        self._compiled = jax.jit(self._observed, static_argnames=("train", "bits"))
        self._advanced = jax.jit(self._buffers_after, static_argnames="bits")
        self._known: dict[Any, Any] = {}

    @property
    def float64(self) -> str:
        """How float64 runs are made: "native", "lifted", or "float32 only" where an operation could not be lifted."""
        return self.lifted.float64

    @property
    def surviving(self) -> tuple[str, ...]:
        """Each constant and operation that float64 runs left in low precision, in words."""
        return self.lifted.surviving

    @property
    def coarsest(self) -> float:
        """The unit roundoff of the coarsest dtype that its code computes in, 0 where that is the run's own."""
        return self.lifted.coarsest

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

    def _observed(self, shake: Any, *args: Any, train: bool, bits: int) -> Flat:
        program = functools.partial(self._program, train=train, bits=bits)
        found: Flat = (lifted(program, self.lifted, shake) if bits == 64 else program)(*args)
        return found

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

    def _buffers_after(self, shake: Any, *args: Any, bits: int) -> Flat:
        def after(weights: Flat, inputs: Any, draws: Any) -> Flat:
            params, buffers = self.load(weights, bits)
            moved = self._forward(params, buffers, inputs, draws, True)[1]
            return {path: value for path, value in self.back(moved).items() if path in self.buffer_paths}

        found: Flat = (lifted(after, self.lifted, shake) if bits == 64 else after)(*args)
        return found

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
        with environment(bits, self.memory):
            given, moved = self._given(weights, bits), self._batch(batch, bits)

            def run(weights: Flat, inputs: Any) -> Any:
                params, buffers = self.load(weights, bits)
                args, kwargs = call(inputs)
                outputs, _ = self.subject.apply(params, buffers, args, kwargs, False)
                return {path: jnp.asarray(value) for path, value in flatten(self.select(outputs)).items()}

            shapes = jax.eval_shape(lifted(run, self.lifted) if bits == 64 else run, given, moved.inputs)
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
        shaken: int | None = None,
    ) -> Seen:
        """The observation that `TorchRunner.observe` makes, of the port, fed the draws that `reference` was served.

        With `shaken`, a seed, float64 runs move what survived lifting by up to its rounding.
        """
        with environment(bits, self.memory):
            given, moved = self._given(weights, bits), self._batch(batch, bits)
            self._check_draws(given, moved, train, reference.draws, bits)
            cotangents = {
                path.removeprefix("outputs."): array(cotangent(seed, path.removeprefix("outputs."), value.shape), bits)
                for path, value in reference.values.items()
                if path.startswith("outputs.") and value.dtype.kind == "f"
            }
            program = self._compiled if compiled else self._observed
            served = [jax.device_put(value) for value in reference.served]
            shake = _shake(bits, shaken)
            found = program(shake, given, moved.inputs, moved.targets, cotangents, served, train=train, bits=bits)
            return Seen(host(found))

    def advance(
        self, bits: int, weights: Observation, batch: Batch, reference: Seen, shaken: int | None = None
    ) -> Observation:
        """The buffers after one training-mode call; `shaken` as in `observe`."""
        with environment(bits, self.memory):
            given, moved = self._given(weights, bits), self._batch(batch, bits)
            served = [jax.device_put(value) for value in reference.served]
            found: Observation = host(self._advanced(_shake(bits, shaken), given, moved.inputs, served, bits=bits))
            return found

    def program(
        self, optimizer: OptimizerPair, rates: Sequence[float], bits: int, gradients: bool = True
    ) -> StepProgram:
        """The port's train step as a pure function of a carry, which keeps the last gradients if asked to."""
        from equivalence.runtimes.jax_steps import StepProgram

        return StepProgram(self, optimizer, rates, bits, gradients)
