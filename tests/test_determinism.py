"""Two runs with one seed say the same, to the last digit; other seeds try other examples."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("jax")
torch = pytest.importorskip("torch")
pytest.importorskip("flax")

import equivalence as eq  # noqa: E402 - they need the frameworks
from equivalence.api import verify_spec  # noqa: E402
from equivalence.events import Finished  # noqa: E402
from equivalence.report.json_report import render  # noqa: E402
from equivalence.spec import load  # noqa: E402
from tests.pairings import NnxMLP, linen_mlp, rows, torch_mlp  # noqa: E402

QUICK = ("structure", "roundtrip", "outputs", "loss", "input_gradients", "parameter_gradients", "step", "jit")


@pytest.fixture(autouse=True)
def _fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One thread, and a cache in which the first run records the reference's training and the second reads it."""
    monkeypatch.setenv("EQUIVALENCE_CACHE", str(tmp_path))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def titanic(seed: int) -> eq.Report:
    *_, last = verify_spec(load("titanic_mlp"), ports=("nnx",), checks=QUICK, examples=4, seed=seed)
    assert isinstance(last, Finished)
    return last.report


@pytest.mark.xdist_group("titanic_mlp")
def test_a_spec_twice_and_from_another_seed() -> None:
    first, second, other = titanic(0), titanic(0), titanic(1)
    assert render(first) == render(second)
    assert first.reports[0].checks != other.reports[0].checks
    assert other.verdict == first.verdict == "equivalent"


@pytest.mark.parametrize("port", [NnxMLP, linen_mlp])
@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_a_pair_twice(port: Any, rate: float) -> None:
    """All checks, training with its recording made and its recording read."""
    data: dict[str, Any] = {"targets": (rows(1, 6, 3),), "loss": "mse", "examples": 4}
    runs = [eq.verify(torch_mlp(rate), port(rate), (rows(),), **data).to_dict() for _ in range(2)]
    assert json.dumps(runs[0]) == json.dumps(runs[1])


def test_a_divergence_twice_with_the_same_smallest_example() -> None:
    runs = [eq.verify(torch_mlp(), NnxMLP(), (rows(),), port_weights="keep", examples=4).to_dict() for _ in range(2)]
    assert runs[0]["reports"][0]["verdict"] == "divergent"
    assert json.dumps(runs[0]) == json.dumps(runs[1])


PROGRAM = """
import torch; torch.set_num_threads(1)
import equivalence as eq
from equivalence.report.json_report import render
from tests.pairings import NnxMLP, rows, torch_mlp
print(render(eq.verify(torch_mlp(0.3), NnxMLP(0.3), (rows(),), checks=["outputs", "step"], examples=4)))
"""


def test_two_processes_say_the_same() -> None:
    """Whatever hash seed each was started with."""
    command = [sys.executable, "-c", PROGRAM]
    runs = [subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(2)]
    assert '"verdict": "equivalent"' in runs[0]
    assert runs[0] == runs[1]
