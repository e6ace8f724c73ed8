"""What `training` saw, as rows of a name and a figure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

from equivalence.report.text import figure

ROW = 6
"""Longer sequences (loss curves) are not shown as a row."""


def training_rows(training: Mapping[str, Any] | None, prefix: str = "") -> Iterator[tuple[str, str]]:
    """The figures of a training summary, nested ones with a dotted name; long series are left to the plot.

    >>> list(training_rows({"epochs": 500, "torch": {"loss": 0.40625, "curve": [0.1] * 500}}))
    [('epochs', '500'), ('torch.loss', '0.4062')]
    """
    for key, value in (training or {}).items():
        name = f"{prefix}{key}".replace("_", " ")
        if isinstance(value, Mapping):
            yield from training_rows(value, f"{name}.")
        elif isinstance(value, str | bool) or value is None:
            yield name, str(value)
        elif isinstance(value, Sequence) or hasattr(value, "__len__"):
            if len(value) <= ROW:
                yield name, ", ".join(_number(item) for item in value)
        else:
            yield name, _number(value)


def _number(value: Any) -> str:
    return figure(float(value), 4) if isinstance(value, Real) and not isinstance(value, Integral) else str(value)
