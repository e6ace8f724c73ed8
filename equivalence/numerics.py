"""Units of rounding, distances between arrays, and the two-stage statistic that decides what differs.

Rounding shrinks by 2^-29 from float32 to float64 and a mistake does not; every function here is plain NumPy.
The statistic is that of DESIGN section 4; `benchmarks/detection.py` measures it on right and on faulty pairs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

U32 = 2.0**-24
"""Unit roundoff of float32."""
U64 = 2.0**-53
"""Unit roundoff of float64."""
SHRINK = U64 / U32
"""How much smaller rounding is in float64: 2^-29."""
TINY32 = 2.0**-126
"""The smallest normal float32."""
AGREES = 10.0
"""A gap of at most this many first expectations agrees without further runs."""
DIFFERS = 100.0
"""A gap of more than this many second expectations is a difference."""
IMPRECISE = 1000.0
"""A port whose float32 error is more than this many times the reference's is less precise."""
BLOCK = 1 << 16
"""Elements a block in reductions over large arrays: small enough to stay in the cache."""


def rms(array: np.ndarray) -> float:
    """Root mean square of the finite elements; 0 for an empty array."""
    return distance(array, None)


def distance(a: np.ndarray, b: np.ndarray | None) -> float:
    """RMS of a - b in float64, over elements where the two can differ.

    NaN against NaN and infinities of one sign at equal positions agree and do not count; `b=None` stands for zeros.
    An element that is finite on one side only counts as infinity.

    >>> distance(np.array([1.0, np.inf]), np.array([2.0, np.inf]))
    0.7071067811865476
    """
    if a.size == 0:
        return 0.0
    total = _sum_of_squares(a, b)
    if math.isfinite(total) and total > 1e-280:
        return math.sqrt(total / a.size)
    if total == 0.0 and (np.array_equal(a, b) if b is not None else not a.any()):
        return 0.0
    return _careful_distance(a, b)


def _sum_of_squares(a: np.ndarray, b: np.ndarray | None) -> float:
    flat_a, flat_b = a.reshape(-1), None if b is None else b.reshape(-1)
    if flat_a.size <= BLOCK:
        with np.errstate(all="ignore"):
            part = _difference(flat_a, flat_b)
            return _squares(part)
    total, scratch = 0.0, np.empty(BLOCK)
    with np.errstate(all="ignore"):
        for start in range(0, flat_a.size, BLOCK):
            piece = flat_a[start : start + BLOCK]
            part = scratch[: piece.size]
            if flat_b is None:
                part[:] = piece
            else:
                np.subtract(piece, flat_b[start : start + BLOCK], out=part, dtype=np.float64)
            total += _squares(part)
    return total


def _squares(part: np.ndarray) -> float:
    # not np.dot: BLAS splits it over threads, which wait for each other a hundred times longer where cores are busy
    return float(np.einsum("i,i->", part, part))


def _difference(a: np.ndarray, b: np.ndarray | None) -> np.ndarray:
    wide = a.astype(np.float64, copy=False)
    return wide if b is None else wide - b


def _careful_distance(a: np.ndarray, b: np.ndarray | None) -> float:
    wide = a.astype(np.float64)
    other = np.zeros(()) if b is None else b.astype(np.float64)
    with np.errstate(all="ignore"):
        part = np.where((wide == other) | (np.isnan(wide) & np.isnan(other)), 0.0, wide - other)
    if b is None:
        part = part[np.isfinite(part)]
    if part.size == 0:
        return 0.0
    largest = float(np.max(np.abs(part)))
    if not np.isfinite(part).all():
        return math.inf
    if largest == 0.0:
        return 0.0
    return largest * math.sqrt(float(np.mean(np.square(part / largest))))


def finite(value: float) -> float:
    """The value, or 0 where it is not finite: a distance that could not be taken expects nothing."""
    return value if math.isfinite(value) else 0.0


def nonfinite(array: np.ndarray) -> bool:
    """Whether any element is NaN or infinite."""
    return array.dtype.kind in "fc" and not bool(np.isfinite(array).all())


def ratio(gap: float, expected: float) -> float:
    """gap / expected, with 0 / 0 = 0.

    >>> ratio(0.0, 0.0), ratio(1.0, 0.0)
    (0.0, inf)
    """
    if gap == 0.0:
        return 0.0
    return gap / expected if expected > 0.0 else math.inf


def accumulation(elements: int) -> float:
    """How many units of rounding a sum over the largest array of an example can carry: max(1, sqrt(n) / 4)."""
    return max(1.0, math.sqrt(elements) / 4.0)


@dataclass(frozen=True)
class Measure:
    """One leaf on one example: all distances that its judgement needs.

    `scale_reference` is the rms of the reference in float64; the scale that counts may be larger (see `expected`).
    Exact leaves (integers, booleans) have `exact=True` and `gap` = fraction of elements that differ.
    """

    path: str
    gap: float
    rounding: float
    port_rounding: float
    scale_reference: float
    port_error: float
    elements: int
    exact: bool = False
    nonfinite: bool = False
    shape: tuple[int, ...] = ()


def measure(
    path: str,
    reference32: np.ndarray,
    reference64: np.ndarray,
    port32: np.ndarray,
    port64: np.ndarray,
    elements: int,
) -> Measure:
    """Every distance between the four runs of one leaf, of equal shape; `elements` of the example's largest array."""
    if reference64.dtype.kind not in "fc":
        differing = float(np.mean(reference64 != port64)) if reference64.size else 0.0
        return Measure(path, differing, 0.0, 0.0, 1.0, 0.0, elements, exact=True, shape=reference64.shape)
    if reference64.dtype.kind == "c":
        reference32, reference64, port32, port64 = (_real(a) for a in (reference32, reference64, port32, port64))
    return Measure(
        path,
        gap=distance(port64, reference64),
        rounding=distance(reference32, reference64),
        port_rounding=distance(port32, port64),
        scale_reference=rms(reference64),
        port_error=distance(port32, reference64),
        elements=elements,
        nonfinite=nonfinite(reference64) and nonfinite(port64),
        shape=reference64.shape,
    )


def _real(array: np.ndarray) -> np.ndarray:
    return np.stack([array.real, array.imag], axis=-1)


def expected(m: Measure, scale: float) -> float:
    """The first expectation: 2^-29 of either side's float32 error, at least the rounding of one sum at this scale."""
    return max(
        SHRINK * finite(m.rounding),
        SHRINK * finite(m.port_rounding),
        U64 * finite(scale) * accumulation(m.elements),
    )


def precision(m: Measure, scale: float, noise: float = 0.0) -> float:
    """The port's float32 error over the reference's; about 1 for a right port.

    Where the reference's own float64 `noise` is far beyond a unit of rounding (ten of them are ordinary), what it
    becomes in float32 is no error of the port's.
    """
    floor = max(U32 * finite(scale), TINY32, noise / (AGREES * SHRINK))
    if not math.isfinite(m.port_error):
        return math.inf if math.isfinite(m.rounding) else 1.0
    return m.port_error / max(finite(m.rounding), floor)


def worst_index(a: np.ndarray, b: np.ndarray) -> tuple[int, ...]:
    """The index of the element at which two arrays of one shape differ most; one-sided NaN first."""
    if a.size == 0 or a.ndim == 0:
        return ()
    with np.errstate(all="ignore"):
        part = np.abs(a.astype(np.float64) - b.astype(np.float64))
    part[(a == b) | (np.isnan(a.astype(np.float64)) & np.isnan(b.astype(np.float64)))] = 0.0
    return tuple(int(i) for i in np.unravel_index(int(np.argmax(np.nan_to_num(part, nan=np.inf))), a.shape))


def ulp_twin(array: np.ndarray, rng: np.random.Generator, ulp: float) -> np.ndarray:
    """The array with every element moved by a random sign of one `ulp` relative; integers stay."""
    if array.dtype.kind != "f":
        return array
    signs = rng.integers(0, 2, size=array.shape, dtype=np.int8) * 2 - 1
    return array * (1.0 + signs * ulp)


def representable(array: np.ndarray) -> np.ndarray:
    """A float array rounded to what float32 can represent, as float32; other dtypes as they are."""
    return array.astype(np.float32) if array.dtype.kind == "f" else array
