"""The dictionary of training for a reader: the page of the documentation, and what `equivalence list` prints.

`python -m equivalence.report.dictionary` measures every line and writes the figures and docs/training-dictionary.md; a
test says when the page is out of date.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

from equivalence import dictionary
from equivalence.dictionary import Entry, Figures, Gaps
from equivalence.optimizers.around_table import AROUND
from equivalence.report.files import check_writable, write_atomically
from equivalence.report.tables import code, row, wrapped
from equivalence.report.text import figure

PAGE = Path(__file__).parents[2] / "docs" / "training-dictionary.md"
PACKAGES = ("torch", "jax", "optax")
MARGIN = 10
"""Columns of a listing before its words: those of a figure."""

HEAD = """# The dictionary of training

What torch calls it, what one would write in JAX, what quietly differs, and how far apart the two end. A *gap* is
measured in float64, relative, and 0 where every bit is the same: of an optimizer, the distance between the parameters
after 50 steps of random gradients (LBFGS: three of a smooth loss), in units of the distance that torch went; of a
schedule, the largest difference over 120 counts, in units of the largest rate; of a loss, the larger of the differences
of value and gradient. *Ours* is the translation of this package; what rounding alone may make of its gap stands behind
it, in brackets. Measured with VERSIONS, on a CPU. This page is generated: `python -m equivalence.report.dictionary`.

## Going on in JAX, and back

An optimizer is translated once, and its state is carried over at any time, in both directions:

```python
import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch

import equivalence as eq

model = torch.nn.Linear(5, 3)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=100)
x, y = torch.randn(8, 5), torch.randn(8, 3)
for _ in range(10):
    optimizer.zero_grad()
    torch.nn.functional.mse_loss(model(x), y).backward()
    optimizer.step()
    scheduler.step()

params = {"kernel": jnp.array(model.weight.detach().numpy().T), "bias": jnp.array(model.bias.detach().numpy())}
transform = eq.to_optax(optimizer, scheduler=scheduler, model=model)
state = eq.optimizer_state(optimizer, transform, params, model=model, scheduler=scheduler)


@jax.jit
def step(params, state, x, y):
    gradients = jax.grad(lambda p: eq.losses.mse(x @ p["kernel"] + p["bias"], y))(params)
    changes, state = transform.update(gradients, state, params)
    return optax.apply_updates(params, changes), state


for _ in range(10):
    params, state = step(params, state, x.numpy(), y.numpy())

eq.load_optimizer_state(optimizer, state, params, model=model, scheduler=scheduler)
with torch.no_grad():
    model.weight.copy_(torch.tensor(np.asarray(params["kernel"]).T))
    model.bias.copy_(torch.tensor(np.asarray(params["bias"])))
```
"""

WORDS = {
    "optimizers": "`optimizer` is the torch one, and ours is `eq.to_optax(optimizer)` unless said otherwise below.",
    "schedules": (
        "`lr_scheduler` is that of `torch.optim`, `scheduler` the torch one, and ours is `eq.to_schedule(scheduler)`"
        " unless said otherwise below. Counts are int32, as Optax's own."
    ),
    "losses": "Ours is a function of the torch module's inputs, with its options as keywords.",
}
AROUND_WORDS = "What surrounds the step; ours is in `eq.optimizers`, and tested against torch step by step."
LISTED = (
    "The figure before a form is its gap: how far it ends from torch in float64,\n"
    "relative; 0 is bit for bit. The last form is ours."
)
NAMES = {"optimizers": "Names for verify --optimizer", "losses": "Names for verify(loss=...)"}


TAIL = """## What is not covered

- Muon iterates in bfloat16, whose sums a kernel rounds in an order of its own. Matrices up to about 16 x 16 take
  torch's steps to the bit; larger ones part by ulps of bfloat16, as torch's do from torch's without oneDNN (1.1e-5 in
  a 256 x 512 parameter after ten steps of 0.02). No precision makes this smaller, so `verify` reports it.
- SparseAdam moves the rows that torch's sparse gradient holds. JAX's gradients are dense: say which rows by
  `received=`. Gradients sparse in more than their first axis are refused.
- LBFGS evaluates the model several times a step: in `verify` it takes models without dropout and without buffers.
- torch refuses some values at run time (labels out of range, probabilities beyond 1); a compiled JAX function cannot,
  and returns NaN.
- XLA drops subnormal numbers on CPUs, torch keeps them.
- Complex parameters, optimizers and schedulers of other people's classes, and step hooks are refused: their effect
  cannot be read.
- `optax.MultiSteps` accumulates in float32, also in a float64 run, so a right port that uses it is reported:
  `eq.optimizers.accumulate` does not.
"""


def page(figures: Figures) -> str:
    """The whole page, with these figures. Raises InputError for a line that has none."""
    parts = [HEAD.replace("VERSIONS", ", ".join(f"{name} {version}" for name, version in figures.versions.items()))]
    for section in dictionary.SECTIONS:
        lines = list(dictionary.entries(section))
        parts.append(f"## {section.capitalize()}\n\n{WORDS[section]}\n\n{_table(lines, figures)}\n")
        if called := "\n".join(_called(lines)):
            parts.append(f"{called}\n")
    parts.append(f"## Around the step\n\n{AROUND_WORDS}\n\n{_around()}\n")
    parts.append(TAIL)
    return "\n".join(parts)


def _table(lines: Sequence[Entry], figures: Figures) -> str:
    """A section; a column of plain exact forms where there are any, of ours where they are not alike."""
    exact, alike = any(line.exact for line in lines), lines[0].section != "losses"
    head = ["torch", "one would write", "gap", *(["exactly", "gap"] if exact else []), *([] if alike else ["ours"])]
    rows = [row([*head, "gap of ours", "quietly"])]
    rows.append("|" + "".join("--:|" if "gap" in cell else "---|" for cell in (*head, "gap", "")))
    for line in lines:
        gaps = figures.of(line)
        plain = ["the same", "–"] if line.exact and line.exact == line.form else [code(line.exact), figure(gaps.exact)]
        cells = [_titled(line), code(line.form), figure(gaps.form), *(plain if exact else [])]
        cells += [] if alike else [code(line.ours)]
        rows.append(row([*cells, f"{figure(gaps.ours)} ({figure(gaps.rounding, 1)})", line.differs]))
    return "\n".join(rows)


def _titled(line: Entry) -> str:
    return code(line.torch) if line.section != "losses" else f"{line.name}<br>{code(line.torch)}"


def _called(lines: Iterable[Entry]) -> Iterator[str]:
    """How the translations are made and called that are not as the others."""
    for name, line in {line.name: line for line in lines}.items():
        if name in dictionary.OURS or line.call:
            yield f"- {name}: `{line.ours}`" + (f", then `{line.call}`" if line.call else "")


def _around() -> str:
    rows = [row(["torch", "one would write", "ours", "quietly"]), "|---|---|---|---|"]
    rows += [row([code(line.torch), code(line.naive), code(line.form), line.differs]) for line in AROUND]
    return "\n".join(rows)


def listing(section: str, names: Iterable[tuple[str, str]]) -> str:
    """A section of the dictionary in 80 columns, after the names that `verify` takes. Loads no framework."""
    known, figures = list(names), dictionary.figures()
    width = max((len(name) for name, _ in known), default=0)
    parts = []
    if section in NAMES:
        rows = [wrapped(f"  {name:<{width}}  {summary}", width + 4) for name, summary in known]
        parts.append("\n".join([f"{NAMES[section]}:", *rows]))
    parts.append(LISTED)
    parts += [_lines(line, figures.of(line)) for line in dictionary.entries(section)]
    return "\n\n".join(parts)


def _lines(line: Entry, gaps: Gaps) -> str:
    """One entry: torch's form, then a line each for a figure and its form, then what differs."""
    title = line.torch if line.section != "losses" else f"torch.nn.{line.name}: {line.torch}"
    exact = None if line.exact == line.form else line.exact
    forms = [(gaps.form, line.form), (gaps.exact, exact), (gaps.ours, line.ours)]
    rows = [wrapped(title, 4)]
    rows += [wrapped(f"{figure(gap):>{MARGIN - 2}}  {form}", MARGIN) for gap, form in forms if form is not None]
    words = [*([line.call] if line.call else []), f"differs: {line.differs}"]
    return "\n".join([*rows, *(wrapped(" " * MARGIN + text, MARGIN) for text in words)])


def main() -> None:
    """Measure every line; write the figures and the page."""
    for place in (dictionary.FIGURES, PAGE):
        check_writable(place)
    gaps = {}
    for section in dictionary.SECTIONS:
        for line in dictionary.entries(section):
            gaps[line.key] = dictionary.measure(line)
            sys.stdout.write(f"{line.torch}: {figure(gaps[line.key].ours)}\n")
    measured = Figures({name: version(name) for name in PACKAGES}, gaps)
    write_atomically(dictionary.FIGURES, dictionary.as_json(measured))
    write_atomically(PAGE, page(dictionary.figures()))


if __name__ == "__main__":
    main()
