"""`equivalence train` on the terminal: progress, then losses, accuracies and seconds side by side, and the picture."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from equivalence.report.text import figure
from equivalence.train import Trained, TrainProgress


def follow(console: Console, events: Iterable[Trained | TrainProgress]) -> list[Trained]:
    """Show the runs while they go on; return them. An interrupted one leaves the terminal in order."""
    runs: list[Trained] = []
    bar = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}", markup=False),
        TimeElapsedColumn(),
        console=console,
        transient=True,
    )
    tasks: dict[str, TaskID] = {}
    live = console.is_terminal
    if live:
        bar.start()
    try:
        for event in events:
            match event:
                case TrainProgress(name, done, total, loss) if live:
                    if name not in tasks:
                        tasks[name] = bar.add_task(name, total=total, loss="–")
                    bar.update(tasks[name], completed=done, loss=figure(loss, 4))
                case TrainProgress(name, 0, total, _):
                    console.print(Text(f"{name}: {total} epochs"), soft_wrap=True)
                case Trained():
                    runs.append(event)
                    if live:
                        bar.remove_task(tasks.pop(event.name))
                        console.print(Text(f"{event.name}: loss {figure(event.loss, 4)}"), soft_wrap=True)
    finally:
        if live:
            bar.stop()
    return runs


def print_runs(console: Console, title: str, runs: Sequence[Trained]) -> None:
    """The table of runs; the last column is how many times slower each is than the fastest, per epoch."""
    fastest = min((run.seconds_per_epoch for run in runs), default=1.0)
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=None,
        padding=(0, 1),
        pad_edge=False,
        collapse_padding=True,
    )
    table.add_column("", overflow="fold")
    for name in ("epochs", "loss", "accuracy", "seconds", "compiling", "slower"):
        table.add_column(name, justify="right", no_wrap=True)
    for run in runs:
        table.add_row(
            Text(run.name),
            str(run.epochs),
            f"{run.loss:.4f}",
            "–" if run.accuracy is None else f"{100 * run.accuracy:.1f} %",
            f"{'~' if run.extrapolated else ''}{run.seconds:.4g}",
            "–" if run.compile_seconds is None else f"{run.compile_seconds:.2f}",
            f"{run.seconds_per_epoch / fastest:,.1f} x",
        )
    console.print()
    console.print(table)
    if extrapolated := [run for run in runs if run.extrapolated]:
        names = ", ".join(f"{run.name} ({run.epochs} of {run.planned} epochs)" for run in extrapolated)
        console.print(Text(f"~ extrapolated: {names}"), soft_wrap=True)
