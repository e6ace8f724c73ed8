"""The gaps of the dictionary of layers, measured: an entry's example in torch and in both translations, in float64."""

from __future__ import annotations

from typing import Any

import numpy as np

from equivalence.frameworks.torch import subject
from equivalence.layers.calls import arrays_of, batch_of, closed, present
from equivalence.layers.figures import Line
from equivalence.layers.registry import Entry
from equivalence.layers.translation import FRAMEWORKS, translate
from equivalence.numerics import distance, expected, measure
from equivalence.observation import Observation
from equivalence.runtimes.jax import JaxRunner
from equivalence.runtimes.torch import TorchRunner


def line(entry: Entry) -> Line:
    """The line of an entry, measured. Loads torch and jax."""
    import torch

    if entry.example is None:
        words = f"the leaves and layers of nn.{entry.name}, translated"
        return Line(
            entry.name, entry.family, f"nn.{entry.name}", words, words, entry.differs, (), None, None, None
        )  # fmt: skip
    torch.manual_seed(0)
    module = eval(entry.example.torch, {"nn": torch.nn, "torch": torch})
    inputs = _inputs(entry)
    forms = {to: translate(module, to) for to in FRAMEWORKS}
    own = tuple(to for to, made in forms.items() if made.own)
    found = [_gaps(module, inputs, to, train) for to in FRAMEWORKS for train in (False, True)]
    forward, backward, rounding = (max(values) for values in zip(*found, strict=True))
    return Line(
        entry.name, entry.family, entry.example.torch, forms["nnx"].written, forms["linen"].written,
        entry.differs, own,
        forward, backward, rounding,
    )  # fmt: skip


def _inputs(entry: Entry) -> tuple[Any, ...]:
    assert entry.example is not None
    rng = np.random.default_rng(0)
    given = entry.example.inputs
    if callable(given):
        return tuple(given(rng))
    return tuple(rng.standard_normal(shape).astype(np.float32) for shape in given)


def _gaps(module: Any, inputs: tuple[Any, ...], to: str, train: bool) -> tuple[float, float, float]:
    """`(forward, backward, what rounding explains)`, each relative to the scale of its array."""
    ours, theirs = subject(module), translate(module, to).subject
    assert theirs.mapping is not None
    bound = theirs.mapping.bind(ours.leaves, theirs.leaves)
    reference = TorchRunner(closed(ours, inputs, {}), None, present)
    port = JaxRunner(closed(theirs, inputs, {}), bound, None, present)
    rng = np.random.default_rng(1)
    weights: Observation = {}
    for path, value in {**ours.params, **ours.buffers}.items():
        noise = 0.3 * rng.standard_normal(value.shape).astype(np.float32)
        weights[path] = value + (np.abs(noise) if "var" in path else noise) if value.dtype.kind == "f" else value
    arrays = arrays_of(inputs, {})
    batch = batch_of(arrays)
    seen = {bits: reference.observe(bits, weights, batch, train, 0) for bits in (32, 64)}
    made = {bits: port.observe(bits, weights, batch, train, 0, seen[bits]) for bits in (32, 64)}
    forward = backward = rounding = 0.0
    elements = max(array.size for array in (*arrays.values(), *weights.values()))
    for path, value in seen[64].values.items():
        four = (seen[32].values[path], value, made[32].values[path], made[64].values[path])
        held = measure(path, *four, max(elements, value.size))
        if held.exact:
            gap, explained = float(held.gap > 0), 0.0
        else:
            scale = max(held.scale_reference, float(np.finfo(np.float32).tiny))
            gap, explained = distance(four[3], value) / scale, expected(held, held.scale_reference) / scale
        rounding = max(rounding, explained)
        if "gradients" in path:
            backward = max(backward, gap)
        else:
            forward = max(forward, gap)
    return forward, backward, rounding
