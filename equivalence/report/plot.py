"""The loss curves of a training run as a picture."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from equivalence.errors import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from equivalence.train import Trained

# Okabe and Ito's palette, told apart by colour-blind readers too.
COLOURS = ("#000000", "#E69F00", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#F0E442")
MARKED = 10
"""Up to so many epochs are drawn as points."""
SMOOTHED = 100
"""From so many epochs on a curve is drawn faintly, with its running mean over a 25th of them in full."""


def save_curves(path: Path, title: str, runs: Sequence[Trained]) -> None:
    """Write a PNG of every run's training loss by epoch; its axis is logarithmic where all losses are positive.

    Written beside `path` and renamed there. Raises InputError where it cannot be written, and where Matplotlib is
    not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter
    except ModuleNotFoundError:
        raise InputError(
            "the picture of the loss curves needs Matplotlib: pip install 'equivalence-suite[data]'"
        ) from None

    figure = Figure(figsize=(9.0, 5.5), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot(title=title, xlabel="epoch", ylabel="training loss (mean of the epoch's batches)")
    for number, run in enumerate(runs):
        _curve(axes, run, COLOURS[number % len(COLOURS)])
    losses = np.concatenate([run.losses for run in runs] or [np.ones(1)])
    if (losses[np.isfinite(losses)] > 0).all():
        axes.set_yscale("log")
        # Within one decade the powers of ten alone would leave the axis without a number.
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.grid(which="major", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    smoothed = any(run.epochs >= SMOOTHED for run in runs)
    axes.legend(frameon=False, title="faint: every epoch · full: running mean" if smoothed else None)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        canvas.print_figure(beside, format="png", dpi=150)
        os.replace(beside, path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        beside.unlink(missing_ok=True)


def _curve(axes: Axes, run: Trained, colour: str) -> None:
    epochs, losses = np.arange(1, run.epochs + 1), run.losses
    if run.epochs <= MARKED:
        axes.plot(epochs, losses, "o-", color=colour, markersize=5, linewidth=1.2, label=_label(run), zorder=3)
        return
    if run.epochs >= SMOOTHED:
        axes.plot(epochs, losses, color=colour, linewidth=0.6, alpha=0.3)
        width = run.epochs // 25
        losses = np.convolve(losses, np.full(width, 1 / width), mode="valid")
        epochs = epochs[width // 2 :][: len(losses)]
    axes.plot(epochs, losses, color=colour, linewidth=1.6, label=_label(run))


def _label(run: Trained) -> str:
    if run.extrapolated:
        return f"{run.name} (first {run.epochs} epochs only)"
    return f"{run.name}: {run.loss:.4f} at the end"
