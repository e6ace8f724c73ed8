"""The pieces of a generated page: rows of a Markdown table, code in a cell, and lines of 80 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable

WIDTH = 80


def row(cells: Iterable[str]) -> str:
    r"""One row of a Markdown table.

    >>> row(["a | b", "c"])
    '| a \\| b | c |'
    """
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def code(text: str | None) -> str:
    """Code in a cell; a dash for none."""
    return "–" if text is None else f"`{text}`"


def wrapped(text: str, indent: int) -> str:
    """Text in lines of 80 columns, all but the first indented."""
    return textwrap.fill(text, WIDTH, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False)
