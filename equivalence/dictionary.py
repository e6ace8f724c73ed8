"""The dictionary of training: what torch calls it, how one would write it in JAX, and the gaps that were measured.

Its words are the tables beside the translations; its figures are `dictionary.json`, which
`python -m equivalence.report.dictionary` measures. Reading both loads no framework.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from equivalence.errors import InputError

FIGURES = Path(__file__).with_name("dictionary.json")
SECTIONS = ("optimizers", "schedules", "losses")

Key = tuple[str, str, str | None, str | None]
"""Section, torch form, first form, exact form."""


@dataclass(frozen=True)
class Entry:
    """One line of the dictionary.

    Attributes:
        section: one of SECTIONS.
        name: torch's class.
        torch: the torch form.
        form: what one would write in JAX first; None where there is nothing like it.
        exact: the plain Optax form that is the same function; None where there is none or it is not listed.
        ours: the translation here.
        call: how its `update` is called, where not as that of any Optax transformation.
        differs: what quietly differs between `torch` and `form`.
        row: the line of its table, which knows how to make both sides.
    """

    section: str
    name: str
    torch: str
    form: str | None
    exact: str | None
    ours: str
    call: str | None
    differs: str
    row: Any

    @property
    def key(self) -> Key:
        """What its figures are found by: all that was measured, so that another form has none."""
        return self.section, self.torch, self.form, self.exact


@dataclass(frozen=True)
class Gaps:
    """How far the forms of one entry end from torch in float64, relative; None for a form that there is not.

    `rounding`: how far rounding alone may take a right one.
    """

    form: float | None
    exact: float | None
    ours: float
    rounding: float


PLAINLY = "eq.to_optax(optimizer)"
WITH_MODEL = "eq.to_optax(optimizer, model=model)"
OURS = {
    "Adafactor": WITH_MODEL,
    "Muon": WITH_MODEL,
    "ReduceLROnPlateau": "eq.to_optax(optimizer, scheduler=scheduler)",
}
"""How a translation is made where not as any other: what depends on the order of axes has to know the model."""
CALLS = {
    "LBFGS": "update(gradients, state, params, value_fn=loss_of_params)",
    "SparseAdam": "update(gradients, state, params, received=rows)",
    "ReduceLROnPlateau": "update(gradients, state, params, value=metric)",
}
"""How `update` is called where an Optax transformation is not told enough: a closure, rows, a metric."""


def entries(section: str) -> Iterator[Entry]:
    """The entries of a section, in the order of its table. Loads no framework."""
    if section == "optimizers":
        from equivalence.optimizers.rules.table import ROWS

        for row in ROWS:
            name = class_of(row.torch)
            ours = OURS.get(name, PLAINLY)
            yield Entry(section, name, row.torch, row.form, row.exact, ours, CALLS.get(name), row.differs, row)
    elif section == "schedules":
        from equivalence.optimizers.schedule_table import ROWS as SCHEDULES

        for schedule in SCHEDULES:
            name, torch = class_of(schedule.torch), schedule.torch.replace("torch.optim.lr_scheduler.", "lr_scheduler.")
            ours = OURS.get(name, "eq.to_schedule(scheduler)")
            words = schedule.form, None, ours, CALLS.get(name), schedule.differs
            yield Entry(section, name, torch, *words, schedule)
    else:
        from equivalence.losses.table import LOSSES

        for loss in LOSSES:
            yield Entry(section, loss.torch, loss.call, loss.form, None, f"eq.{loss.ours}", None, loss.differs, loss)


def class_of(torch: str) -> str:
    """The class that a torch form makes.

    >>> class_of("torch.optim.AdamW(params, lr=0.001)")
    'AdamW'
    """
    return torch.partition("(")[0].rpartition(".")[2]


@dataclass(frozen=True)
class Figures:
    """The measured gaps by the key of their entry, and the versions that they were measured with."""

    versions: Mapping[str, str]
    gaps: Mapping[Key, Gaps]

    def of(self, entry: Entry) -> Gaps:
        """The gaps of an entry. Raises InputError for one that was not measured."""
        if entry.key not in self.gaps:
            raise InputError(f"{entry.torch} was not measured yet: run python -m equivalence.report.dictionary")
        return self.gaps[entry.key]


def figures() -> Figures:
    """The figures that were measured. Raises InputError where the file is not as it was written."""
    try:
        held = json.loads(FIGURES.read_text(encoding="utf-8"))
        gaps = {tuple(line["measured"]): Gaps(**line["gaps"]) for line in held["lines"]}
        return Figures(held["versions"], gaps)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"cannot read {FIGURES.name}: {error}; run python -m equivalence.report.dictionary") from None


def as_json(figures: Figures) -> str:
    """The text of FIGURES: two significant digits of every gap."""
    lines = []
    for key, gaps in figures.gaps.items():
        rounded = {name: None if gap is None else float(f"{gap:.1e}") for name, gap in vars(gaps).items()}
        lines.append({"measured": key, "gaps": rounded})
    return json.dumps({"versions": dict(figures.versions), "lines": lines}, indent=1) + "\n"


def measure(entry: Entry) -> Gaps:
    """Measure an entry's gaps: torch beside each form, in float64, on a small fixed problem. Loads the frameworks."""
    gap = _measure(entry)
    ours, rounding = gap(None)
    form, exact = (None if written is None else gap(written)[0] for written in (entry.form, entry.exact))
    return Gaps(form, exact, ours, rounding)


def _measure(entry: Entry) -> Callable[[str | None], tuple[float, float]]:
    """The gap of a form, None being ours, and what rounding explains of it."""
    if entry.section == "losses":
        from equivalence.losses.gaps import loss_gap

        return lambda form: loss_gap(entry.row, naive=form is not None)
    from equivalence.optimizers import gaps

    measure = gaps.optimizer_gap if entry.section == "optimizers" else gaps.schedule_gap
    return lambda form: measure(entry.row, form)
