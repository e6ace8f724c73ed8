"""The implementations of one model side by side, aligned by class and function; `# differs:` lines stand out."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.box import MINIMAL
from rich.console import Console
from rich.rule import Rule as Line
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from equivalence.errors import InputError

COLUMN = 44
"""The narrowest column in which code is still read: with less room the implementations are stacked."""

DIFFERS = "# differs:"

SAME = {"forward": "__call__", "setup": "__init__"}
"""Methods that do one thing under two names."""


@dataclass(frozen=True)
class Section:
    """One class head, method, function or run of plain statements of a file: its name there, and its source."""

    name: str
    source: str

    @property
    def key(self) -> str:
        """The name under which the sections of several files are aligned."""
        owner, dot, method = self.name.rpartition(".")
        return owner + dot + SAME.get(method, method)


def source_of(module: str) -> str:
    """The source text of a module, which is found but not run. Raises InputError when there is none."""
    try:
        found = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        found = None
    if found is None or found.origin is None or not found.origin.endswith(".py"):
        raise InputError(f"{module} has no source file to show")
    return Path(found.origin).read_text(encoding="utf-8")


def sections(source: str) -> list[Section]:
    """Cut a module's source into sections, in order; every line but blank ones between sections is in one.

    >>> [section.name for section in sections("import jax\\n\\nclass A:\\n    x = 1\\n\\n    def f(self): ...\\n")]
    ['', 'A', 'A.f']
    """
    lines = source.splitlines()
    starts: list[tuple[int, str]] = [(0, "")]
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef):
            starts.append((_first_line(node, lines), node.name))
            for member in node.body:
                if isinstance(member, ast.FunctionDef):
                    starts.append((_first_line(member, lines), f"{node.name}.{member.name}"))
        elif isinstance(node, ast.FunctionDef):
            starts.append((_first_line(node, lines), node.name))
        elif starts[-1][1]:
            starts.append((_first_line(node, lines), ""))
    ends = [start for start, _ in starts[1:]] + [len(lines)]
    cut = [
        Section(name, "\n".join(lines[start:end]).strip("\n")) for (start, name), end in zip(starts, ends, strict=True)
    ]
    return [section for section in cut if section.source.strip()]


def _first_line(node: ast.stmt, lines: Sequence[str]) -> int:
    """The index of a statement's first line, its decorators and the comments above it included."""
    decorators = getattr(node, "decorator_list", [])
    first = min([node.lineno, *(decorator.lineno for decorator in decorators)]) - 1
    while first > 0 and lines[first - 1].lstrip().startswith("#"):
        first -= 1
    return first


def aligned(files: Mapping[str, Sequence[Section]]) -> list[tuple[str, dict[str, Section]]]:
    """One row a section key: which file has what there. Rows stay in every file's own order where that is possible.

    >>> a = [Section("A.forward", "1"), Section("C", "2")]
    >>> b = [Section("A.__call__", "3"), Section("B", "4"), Section("C", "5")]
    >>> [(key, sorted(row)) for key, row in aligned({"torch": a, "nnx": b})]
    [('A.__call__', ['nnx', 'torch']), ('B', ['nnx']), ('C', ['nnx', 'torch'])]
    """
    order: list[str] = []
    rows: dict[str, dict[str, Section]] = {}
    for name, parts in files.items():
        after = 0
        unnamed = 0
        for part in parts:
            key = part.key
            if not key:
                key, unnamed = f"#{unnamed}", unnamed + 1
            if key in rows:
                after = order.index(key) + 1
            else:
                order.insert(after, key)
                after += 1
            rows.setdefault(key, {})[name] = part
    return [(key, rows[key]) for key in order]


def print_lesson(console: Console, title: str, modules: Mapping[str, str]) -> None:
    """Show the files of `modules` (framework -> module name): in columns where they fit, stacked otherwise."""
    files = {name: sections(source_of(module)) for name, module in modules.items()}
    rows = aligned(files)
    console.print(Text(title, style="bold"))
    if console.width >= (COLUMN + 3) * len(files):
        _print_columns(console, list(files), rows)
    else:
        _print_stacked(console, rows)


def _print_columns(console: Console, names: Sequence[str], rows: Sequence[tuple[str, dict[str, Section]]]) -> None:
    width = (console.width - 3 * (len(names) - 1)) // len(names)
    table = Table(box=MINIMAL, padding=(0, 1), pad_edge=False, show_edge=False, show_lines=True)
    for name in names:
        table.add_column(name, width=width, no_wrap=True, header_style="bold")
    for _, row in rows:
        table.add_row(*(_code(row[name].source, width) if name in row else Text("–", style="dim") for name in names))
    console.print(table)


def _print_stacked(console: Console, rows: Sequence[tuple[str, dict[str, Section]]]) -> None:
    for key, row in rows:
        console.print(Line(Text("module" if key.startswith("#") else key, style="bold"), align="left"))
        for name, part in row.items():
            console.print(Text(name, style="bold cyan"))
            console.print(_code(part.source, console.width))
        console.print()


def _code(source: str, width: int) -> Text:
    """Python source, coloured and folded to `width`, continuations indented, with the `# differs:` lines marked."""
    coloured = Syntax("", "python", theme="ansi_dark", background_color="default").highlight(source)
    folded = Text()
    for line in coloured.split("\n", allow_blank=True):
        if DIFFERS in line.plain:
            line.stylize("not dim bold yellow", line.plain.index(DIFFERS))
        for piece in _fold(line, width):
            folded.append_text(piece).append("\n")
    folded.rstrip()
    folded.no_wrap = True
    return folded


def _fold(line: Text, width: int) -> list[Text]:
    plain = line.plain.rstrip()
    line = line[: len(plain)]
    if len(plain) <= width:
        return [line]
    indent = min(len(plain) - len(plain.lstrip()), width // 2)
    comment = plain.find("# ")
    if plain[: max(comment, 0)].strip():
        # A remark at the end of its line goes above it, so that the code beside the others stays whole.
        remark = Text(" " * indent).append_text(line[comment:])
        return [*_fold(remark, width), *_fold(line[:comment], width)]
    cut = max(plain.rfind(" ", indent + 1, width + 1), plain.rfind("(", indent + 1, width) + 1)
    cut = cut if cut > indent else width
    lead = "# " if 0 <= comment < cut else "    "
    rest = Text(" " * indent).append(lead, style="bold yellow" if DIFFERS in plain else "dim")
    rest.append_text(line[cut + (plain[cut] == " ") :])
    return [line[:cut], *_fold(rest, width)]
