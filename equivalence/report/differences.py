"""The table of what the frameworks do differently, made of the `# differs:` lines of the implementations.

`python -m equivalence.report.differences > docs/differences.md` writes the page; a test says when it is out of date.
"""

from __future__ import annotations

import sys

from equivalence.report.lessons import DIFFERS, aligned, sections, source_of
from equivalence.spec import Spec, load, models

HEAD = """# What the frameworks do differently

Every line below stands in the code as a comment `# differs:`, at the place it speaks of; `equivalence show MODEL`
lays the code itself side by side. This page is generated:
`python -m equivalence.report.differences > docs/differences.md`.
"""


def lines(source: str) -> list[str]:
    """The `# differs:` lines of a piece of source, without the words that mark them.

    >>> lines("x = 1\\n# differs: | is or.\\n")
    ['\\\\| is or.']
    """
    marked = (line.partition(DIFFERS) for line in source.splitlines())
    return [text.strip().replace("|", "\\|") for _, mark, text in marked if mark]


def table(spec: Spec) -> str:
    """One model's differences as a Markdown table: a row a class or function, a column a framework."""
    names = list(spec.implementations)
    rows = aligned({name: sections(source_of(module)) for name, module in spec.implementations.items()})
    found = [f"| | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for key, row in rows:
        cells = ["<br>".join(lines(row[name].source)) if name in row else "" for name in names]
        if any(cells):
            found.append(f"| `{key}` | {' | '.join(cells)} |")
    return "\n".join(found)


def page() -> str:
    """The whole page, every model of `impls/`."""
    parts = [HEAD]
    for name in models():
        spec = load(name)
        parts.append(f"## {spec.title}\n\n`impls/{name}`\n\n{table(spec)}\n")
    return "\n".join(parts)


if __name__ == "__main__":
    sys.stdout.write(page())
