"""What `verify` says while it works. Reports, command line and pytest plugin listen; they decide nothing."""

from __future__ import annotations

from dataclasses import dataclass

from equivalence.verdict import CheckReport, PortReport, Report


@dataclass(frozen=True)
class Started:
    """A run begins."""

    target: str
    reference: str
    ports: tuple[str, ...]
    checks: tuple[str, ...]


@dataclass(frozen=True)
class PortStarted:
    """One port's turn begins; `examples` of them will be tried."""

    port: str
    examples: int


@dataclass(frozen=True)
class Progress:
    """`done` of `total` units of `activity` (examples, training steps, plants) are finished."""

    port: str
    activity: str
    done: int
    total: int


@dataclass(frozen=True)
class CheckFinished:
    """A check reached its conclusion."""

    port: str
    check: CheckReport


@dataclass(frozen=True)
class PortFinished:
    """A port is judged."""

    port: str
    report: PortReport


@dataclass(frozen=True)
class Finished:
    """The run is over."""

    report: Report


Event = Started | PortStarted | Progress | CheckFinished | PortFinished | Finished
