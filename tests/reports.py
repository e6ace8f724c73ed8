"""Reports made by hand, for the tests of what shows them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from equivalence import events
from equivalence.verdict import (
    CHECKS,
    Cause,
    Caveat,
    CheckReport,
    Coverage,
    Divergence,
    PortReport,
    Report,
    Verdict,
)


def check(name: str, verdict: Verdict = "equivalent", **figures: Any) -> CheckReport:
    plain: dict[str, Any] = {
        "gap": 3.17e-16,
        "expected_gap": 2.5e-16,
        "precision": 1.28,
        "resolution": 1.4e-15,
        "examples": 40,
    }
    return CheckReport(name, verdict, **{**plain, **figures})


def equivalent_port(port: str = "nnx") -> PortReport:
    return PortReport(
        port,
        "equivalent",
        tuple(check(name) for name in CHECKS),
        Coverage(1.0, (), ("attn.key.bias",)),
        (Caveat("tie", "the slope of leaky ReLU at 0 is 1 in jax, 0.01 in torch", "act1", "input_gradients"),),
        ({"source": "linear{i}.weight", "target": "linear{i}.kernel", "axes": "o i -> i o"},),
        training={"steps": 8500, "ends": {"port, float64": {"loss": 0.40625, "accuracy": 0.75}}},
    )


def divergent_port(port: str = "nnx") -> PortReport:
    bad = check("outputs", "divergent", gap=4.7e-4, expected_gap=3e-16, worst="eval.outputs[0, 7]")
    cause = Cause("gelu", "the port's GELU is the <tanh> approximation", True, "jax.nn.gelu(x, approximate=False)")
    return PortReport(
        port,
        "divergent",
        (check("structure"), bad, check("loss", "divergent", worst="eval.loss")),
        divergence=Divergence("outputs", "blocks.3.act", "blocks.3.gelu", cause),
        reproduce="equivalence verify gpt2 --port nnx --seed 0",
    )


def inconclusive_port(port: str = "nnx") -> PortReport:
    return PortReport(
        port,
        "inconclusive",
        (check("outputs"), check("step", "inconclusive", gap=None, message="nothing finite was left", examples=0)),
        Coverage(0.75, tuple(f"blocks.{n}.bias" for n in range(8))),
    )


def report(*ports: PortReport, target: str = "titanic_mlp") -> Report:
    return Report(target, "torch", {"seed": 0, "versions": {"torch": "2.13.0"}, "nan": float("nan")}, ports)


def stream(whole: Report) -> Iterator[events.Event]:
    """The events of a run that ends in `whole`."""
    names = tuple(port.port for port in whole.reports)
    yield events.Started(whole.target, whole.reference, names, CHECKS)
    for port in whole.reports:
        yield events.PortStarted(port.port, 40)
        for done in (0, 20, 40):
            yield events.Progress(port.port, "examples", done, 40)
        for item in port.checks:
            yield events.CheckFinished(port.port, item)
        yield events.Progress(port.port, "training steps", 1, 8500)
        yield events.PortFinished(port.port, port)
    yield events.Finished(whole)
