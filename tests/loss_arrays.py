"""Arrays for every loss: ordinary ones, ties and kinks, and extremes, of the same shapes, so nothing compiles anew."""

from __future__ import annotations

import numpy as np

KINDS = ("ordinary", "ties", "extremes")
GRID = [-2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0]
FAR = [*GRID, np.inf, -np.inf, np.nan]

Rng = np.random.Generator
Drawn = dict[str, np.ndarray]


def real(rng: Rng, kind: str, *shape: int) -> np.ndarray:
    pool = {"ties": GRID, "extremes": FAR}.get(kind)
    return rng.choice(pool, shape) if pool else 2 * rng.standard_normal(shape)


def pair(rng: Rng, kind: str) -> Drawn:
    return {"x": real(rng, kind, 2, 3, 4, 5), "y": real(rng, kind, 2, 3, 4, 5)}


def probabilities(rng: Rng, kind: str) -> Drawn:
    def some() -> np.ndarray:
        pool = {"ties": [0.0, 0.5, 1.0], "extremes": [0.0, 1e-30, 1e-13, 1e-12, 0.25, 1.0]}.get(kind)
        return rng.choice(pool, (2, 3, 4, 5)) if pool else rng.uniform(0.01, 0.99, (2, 3, 4, 5))

    return {"x": some(), "y": some(), "w": rng.uniform(0.5, 2, (4, 5))}


def binary(rng: Rng, kind: str) -> Drawn:
    shares = probabilities(rng, "ties" if kind != "ordinary" else kind)
    return {"x": real(rng, kind, 2, 3, 4, 5), "y": shares["y"], "w": shares["w"], "v": rng.uniform(2, 4, (4, 5))}


def logs(values: np.ndarray, axis: int) -> np.ndarray:
    return values - np.log(np.exp(values).sum(axis, keepdims=True))


def classes(rng: Rng, kind: str) -> Drawn:
    x = real(rng, "ordinary" if kind == "extremes" else kind, 3, 4, 2, 5)
    if kind == "extremes":
        x[rng.random(x.shape) < 0.2] = -np.inf
        x[0, :, 0, 0] = 1000.0, 2000.0, -1e5, 0.0
    y = rng.integers(0, 4, (3, 2, 5))
    y[rng.random(y.shape) < (1.0 if rng.random() < 0.2 else 0.3)] = -1
    soft = np.exp(logs(rng.standard_normal(x.shape), 1))
    soft[rng.random(x.shape) < 0.2] = 0.0
    return {"x": x, "y": y, "s": soft, "w": rng.uniform(0.5, 2, 4)}


def log_classes(rng: Rng, kind: str) -> Drawn:
    return {**classes(rng, kind), "x": real(rng, kind, 3, 4, 2, 5)}


def signs(rng: Rng, kind: str) -> Drawn:
    return {
        "x": real(rng, kind, 2, 3, 4, 5),
        "y": rng.choice([1, -1] if kind == "ordinary" else [1, -1, 0], (2, 3, 4, 5)),
    }


def logistic(rng: Rng, kind: str) -> Drawn:
    return {"x": real(rng, kind, 2, 3, 4, 5), "y": rng.choice([1.0, -1.0], (2, 3, 4, 5))}


def normals(rng: Rng, kind: str) -> Drawn:
    v = rng.uniform(0.5, 2, (2, 3, 4)) if kind == "ordinary" else rng.choice([0.0, 1e-9, 0.25, 1.0], (2, 3, 4))
    return {**{k: real(rng, kind, 2, 3, 4) for k in ("x", "y")}, "v": v}


def counts(rng: Rng, kind: str) -> Drawn:
    y = rng.integers(0, 9, (2, 3, 4, 5)).astype(float)
    x = real(rng, kind, 2, 3, 4, 5)
    return {"x": x, "y": y, "r": np.abs(x)}


def divergences(rng: Rng, kind: str) -> Drawn:
    y = rng.uniform(0.01, 0.99, (2, 3, 4, 5)) if kind == "ordinary" else rng.choice([0.0, 0.25, 1.0, 2.0], (2, 3, 4, 5))
    return {"x": real(rng, kind, 2, 3, 4, 5), "y": y}


def ranked(rng: Rng, kind: str) -> Drawn:
    return {"a": real(rng, kind, 2, 3, 4), "b": real(rng, kind, 2, 3, 4), "y": rng.choice([1.0, -1.0], (2, 3, 4))}


def vectors(rng: Rng, kind: str) -> Drawn:
    def some() -> np.ndarray:
        x = rng.choice([-1.0, 0.0, 1.0], (5, 3)) if kind == "ties" else real(rng, kind, 5, 3)
        if kind != "ordinary":
            x[rng.random(5) < 0.3] = 0.0
        return x

    return {"a": some(), "b": some(), "y": rng.choice([1.0, -1.0, 0.0], 5)}


def triplets(rng: Rng, kind: str) -> Drawn:
    whole = {name: real(rng, kind, 5, 3) for name in "apn"}
    if kind == "ties":
        whole["p"][0] = whole["a"][0]
        whole["n"][1] = whole["a"][1]
    return whole


def apart(rng: Rng, kind: str) -> Drawn:
    """No ties but equal vectors: a root rounds, and a margin that is met in one library is missed in the other."""
    whole = triplets(rng, "ordinary")
    if kind != "ordinary":
        whole["p"][0] = whole["a"][0]
        whole["n"][1] = whole["a"][1]
    return whole


def scores(rng: Rng, kind: str) -> Drawn:
    lists = rng.integers(-1, 4, (5, 4))
    return {"x": real(rng, kind, 5, 4), "y": rng.integers(0, 4, 5), "l": lists, "w": rng.uniform(0.5, 2, 4)}


def sequences(rng: Rng, kind: str) -> Drawn:
    x = logs(rng.standard_normal((7, 3, 5)), 2)
    if kind == "extremes":
        x[rng.random(x.shape) < 0.05] = -np.inf
    y = rng.integers(1, 5, (3, 4)) if kind == "ordinary" else np.where(rng.random((3, 4)) < 0.5, 1, 2)
    low = 6 if kind == "ordinary" else 0
    return {"x": x, "y": y, "t": rng.integers(low, 8, 3), "s": rng.integers(0, 4 if kind == "ordinary" else 5, 3)}


def layer(rng: Rng, kind: str) -> Drawn:
    return {
        **{"x": real(rng, "ordinary", 5, 3), "w": real(rng, "ordinary", 4, 2, 3), "b": real(rng, "ordinary", 4, 2)},
        **{"y": rng.integers(0, 4, (5, 2)), "v": rng.uniform(0.5, 2, 4)},
    }


def clusters(rng: Rng, kind: str) -> Drawn:
    shapes = {"head": (4, 8), "hb": (4,), "a0": (4, 8), "b0": (3, 4), "a1": (2, 8), "b1": (5, 2), "x": (6, 8)}
    return {**{k: rng.standard_normal(v) for k, v in shapes.items()}, "y": rng.integers(0, 10, 6)}
