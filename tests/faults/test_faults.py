"""Every planted fault is divergent, in the first check that can see it; the same harness without a fault is not."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path

import jax
import pytest
from jax import Array

from equivalence.optimizers import PAIRS
from equivalence.verdict import CHECKS
from tests.faults.faults import EQUAL, FAULTS, SQUARE, counts_its_calls, linear_rules
from tests.faults.planting import Fault, Parts, assert_caught, first_divergent, judged, right


@pytest.fixture(autouse=True, scope="session")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Training runs of the reference are recorded once a session, away from the user's own cache."""
    patch = pytest.MonkeyPatch()
    patch.setenv("EQUIVALENCE_CACHE", str(tmp_path_factory.mktemp("recordings")))


def items(faults: tuple[Fault, ...]) -> list[object]:
    """One test a fault; those of training share a worker, and with it the recorded reference."""
    return [
        pytest.param(
            fault,
            id=f"{fault.port}-{fault.check}-{fault.name.replace(' ', '_')}",
            marks=[pytest.mark.xdist_group("training_faults")] if fault.check == "training" else [],
        )
        for fault in faults
    ]


@pytest.mark.parametrize("fault", items(FAULTS))
def test_planted_fault_is_caught_first_where_it_can_be_seen(fault: Fault, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_caught(judged(fault, monkeypatch), fault.check)


def dropout_after_activation(parts: Parts, x: Array) -> Array:
    """Right though written otherwise: leaky ReLU commutes with a positive factor, and with 0."""
    h = parts.drop(1, jax.nn.leaky_relu(parts.linear(1, x), parts.module.slope))
    h = parts.drop(2, jax.nn.leaky_relu(parts.linear(2, h), parts.module.slope))
    return parts.linear(3, h).squeeze(-1)


CONTROLS = (
    Fault("the body", "nnx", "training", right),
    Fault("the body", "linen", "training", right),
    Fault("nothing", "nnx", "training"),
    Fault("nothing", "linen", "training"),
    Fault("data untouched", "nnx", "training", data=dataclasses.replace),
    Fault("dropout after the activation", "linen", "training", dropout_after_activation),
    Fault("square", "linen", "parameter_gradients", config=SQUARE, rules=linear_rules()),
    Fault("equal layers", "nnx", "parameter_gradients", config=EQUAL, rules=linear_rules()),
    Fault("large inputs", "linen", "loss", right, examples=8),
    Fault("a counter that never acts", "linen", "jit", counts_its_calls(10**9)),
    *(Fault(f"optimizer {name}", "nnx", "optimizer_state", optimizer=pair) for name, pair in PAIRS.items()),
)
"""Every variant of the harness with nothing wrong in it; `check` is the last one that is run."""


@pytest.mark.parametrize("control", items(CONTROLS))
def test_harness_without_a_fault_is_equivalent(control: Fault, monkeypatch: pytest.MonkeyPatch) -> None:
    report = judged(control, monkeypatch)
    assert first_divergent(report) is None
    assert {check.name: check.verdict for check in report.checks} == dict.fromkeys(
        CHECKS[: CHECKS.index(control.check) + 1], "equivalent"
    )
    assert report.verdict == "equivalent"


def test_the_table_is_whole() -> None:
    """Every check that the Titanic network can be told by has faults, in both ports; names are not reused."""
    from tests.faults import test_handover_faults, test_pair_faults

    caught = {fault.check for fault in FAULTS} | test_pair_faults.CAUGHT | test_handover_faults.CAUGHT
    assert caught == set(CHECKS)
    assert len(FAULTS) >= 36
    assert {fault.port for fault in FAULTS} == {"nnx", "linen"}
    assert max(Counter(fault.name for fault in FAULTS).values()) == 1
    assert Path(__file__).with_name("test_gates.py").is_file()
