"""Writing a report: whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from equivalence.errors import InputError


def check_writable(path: Path) -> None:
    """Raise InputError now if `path` could not be written after a long run."""
    folder = path.parent
    if path.is_dir():
        raise InputError(f"cannot write {path}: it is a folder")
    if not folder.is_dir():
        raise InputError(f"cannot write {path}: no such folder: {folder}")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise InputError(f"cannot write {path}: permission denied")


def write_atomically(path: Path, text: str) -> None:
    """Write `text` to a file beside `path` and rename it there, so that no reader ever sees half of it.

    A path that exists and is no regular file (a pipe, a terminal) is written to directly. Raises InputError.
    """
    try:
        if path.exists() and not path.is_file():
            path.write_text(text, encoding="utf-8")
            return
        target = path.resolve()
        beside = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        try:
            beside.write_text(text, encoding="utf-8")
            os.replace(beside, target)
        finally:
            beside.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from None
