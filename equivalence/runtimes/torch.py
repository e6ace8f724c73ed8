"""The torch runtime: observe a subject, step it, in float32 or float64, with every draw taken from the tape."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from equivalence.errors import InputError, UnsupportedDraw
from equivalence.frameworks.subject import Subject, call
from equivalence.observation import Batch, Observation, Seen, cotangent
from equivalence.optimizers import OptimizerPair
from equivalence.paths import flatten
from equivalence.randomness import Tape
from equivalence.runtimes.torch_environment import DTYPES, environment
from equivalence.runtimes.torch_tape import TapeMode

SMALL = 100_000
"""Parameters below which a model runs on one thread: sharing its work out costs more than the work."""


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
            self.scheduler = None if optimizer.scheduler is None else optimizer.scheduler(self.optimizer)
        self.changes_rate = optimizer.changes_rate
        self.gradients: dict[str, torch.Tensor] = {}
        self.jitter: Callable[[dict[str, torch.Tensor]], dict[str, np.ndarray]] | None = None
        self._mode: TapeMode | None = None
        self.takes_closure = isinstance(self.optimizer, torch.optim.LBFGS)
        if self.takes_closure and self.buffers:
            raise InputError(
                f"LBFGS evaluates the model several times a step, and each time moves {next(iter(self.buffers))}:"
                " a port's step has no such buffers in its closure"
            )
        if not self.takes_closure:
            self.optimizer.register_step_pre_hook(self._before_update)

    def _before_update(self, *_: Any) -> None:
        """At the optimizer's door: stop taping (nothing random follows), record gradients, add the jitter."""
        if self._mode is not None and not self.takes_closure:
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
        if self.changes_rate:  # a scheduler of the user's moves it otherwise
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
        if self.takes_closure and tape.draws:
            raise UnsupportedDraw("LBFGS evaluates the model several times a step, each with draws of its own")
        self.count += 1
        return Seen({"loss": host(torch.as_tensor(loss))}, tuple(tape.draws), tuple(tape.values))

    def _advance(self, inputs: Any, targets: tuple[Any, ...]) -> Any:
        args, kwargs = call(inputs)
        if self.runner.own_step is not None:
            loss = self.runner.own_step(self.module, self.optimizer, *args, *targets, **kwargs)
            if self.scheduler is not None:
                self.scheduler.step()
            return loss
        loss_function = self.runner.loss
        assert loss_function is not None

        def backward() -> torch.Tensor:
            self.optimizer.zero_grad()
            loss: torch.Tensor = loss_function(self.runner.select(self.module(*args, **kwargs)), *targets)
            loss.backward()
            if self.takes_closure:
                self._before_update()
            return loss

        if self.takes_closure:
            loss = self.optimizer.step(backward)
        else:
            loss = backward()
            self.optimizer.step()
        if self.scheduler is not None:
            self.scheduler.step()
        return loss

    def named(self) -> Any:
        """The optimizer with its parameters named."""
        from equivalence.optimizers.torch_side import Torch

        return Torch.of(self.optimizer, {id(value): path for path, value in self.params.items()})

    def fields(self) -> dict[str, str]:
        """Where Optax keeps each piece of the optimizer's state: torch's name -> field."""
        from equivalence.optimizers.torch_side import fields_of

        return fields_of(self.optimizer)

    def held_buffers(self) -> Observation:
        """The buffers now; arrays share memory with the running model."""
        return {path: host(value) for path, value in self.buffers.items()}

    def resume(self, buffers: Observation, steps: int, optimizer: Callable[[Any, Any], None]) -> None:
        """Go on from another run after `steps` steps: its buffers, and its optimizer's state, which
        `optimizer(named optimizer, scheduler)` puts there; weights were given at the start."""
        with environment(self.bits, self.runner.threads):
            with torch.no_grad():
                for path, value in buffers.items():
                    self.buffers[path].copy_(tensor(value, self.bits))
            optimizer(self.named(), self.scheduler)
        self.count = steps

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
        if self.takes_closure:
            from equivalence.optimizers.lbfgs_slots import read

            named = self.named()
            for slot, held in read(self.optimizer, tuple(named.params)).items():
                if slot in self.fields() and held is not None:
                    slots[slot] = held if isinstance(held, dict) else dict.fromkeys(named.params, np.asarray(held))
            return slots
        for path, value in self.params.items():
            for slot, held in self.optimizer.state.get(value, {}).items():
                if held is not None:
                    slots.setdefault(slot, {})[path] = host(torch.as_tensor(held))
        return slots
