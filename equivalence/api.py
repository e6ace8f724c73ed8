"""The Python interface: `verify` for a user's own pair, `verify_spec` for a model that has a spec."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from equivalence import losses
from equivalence.checks import chosen
from equivalence.errors import InputError, unknown
from equivalence.events import Event, Finished
from equivalence.frameworks import adapt
from equivalence.optimizers import PAIRS, resolve
from equivalence.pipeline import run
from equivalence.sources import EXAMPLES, PairSource, Parts, SpecSource, _array, as_inputs, compared, first_batch
from equivalence.spec import Spec
from equivalence.verdict import Report
from equivalence.weights import Mapping
from equivalence.work import Plan, Structure


def verify(
    reference: Any,
    port: Any,
    inputs: Any,
    targets: Any = (),
    loss: Any = None,
    optimizer: Any = None,
    train_step: tuple[Callable[..., Any], Callable[..., Any]] | None = None,
    weights: Mapping | None = None,
    port_weights: str = "copy",
    checks: Iterable[str] | None = None,
    outputs: Any = None,
    seed: int = 0,
    examples: int | None = None,
    resolution: float = 1e-6,
) -> Report:
    """Judge whether a JAX port is the same model as a PyTorch reference, from the reference's own weights.

    Args:
        reference: a `torch.nn.Module`.
        port: an `nnx.Module`, an `equinox.Module`, `equivalence.linen(module, variables)` or
            `equivalence.function(apply, params)`.
        inputs: a tuple or dict of example arrays, or a Hypothesis strategy of them. A dict is passed by keyword on both
            sides. The first example is the user's own weights and inputs, exactly.
        targets: arrays handed to the loss after the outputs.
        loss: (reference loss, port loss), each `callable(outputs, *targets)`, the name of a built-in pair, or a torch
            loss module alone (translated, and the report says so); None: a random cotangent.
        optimizer: (torch factory, Optax transformation), a torch factory alone (translated, and the report says so), a
            name, or None for Adam. A torch factory is a callable from parameters to an optimizer, or to an optimizer
            and its scheduler, which is stepped after every step.
        train_step: (reference step, port step), the user's own. torch and nnx: `(model, optimizer, *inputs, *targets)
            -> loss`; linen: `(state, *inputs, *targets) -> (state, loss)`.
        weights: a `Mapping`; None infers one from names and layer types.
        port_weights: "copy" moves the reference's weights to the port; "keep" judges those the port holds.
        checks: names of checks; None is all that apply.
        outputs: a key, an index or a callable that picks arrays out of what each side returns.
        seed: every random choice follows from it.
        examples: how many examples to try.
        resolution: the coarsest resolution at which a verdict may be `equivalent`.

    Returns the report; models, their weights and modes are left as they were found. Raises InputError for what cannot
    be used, MappingError where leaves do not fit.
    """
    if port_weights not in ("copy", "keep"):
        raise unknown("port_weights", str(port_weights), ("copy", "keep"))
    if train_step is not None and not (isinstance(train_step, tuple) and len(train_step) == 2):
        raise InputError("train_step= takes (reference_step, port_step)")
    alone = loss is not None and not isinstance(loss, (str, tuple))
    made = losses.resolve(loss)
    translated = type(loss).__name__ if alone else None
    parts = Parts(made, train_step, resolve(optimizer), _selector(outputs), translated)
    ours, theirs = adapt(reference), adapt(port)
    from hypothesis.strategies import SearchStrategy

    given = inputs if isinstance(inputs, SearchStrategy) else as_inputs(inputs)
    wanted = tuple(_array(value) for value in (targets if isinstance(targets, (tuple, list)) else (targets,)))
    mapping = theirs.mapping if weights is None else weights
    bound, comparison = compared(ours, theirs, mapping, parts, seed, first_batch(given, wanted, seed))
    if train_step is not None and theirs.own_step is None:
        raise InputError(
            f"train_step= is not supported for a port of {theirs.framework}: leave it out, or use nnx or linen"
        )
    structure = Structure(ours, theirs, bound, comparison, [], keep=port_weights == "keep")
    source = PairSource(structure, given, wanted, parts, _examples(examples), seed, inferred=mapping is None)
    plan = Plan(chosen(checks), resolution, seed, asked=checks is not None)
    return _report(run(source, plan))


def verify_spec(
    spec: Spec,
    *,
    ports: Iterable[str] | None = None,
    checks: Iterable[str] | None = None,
    optimizer: Any = None,
    examples: int | None = None,
    seed: int = 0,
    resolution: float = 1e-6,
    shrink: bool = True,
) -> Iterator[Event]:
    """Judge the ports of a spec (all of them, or those named); yields events, the last one `Finished`.

    `optimizer` is a name in `equivalence.optimizers.PAIRS`, "all" for each of them in turn, a pair, or None for the
    implementations' own. Raises InputError for names that are not there.
    """
    wanted = list(spec.ports if ports is None else ports)
    for port in wanted:
        if port not in spec.ports:
            raise unknown("port", port, spec.ports)
    if not wanted:
        raise InputError(f"{spec.name} has no port to judge")
    optimizers = tuple(PAIRS) if optimizer == "all" else (optimizer,)
    for named in optimizers:
        resolve(named)
    source = SpecSource(spec, tuple(wanted), optimizers, _examples(examples), seed)
    return run(source, Plan(chosen(checks), resolution, seed, shrink, checks is not None))


def _examples(count: int | None) -> int:
    if count is not None and count < 1:
        raise InputError(f"examples must be at least 1, not {count}")
    return EXAMPLES if count is None else count


def _selector(outputs: Any) -> Callable[[Any], Any]:
    """What `verify(outputs=...)` picks out of what a side returns."""
    if outputs is None:
        return _everything
    if callable(outputs):
        picked: Callable[[Any], Any] = outputs
        return picked
    if isinstance(outputs, str):
        return lambda raw: raw[outputs] if hasattr(raw, "keys") else getattr(raw, outputs)
    if isinstance(outputs, int):
        return lambda raw: raw[outputs]
    raise InputError("outputs= takes a key, an index or a callable")


def _everything(raw: Any) -> Any:
    return raw


def _report(events: Iterator[Event]) -> Report:
    for event in events:
        if isinstance(event, Finished):
            return event.report
    raise AssertionError("a run ends with Finished")
