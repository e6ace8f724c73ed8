"""Two functions on arrays judged by the statistic of DESIGN section 4: the yardstick of the translation tests.

A side is `run(bits, arrays) -> {path: array}`: it computes in float32 or float64 from NumPy arrays and returns NumPy
arrays of that precision. No tolerance: what is allowed follows from the four runs and from the reference's own noise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np

from equivalence.numerics import AGREES, DIFFERS, IMPRECISE, distance, expected, finite, measure, precision, ulp_twin

Arrays = Mapping[str, np.ndarray]
Side = Callable[[int, Arrays], Arrays]

NOISE_RUNS = 4
ULP = 2.0**-52


def disagreements(
    reference: Side, port: Side, arrays: Arrays, moved: Iterable[str] | None = None, scale: float = 0.0
) -> dict[str, float]:
    """Paths at which the port differs from the reference, with gap / expected gap; empty for a right port.

    Args:
        reference, port: the two sides.
        arrays: what both are given; floating ones are handed over as float32-representable values in the run's
            precision.
        moved: the arrays whose elements the reference's noise runs move by one ulp of float64; None is all floating
            ones. Leave out what reaches a tie or a kink on purpose (noise there would hide which side is chosen).
        scale: a size below which every path's scale may not fall (a loss gradient that cancels to zero).
    """
    given = {k: v.astype(np.float32) if v.dtype.kind == "f" else v for k, v in arrays.items()}

    def cast(bits: int, values: Arrays) -> Arrays:
        kind = {32: np.float32, 64: np.float64}[bits]
        return {k: v.astype(kind) if v.dtype.kind == "f" else v for k, v in values.items()}

    ours = {bits: dict(reference(bits, cast(bits, given))) for bits in (32, 64)}
    theirs = {bits: dict(port(bits, cast(bits, given))) for bits in (32, 64)}
    found: dict[str, float] = {}
    open_: dict[str, tuple[float, float]] = {}
    elements = max((v.size for v in given.values()), default=1)
    for path in sorted({*ours[64], *theirs[64]}):
        if path not in ours[64] or path not in theirs[64]:
            found[f"{path} (one side only)"] = np.inf
            continue
        four = [np.asarray(side[bits][path]) for side in (ours, theirs) for bits in (32, 64)]
        if len({a.shape for a in four}) > 1:
            found[f"{path} (shapes {[a.shape for a in four]})"] = np.inf
            continue
        m = measure(path, *four, max(elements, four[1].size))
        if m.exact:
            if m.gap:
                found[path] = np.inf
            continue
        size = max(m.scale_reference, scale)
        first = expected(m, size)
        if precision(m, size) > IMPRECISE:
            open_[f"{path} (float32)"] = precision(m, size), size
        if m.gap > AGREES * first:
            open_[path] = m.gap, first
    if not open_:
        return found
    noise: dict[str, float] = {}
    wide = cast(64, given)
    names = [k for k, v in given.items() if v.dtype.kind == "f"] if moved is None else list(moved)
    for number in range(NOISE_RUNS):
        rng = np.random.default_rng(number)
        near = {k: ulp_twin(v, rng, ULP) if k in names else v for k, v in wide.items()}
        run = reference(64, near)
        for path, value in ours[64].items():
            if path in run and np.asarray(value).dtype.kind == "f":
                noise[path] = max(noise.get(path, 0.0), finite(distance(np.asarray(run[path]), np.asarray(value))))
    for name, (gap, first) in open_.items():
        path = name.removesuffix(" (float32)")
        if name != path:
            m = measure(path, *(np.asarray(side[bits][path]) for side in (ours, theirs) for bits in (32, 64)), elements)
            ratio = precision(m, first, noise.get(path, 0.0))
            if ratio > IMPRECISE:
                found[name] = ratio
        elif not gap <= DIFFERS * max(first, noise.get(path, 0.0)):
            found[path] = gap / max(first, noise.get(path, 0.0)) if first or noise.get(path) else np.inf
    return found


def assert_agree(
    reference: Side, port: Side, arrays: Arrays, moved: Iterable[str] | None = None, scale: float = 0.0
) -> None:
    """Raise AssertionError naming every path that differs."""
    found = disagreements(reference, port, arrays, moved, scale)
    assert not found, "; ".join(f"{path}: {ratio:.3g} times what rounding explains" for path, ratio in found.items())
