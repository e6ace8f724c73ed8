"""The `handover` check: a run begun on one side and gone on with on the other, against the reference's whole run.

Weights, buffers, the optimizer's state and the position of its schedule are moved after some steps, reference to port
and port to reference; from there on every step must land where the reference alone would have landed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from equivalence.checks import REGISTRY
from equivalence.comparison import Comparison
from equivalence.judgement import Finding
from equivalence.observation import Observation
from equivalence.runs import Example, Four, Run, finite, port_stepped, stepped

if TYPE_CHECKING:
    from equivalence.optimizers.trees import Layout
    from equivalence.runtimes.jax_steps import JaxStepper
    from equivalence.runtimes.torch_steps import TorchStepper

BITS = (32, 64)

Plant = tuple[str, float, int]
"""A reference leaf, the relative size of the change, and the seed of its direction."""


def hand_over_at(comparison: Comparison, example: Example) -> int:
    """The steps before the handover: drawn from the example's seed, at least one on either side of it."""
    return 1 + example.seed % (comparison.steps - 1)


def handed_over(comparison: Comparison, example: Example) -> Iterator[list[Finding]]:
    """The findings of each step after the handover, in both directions.

    Raises InputError where the optimizer's state cannot be moved, and DrawsDiffer as every run of the port.
    """
    from equivalence.runtimes.jax_steps import JaxStepper

    rates, pair = comparison.optimizer.rates(comparison.steps), comparison.optimizer
    reference = comparison.stepping_reference
    whole = {b: reference.stepper(b, example.weights, pair, rates) for b in BITS}
    begun = {b: JaxStepper(comparison.program(b), example.port_weights) for b in BITS}
    gone_on: dict[str, dict[int, Any]] = {}
    at, where = hand_over_at(comparison, example), ("handover", example.index)
    for number in range(comparison.steps):
        batch, seed = example.batches[number % len(example.batches)], example.step_seed(number)
        if not finite(whole[64].parameters()):
            return
        seen = {bits: stepper.step(batch, seed) for bits, stepper in whole.items()}
        if number < at:
            for stepper in begun.values():
                stepper.step(batch, seen[64])
            if number + 1 == at:
                gone_on = {
                    "to_port": {b: to_port(comparison, whole[b], at) for b in BITS},
                    "to_reference": {b: to_reference(comparison, begun[b], whole[b], at, rates) for b in BITS},
                }
            continue
        ours = {b: seen[b].values | stepped(whole[b]) for b in BITS}
        for direction, runs in gone_on.items():
            theirs: dict[int, Observation] = {}
            for b, run in runs.items():
                if direction == "to_port":
                    theirs[b] = run.step(batch, seen[64]).values | port_stepped(run, whole[b], set())
                else:
                    theirs[b] = run.step(batch, seed).values | stepped(run)
            four = Four(ours[32], ours[64], theirs[32], theirs[64])
            yield _findings(comparison, four, where, f"{direction}.step{number + 1}", example)


def planted_runs(
    comparison: Comparison, example: Example, leaf: str | None, size: float
) -> Iterator[tuple[int, Observation]]:
    """What the port shows in float64 after it took over, one step at a time: as it is, or with what the optimizer keeps
    of one reference leaf (its weights, where it keeps nothing) changed by `size` of itself at the handover."""

    served, at = comparison.served(example), hand_over_at(comparison, example)
    rates = comparison.optimizer.rates(comparison.steps)
    begun = comparison.stepping_reference.stepper(64, example.weights, comparison.optimizer, rates)
    for number in range(at):
        begun.step(example.batches[number % len(example.batches)], example.step_seed(number))
    run: JaxStepper = to_port(comparison, begun, at, None if leaf is None else (leaf, size, example.seed))
    for number in range(at, comparison.steps):
        batch = example.batches[number % len(example.batches)]
        found = run.step(batch, served[number]).values | port_stepped(run, begun, set())
        yield number - at, {f"to_port.step{number + 1}.{path}": value for path, value in found.items()}


def _findings(comparison: Comparison, four: Four, where: Any, at: str, example: Example) -> list[Finding]:
    run = comparison.seen.get(("observe", example.index, True), Run())
    found = []
    for path, m in four.measures(example.elements).items():
        family = REGISTRY["handover"].claims(path)
        if family is not None:
            found.append(Finding("handover", where, f"{at}.{path}", family, m, example.ordinary, size=run.size))
    return found


def to_port(comparison: Comparison, run: TorchStepper, steps: int, plant: Plant | None = None) -> JaxStepper:
    """The port, where the reference's run is; with a plant in what was moved of one leaf, where one is asked for."""
    from equivalence.optimizers.state import moved_state
    from equivalence.optimizers.trees import Layout
    from equivalence.runtimes.jax_steps import JaxStepper

    layout = Layout(comparison.stepping_port.bound)
    weights = {**run.parameters(), **run.held_buffers()}
    if plant is not None and not any(plant[0] in leaves for leaves in run.optimizer_state().values()):
        weights[plant[0]] = _changed(weights[plant[0]], plant)
    made = JaxStepper(comparison.program(run.bits), weights)

    def optimizer(state: Any, params: Any) -> Any:
        recorder, own = state
        moved = moved_state(run.named(), own, params, layout, steps=steps)
        return recorder, moved if plant is None else _planted(moved, params, layout, plant)

    made.resume(optimizer)
    return made


def _planted(state: Any, params: Any, layout: Layout, plant: Plant) -> Any:
    """An Optax state with every floating array that belongs to one leaf changed."""
    import jax
    import jax.numpy as jnp

    from equivalence.optimizers.trees import entries

    places = {plant[0], *layout.targets(plant[0])}

    def one(entry: Any) -> Any:
        floating = jnp.issubdtype(entry.array.dtype, jnp.floating)
        return (
            jnp.asarray(_changed(np.asarray(entry.array), plant), entry.array.dtype)
            if entry.leaf in places and floating
            else entry.array
        )

    structure = jax.tree_util.tree_structure(state)
    return jax.tree_util.tree_unflatten(structure, [one(entry) for entry in entries(state, params)])


def _changed(value: np.ndarray, plant: Plant) -> np.ndarray:
    _, size, seed = plant
    made: np.ndarray = value * (1.0 + size * np.random.default_rng((seed, 5)).standard_normal(value.shape))
    return made


def to_reference(
    comparison: Comparison, run: JaxStepper, whole: TorchStepper, steps: int, rates: list[float]
) -> TorchStepper:
    """The reference, where the port's run is; buffers that the port does not have are those of the `whole` run."""
    from equivalence.optimizers.state import put_state
    from equivalence.optimizers.torch_side import step_on
    from equivalence.optimizers.trees import Layout

    reference, port = comparison.stepping_reference, comparison.stepping_port
    buffers = run.held_buffers()
    weights = {**reference.subject.params, **whole.held_buffers(), **run.parameters(), **buffers}
    made = reference.stepper(run.bits, weights, comparison.optimizer, rates)

    def optimizer(named: Any, scheduler: Any) -> None:
        put_state(named, run.state()[1], port.subject.params, Layout(port.bound), steps=steps)
        if scheduler is not None:
            step_on(scheduler, steps)

    made.resume(buffers, steps, optimizer)
    return made
