"""Constants that float32 rounded before a run: what they stand for, and how far their rounding may have moved them."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch

from equivalence.numerics import U32
from equivalence.runtimes.closed_forms import closed_form

DIGITS = 6
"""Significant decimal digits up to which a float32 constant's shortest decimal is taken for what was meant. One less
where a single number is all there is: one in twenty is a decimal of six by chance."""
FREQUENCIES = 4
"""Elements from which on a table of frequencies is told from chance."""
FORMS: tuple[Callable[[float, torch.Tensor, int], torch.Tensor], ...] = (
    lambda base, number, last: 1.0 / base ** (number / last),
    lambda base, number, last: base ** -(number / last),
    lambda base, number, last: torch.exp(number * (-math.log(base) / last)),
)
"""The ways to write the frequencies 1, b^(-1/n), b^(-2/n), ... of rotary and sinusoidal positions."""


def recovered(values: np.ndarray) -> np.ndarray | None:
    """What a float32 array was rounded from, in float64; None where an element's decimals do not say.

    An element is recovered where some decimal of at most six significant digits rounds to it (0.1, 1e-05; five where
    it is the only one), where it is an integer, and where it is not finite; a single number where one closed form does
    (1/3, sqrt(2)). A whole table is where float32 makes it, bit for bit, of 1, b^(-1/n), b^(-2/n), ... of such a
    decimal b: the frequencies of rotary and sinusoidal positions.

    >>> float(recovered(np.float32([0.1]))[0]), recovered(np.float32([0.1234567]))
    (0.1, None)
    """
    flat = np.asarray(values, np.float32).reshape(-1)
    found = _decimals(flat)
    if flat.size == 1 and np.isfinite(flat[0]) and flat[0] != np.trunc(flat[0]):
        known = {value for value in (None if found is None else float(found[0]), closed_form(float(flat[0]))) if value}
        found = np.array([known.pop()]) if len(known) == 1 else None  # sqrt(70) is 8.3666 by chance
    if found is None:
        found = _frequencies(flat)
    return None if found is None else found.reshape(np.shape(values))


def _decimals(flat: np.ndarray) -> np.ndarray | None:
    wide = flat.astype(np.float64)
    with np.errstate(invalid="ignore"):
        meant = ~np.isfinite(flat) | (np.trunc(flat) == flat)
    digits = DIGITS - (np.unique(np.abs(flat[~meant])).size == 1)
    for part in (slice(0, 64), slice(64, None)):  # most tables betray themselves at once
        rest, places = np.unique(flat[part][~meant[part]], return_inverse=True)
        decimals = np.char.mod(f"%.{digits - 1}e", rest.astype(np.float64)).astype(np.float64)
        if not np.array_equal(decimals.astype(np.float32), rest):
            return None
        wide[part][~meant[part]] = decimals[places]
    return wide


def _frequencies(flat: np.ndarray) -> np.ndarray | None:
    """The table in float64, where one of the ways to write it gives these very bits in float32."""
    if flat.size < FREQUENCIES or flat[0] != 1.0 or not 0 < flat[-1] < 1:
        return None
    held, number = torch.from_numpy(flat), torch.arange(flat.size, dtype=torch.float64, device="cpu")
    for digits in range(1, DIGITS + 1):
        for last in (flat.size, flat.size - 1):
            base = float(f"{float(flat[-1]) ** (-last / (flat.size - 1)):.{digits}g}")
            for form in FORMS:
                if torch.equal(form(base, number.float(), last), held):
                    return form(base, number, last).numpy()
    return None


def shaken_by(values: np.ndarray, seed: int) -> np.ndarray:
    """A float64 array off by what rounding to float32 may have done: every element x (1 ± 2^-24), by a hash of its
    bits and of `seed`, so that equal elements stay equal. Integers (zeros among them) stay."""
    bits = np.ascontiguousarray(values, np.float64).view(np.uint64)
    with np.errstate(over="ignore", invalid="ignore"):
        hashed = (bits ^ (bits >> np.uint64(29))) * np.uint64(6364136223846793005 * (2 * seed + 1) % 2**64)
        stays = (np.trunc(values) == values) | ~np.isfinite(values)
    moved: np.ndarray = np.where(stays, values, values * (1.0 + np.where(hashed >> np.uint64(63), U32, -U32)))
    return moved
