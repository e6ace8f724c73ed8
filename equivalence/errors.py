"""Every error this project raises on purpose, and the exit status each one means."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

EQUIVALENT, DIVERGENT, UNUSABLE, INCONCLUSIVE, INTERNAL, INTERRUPTED = 0, 1, 2, 3, 70, 130


class EquivalenceError(Exception):
    """Base of all errors raised on purpose; `status` is the command line's exit status."""

    status = INTERNAL


class InputError(EquivalenceError):
    """What the caller handed in cannot be used: one clear line, exit status 2."""

    status = UNUSABLE


class MappingError(InputError):
    """Leaves left over, missing or of another shape; the message lists all of them."""


class DivergenceError(EquivalenceError, AssertionError):
    """Raised by `Report.assert_equivalent` when the port is another model."""

    status = DIVERGENT


class InconclusiveError(EquivalenceError, AssertionError):
    """Raised by `Report.assert_equivalent` when the run could not have told."""

    status = INCONCLUSIVE


class DrawsDiffer(EquivalenceError):
    """The two sides asked for different random numbers; a divergence, not a bad input."""

    status = DIVERGENT


class UnsupportedDraw(EquivalenceError):
    """A random number was asked for in a way that the tape cannot serve; nothing is judged."""

    status = INCONCLUSIVE


def nearest(word: str, choices: Iterable[str], n: int = 3) -> list[str]:
    """The `n` choices most like `word`, best first.

    >>> nearest("titanic", ["titanic_mlp", "gpt2"])
    ['titanic_mlp']
    """
    return difflib.get_close_matches(word, list(choices), n=n, cutoff=0.4)


def unknown(what: str, word: str, choices: Iterable[str]) -> InputError:
    """The error for a name that is not there, with the nearest names that are.

    >>> str(unknown("check", "output", ["outputs", "loss"]))
    "unknown check 'output' (did you mean outputs? known: loss, outputs)"
    """
    known = sorted(choices)
    near = nearest(word, known)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    return InputError(f"unknown {what} {word!r} ({hint}known: {', '.join(known) or 'none'})")
