"""The report as JSON, schema 1."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from equivalence.report.files import write_atomically
from equivalence.verdict import Report


def render(report: Report) -> str:
    """The JSON text of a report; strict JSON, with null for what is not finite."""
    return json.dumps(report.to_dict(), indent=2, ensure_ascii=False, allow_nan=False, default=_plain) + "\n"


def write(report: Report, place: str) -> None:
    """Write the report to a file, or to stdout for `-`. Raises InputError when the file cannot be written."""
    text = render(report)
    if place == "-":
        sys.stdout.write(text)
        sys.stdout.flush()
    else:
        write_atomically(Path(place), text)


def _plain(value: object) -> object:
    """NumPy scalars and arrays that found their way into the environment or the training summary."""
    plain = getattr(value, "tolist", None)
    return plain() if plain is not None else str(value)
