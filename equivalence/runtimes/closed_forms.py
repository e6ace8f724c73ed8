"""Numbers that code commonly computes before float32 rounds them."""

from __future__ import annotations

import functools
import math

import numpy as np

from equivalence.numerics import U32

ROOTS = 4096
"""Integers n whose 1/n, sqrt(n) and 1/sqrt(n) are recognised: sizes of heads and layers."""


def closed_form(number: float) -> float | None:
    """The one double 1/n, sqrt(n), 1/sqrt(n), log(n) of a small n, or such times pi, that rounds to a float32 number.

    >>> closed_form(float(np.float32(1 / 3))) == 1 / 3, closed_form(0.1234567)
    (True, None)
    """
    found = _closed_forms().get(abs(number))
    return None if found is None else math.copysign(found, number)


@functools.cache
def _closed_forms() -> dict[float, float | None]:
    n = np.arange(1.0, ROOTS + 1)
    few = n[:16]
    pi = np.concatenate([np.pi * few, np.pi / few, np.sqrt(np.pi * few), np.sqrt(few / np.pi), few / np.pi])
    doubles: list[float] = np.concatenate(
        [1 / n, np.sqrt(n), 1 / np.sqrt(n), pi, 1 / np.sqrt(np.pi * few), np.log(n[1:16]), 1 / np.log(n[1:16])]
    ).tolist()
    found: dict[float, float | None] = {}
    for rounded, double in zip(np.array(doubles, np.float32).tolist(), doubles, strict=True):
        known = found.setdefault(rounded, double)
        if known is not None and abs(known - double) > U32**2 * double:
            found[rounded] = None  # two forms round to it
    return found
