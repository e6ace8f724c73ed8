"""The report as one self-contained HTML file, for a reader who was not there."""

from __future__ import annotations

from pathlib import Path

import jinja2

from equivalence.report.files import write_atomically
from equivalence.report.summary import training_rows
from equivalence.report.text import caveat_line, explain, figure, float64_line
from equivalence.verdict import Report


def render(report: Report) -> str:
    """The HTML text of a report. Everything it shows is escaped; it loads nothing."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("equivalence.report", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["figure"] = figure
    return environment.get_template("report.html").render(
        report=report,
        caveat_line=caveat_line,
        explain=explain,
        float64_line=float64_line,
        training_rows=training_rows,
    )


def write(report: Report, place: str) -> None:
    """Write the report to a file, whole or not at all. Raises InputError when it cannot be written."""
    write_atomically(Path(place), render(report))
