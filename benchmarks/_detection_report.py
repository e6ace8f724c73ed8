"""The figures of detection.py as a table, as a picture and as docs/detection.md."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

BINS = np.concatenate([[-np.inf], np.arange(-2.0, 12.25, 0.25), [np.inf]])
"""Powers of ten between which trials are counted by their largest ratio."""
BAR = 46


def _number(value: float | None) -> str:
    return "inf" if value is None else f"{value:.3g}"


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


RIGHT_HEAD = ("network", "trials", "leaves", "second stage", "median", "p99", "p99.9", "max", "alarms")
FAULT_HEAD = ("fault", "caught", "smallest ratio", "median")


def right_rows(facts: dict[str, Any]) -> list[tuple[str, ...]]:
    """Rows of the table of right trials, their sum last."""
    rows = []
    for row in facts["right"]:
        figures = (_number(row[key]) for key in ("median", "p99", "p99.9", "max"))
        counts = str(row["trials"]), f"{row['leaves']:,}", _percent(row["second_stage"])
        rows.append((row["name"], *counts, *figures, str(row["alarms"])))
    whole = totals(facts)
    counts = str(whole["trials"]), f"{whole['leaves']:,}", _percent(whole["second_stage"])
    return [*rows, ("all", *counts, "", "", "", _number(whole["max"]), str(whole["alarms"]))]


def fault_rows(facts: dict[str, Any]) -> list[tuple[str, ...]]:
    """Rows of the table of faults."""
    return [
        (row["name"], f"{row['alarms']}/{row['trials']}", _number(row["min"]), _number(row["median"]))
        for row in facts["faults"]
    ]


def totals(facts: dict[str, Any]) -> dict[str, Any]:
    """All right trials together, and the margin to the faults that every trial must catch."""
    right, certain = facts["right"], [row for row in facts["faults"] if row["certain"]]
    trials = sum(row["trials"] for row in right)
    largest = max(((np.inf if row["max"] is None else row["max"]) for row in right), default=0.0)
    smallest = min((row["min"] for row in certain if row["min"] is not None), default=np.inf)
    return {
        "trials": trials,
        "leaves": sum(row["leaves"] for row in right),
        "second_stage": sum(row["second_stage"] * row["trials"] for row in right) / max(1, trials),
        "max": largest,
        "alarms": sum(row["alarms"] + len(row["imprecise"]) for row in right),
        "faulty": sum(row["trials"] for row in facts["faults"]),
        "smallest": smallest,
        "margin": smallest / largest if largest else np.inf,
        "missed": sum(row["trials"] - row["alarms"] for row in certain),
    }


def histogram(rows: Sequence[dict[str, Any]]) -> np.ndarray:
    """Trials of all rows by bin."""
    return np.sum([np.zeros(len(BINS) - 1, int), *(row["histogram"] for row in rows)], axis=0)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    lines = []
    for row in [head, *rows]:
        first, *others = (f"{cell:{'>' if column else '<'}{widths[column]}}" for column, cell in enumerate(row))
        lines.append("  ".join([first, *others]).rstrip())
    return "\n".join(lines)


def _bars(facts: dict[str, Any]) -> str:
    """Both histograms side by side, a line for every half decade; bars are of the logarithm of the count."""
    right, faulty = histogram(facts["right"]), histogram(facts["faults"])
    lines = [f"{'largest ratio':>16}  {'right':>7}  {'faulty':>7}"]
    used = np.flatnonzero(right + faulty)
    for first in range((used[0] + 1) // 2 * 2 - 1, used[-1] + 1, 2):
        ours, theirs = (int(counts[max(0, first) : first + 2].sum()) for counts in (right, faulty))
        top = BINS[min(first + 2, len(BINS) - 1)]
        bars = [letter * round(4 * np.log2(1 + count)) for letter, count in (("r", ours), ("F", theirs))]
        label = f"up to {10.0**top:.1e}" if np.isfinite(top) else "above"
        lines.append(f"{label:>16}  {ours:7d}  {theirs:7d}  {''.join(bars)[:BAR]}".rstrip())
    return "\n".join(lines)


def show(facts: dict[str, Any]) -> str:
    """Everything, for a terminal."""
    whole = totals(facts)
    parts = [
        _table(RIGHT_HEAD, right_rows(facts)),
        _table(FAULT_HEAD, fault_rows(facts)),
        _bars(facts),
        f"largest ratio of a right trial {_number(whole['max'])} (a difference: above {facts['differs']:g});"
        f" smallest of a fault that every trial must catch {_number(whole['smallest'])}: a margin of"
        f" {_number(whole['margin'])}; {whole['missed']} of those trials missed",
        f"{whole['trials']} right trials ({whole['leaves']:,} leaves) and {whole['faulty']} faulty ones in"
        f" {facts['seconds']:g} s, seed {facts['seed']}",
    ]
    opened = [f"second stage opened in {r['name']} by {r['opened_by']}" for r in facts["right"] if r["opened_by"]]
    alarms = [f"ALARM {row['name']}: {text}" for row in facts["right"] for text in (*row["alarmed"], *row["imprecise"])]
    return "\n\n".join(parts) + "".join(f"\n{text}" for text in [*opened, *alarms])


def save_plot(facts: dict[str, Any], path: Path) -> None:
    """Both histograms on logarithmic axes, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    width = BINS[2] - BINS[1]
    edges = np.concatenate([[BINS[1] - width], BINS[1:-1], [BINS[-2] + width]])
    figure = Figure(figsize=(9.0, 4.8), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel="largest gap / expected gap of a trial", ylabel="trials")
    axes.set(xscale="log", yscale="log")
    whole = totals(facts)
    for rows, colour, label in (
        (facts["right"], "#0072B2", f"{whole['trials']:,} right trials"),
        (facts["faults"], "#D55E00", f"{whole['faulty']:,} trials with a planted fault"),
    ):
        counts = histogram(rows)
        axes.stairs(counts, 10.0**edges, fill=True, color=colour, alpha=0.75, label=label, baseline=0.5)
    for at, text in ((facts["agrees"], "agrees"), (facts["differs"], "differs")):
        axes.axvline(at, color="black", linewidth=1.0, linestyle="--")
        side = "right" if at < facts["differs"] else "left"
        axes.annotate(f" {text} ", (at, 1.0), xycoords=("data", "axes fraction"), va="top", ha=side)
    axes.set_ylim(bottom=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper right", bbox_to_anchor=(1.0, 0.9))
    canvas.print_figure(path, format="png", dpi=130)


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    rule = "|".join(["---", *["--:"] * (len(head) - 1)])
    return "\n".join([f"| {' | '.join(head)} |", f"|{rule}|", *(f"| {' | '.join(row)} |" for row in rows)])


def write_docs(facts: dict[str, Any], path: Path) -> None:
    """docs/detection.md, from the figures alone."""
    whole, versions = totals(facts), ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    precision = [
        (row["name"], *(" / ".join(map(_number, row["precision"].get(check, ()))) for check in CHECKS))
        for row in facts["right"]
    ]
    missed = [row for row in facts["faults"] if row["alarms"] < row["trials"]]
    rights, faults, leaves = f"{whole['trials']:,}", f"{whole['faulty']:,}", f"{whole['leaves']:,}"
    largest, smallest, margin = (_number(whole[name]) for name in ("max", "smallest", "margin"))
    text = f"""# What the statistic detects

Written by `python benchmarks/detection.py --seconds N --write-docs`; every figure on this page comes from
`detection.json` beside it: {rights} right trials and {faults} with a planted fault, in
{facts["seconds"]:g} s, seed {facts["seed"]} ({versions}).

A trial is one example of one network: weights, three batches and draws, observed in eval and in train mode, in float32
and float64 on both sides, then five Adam steps; {facts["group"]} right trials are judged together, as `verify`
does. Its figure is the largest ratio over all of its leaves, of the gap to the expectation that decided. Above
{facts["differs"]:g} a leaf differs.

![Both histograms](detection.png)

## Right ports

{whole["alarms"]} alarms in {rights} trials ({leaves} leaves); the largest ratio was {largest}. The
second stage, further runs of the reference, was needed in {_percent(whole["second_stage"])} of the trials.

{_markdown(RIGHT_HEAD, right_rows(facts))}

{_opened(facts)}{_alarms(facts)}

## Planted faults

{_markdown(FAULT_HEAD, fault_rows(facts))}

The smallest ratio of a fault that every single trial must catch was {smallest}: {margin} times the largest
ratio of a right trial.{_missed(missed)}

## Precision

Float32 error of the right ports over that of the reference: median / 99 % / largest, over all leaves of a check. A
check is called less precise when the median over its examples is above 1000.

{_markdown(("network", *CHECKS), precision)}
"""
    path.write_text(text)


def _opened(facts: dict[str, Any]) -> str:
    """What asked for the second stage: the trials of each network in which a leaf of a check was left open."""
    rows = [
        f"{row['name']}: " + ", ".join(f"`{check}` {count}" for check, count in row["opened_by"].items())
        for row in facts["right"]
        if row["opened_by"]
    ]
    return f"Trials whose second stage was opened by a check: {'; '.join(rows)}." if rows else "No trial needed it."


def _alarms(facts: dict[str, Any]) -> str:
    rows = [f"- {row['name']}, {text}" for row in facts["right"] for text in (*row["alarmed"], *row["imprecise"])]
    return "\n\nAlarms, at most five a network and kind:\n\n" + "\n".join(rows) if rows else ""


CHECKS = ("outputs", "loss", "input_gradients", "parameter_gradients", "state", "step", "optimizer_state")


def _missed(rows: Sequence[dict[str, Any]]) -> str:
    if not rows:
        return " No trial missed its fault."
    names = "; ".join(f"{row['name']} ({row['alarms']} of {row['trials']})" for row in rows)
    return (
        f" Faults that a single example does not always show, and that take several: {names}. In an example that misses"
        " one, it is smaller than what the reference's own rounding does."
    )
