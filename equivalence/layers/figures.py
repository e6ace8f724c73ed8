"""The dictionary of layers as it was measured: `figures.json`, which `python -m equivalence.report.layers` writes.

Reading it loads no framework.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from equivalence.errors import InputError

FIGURES = Path(__file__).with_name("figures.json")


@dataclasses.dataclass(frozen=True)
class Line:
    """One line of the dictionary of layers.

    Attributes:
        name, family: torch's class, and the module of this package that knows it.
        torch, nnx, linen: the example, and its form as one would write it in either.
        differs: what quietly differs.
        own: the frameworks in which the form is Flax's own layer.
        forward, backward: the largest relative gap of outputs and buffers, and of gradients, over both frameworks,
            eval and train mode, in float64; None for what cannot be called.
        rounding: the largest that rounding alone explains of them.
    """

    name: str
    family: str
    torch: str
    nnx: str
    linen: str
    differs: str
    own: tuple[str, ...]
    forward: float | None
    backward: float | None
    rounding: float | None


@dataclasses.dataclass(frozen=True)
class Figures:
    """Every line, in the order of families and names, and the versions that they were measured with."""

    versions: Mapping[str, str]
    lines: Sequence[Line]


def figures() -> Figures:
    """What was measured. Raises InputError where the file is not as it was written."""
    try:
        held = json.loads(FIGURES.read_text(encoding="utf-8"))
        lines = [Line(**{**line, "own": tuple(line["own"])}) for line in held["lines"]]
        return Figures(held["versions"], lines)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"cannot read {FIGURES.name}: {error}; run python -m equivalence.report.layers") from None


def as_json(figures: Figures) -> str:
    """The text of FIGURES: two significant digits of every gap."""
    lines = []
    for line in figures.lines:
        words = dataclasses.asdict(line)
        gaps = {name: words[name] for name in ("forward", "backward", "rounding")}
        words |= {name: None if gap is None else float(f"{gap:.1e}") for name, gap in gaps.items()}
        lines.append(words)
    return json.dumps({"versions": dict(figures.versions), "lines": lines}, indent=1) + "\n"
