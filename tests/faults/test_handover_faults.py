"""Faults in handing a run over: each is planted in what is moved, and `handover` must be the check that sees it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

jax = pytest.importorskip("jax")
torch = pytest.importorskip("torch")
pytest.importorskip("flax")

import equivalence as eq  # noqa: E402 - they need the frameworks
from equivalence import handover  # noqa: E402
from equivalence.optimizers import state as moving  # noqa: E402
from equivalence.runtimes.torch_steps import TorchStepper  # noqa: E402
from tests.pairings import NnxMLP, NnxNorm, TorchNorm, rows, seeded, torch_mlp  # noqa: E402

X, Y = rows(0, 6, 5), rows(1, 6, 3)

CAUGHT = {"handover"}
"""Checks that have faults here."""


def judged(optimizer: Any = "adam", seed: int = 0) -> eq.Report:
    given = {"targets": (Y,), "loss": "mse", "checks": ["handover"], "examples": 2, "seed": seed}
    return eq.verify(torch_mlp(), NnxMLP(), (X,), optimizer=optimizer, **given)


def on_state(change: Callable[[str, Any], Any]) -> Callable[[Any], None]:
    """A fault in every moved state: `change(field, array)` of each of its arrays."""

    def plant(patch: Any) -> None:
        right = moving.moved_state

        def wrong(torch_: Any, template: Any, flat: Any, *rest: Any, **named: Any) -> Any:
            moved = right(torch_, template, flat, *rest, **named)
            structure = jax.tree_util.tree_structure(moved)
            arrays = [change(entry.field, entry.array) for entry in moving.entries(moved, flat)]
            return jax.tree_util.tree_unflatten(structure, arrays)

        patch.setattr(moving, "moved_state", wrong)

    return plant


def not_moved(patch: Any) -> None:
    patch.setattr(moving, "moved_state", lambda torch_, template, *rest, **named: template)


def not_moved_back(patch: Any) -> None:
    patch.setattr(moving, "put_state", lambda *arguments, **named: None)


def schedule_late(patch: Any) -> None:
    right = TorchStepper.resume

    def wrong(self: Any, buffers: Any, steps: int, optimizer: Any) -> None:
        right(self, buffers, steps - 1, optimizer)

    patch.setattr(TorchStepper, "resume", wrong)


def early_weights(patch: Any) -> None:
    right = TorchStepper.parameters
    patch.setattr(
        handover,
        "to_port",
        lambda comparison, run, steps, plant=None, made=handover.to_port: made(comparison, _Early(run, right), steps),
    )


class _Early:
    """A run whose weights are 1e-6 off when they are handed over."""

    def __init__(self, run: Any, parameters: Any) -> None:
        self._run, self._parameters = run, parameters

    def __getattr__(self, name: str) -> Any:
        return getattr(self._run, name)

    def parameters(self) -> Any:
        return {path: value * (1 + 1e-6) for path, value in self._parameters(self._run).items()}


FAULTS: dict[str, tuple[Any, Callable[[Any], None]]] = {
    "state not moved to the port": ("adam", not_moved),
    "state not moved to the reference": ("adam", not_moved_back),
    "momentum not moved": ("momentum", not_moved),
    "first moment times 1 + 1e-6": ("adam", on_state(lambda f, a: a * (1 + 1e-6) if f == "mu" else a)),
    "second moment times 1 + 1e-6": ("adamw", on_state(lambda f, a: a * (1 + 1e-6) if f == "nu" else a)),
    "counter one behind": ("adam", on_state(lambda f, a: a - 1 if f == "count" and a.ndim == 0 else a)),
    "largest second moment forgotten": ("amsgrad", on_state(lambda f, a: a * 0 if f == "nu_max" else a)),
    "mu_product left at its start": ("nadam", on_state(lambda f, a: a * 0 + 1 if f == "mu_product" else a)),
    "step sizes at their start": ("rprop", on_state(lambda f, a: a * 0 + 0.01 if f == "step_size" else a)),
    "schedule one step late": ("sgd", schedule_late),
    "weights 1e-6 off": ("sgd", early_weights),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_in_the_handover_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer, plant = FAULTS[name]
    plant(monkeypatch)
    check = judged(optimizer).check("handover")
    assert check.verdict == "divergent", check.message


def test_buffers_that_are_not_handed_over_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    model, given = seeded(TorchNorm), {"checks": ["handover"], "examples": 2}
    assert eq.verify(model, NnxNorm(), (X,), **given).check("handover").verdict == "equivalent"
    right = TorchStepper.held_buffers
    monkeypatch.setattr(TorchStepper, "held_buffers", lambda self: {p: v * 0 for p, v in right(self).items()})
    assert eq.verify(model, NnxNorm(), (X,), **given).check("handover").verdict == "divergent"


def test_a_right_handover_is_equivalent_from_every_step() -> None:
    for seed in range(4):
        assert judged(seed=seed).check("handover").verdict == "equivalent"
