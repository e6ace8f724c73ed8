"""The command line: `equivalence list | verify | train | show`. Parses, calls, listens; decides nothing.

Exit status: 0 equivalent, 1 divergent, 2 unusable arguments or input, 3 inconclusive, 70 an error of ours,
130 interrupted.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from equivalence import __version__
from equivalence.errors import INTERNAL, INTERRUPTED, UNUSABLE, EquivalenceError, InputError, unknown

if TYPE_CHECKING:
    from rich.console import Console

    from equivalence.spec import Spec
    from equivalence.verdict import Report

SECTIONS = ("models", "frameworks", "checks", "optimizers", "schedules", "losses", "layers")
TRACEBACK = "EQUIVALENCE_TRACEBACK"
EXTRAS = {
    "torch": "torch",
    "jax": "jax",
    "jaxlib": "jax",
    "flax": "jax",
    "optax": "jax",
    "equinox": "equinox",
    "transformers": "hf",
    "pandas": "data",
    "matplotlib": "data",
}
"""The extra that installs a package which only some commands need."""


class _Commands(click.Group):
    """A group whose unknown commands are answered with the nearest names."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command; raises InputError for an unknown one."""
        if args and not args[0].startswith("-") and args[0] not in self.commands:
            raise unknown("command", args[0], self.commands)
        return super().resolve_command(ctx, args)


class _Names(click.ParamType):
    """A comma-separated list of names."""

    name = "a,b"

    def convert(
        self, value: str | tuple[str, ...], param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, ...]:
        """Split at commas; an empty list is an error."""
        if isinstance(value, tuple):
            return value
        names = tuple(dict.fromkeys(name.strip() for name in value.split(",") if name.strip()))
        if not names:
            self.fail("expected at least one name", param, ctx)
        return names


@click.group(
    cls=_Commands,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, message="equivalence %(version)s")
@click.pass_context
def cli(context: click.Context) -> None:
    """Prove that a PyTorch model and its JAX port are the same function, or see where they part.

    TARGET is a model's name (see `equivalence list models`), a package.module:SPEC, or a path/to/file.py:SPEC.
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


@cli.command(name="list", short_help="What there is: models, checks, ...")
@click.argument("section", required=False, metavar="[" + "|".join(SECTIONS) + "]")
def list_(section: str | None) -> None:
    """Say what there is: models, frameworks, checks and more.

    Of optimizers, schedules, losses and layers: torch's beside their JAX forms, with the gaps that were measured.
    """
    if section is not None and section not in SECTIONS:
        raise unknown("section", section, SECTIONS)
    if section in ("optimizers", "schedules", "losses"):
        from equivalence.report.dictionary import listing

        click.echo(listing(section, _rows(section)))
        return
    if section == "layers":
        from equivalence.report import layers

        click.echo(layers.listing())
        return
    for name in SECTIONS if section is None else (section,):
        rows = _rows(name)
        if section is None:
            click.echo(f"{name}:")
        width = max((len(row[0]) for row in rows), default=0)
        for entry, summary in rows:
            click.echo(f"{'' if section else '  '}{entry:<{width}}  {summary}".rstrip())


def _rows(section: str) -> list[tuple[str, str]]:
    """The entries of one section: name and summary."""
    if section == "models":
        from equivalence.spec import load, models

        specs = [load(name) for name in models()]
        return [(spec.name, f"{spec.title} ({', '.join(spec.implementations)})") for spec in specs]
    if section == "frameworks":
        from equivalence import frameworks

        return [(name, "") for name in frameworks.names()]
    if section == "checks":
        from equivalence.checks import REGISTRY

        return [(check.name, check.summary) for check in REGISTRY.values()]
    if section == "losses":
        from equivalence import losses

        return [(name, pair.__doc__ or "") for name, pair in losses.PAIRS.items()]
    if section == "optimizers":
        from equivalence.optimizers import PAIRS

        return [(name, pair.summary) for name, pair in PAIRS.items()]
    if section == "schedules":
        from textwrap import shorten

        from equivalence.dictionary import entries

        return [
            (entry.name, shorten(entry.form or entry.differs, 60, placeholder=" ...")) for entry in entries(section)
        ]
    if section == "layers":
        from textwrap import shorten

        from equivalence.layers.figures import figures

        return [(line.name, shorten(line.nnx, 60, placeholder=" ...")) for line in figures().lines]
    raise AssertionError(section)


@cli.command(short_help="Judge the ports of TARGET.")
@click.argument("target")
@click.option("--port", "ports", type=_Names(), help="Judge only these ports.  [default: all]")
@click.option("--checks", type=_Names(), help="Run only these checks.  [default: all that apply]")
@click.option("--optimizer", metavar="NAME|all", help="Step with this optimizer.  [default: the model's own]")
@click.option("--examples", type=click.IntRange(min=1), help="How many examples to try.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of everything random.")
@click.option("--power", is_flag=True, help="Also measure what the run could have noticed, leaf by leaf.")
@click.option("--json", "json_place", metavar="FILE|-", help="Write the report as JSON; - is stdout.")
@click.option("--html", "html_place", metavar="FILE", help="Write the report as one HTML file.")
@click.pass_context
def verify(
    context: click.Context,
    target: str,
    ports: tuple[str, ...] | None,
    checks: tuple[str, ...] | None,
    optimizer: str | None,
    examples: int | None,
    seed: int,
    power: bool,
    json_place: str | None,
    html_place: str | None,
) -> None:
    """Judge the ports of TARGET against its PyTorch reference; the exit status is the verdict."""
    from equivalence.report import html, json_report
    from equivalence.report.files import check_writable
    from equivalence.spec import load
    from equivalence.verdict import CHECKS

    for place in (json_place, html_place):
        if place is not None and place != "-":
            check_writable(Path(place))
    spec = load(target)
    _known("port", ports, spec.ports)
    _known("check", checks, CHECKS)
    if optimizer is not None:
        from equivalence.optimizers import PAIRS

        _known("optimizer", (optimizer,), [*PAIRS, "all"])
    from equivalence.recordings import folder
    from equivalence.runtimes.jax import keep_programs

    keep_programs(folder() / "jax")
    console = _console(stderr=json_place == "-")
    report = _listen(spec, console, ports, checks, optimizer, examples, seed, power)
    if json_place is not None:
        json_report.write(report, json_place)
    if html_place is not None:
        html.write(report, html_place)
    context.exit(report.exit_status)


def _listen(
    spec: Spec,
    console: Console,
    ports: tuple[str, ...] | None,
    checks: tuple[str, ...] | None,
    optimizer: str | None,
    examples: int | None,
    seed: int,
    power: bool,
) -> Report:
    """Run the pipeline and show its events; return the report of the last one."""
    from equivalence.api import verify_spec
    from equivalence.events import Finished
    from equivalence.report.terminal import Terminal

    event = None
    with Terminal(console, power) as terminal:
        for event in verify_spec(spec, ports=ports, checks=checks, optimizer=optimizer, examples=examples, seed=seed):
            terminal.handle(event)
    if not isinstance(event, Finished):
        raise RuntimeError("the run ended without a report")
    return event.report


@cli.command(short_help="Train every implementation of TARGET.")
@click.argument("target")
@click.option("--epochs", type=click.IntRange(min=1), help="Stop after this many epochs.  [default: the whole run]")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of everything random.")
@click.option(
    "--plot", "place", metavar="FILE", help="Where to save the loss curves.  [default: out/TARGET-training.png]"
)
def train(target: str, epochs: int | None, seed: int, place: str | None) -> None:
    """Train every implementation of TARGET on its data: a table of losses and seconds, and a picture."""
    from equivalence.report.files import check_writable
    from equivalence.spec import load

    spec = load(target)
    if spec.training is None:
        raise InputError(f"{spec.name} has no training data: its spec declares no `training`")
    if place is None:
        Path("out").mkdir(exist_ok=True)
    picture = Path(place or f"out/{spec.name}-training.png")
    check_writable(picture)

    from equivalence.report.plot import save_curves
    from equivalence.report.training import follow, print_runs
    from equivalence.train import train as trained

    console = _console()
    runs = follow(console, trained(spec, epochs=epochs, seed=seed))
    print_runs(console, f"{spec.name}: trained from the same weights on the same batches", runs)
    save_curves(picture, spec.title, runs)
    click.echo(f"loss curves: {picture}")


@cli.command(short_help="Show implementations side by side.")
@click.argument("target")
@click.option("--width", type=click.IntRange(min=40), help="Columns to lay out for.  [default: the terminal's]")
def show(target: str, width: int | None) -> None:
    """Show the implementations of TARGET side by side (three read well in 160 columns)."""
    from equivalence.report.lessons import print_lesson
    from equivalence.spec import load

    spec = load(target)
    print_lesson(_console(width=width), f"{spec.name}: {spec.title}", spec.implementations)


def _known(what: str, names: Sequence[str] | None, choices: Sequence[str]) -> None:
    for name in names or ():
        if name not in choices:
            raise unknown(what, name, choices)


def _console(*, stderr: bool = False, width: int | None = None) -> Console:
    from rich import console

    class Console(console.Console):
        """Rich's, but for a reader that goes away: that must not look like status 1, a divergence."""

        def on_broken_pipe(self) -> None:
            raise BrokenPipeError

    return Console(stderr=stderr, width=width, highlight=False, emoji=False)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its status. `arguments` defaults to those of the process."""
    sys.exit(run(arguments))


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status; every error becomes one clear line on stderr."""
    try:
        status = cli.main(args=arguments, prog_name="equivalence", standalone_mode=False)
        sys.stdout.flush()
    except (KeyboardInterrupt, click.Abort):
        return _fail("interrupted", INTERRUPTED)
    except BrokenPipeError:
        # The reader of our output went away (`equivalence list | head -1`): there is nobody left to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return INTERRUPTED
    except click.ClickException as error:
        return _fail(error.format_message(), UNUSABLE)
    except EquivalenceError as error:
        return _fail(str(error), error.status)
    except Exception as error:
        missing = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
        if missing in EXTRAS:
            extra = f"equivalence-suite[{EXTRAS[missing]}]"
            return _fail(f"{missing} is not installed: pip install '{extra}'", UNUSABLE)
        if os.environ.get(TRACEBACK):
            traceback.print_exc()
        detail = " ".join(str(error).split())
        return _fail(
            f"internal error: {type(error).__name__}: {detail} (set {TRACEBACK}=1 to see the traceback)", INTERNAL
        )
    return status if isinstance(status, int) else 0


def _fail(message: str, status: int) -> int:
    click.echo(f"equivalence: {message}", err=True)
    return status


if __name__ == "__main__":
    main()
