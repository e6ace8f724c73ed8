"""The dictionary of layers for a reader: the page of the documentation, and what `equivalence list layers` prints.

`python -m equivalence.report.layers` measures every line and writes the figures and docs/layers.md; a test says when
either is out of date.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.metadata import version
from itertools import groupby
from pathlib import Path

from equivalence.layers import figures as kept
from equivalence.layers.figures import Figures, Line
from equivalence.report.files import check_writable, write_atomically
from equivalence.report.tables import code, row, wrapped
from equivalence.report.text import figure

PAGE = Path(__file__).parents[2] / "docs" / "layers.md"
PACKAGES = ("torch", "jax", "flax")
COLUMNS = ("torch", "Flax NNX", "Flax Linen", "gap forward", "gap backward", "status", "quietly")

HEAD = """# The dictionary of layers

Every layer of `torch.nn`, what it is in Flax, and what quietly differs. `eq.translate` makes it, with its weights:

```python
import numpy as np
import torch

import equivalence as eq

model = torch.nn.Sequential(
    torch.nn.Conv2d(3, 8, 3, padding=1),
    torch.nn.BatchNorm2d(8),
    torch.nn.ReLU(),
    torch.nn.Flatten(),
    torch.nn.Linear(8 * 5 * 6, 4),
)
images = np.random.default_rng(0).standard_normal((2, 3, 5, 6)).astype(np.float32)

port = eq.translate(model, to="nnx")  # or to="linen"
port.module  # the nnx.Module; of Linen the module, with its weights in port.variables
port.mapping  # the rules that moved the weights, in both directions
port.inputs  # ('... c h w -> ... h w c',): the module is channels last, as JAX expects
port(images)  # takes and returns torch's layout, in the mode that the torch module was in

report = eq.verify(model, port, (images,))
report.assert_equivalent()
```

A module made of layers of torch.nn alone translates as a whole. One with a forward of its own is refused, and the line
says which: writing its forward is the porter's part, and its layers can be translated one by one. So are hooks,
parametrizations, and parameters that two layers share.

A *gap* is measured in float64 on the line's own example with random weights: the largest distance, relative to the size
of the array, of outputs and buffers (forward) and of gradients by inputs and weights (backward), over both frameworks
and both modes, with the same draws. *Flax's own* and *JAX's own* say that they have exactly this layer; otherwise the
function named is one of this package, carried by a module that keeps the weights under Flax's names.
Measured with VERSIONS, on a CPU. This page is generated: `python -m equivalence.report.layers`.
"""

TAIL = """## In every line

- Layers over images take and return channels last, as Flax's do, with and without a batch; everything else keeps
  torch's axes, so `batch_first` stays what it was. `Sequential` moves axes back where a layer needs torch's order.
- The `Lazy` classes have no line: once called, torch itself makes them the class without `Lazy`.
- Random masks are drawn in torch's shapes and order, so that `verify` can serve both sides the same draws.
- torch refuses some values at run time (labels or indices out of range). A compiled JAX function cannot, and returns
  NaN. What it can know before it runs (shapes, options) it refuses as torch does.
- Of the 2,067 samples that torch tests its modules with, each in both frameworks, one is a declared gap: attention
  heads of one feature beside a saturated softmax, where JAX's derivative of softmax cancels and torch's does not.
- `DataParallel` and the abstract bases (`Module`, `RNNBase`, `RNNCellBase`, `Container`) are not layers.
"""


def page(figures: Figures) -> str:
    """The whole page, with these figures."""
    versions = ", ".join(f"{name} {version}" for name, version in figures.versions.items())
    own = sum(bool(line.own) for line in figures.lines)
    count = f"{len(figures.lines)} classes, {own} of them Flax's own.\n"
    parts = [HEAD.replace("VERSIONS", versions), count]
    for family, lines in groupby(figures.lines, key=lambda line: line.family):
        parts.append(f"## {family.replace('_', ' ').capitalize()}\n\n{_table(list(lines))}\n")
    return "\n".join([*parts, TAIL])


def status(line: Line) -> str:
    """Whose layer the form is."""
    if line.forward is None:
        return "not called"
    if line.own:
        return "Flax's own" if len(line.own) == 2 else f"Flax's own in {line.own[0]}"
    return "JAX's own" if line.nnx.startswith(("jax.", "jnp.")) else "this package's"


def _table(lines: Sequence[Line]) -> str:
    rows = [row(COLUMNS), "|" + "".join("--:|" if "gap" in name else "---|" for name in COLUMNS)]
    for line in lines:
        gaps = [figure(line.forward), figure(line.backward)]
        rows.append(row([*map(code, (line.torch, line.nnx, line.linen)), *gaps, status(line), line.differs]))
    return "\n".join(rows)


def listing() -> str:
    """The dictionary in 80 columns. Loads no framework."""
    parts = [
        "eq.translate(module, to='nnx'|'linen') makes each of these; behind a class the\n"
        "gaps of its outputs and of its gradients to torch in float64, relative."
    ]
    for line in kept.figures().lines:
        lines = [wrapped(f"{line.torch}  {figure(line.forward)}, {figure(line.backward)}", 4)]
        lines += [wrapped(f"    {framework:<6} {getattr(line, framework)}", 11) for framework in ("nnx", "linen")]
        parts.append("\n".join([*lines, wrapped(f"    differs: {line.differs}", 11)]))
    return "\n\n".join(parts)


def main() -> None:
    """Measure every line; write the figures and the page."""
    from equivalence.layers.measured import line
    from equivalence.layers.registry import entries

    for place in (kept.FIGURES, PAGE):
        check_writable(place)
    lines = []
    for entry in sorted(entries().values(), key=lambda entry: (entry.family, entry.name)):
        lines.append(line(entry))
        sys.stdout.write(f"{entry.name}: {figure(lines[-1].forward)}, {figure(lines[-1].backward)}\n")
    measured = Figures({name: version(name) for name in PACKAGES}, lines)
    write_atomically(kept.FIGURES, kept.as_json(measured))
    write_atomically(PAGE, page(kept.figures()))


if __name__ == "__main__":
    main()
