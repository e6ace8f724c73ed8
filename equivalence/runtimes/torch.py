"""The torch runtime: observe a subject, step it, in float32 or float64, with every draw taken from the tape."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from equivalence.errors import UnsupportedDraw
from equivalence.frameworks.subject import Subject, call
from equivalence.observation import Batch, Observation, Seen, cotangent
from equivalence.optimizers import OptimizerPair
from equivalence.paths import flatten
from equivalence.randomness import Draw, Tape

SMALL = 100_000
"""Parameters below which a model runs on one thread: sharing its work out costs more than the work."""

DTYPES = {32: torch.float32, 64: torch.float64}


@contextlib.contextmanager
def environment(bits: int, threads: int | None = None) -> Iterator[None]:
    """Default dtype, threads and matmul precision for a run, no autocast; settings and generator states put back."""
    dtype, threads_before = torch.get_default_dtype(), torch.get_num_threads()
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=range(torch.cuda.device_count())))
        stack.enter_context(torch.autocast("cpu", enabled=False))
        if torch.cuda.is_available():
            stack.enter_context(torch.autocast("cuda", enabled=False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(_highest_precision())
        if bits == 64:
            stack.enter_context(_pinned())
        try:
            if threads is not None:
                torch.set_num_threads(threads)
            torch.set_default_dtype(DTYPES[bits])
            yield
        finally:
            torch.set_num_threads(threads_before)
            torch.set_default_dtype(dtype)


@contextlib.contextmanager
def _highest_precision() -> Iterator[None]:
    """Full float32 everywhere, by torch's older and its newer interface; both are put back, even where the user has
    mixed them, which torch's own getters refuse."""
    places = [place for place in _precision_places() if hasattr(place, "fp32_precision")]
    before = [place.fp32_precision for place in places]
    try:
        matmul: str | None = torch.get_float32_matmul_precision()
    except RuntimeError:
        matmul = None
    try:
        torch.set_float32_matmul_precision("highest")
        for convolutional in _precision_places()[4:6]:
            convolutional.fp32_precision = "ieee"
        yield
    finally:
        if matmul is not None:
            torch.set_float32_matmul_precision(matmul)
        for place, value in zip(places, before, strict=True):
            place.fp32_precision = value


def _precision_places() -> list[Any]:
    """Everything that has a float32 precision of its own, the general before the particular."""
    backends: Any = torch.backends
    particular = [getattr(backends.cudnn, name) for name in ("conv", "rnn")]
    particular += [getattr(backends.mkldnn, name, None) for name in ("matmul", "conv", "rnn")]
    return [backends, backends.cudnn, backends.mkldnn, backends.cuda.matmul, *particular]


class _Pinned(TorchFunctionMode):
    """In a float64 run, code that asks for its dtype's limits is told float32's: `RMSNorm(eps=None)` would otherwise
    be another function in float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.rms_norm, torch.nn.functional.rms_norm) and _eps(args, kwargs) is None:
            args, kwargs = args[:3], {**kwargs, "eps": torch.finfo(torch.float32).eps}
        return func(*args, **kwargs)


def _eps(args: Any, kwargs: dict[str, Any]) -> Any:
    return args[3] if len(args) > 3 else kwargs.get("eps")


@contextlib.contextmanager
def _pinned() -> Iterator[None]:
    ours = torch.finfo

    def finfo(dtype: torch.dtype | None = None) -> torch.finfo:
        return ours(torch.float32 if dtype in (None, torch.float64) else dtype)

    torch.finfo = finfo  # type: ignore[assignment, misc]
    try:
        with _Pinned():
            yield
    finally:
        torch.finfo = ours  # type: ignore[misc]


class TapeMode(TorchDispatchMode):
    """Serves every random operation that reaches the dispatcher from a tape."""

    def __init__(self, tape: Tape) -> None:
        super().__init__()
        self.tape = tape

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing here is compiled: without dynamo's guard around every operation a step takes a third less time."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        sampler = _SAMPLERS.get(func)
        if sampler is not None:
            return sampler(self.tape, func, *args, **(kwargs or {}))
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise UnsupportedDraw(f"the reference draws random numbers by {func}, which the tape cannot serve")
        return func(*args, **(kwargs or {}))


def _standard(tape: Tape, kind: str, like: torch.Tensor) -> torch.Tensor:
    value = tape.take(Draw(kind, tuple(like.shape)))
    return torch.from_numpy(np.asarray(value)).to(like)


def _bernoulli(tape: Tape, like: torch.Tensor, p: float) -> torch.Tensor:
    value = tape.take(Draw("bernoulli", tuple(like.shape), float(p)))
    return torch.from_numpy(np.asarray(value)).to(like)


def _native_dropout(tape: Tape, func: Any, x: torch.Tensor, p: float, train: bool | None) -> Any:
    if train is False or p == 0:
        return x, torch.ones_like(x, dtype=torch.bool)
    mask = _bernoulli(tape, x, 1.0 - p)
    return x * mask / (1.0 - p), mask.bool()


_aten = torch.ops.aten
_SAMPLERS: dict[Any, Callable[..., Any]] = {
    _aten.bernoulli_.float: lambda tape, f, x, p=0.5, generator=None: x.copy_(_bernoulli(tape, x, p)),
    _aten.bernoulli.p: lambda tape, f, x, p=0.5, generator=None: _bernoulli(tape, x, p),
    _aten.native_dropout.default: _native_dropout,
    _aten.uniform_.default: lambda tape, f, x, low=0.0, high=1.0, generator=None: x.copy_(
        _standard(tape, "uniform", x) * (high - low) + low
    ),
    _aten.normal_.default: lambda tape, f, x, mean=0.0, std=1.0, generator=None: x.copy_(
        _standard(tape, "normal", x) * std + mean
    ),
    _aten.exponential_.default: lambda tape, f, x, rate=1.0, generator=None: x.copy_(
        _standard(tape, "exponential", x) / rate
    ),
}


def _factory(kind: str, like: bool) -> Callable[..., Any]:
    def sample(tape: Tape, func: Any, first: Any, **kwargs: Any) -> torch.Tensor:
        kwargs.pop("generator", None)
        empty = torch.empty_like(first, **kwargs) if like else torch.empty(first, **kwargs)
        return empty.copy_(_standard(tape, kind, empty))

    return sample


_SAMPLERS.update(
    {
        _aten.rand.default: _factory("uniform", False),
        _aten.randn.default: _factory("normal", False),
        _aten.rand_like.default: _factory("uniform", True),
        _aten.randn_like.default: _factory("normal", True),
    }
)


def tensor(array: np.ndarray, bits: int) -> torch.Tensor:
    """A NumPy array as a tensor: floats in the run's precision, others as they are.

    Always a copy in memory that torch allocates: sums depend on how their operands are aligned, and NumPy's are
    aligned by chance.
    """
    plain = torch.from_numpy(np.require(array, requirements=("C", "W")))
    return plain.to(DTYPES[bits] if plain.is_floating_point() else plain.dtype, copy=True)


def host(value: torch.Tensor) -> np.ndarray:
    """A tensor as a NumPy array of its own dtype; low precision, which NumPy lacks, as float32."""
    plain = value.detach().cpu()
    return (plain.float() if plain.dtype in (torch.bfloat16, torch.float16) else plain).numpy()


def projection(seed: int) -> Callable[..., torch.Tensor]:
    """A loss where none was given: the mean of the outputs against a fixed random cotangent."""

    def loss(outputs: Any, *targets: Any) -> torch.Tensor:
        del targets
        flat = {path: value for path, value in flatten(outputs).items() if value.is_floating_point()}
        parts = [
            (value * torch.from_numpy(cotangent(seed, path, tuple(value.shape))).to(value)).mean()
            for path, value in flat.items()
        ]
        return torch.stack(parts).sum()

    return loss


class TorchRunner:
    """Runs one torch subject: the reference of every comparison."""

    def __init__(
        self,
        subject: Subject,
        loss: Callable[..., Any] | None,
        select: Callable[[Any], Any],
        own_step: Callable[..., Any] | None = None,
    ) -> None:
        self.subject, self.loss, self.select, self.own_step = subject, loss, select, own_step
        small = sum(value.size for value in subject.params.values()) < SMALL
        self.threads = 1 if small else None

    def observe(
        self, bits: int, weights: Observation, batch: Batch, train: bool, seed: int, gradients: bool = True
    ) -> Seen:
        """One forward pass and its gradients, under a random cotangent and under the loss.

        Returned paths: `outputs.*`, `loss`, `output_gradients.*`, and `input_gradients.*` and
        `parameter_gradients.*`, each under `cotangent.` and `loss.`; in train mode also `buffers.*`.
        """
        tape = Tape((seed, int(train)))
        with environment(bits, self.threads):
            params, buffers = self._load(bits, weights)
            leaves = {f"parameter_gradients.{{}}.{p}": params[p] for p in params if p not in self.subject.frozen}
            inputs = batch.map(lambda array: tensor(array, bits)).inputs
            named: dict[str, Any] = dict(Batch(inputs).arrays())
            for value in named.values():
                value.requires_grad_(value.is_floating_point())
            leaves |= {f"input_gradients.{{}}.{n}": v for n, v in named.items() if v.requires_grad}
            for value in leaves.values():
                value.requires_grad_(True)
            args, kwargs = call(inputs)
            clones = tuple(v.clone() for v in args), {n: v.clone() for n, v in kwargs.items()}
            with TapeMode(tape):
                raw, after = self.subject.apply(params, buffers, *clones, train)
            outputs = self.select(raw)
            flat = flatten(outputs)
            seen: dict[str, Any] = {f"outputs.{path}": value for path, value in flat.items()}
            if train:
                seen |= {f"buffers.{path}": value for path, value in after.items()}
            targets = tuple(tensor(array, bits) for array in batch.targets)
            if gradients:
                seen |= self._gradients(outputs, flat, leaves, targets, seed, bits)
            elif self.loss is not None:
                seen["loss"] = self.loss(outputs, *targets)
            values = {path: host(torch.as_tensor(value)) for path, value in seen.items()}
        return Seen(values, tuple(tape.draws), tuple(tape.values), {"outputs": outputs})

    def _gradients(
        self, outputs: Any, flat: dict[str, Any], leaves: dict[str, torch.Tensor], targets: Any, seed: int, bits: int
    ) -> dict[str, Any]:
        seen: dict[str, Any] = {}
        roots = {p: v for p, v in flat.items() if isinstance(v, torch.Tensor) and v.requires_grad}
        cotangents = {p: tensor(cotangent(seed, p, tuple(v.shape)), bits).to(v.dtype) for p, v in roots.items()}
        families = {"cotangent": cotangents}
        if self.loss is not None:
            value = self.loss(outputs, *targets)
            seen["loss"] = value
            taken = torch.autograd.grad(value, list(roots.values()), retain_graph=True, allow_unused=True)
            slopes = {
                p: torch.zeros_like(v) if g is None else g for (p, v), g in zip(roots.items(), taken, strict=True)
            }
            seen |= {f"output_gradients.{path}": slope for path, slope in slopes.items()}
            families["loss"] = slopes
        for number, (family, slopes) in enumerate(families.items()):
            keep = number + 1 < len(families)
            if not leaves or not roots:
                continue
            found = torch.autograd.grad(
                [roots[p] for p in slopes],
                list(leaves.values()),
                [slopes[p] for p in slopes],
                retain_graph=keep,
                allow_unused=True,
            )
            for (path, leaf), gradient in zip(leaves.items(), found, strict=True):
                seen[path.format(family)] = torch.zeros_like(leaf) if gradient is None else gradient
        return seen

    def _load(self, bits: int, weights: Observation) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        params = {path: tensor(weights[path], bits) for path in self.subject.params}
        buffers = {path: tensor(weights[path], bits) for path in self.subject.buffers}
        return params, buffers

    def advance(self, bits: int, weights: Observation, batch: Batch, seed: int) -> Observation:
        """The buffers after one training-mode call, no gradients; the draws are those of `observe` with that seed."""
        seen = self.observe(bits, weights, batch, train=True, seed=seed, gradients=False)
        return {path.removeprefix("buffers."): v for path, v in seen.values.items() if path.startswith("buffers.")}

    def stepper(
        self, bits: int, weights: Observation, optimizer: OptimizerPair, rates: Sequence[float]
    ) -> TorchStepper:
        """A training run at its start."""
        return TorchStepper(self, bits, weights, optimizer, rates)


class TorchStepper:
    """A training run of a private copy of the module: the user's own step or ours, one batch at a time.

    `jitter` is added to each step's gradients where the optimizer receives them; gradients are recorded there too.
    """

    def __init__(
        self, runner: TorchRunner, bits: int, weights: Observation, optimizer: OptimizerPair, rates: Sequence[float]
    ) -> None:
        self.runner, self.bits, self.rates, self.count = runner, bits, rates, 0
        with environment(bits, runner.threads):
            self.module = copy.deepcopy(runner.subject.model).to(DTYPES[bits])
            self.module.train()
            self.module.requires_grad_(True)
            self.params = dict(self.module.named_parameters())
            self.buffers = dict(self.module.named_buffers())
            with torch.no_grad():
                for path, value in {**self.params, **self.buffers}.items():
                    value.copy_(tensor(weights[path], bits))
            for path in runner.subject.frozen:
                self.params[path].requires_grad_(False)
            trained = [value for path, value in self.params.items() if path not in runner.subject.frozen]
            self.optimizer = optimizer.reference(trained, rates[0])
        self.changes_rate = optimizer.changes_rate
        self.gradients: dict[str, torch.Tensor] = {}
        self.jitter: Callable[[dict[str, torch.Tensor]], dict[str, np.ndarray]] | None = None
        self._mode: TapeMode | None = None
        self.optimizer.register_step_pre_hook(self._before_update)

    def _before_update(self, *_: Any) -> None:
        """At the optimizer's door: stop taping (nothing random follows), record gradients, add the jitter."""
        if self._mode is not None:
            mode, self._mode = self._mode, None
            mode.__exit__(None, None, None)
        found = {path: p.grad for path, p in self.params.items() if p.grad is not None}
        self.gradients = {path: gradient.detach().clone() for path, gradient in found.items()} if self.recording else {}
        if self.jitter is not None:
            with torch.no_grad():
                for path, noise in self.jitter(found).items():
                    found[path].add_(torch.from_numpy(noise).to(found[path]))

    recording = True

    def step(self, batch: Batch, seed: int | None) -> Seen:
        """One step. With a seed its draws come from that tape; None means that the model draws nothing."""
        inputs = batch.map(lambda array: tensor(array, self.bits))
        with environment(self.bits, self.runner.threads):
            return self.step_tensors(inputs.inputs, inputs.targets, seed)

    def step_tensors(self, inputs: Any, targets: tuple[Any, ...], seed: int | None) -> Seen:
        """One step on tensors, inside an `environment` that the caller keeps open over many steps."""
        if self.changes_rate:
            for group in self.optimizer.param_groups:
                group["lr"] = self.rates[min(self.count, len(self.rates) - 1)]
        tape = Tape((seed or 0, 1))
        if seed is not None:
            self._mode = TapeMode(tape)
            self._mode.__enter__()
        try:
            loss = self._advance(inputs, targets)
        finally:
            if self._mode is not None:
                self._mode.__exit__(None, None, None)
                self._mode = None
        self.count += 1
        return Seen({"loss": host(torch.as_tensor(loss))}, tuple(tape.draws), tuple(tape.values))

    def _advance(self, inputs: Any, targets: tuple[Any, ...]) -> Any:
        args, kwargs = call(inputs)
        if self.runner.own_step is not None:
            return self.runner.own_step(self.module, self.optimizer, *args, *targets, **kwargs)
        self.optimizer.zero_grad()
        loss_function = self.runner.loss
        assert loss_function is not None
        loss = loss_function(self.runner.select(self.module(*args, **kwargs)), *targets)
        loss.backward()
        self.optimizer.step()
        return loss

    def parameters(self) -> Observation:
        """The parameters now; arrays share memory with the running model."""
        return {path: host(value) for path, value in self.params.items()}

    def seen_gradients(self) -> Observation:
        """The gradients that the optimizer received in the last step; zeros where it received none."""
        return {
            path: host(self.gradients[path]) if path in self.gradients else np.zeros(tuple(value.shape))
            for path, value in self.params.items()
            if path not in self.runner.subject.frozen
        }

    def optimizer_state(self) -> dict[str, dict[str, np.ndarray]]:
        """The optimizer's state: slot -> leaf -> array (`exp_avg`, `momentum_buffer`, `step`, ...)."""
        slots: dict[str, dict[str, np.ndarray]] = {}
        for path, value in self.params.items():
            for slot, held in self.optimizer.state.get(value, {}).items():
                if held is not None:
                    slots.setdefault(slot, {})[path] = host(torch.as_tensor(held))
        return slots
