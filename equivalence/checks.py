"""The checks: named comparisons of two observations. Each claims the paths it judges; the statistic is one for all.

A check is one registered function, `claims(path) -> Family | None`, and the run that shows it those paths.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from equivalence.errors import unknown
from equivalence.verdict import CHECKS

Family = Literal["plain", "loss", "output_gradient", "loss_gradient"]
"""How a leaf's scale is found. The derivative of a saturated loss is exactly 0 on one side and rounding on the other:
the loss, its derivative by the outputs and the gradients under it are also held against the largest of their kind."""

Run = Literal["once", "observe", "state", "steps", "jit", "handover", "training"]


@dataclass(frozen=True)
class Check:
    """A registered check."""

    name: str
    run: Run
    summary: str
    claims: Callable[[str], Family | None]


REGISTRY: dict[str, Check] = {}


def check(name: str, run: Run) -> Callable[[Callable[[str], Family | None]], Callable[[str], Family | None]]:
    """Register a check under one of the names of the contract; its docstring becomes its summary."""
    if name not in CHECKS:
        raise unknown("check", name, CHECKS)

    def register(claims: Callable[[str], Family | None]) -> Callable[[str], Family | None]:
        summary = (claims.__doc__ or "").strip().splitlines()
        if not summary:
            raise ValueError(f"check {name} needs a docstring: it is its summary")
        REGISTRY[name] = Check(name, run, summary[0], claims)
        return claims

    return register


def _within(path: str, prefix: str) -> bool:
    return path == prefix or path.startswith(prefix + ".")


@check("structure", "once")
def structure(path: str) -> Family | None:
    """Leaf sets, shapes, param or buffer, tied leaves, and the tree of outputs."""
    return None


@check("roundtrip", "once")
def roundtrip(path: str) -> Family | None:
    """Weights moved to the port and back: bit-exact."""
    return None


@check("outputs", "observe")
def outputs(path: str) -> Family | None:
    """What the model returns, in eval and in train mode, with the same draws."""
    return "plain" if _within(path, "outputs") else None


@check("loss", "observe")
def loss(path: str) -> Family | None:
    """The loss and its derivative by the outputs."""
    if path == "loss":
        return "loss"
    return "output_gradient" if _within(path, "output_gradients") else None


@check("input_gradients", "observe")
def input_gradients(path: str) -> Family | None:
    """Gradients by every floating input, under a random cotangent and under the loss."""
    return _gradient(path, "input_gradients")


@check("parameter_gradients", "observe")
def parameter_gradients(path: str) -> Family | None:
    """Gradients by every parameter, under a random cotangent and under the loss."""
    return _gradient(path, "parameter_gradients")


def _gradient(path: str, prefix: str) -> Family | None:
    if _within(path, f"{prefix}.cotangent"):
        return "plain"
    return "loss_gradient" if _within(path, f"{prefix}.loss") else None


@check("state", "state")
def state(path: str) -> Family | None:
    """Buffers after each of several training-mode calls, inputs changing."""
    return "plain" if _within(path, "buffers") else None


@check("step", "steps")
def step(path: str) -> Family | None:
    """Loss and parameters after each of several optimizer steps, inputs and learning rate changing."""
    if path == "loss":
        return "loss"
    return "plain" if _within(path, "parameters") else None


@check("optimizer_state", "steps")
def optimizer_state(path: str) -> Family | None:
    """The optimizer's state after each of those steps."""
    return "plain" if _within(path, "optimizer") else None


@check("jit", "jit")
def jit(path: str) -> Family | None:
    """The compiled port against itself not compiled."""
    claimed = (outputs(path), loss(path), input_gradients(path), parameter_gradients(path))
    return next((family for family in claimed if family is not None), None)


@check("handover", "handover")
def handover(path: str) -> Family | None:
    """A run begun on one side and gone on with on the other: weights, buffers, optimizer state and schedule moved."""
    return step(path) or optimizer_state(path) or state(path)


@check("training", "training")
def training(path: str) -> Family | None:
    """Whole jitted training, compared at every step."""
    return "plain"


def chosen(names: Iterable[str] | None) -> tuple[str, ...]:
    """The checks asked for, in the order of the contract; None is all. Raises InputError for an unknown name."""
    if names is None:
        return CHECKS
    wanted = list(names)
    for name in wanted:
        if name not in CHECKS:
            raise unknown("check", name, CHECKS)
    return tuple(name for name in CHECKS if name in wanted)
