"""The checks that need no run: do the two sides hold the same leaves, and do weights survive the way there and back?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from equivalence.frameworks.subject import Subject
from equivalence.numerics import U64, accumulation, distance, ratio, rms
from equivalence.verdict import CheckReport
from equivalence.weights import Bound

EXACT = 0.0
"""The resolution of an exact comparison."""
ONE_ULP = 2.0**-23
"""The resolution of a bit-exact comparison of float32: one ulp, relative, at most."""


def structure(
    reference: Subject,
    port: Subject,
    bound: Bound,
    outputs: tuple[Mapping[str, tuple[tuple[int, ...], str]], Mapping[str, tuple[tuple[int, ...], str]]],
) -> CheckReport:
    """Leaves without counterpart, params that are buffers on the other side, ties kept on one side only, and the tree,
    shapes and kinds of the outputs (path -> shape, kind; reference and port)."""
    problems = [*_leaves(reference, port, bound), *_ties(reference, port, bound), *_outputs(*outputs)]
    return CheckReport(
        "structure",
        "divergent" if problems else "equivalent",
        gap=float(len(problems)),
        expected_gap=0.0,
        resolution=EXACT,
        examples=1,
        worst=problems[0][0] if problems else None,
        message="; ".join(text for _, text in problems) or None,
    )


def _leaves(reference: Subject, port: Subject, bound: Bound) -> list[tuple[str, str]]:
    found = []
    ours, theirs = bound.without_counterpart()
    learned = [p for p in ours if p in reference.params and p not in reference.frozen]
    found += [(p, f"the port has no counterpart of the parameter {p}") for p in learned]
    found += [(p, f"the reference has no counterpart of the port's parameter {p}") for p in theirs if p in port.params]
    for move in bound.moves:
        for source in move.sources:
            for target in move.targets:
                kept = (source in reference.params, target in port.params)
                if kept[0] != kept[1] and source not in reference.aliases and target not in port.aliases:
                    names = {True: "parameter", False: "buffer"}
                    text = f"{source} is a {names[kept[0]]}, the port's {target} is a {names[kept[1]]}"
                    found.append((source, text))
    return found


def _ties(reference: Subject, port: Subject, bound: Bound) -> list[tuple[str, str]]:
    found = []
    for alias, kept in reference.aliases.items():
        ends = {port.aliases.get(t, t) for path in (alias, kept) for t in bound.targets_of(path)}
        if len(ends) > 1:
            found.append(
                (alias, f"{alias} and {kept} are one leaf in the reference, {', '.join(sorted(ends))} in the port")
            )
    back = bound.inverse()
    for alias, kept in port.aliases.items():
        ends = {reference.aliases.get(s, s) for path in (alias, kept) for s in back.targets_of(path)}
        if len(ends) > 1:
            found.append(
                (sorted(ends)[0], f"{', '.join(sorted(ends))} are two leaves in the reference, one in the port")
            )
    return found


def _outputs(
    ours: Mapping[str, tuple[tuple[int, ...], str]], theirs: Mapping[str, tuple[tuple[int, ...], str]]
) -> list[tuple[str, str]]:
    found = [(p, f"the port returns no {p}") for p in ours if p not in theirs]
    found += [(p, f"the reference returns no {p}") for p in theirs if p not in ours]
    for path in ours:
        if path in theirs and ours[path][0] != theirs[path][0]:
            found.append((path, f"{path} has shape {ours[path][0]} in the reference, {theirs[path][0]} in the port"))
        elif path in theirs and (ours[path][1] == "f") != (theirs[path][1] in "fV"):
            found.append(
                (path, f"{path} is of kind {ours[path][1]!r} in the reference, {theirs[path][1]!r} in the port")
            )
    return found


def roundtrip(reference: Subject, port: Subject, bound: Bound, keep: bool) -> CheckReport:
    """Reference leaves moved to the port's own dtypes and back, compared bit for bit; with `keep` what the port holds
    already against what the mapping would have put there. Rules that change values are compared in float64."""
    weights = {**reference.params, **reference.buffers}
    held = {**port.params, **port.buffers}
    changing = {t for move in bound.moves if move.rule.change is not None for t in move.targets}
    there = {p: _stored(a, held[p]) for p, a in bound.forward(weights).items()}
    if keep:
        pairs = {path: (there[path], held[path]) for path in there}
    else:
        back = bound.backward(there)
        pairs = {path: (weights[path], back[path]) for path in back if path in weights}
        changing = {s for move in bound.moves if move.rule.change is not None for s in move.sources}
    worst, largest, expected, problems = None, 0.0, 0.0, []
    for path, (wanted, found) in pairs.items():
        if path in changing and not keep:
            wanted, found = _in_float64(path, weights, bound)
            expected = U64 * rms(wanted) * accumulation(wanted.size)
            same = ratio(distance(found, wanted), expected) <= 10.0
        else:
            same = wanted.dtype == found.dtype and wanted.tobytes() == np.ascontiguousarray(found).tobytes()
        if not same:
            size = rms(_wide(wanted)) or 1.0
            gap = distance(_wide(found), _wide(wanted)) / size
            differing = int(np.sum(_wide(found) != _wide(wanted)))
            problems.append(f"{path}: {differing} of {wanted.size} elements differ")
            if worst is None or gap > largest:
                worst, largest = path, gap
    return CheckReport(
        "roundtrip",
        "divergent" if problems else "equivalent",
        gap=largest,
        expected_gap=0.0,
        resolution=ONE_ULP,
        examples=1,
        worst=worst,
        message="; ".join(problems) or None,
    )


def _stored(array: np.ndarray, like: np.ndarray) -> np.ndarray:
    """What remains of an array once it is stored in the dtype of the port's leaf."""
    return np.ascontiguousarray(array).astype(like.dtype).astype(array.dtype) if array.dtype != like.dtype else array


def _wide(array: np.ndarray) -> np.ndarray:
    return np.asarray(array).astype(np.float64)


def _in_float64(path: str, weights: Mapping[str, Any], bound: Bound) -> tuple[np.ndarray, np.ndarray]:
    wide = {name: _wide(value) if value.dtype.kind == "f" else value for name, value in weights.items()}
    return wide[path], bound.backward(bound.forward(wide))[path]
