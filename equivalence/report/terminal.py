"""The terminal: what is done meanwhile, then an 80-column table of checks, caveats, coverage and the verdict."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from equivalence import events
from equivalence.report.text import caveat_line, explain, figure, float64_line, shortened
from equivalence.verdict import PortReport, Report

STYLES = {"equivalent": "green", "divergent": "bold red", "inconclusive": "yellow"}
WIDTH = 80
QUIET = 10.0
"""Seconds after which a run that is not on a terminal says how far it is."""


class Terminal:
    """A listener that shows a run on `console`: live on a terminal, a few plain lines elsewhere.

    With `power` the smallest change of each leaf that would have shown is listed too. Use it as a context manager, so
    that an interrupted run leaves the terminal in order.
    """

    def __init__(self, console: Console, power: bool = False) -> None:
        self.console = console
        self.power = power
        self.target = ""
        self._activity = ("", "")
        self._spoke = time.monotonic()
        self._task: TaskID | None = None
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
        )

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.console.is_terminal:
            self._bar.stop()

    def handle(self, event: events.Event) -> None:
        """Show one event."""
        match event:
            case events.Started(target, reference, ports, checks):
                self.target = target
                self._say(f"{target}: {reference} against {', '.join(ports)}, {len(checks)} checks")
            case events.PortStarted(port, examples):
                self._say(f"{port}: {examples} examples")
            case events.Progress(port, activity, done, total):
                self._progress(port, activity, done, total)
            case events.CheckFinished(port, check) if check.verdict != "equivalent":
                self._say(f"{port}: {check.name} {check.verdict}", STYLES[check.verdict])
            case events.PortFinished(_, report):
                self._clear()
                print_port(self.console, self.target, report, self.power)
            case events.Finished(report):
                self._clear()
                print_verdict(self.console, report)

    def _say(self, line: str, style: str = "") -> None:
        self.console.print(Text(line, style=style), soft_wrap=True)
        self._spoke = time.monotonic()

    def _progress(self, port: str, activity: str, done: int, total: int) -> None:
        began = self._activity != (port, activity)
        self._activity = (port, activity)
        if not self.console.is_terminal:
            if began:
                self._say(f"{port}: {activity} ({total})")
            elif time.monotonic() - self._spoke > QUIET:
                self._say(f"{port}: {activity} {done}/{total}")
            return
        if began or self._task is None:
            self._clear()
            self._activity = (port, activity)
            self._task = self._bar.add_task(f"{port}: {activity}", total=total)
        self._bar.update(self._task, completed=done, total=total)

    def _clear(self) -> None:
        if self._task is not None:
            self._bar.remove_task(self._task)
        self._task = None
        self._activity = ("", "")


def print_port(console: Console, target: str, report: PortReport, power: bool = False) -> None:
    """The conclusion about one port: the table of its checks and what a reader must know beside it."""
    console.print()
    console.print(checks_table(target, report))
    if report.verdict != "equivalent":
        console.print()
        first, *rest = explain(target, report).splitlines()
        console.print(Text(first, style=STYLES[report.verdict]), soft_wrap=True)
        for line in rest:
            console.print(Text(line), soft_wrap=True)
    else:
        caveats = [
            f"caveat ({item.kind}): {caveat_line(item.summary, item.module, item.check)}" for item in report.caveats
        ]
        for line in shortened(caveats):
            _wrapped(console, line)
    _wrapped(console, coverage_line(report))
    if line := float64_line(report):
        _wrapped(console, line)
    if report.training:
        console.print()
        console.print(training_table(report.training))
    if report.power and power:
        console.print()
        console.print(power_table(report.power))


def checks_table(target: str, report: PortReport) -> Table:
    """One row a check; fits 80 columns."""
    table = Table(
        title=f"{target}/{report.port}",
        title_justify="left",
        title_style="bold",
        box=None,
        padding=(0, 1),
        pad_edge=False,
        collapse_padding=True,
    )
    table.add_column("check", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for name in ("gap", "expected", "precision", "resolution", "examples"):
        table.add_column(name, justify="right", no_wrap=True)
    for check in report.checks:
        table.add_row(
            check.name,
            Text(check.verdict, style=STYLES[check.verdict]),
            figure(check.gap),
            figure(check.expected_gap),
            figure(check.precision),
            figure(check.resolution),
            str(check.examples),
        )
    return table


def training_table(training: Mapping[str, Any]) -> Table:
    """How every run of the training check ended: read beside the verdict, never for it."""
    table = _plain_table(f"after {training['steps']} steps", "loss of the last epoch", "held-out accuracy")
    for name, end in training["ends"].items():
        score = end["accuracy"]
        table.add_row(name, figure(end["loss"], 4), "–" if score is None else f"{100 * score:.1f} %")
    return table


def power_table(power: Mapping[str, Mapping[str, float]]) -> Table:
    """The smallest relative change of each leaf that would have been noticed, and by which check."""
    table = _plain_table("smallest change of", "noticed", "by")
    for leaf in dict.fromkeys(leaf for found in power.values() for leaf in found):
        check = min((check for check in power if leaf in power[check]), key=lambda check: power[check][leaf])
        table.add_row(leaf, figure(power[check][leaf]), check)
    return table


def _plain_table(first: str, *others: str) -> Table:
    table = Table(box=None, padding=(0, 1), pad_edge=False, collapse_padding=True)
    table.add_column(first)
    for name in others:
        table.add_column(name, justify="right")
    return table


def coverage_line(report: PortReport) -> str:
    """How much of the model the run could judge."""
    coverage = report.coverage
    if any(caveat.kind == "coverage" for caveat in report.caveats):
        return "coverage: not measured"
    line = f"coverage: {100 * coverage.parameters:.4g} % of the parameters"
    for name, leaves in (("not judged", coverage.uncovered), ("inert", coverage.inert)):
        if leaves:
            line += f" · {name}: {', '.join(shortened(leaves))}"
    return line


def print_verdict(console: Console, report: Report) -> None:
    """The last line: the verdict on the target and on each port."""
    ports = ", ".join(
        item.port if item.verdict == report.verdict else f"{item.port} {item.verdict}" for item in report.reports
    )
    line = Text.assemble(f"{report.target}: ", (report.verdict, STYLES[report.verdict]), f" ({ports})")
    console.print()
    console.print(line, soft_wrap=True)


def _wrapped(console: Console, line: str) -> None:
    console.print(Text(line), width=min(WIDTH, console.width), highlight=False)
