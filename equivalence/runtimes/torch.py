"""The torch runtime: observe a subject, step it, in float32 or float64, with every draw taken from the tape."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from equivalence.frameworks.subject import Subject, call
from equivalence.observation import Batch, Observation, Seen, cotangent
from equivalence.optimizers import OptimizerPair
from equivalence.paths import flatten
from equivalence.randomness import Tape
from equivalence.runtimes.torch_environment import DTYPES, environment
from equivalence.runtimes.torch_found import Lifting
from equivalence.runtimes.torch_lift import Lift, holding, lifting
from equivalence.runtimes.torch_tape import TapeMode

if TYPE_CHECKING:
    from equivalence.runtimes.torch_steps import TorchStepper

SMALL = 100_000
"""Parameters below which a model runs on one thread: sharing its work out costs more than the work."""


def tensor(array: np.ndarray, bits: int) -> torch.Tensor:
    """A NumPy array as a tensor: floats in the run's precision, others as they are.

    Always a copy in memory that torch allocates: sums depend on how their operands are aligned, and NumPy's are
    aligned by chance.
    """
    array = array.astype(np.float64) if bits == 64 and array.dtype.kind == "f" else array
    plain = torch.from_numpy(np.require(array, requirements=("C", "W")))
    return plain.to(DTYPES[bits] if plain.is_floating_point() else plain.dtype, copy=True)


def host(value: torch.Tensor) -> np.ndarray:
    """A tensor as a NumPy array of its own dtype; low precision, which NumPy lacks, as float32; a sparse one whole."""
    plain = value.detach().cpu()
    plain = plain.to_dense() if plain.layout is not torch.strided else plain
    return (plain.float() if plain.dtype in (torch.bfloat16, torch.float16) else plain).numpy()


def projection(seed: int) -> Callable[..., torch.Tensor]:
    """A loss where none was given: the mean of the outputs against a fixed random cotangent."""

    def loss(outputs: Any, *targets: Any) -> torch.Tensor:
        del targets
        flat = {path: value for path, value in flatten(outputs).items() if value.is_floating_point()}
        parts = [
            (value * torch.from_numpy(cotangent(seed, path, tuple(value.shape)).astype(np.float64)).to(value)).mean()
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
        lifted: Lifting | None = None,
    ) -> None:
        self.subject, self.loss, self.select, self.own_step = subject, loss, select, own_step
        self.lifting = Lifting(subject) if lifted is None else lifted
        small = sum(value.size for value in subject.params.values()) < SMALL
        self.threads = 1 if small else None

    @property
    def float64(self) -> str:
        """What its float64 runs are: `native`, `lifted` or `float32 only`."""
        return self.lifting.found.float64

    @property
    def surviving(self) -> tuple[str, ...]:
        """Constants rounded before and operations in low precision that are in its float64 runs."""
        return self.lifting.found.surviving

    @property
    def coarsest(self) -> float:
        """The unit roundoff of the coarsest dtype that its code computes in, 0 where that is the run's own."""
        return self.lifting.found.coarsest

    def observe(
        self,
        bits: int,
        weights: Observation,
        batch: Batch,
        train: bool,
        seed: int,
        gradients: bool = True,
        shaken: int | None = None,
    ) -> Seen:
        """One forward pass and its gradients, under a random cotangent and under the loss.

        Returned paths: `outputs.*`, `loss`, `output_gradients.*`, and `input_gradients.*` and
        `parameter_gradients.*`, each under `cotangent.` and `loss.`; in train mode also `buffers.*`.
        With `shaken`, a seed, what survives of float32 in a float64 run is moved by its own rounding.
        """
        tape, kind = Tape((seed, int(train))), "train" if train else "eval"
        if bits == 64:
            self.lifting.fix(lambda: self.advance(32, weights, batch, seed))
        lift = Lift(shaken) if bits == 64 and self.lifting.wanted(kind) else None
        with environment(bits, self.threads), holding(lift, self.subject.model):
            params, buffers = self._load(bits, weights, shaken)
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
            with TapeMode(tape), lifting(lift):
                raw, after = self.subject.apply(params, buffers, *clones, train)
            with lifting(lift):
                outputs = self.select(raw)
            flat = flatten(outputs)
            seen: dict[str, Any] = {f"outputs.{path}": value for path, value in flat.items()}
            if train:
                seen |= {f"buffers.{path}": value for path, value in after.items()}
            targets = tuple(tensor(array, bits) for array in batch.targets)
            with lifting(lift):
                if gradients:
                    seen |= self._gradients(outputs, flat, leaves, targets, seed, bits)
                elif self.loss is not None:
                    seen["loss"] = self.loss(outputs, *targets)
                values = {path: host(torch.as_tensor(value).detach()) for path, value in seen.items()}
        if lift is not None:
            self.lifting.learn(kind, lift.found)
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

    def _load(
        self, bits: int, weights: Observation, shaken: int | None
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        if bits == 64:
            weights = self.lifting.meant(weights, shaken)
        params = {path: tensor(weights[path], bits) for path in self.subject.params}
        buffers = {path: tensor(weights[path], bits) for path in self.subject.buffers}
        return params, buffers

    def advance(
        self, bits: int, weights: Observation, batch: Batch, seed: int, shaken: int | None = None
    ) -> Observation:
        """The buffers after one training-mode call, no gradients; the draws are those of `observe` with that seed."""
        seen = self.observe(bits, weights, batch, train=True, seed=seed, gradients=False, shaken=shaken)
        return {path.removeprefix("buffers."): v for path, v in seen.values.items() if path.startswith("buffers.")}

    def stepper(
        self,
        bits: int,
        weights: Observation,
        optimizer: OptimizerPair,
        rates: Sequence[float],
        shaken: int | None = None,
    ) -> TorchStepper:
        """A training run at its start."""
        from equivalence.runtimes.torch_steps import TorchStepper

        return TorchStepper(self, bits, weights, optimizer, rates, shaken)
