"""Training steps on torch: the user's own or ours, one batch at a time, on a private copy of the module."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from equivalence.errors import InputError, UnsupportedDraw
from equivalence.frameworks.subject import call
from equivalence.observation import Batch, Observation, Seen
from equivalence.optimizers import OptimizerPair
from equivalence.randomness import Tape
from equivalence.runtimes.torch import TorchRunner, host, tensor
from equivalence.runtimes.torch_environment import DTYPES, environment
from equivalence.runtimes.torch_lift import Lift, holding, lifting
from equivalence.runtimes.torch_tape import TapeMode


class TorchStepper:
    """A training run of a private copy of the module: the user's own step or ours, one batch at a time.

    `jitter` is added to each step's gradients where the optimizer receives them; gradients are recorded there too.
    """

    def __init__(
        self,
        runner: TorchRunner,
        bits: int,
        weights: Observation,
        optimizer: OptimizerPair,
        rates: Sequence[float],
        shaken: int | None = None,
    ) -> None:
        self.runner, self.bits, self.rates, self.count = runner, bits, rates, 0
        weights = runner.lifting.meant(weights, shaken) if bits == 64 else weights
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
        self.lift = Lift(shaken) if bits == 64 and runner.lifting.wanted("steps") else None
        self.changes_rate = optimizer.changes_rate
        self.gradients: dict[str, torch.Tensor] = {}
        self.jitter: Callable[[dict[str, torch.Tensor]], dict[str, np.ndarray]] | None = None
        self._modes = contextlib.ExitStack()
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
        if not self.takes_closure:
            self._modes.close()
            self._modes.enter_context(lifting(self.lift))
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
        with holding(self.lift, self.module), contextlib.ExitStack() as self._modes:
            if seed is not None:
                self._modes.enter_context(TapeMode(tape))
            self._modes.enter_context(lifting(self.lift))
            try:
                loss = self._advance(inputs, targets)
            except RuntimeError as error:  # an optimizer may refuse what it is given, sparse gradients for one
                raise InputError(f"the reference's step fails: {str(error).splitlines()[0]}") from error
        if self.lift is not None:
            self.runner.lifting.learn("steps", self.lift.found)
            if not self.runner.lifting.wanted("steps"):
                self.lift = None
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
