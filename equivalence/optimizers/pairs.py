"""Pairs of a torch optimizer and the Optax transformation that takes the same steps.

A pair makes its two sides for a sequence of learning rates, one a step, so that a convention which only shows when
the learning rate moves is seen. Where the port's side is not the user's own, it is torch's, translated (`to_optax`).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from equivalence.errors import InputError, unknown

if TYPE_CHECKING:
    from equivalence.weights import Bound


STEPS = 5
"""Optimizer steps that `step`, `optimizer_state` and `handover` compare, where the rule does not need more."""
YOURS = "yours"
"""The name of a pair that the user handed in, both sides."""
LOOKS_AHEAD = 2000
"""Steps within which a scheduler's first move is looked for."""


@dataclass(frozen=True)
class OptimizerPair:
    """`reference(params, learning_rate) -> torch optimizer`, `port(learning_rate or schedule) -> Optax transformation`.

    `port` of None translates the reference's. `scheduler` makes a torch scheduler for the reference's optimizer, which
    is stepped after each optimizer step. `changes_rate` is False when the learning rate is not ours to move: it is the
    user's own transformation, or a scheduler's. `note` is what the report has to say about where the pair came from.
    """

    name: str
    summary: str
    learning_rate: float
    reference: Callable[[Iterable[Any], float], Any]
    port: Callable[[Any], Any] | None = None
    changes_rate: bool = True
    note: str | None = None
    scheduler: Callable[[Any], Any] | None = None
    steps: int = STEPS
    """Optimizer steps after which all of its rule has been at work."""
    first_move: int | None = None
    """The first step at which the user's scheduler moves a rate that the user's own transformation must move too."""

    def rates(self, steps: int) -> list[float]:
        """The learning rate of each step: representable in float32, moving up and down when the pair allows it."""
        factors = (1.0, 0.5, 1.5, 0.25, 2.0) if self.changes_rate else (1.0,)
        return [float(self.learning_rate * factors[step % len(factors)]) for step in range(steps)]

    def transformation(self, rates: Sequence[float], trained: Mapping[str, tuple[int, ...]], bound: Bound) -> Any:
        """The port's transformation for a sequence of learning rates.

        Args:
            rates: one a step.
            trained: shapes of the reference's parameters that are trained, in its order.
            bound: where they are in the port.
        """
        rate = schedule(rates) if self.changes_rate else self.learning_rate
        if self.port is not None:
            return self.port(rate)
        return _translated(self, rate if self.changes_rate else None, trained, bound)


def _translated(pair: OptimizerPair, rate: Any, trained: Mapping[str, tuple[int, ...]], bound: Bound) -> Any:
    import optax
    import torch

    from equivalence.optimizers.translate import Names, translation
    from equivalence.weights import Leaves

    parameters = {name: torch.nn.Parameter(torch.empty(shape, device="meta")) for name, shape in trained.items()}
    optimizer = pair.reference(list(parameters.values()), pair.learning_rate)
    scheduler = rate if pair.scheduler is None else pair.scheduler(optimizer)
    names = Names(Leaves(dict(trained)), {}, frozenset())
    # One group moves every leaf that it is handed, frozen ones too: that they stay is for the port's own step to show.
    whole = len(optimizer.param_groups) == 1 and len(_params(optimizer)) == len(parameters)
    known = None if whole else {id(p): name for name, p in parameters.items()}
    made = translation(optimizer, scheduler, names, known, bound)
    return optax.GradientTransformationExtraArgs(made.init, made.update)


def schedule(rates: Sequence[float]) -> Any:
    """An Optax schedule that reads its learning rate off a list; past the end it keeps the last."""
    import jax.numpy as jnp

    # a list, made an array where it is traced: JAX would remember one NumPy table's dtype when x64 is switched
    table = [float(rate) for rate in rates]
    return lambda count: jnp.take(jnp.asarray(list(table)), count, mode="clip")


def _pair(name: str, summary: str, rate: float, kind: str, **options: Any) -> OptimizerPair:
    def reference(params: Iterable[Any], learning_rate: float) -> Any:
        import torch

        return getattr(torch.optim, kind)(params, lr=learning_rate, **options)

    return OptimizerPair(name, summary, rate, reference, steps=7 if kind == "RAdam" else STEPS)


PAIRS: dict[str, OptimizerPair] = {
    pair.name: pair
    for pair in (
        _pair("sgd", "plain gradient descent", 0.05, "SGD"),
        _pair("momentum", "SGD, momentum 0.9 (heavy ball)", 0.02, "SGD", momentum=0.9),
        _pair("nesterov", "SGD, Nesterov momentum 0.9", 0.02, "SGD", momentum=0.9, nesterov=True),
        _pair(
            "sgd_decay",
            "SGD, momentum 0.9, weight decay 0.01 added to the gradient",
            0.02,
            "SGD",
            momentum=0.9,
            weight_decay=0.01,
        ),
        _pair("adam", "Adam", 0.01, "Adam"),
        _pair("adam_decay", "Adam, weight decay 0.01 added to the gradient", 0.01, "Adam", weight_decay=0.01),
        _pair("adamw", "AdamW, decoupled weight decay 0.01", 0.01, "AdamW", weight_decay=0.01),
        _pair("amsgrad", "Adam with the largest second moment so far", 0.01, "Adam", amsgrad=True),
        _pair("adamax", "Adamax: Adam under the largest gradient", 0.01, "Adamax"),
        _pair("nadam", "NAdam: Adam with Nesterov momentum on torch's momentum schedule", 0.01, "NAdam"),
        _pair("radam", "RAdam: Adam that starts as SGD with momentum", 0.01, "RAdam"),
        _pair("rmsprop", "RMSprop, eps outside the square root", 0.005, "RMSprop"),
        _pair("rmsprop_centered", "RMSprop, centered, momentum 0.9", 0.005, "RMSprop", centered=True, momentum=0.9),
        _pair("adagrad", "Adagrad", 0.05, "Adagrad"),
        _pair("adadelta", "Adadelta", 1.0, "Adadelta"),
        _pair("rprop", "Rprop: signs of the gradients alone", 0.01, "Rprop"),
        _pair("asgd", "ASGD: averaged gradient descent", 0.05, "ASGD"),
        _pair("adafactor", "Adafactor: second moments of rows and columns", 0.01, "Adafactor"),
    )
}
"""Optimizers that suit any model. Muon moves matrices only, SparseAdam rows, LBFGS takes a closure: pass them as your
own torch factory, and they are translated."""


def resolve(optimizer: Any) -> OptimizerPair:
    """The pair that `verify(optimizer=...)` names.

    Args:
        optimizer: None (Adam), a name in `PAIRS`, a pair (torch factory, Optax transformation), or a torch factory
            alone, which is translated: a callable from parameters to an optimizer, or to (optimizer, scheduler).

    Raises InputError for anything else, and for a torch optimizer that has no translation.
    """
    if optimizer is None:
        return PAIRS["adam"]
    if isinstance(optimizer, OptimizerPair):
        return optimizer
    if isinstance(optimizer, str):
        if optimizer not in PAIRS:
            raise unknown("optimizer", optimizer, PAIRS)
        return PAIRS[optimizer]
    if hasattr(optimizer, "init") and hasattr(optimizer, "update"):
        raise InputError(
            "an Optax transformation alone has no reference: give optimizer=(torch factory, transformation)"
        )
    if isinstance(optimizer, tuple) and len(optimizer) == 2 and callable(optimizer[0]):
        factory, transformation = optimizer
        if not (hasattr(transformation, "init") and hasattr(transformation, "update")):
            raise InputError("optimizer=(torch factory, Optax transformation): the second has no init and update")
        probed, its_scheduler = _probe(factory)
        rate, steps = float(probed.param_groups[0]["lr"]), horizon(probed)
        reference, scheduler = _sides(factory)
        return OptimizerPair(
            YOURS,
            "your own pair",
            rate,
            reference,
            lambda _: transformation,
            changes_rate=False,
            scheduler=scheduler,
            steps=steps,
            first_move=first_move(probed, its_scheduler),
        )
    if callable(optimizer):
        return _read(optimizer)
    raise InputError(
        "optimizer= takes None, a name, a torch factory, or (torch factory, Optax transformation),"
        f" not {type(optimizer).__name__}"
    )


def horizon(optimizer: Any) -> int:
    """Steps after which all of an optimizer's rule has been at work: RAdam rectifies from its sixth on, or later."""
    if type(optimizer).__name__ != "RAdam":
        return STEPS
    from equivalence.optimizers.rules.adam_corrections import first_rectified

    return max([STEPS, *(1 + (first_rectified(group["betas"][1]) or 0) for group in optimizer.param_groups)])


def first_move(optimizer: Any, scheduler: Any) -> int | None:
    """The first count at which a scheduler moves any group's rate, or None where it does not within a long while."""
    if scheduler is None:
        return None

    def rates() -> list[Any]:
        return [(float(g["lr"]), g.get("momentum"), g.get("betas")) for g in optimizer.param_groups]

    start = rates()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch warns of a scheduler stepped before its optimizer
        for count in range(1, LOOKS_AHEAD):
            try:
                scheduler.step()
            except ValueError:  # a OneCycleLR that is through
                return None
            if rates() != start:
                return count
    return None


def _probe(factory: Callable[..., Any]) -> tuple[Any, Any]:
    """`(optimizer, scheduler or None)` of a factory, on a few small matrices."""
    import torch

    given = [torch.nn.Parameter(torch.zeros(2, columns)) for columns in (1, 2, 3, 4)]
    try:
        made = factory(list(given))
    except Exception as error:
        raise InputError(f"the torch optimizer factory fails on a few small matrices: {error}") from None
    optimizer, scheduler = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise InputError(
            f"a torch optimizer factory returns an optimizer, or (optimizer, scheduler), not {type(optimizer).__name__}"
        )
    if scheduler is not None and not hasattr(scheduler, "step"):
        raise InputError(
            f"a torch optimizer factory returns (optimizer, scheduler), the second is not {type(scheduler).__name__}"
        )
    if not {id(p) for p in _params(optimizer)} <= {id(p) for p in given}:
        raise InputError(
            "the torch optimizer factory makes an optimizer of other parameters than it is given: verify trains a copy"
            " of the model, so write lambda params: torch.optim.Adam(params)"
        )
    if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
        raise InputError(
            "ReduceLROnPlateau is stepped with a metric, and verify has none to give it: leave it out here, and"
            " translate it with to_optax(optimizer, scheduler=...)"
        )
    return optimizer, scheduler


def _sides(factory: Callable[..., Any]) -> tuple[Callable[..., Any], Callable[..., Any] | None]:
    """A factory's optimizer, and its scheduler made for such an optimizer."""
    scheduled = _probe(factory)[1] is not None
    if not scheduled:
        return (lambda params, _: factory(params)), None

    def reference(params: Iterable[Any], _: float) -> Any:
        optimizer, scheduler = factory(params)
        optimizer.equivalence_scheduler = scheduler
        return optimizer

    return reference, lambda optimizer: optimizer.equivalence_scheduler


def _read(factory: Callable[..., Any]) -> OptimizerPair:
    """A torch factory alone: its optimizer is translated, and the report says so."""
    from equivalence.optimizers.translate import translation

    optimizer, scheduler = _probe(factory)
    kind = type(optimizer).__name__
    if hasattr(optimizer, "param_groups") and kind == "SparseAdam":
        raise InputError(
            "SparseAdam moves the rows of a sparse gradient, and JAX's gradients are dense: to_optax translates it,"
            " with received= saying which rows; verify has no such rows to hand over"
        )
    names = _single(optimizer)
    translation(optimizer, scheduler, names, {id(p): str(i) for i, p in enumerate(_params(optimizer))}, None)
    note = f"{kind} was translated to Optax by this project; it is not your own transformation that was checked"
    reference, made = _sides(factory)
    rate = float(optimizer.param_groups[0]["lr"])
    moves = made is None and len({float(group["lr"]) for group in optimizer.param_groups}) == 1
    named = kind.lower(), f"{kind}, translated"
    return OptimizerPair(*named, rate, reference, None, moves, note, made, horizon(optimizer))


def _params(optimizer: Any) -> list[Any]:
    return [parameter for group in getattr(optimizer, "param_groups", ()) for parameter in group["params"]]


def _single(optimizer: Any) -> Any:
    """Names for a probed optimizer's parameters."""
    from equivalence.optimizers.translate import Names
    from equivalence.weights import Leaves

    return Names(Leaves({str(i): tuple(p.shape) for i, p in enumerate(_params(optimizer))}), {}, frozenset())
