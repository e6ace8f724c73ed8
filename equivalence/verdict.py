"""What a run concludes: the report and its parts, as plain facts that serialise to the JSON contract."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal

from equivalence.errors import DivergenceError, InconclusiveError

Verdict = Literal["equivalent", "divergent", "inconclusive"]

FLOAT64: tuple[str, ...] = ("native", "lifted", "float32 only")
"""How a side's float64 runs are made, the sharpest first: the code as it is; with its hard-coded float32 lifted;
with an operation in it that could not be."""

EXIT_STATUS: dict[str, int] = {"equivalent": 0, "divergent": 1, "inconclusive": 3}

CHECKS: tuple[str, ...] = (
    "structure",
    "roundtrip",
    "outputs",
    "loss",
    "input_gradients",
    "parameter_gradients",
    "state",
    "step",
    "optimizer_state",
    "jit",
    "handover",
    "training",
)
"""The names of all checks, in the order in which they run and are shown."""


@dataclass(frozen=True)
class CheckReport:
    """One check's conclusion. `gap`, `expected_gap` and `precision` belong to `worst`, relative to its scale.

    `resolution` is the smallest relative change of a leaf that the check would have noticed; 0 for an exact
    comparison. A figure that does not apply is None.
    """

    name: str
    verdict: Verdict
    gap: float | None = None
    expected_gap: float | None = None
    precision: float | None = None
    resolution: float | None = None
    examples: int = 0
    worst: str | None = None
    message: str | None = None


@dataclass(frozen=True)
class Coverage:
    """How much of the model the run could see: a fraction of elements, and the leaves it could not judge."""

    parameters: float = 1.0
    uncovered: tuple[str, ...] = ()
    inert: tuple[str, ...] = ()


@dataclass(frozen=True)
class Caveat:
    """Something the reader of a verdict must know, that did not decide it."""

    kind: str
    summary: str
    module: str | None = None
    check: str | None = None


@dataclass(frozen=True)
class Cause:
    """The named reason of a divergence."""

    name: str
    summary: str
    confirmed: bool
    fix: str


@dataclass(frozen=True)
class Divergence:
    """Where the two sides part first."""

    check: str
    module: str | None = None
    port_module: str | None = None
    cause: Cause | None = None


@dataclass(frozen=True)
class PortReport:
    """The conclusion about one port."""

    port: str
    verdict: Verdict
    checks: tuple[CheckReport, ...]
    coverage: Coverage = Coverage()
    caveats: tuple[Caveat, ...] = ()
    mapping: tuple[dict[str, str | None], ...] = ()
    divergence: Divergence | None = None
    float64: dict[str, str] = field(default_factory=lambda: {"reference": "native", "port": "native"})
    """How the float64 runs of each side were made: one of `FLOAT64`."""
    training: dict[str, Any] | None = field(default=None, compare=False)
    """What the `training` check saw beside its verdict: final losses, accuracies and the float32 twins."""
    power: dict[str, dict[str, float]] | None = field(default=None, compare=False)
    """check -> leaf -> the smallest relative change of that leaf that the check would have noticed."""
    reproduce: str | None = None

    def check(self, name: str) -> CheckReport:
        """The report of one check. Raises KeyError when it did not run."""
        for check in self.checks:
            if check.name == name:
                return check
        raise KeyError(name)


def worst_verdict(verdicts: list[str]) -> Verdict:
    """divergent before inconclusive before equivalent; nothing judged is inconclusive.

    >>> worst_verdict(["equivalent", "inconclusive"])
    'inconclusive'
    """
    if "divergent" in verdicts:
        return "divergent"
    if not verdicts or "inconclusive" in verdicts:
        return "inconclusive"
    return "equivalent"


@dataclass(frozen=True)
class Report:
    """All ports of one target, judged against its reference."""

    target: str
    reference: str
    environment: dict[str, Any]
    reports: tuple[PortReport, ...]

    @property
    def verdict(self) -> Verdict:
        """The worst verdict of the ports."""
        return worst_verdict([report.verdict for report in self.reports])

    @property
    def exit_status(self) -> int:
        """0 equivalent, 1 divergent, 3 inconclusive."""
        return EXIT_STATUS[self.verdict]

    def check(self, name: str) -> CheckReport:
        """The report of one check of the first port."""
        return self.reports[0].check(name)

    def assert_equivalent(self) -> None:
        """Raise `DivergenceError` or `InconclusiveError`, with the whole reason, unless the verdict is equivalent."""
        if self.verdict == "equivalent":
            return
        from equivalence.report.text import explain

        error = DivergenceError if self.verdict == "divergent" else InconclusiveError
        raise error(
            "\n".join(explain(self.target, report) for report in self.reports if report.verdict != "equivalent")
        )

    def to_dict(self) -> dict[str, Any]:
        """The JSON contract, schema 1: floats that are not finite become null."""
        plain = _plain(dataclasses.asdict(self))
        for report in plain["reports"]:
            del report["reproduce"]
        return {"schema": 1, **plain}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
