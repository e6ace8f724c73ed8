"""Pairs of a torch optimizer and the Optax transformation that takes the same steps.

A pair makes its two sides for a sequence of learning rates, one a step, so that a convention which only shows when
the learning rate moves is seen. Formulas: https://docs.pytorch.org/docs/stable/optim.html and
https://optax.readthedocs.io/en/latest/api/optimizers.html.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from equivalence.errors import InputError, unknown


@dataclass(frozen=True)
class OptimizerPair:
    """`reference(params, learning_rate) -> torch optimizer`, `port(learning_rate or schedule) -> Optax transformation`.

    `changes_rate` is False when the port's transformation is the user's own and its learning rate cannot be moved.
    `note` is what the report has to say about where the pair came from.
    """

    name: str
    summary: str
    learning_rate: float
    reference: Callable[[Iterable[Any], float], Any]
    port: Callable[[Any], Any]
    changes_rate: bool = True
    note: str | None = None

    def rates(self, steps: int) -> list[float]:
        """The learning rate of each step: representable in float32, moving up and down when the pair allows it."""
        factors = (1.0, 0.5, 1.5, 0.25, 2.0) if self.changes_rate else (1.0,)
        return [float(self.learning_rate * factors[step % len(factors)]) for step in range(steps)]


def schedule(rates: Sequence[float]) -> Any:
    """An Optax schedule that reads its learning rate off a list; past the end it keeps the last."""
    import jax.numpy as jnp

    table = np.asarray(rates, np.float64)
    return lambda count: jnp.take(jnp.asarray(table), count, mode="clip")


def _sgd(**options: Any) -> tuple[Callable[..., Any], Callable[[Any], Any]]:
    decay = options.get("weight_decay", 0.0)

    def reference(params: Iterable[Any], learning_rate: float) -> Any:
        import torch

        return torch.optim.SGD(params, lr=learning_rate, **options)

    def port(learning_rate: Any) -> Any:
        import optax

        # torch adds the decay to the gradient before the momentum sees it
        momentum = options.get("momentum", 0.0) or None
        return optax.chain(
            optax.add_decayed_weights(decay) if decay else optax.identity(),
            optax.sgd(learning_rate, momentum=momentum, nesterov=options.get("nesterov", False)),
        )

    return reference, port


def _adam(decoupled: bool = False, **options: Any) -> tuple[Callable[..., Any], Callable[[Any], Any]]:
    betas, eps = options.get("betas", (0.9, 0.999)), options.get("eps", 1e-8)
    decay = options.get("weight_decay", 0.0)

    def reference(params: Iterable[Any], learning_rate: float) -> Any:
        import torch

        kind = torch.optim.AdamW if decoupled else torch.optim.Adam
        return kind(params, lr=learning_rate, **{"weight_decay": 0.0, **options})

    def port(learning_rate: Any) -> Any:
        import optax

        if decoupled:
            return optax.adamw(learning_rate, b1=betas[0], b2=betas[1], eps=eps, weight_decay=decay)
        return optax.chain(
            optax.add_decayed_weights(decay) if decay else optax.identity(),
            optax.adam(learning_rate, b1=betas[0], b2=betas[1], eps=eps),
        )

    return reference, port


def _pair(name: str, summary: str, rate: float, sides: tuple[Callable[..., Any], Callable[..., Any]]) -> OptimizerPair:
    return OptimizerPair(name, summary, rate, *sides)


PAIRS: dict[str, OptimizerPair] = {
    pair.name: pair
    for pair in (
        _pair("sgd", "plain gradient descent", 0.05, _sgd()),
        _pair("momentum", "SGD, momentum 0.9 (heavy ball)", 0.02, _sgd(momentum=0.9)),
        _pair("nesterov", "SGD, Nesterov momentum 0.9", 0.02, _sgd(momentum=0.9, nesterov=True)),
        _pair(
            "sgd_decay",
            "SGD, momentum 0.9, weight decay 0.01 added to the gradient",
            0.02,
            _sgd(momentum=0.9, weight_decay=0.01),
        ),
        _pair("adam", "Adam", 0.01, _adam()),
        _pair("adam_decay", "Adam, weight decay 0.01 added to the gradient", 0.01, _adam(weight_decay=0.01)),
        _pair("adamw", "AdamW, decoupled weight decay 0.01", 0.01, _adam(decoupled=True, weight_decay=0.01)),
    )
}


def resolve(optimizer: Any) -> OptimizerPair:
    """The pair that `verify(optimizer=...)` names.

    Args:
        optimizer: None (Adam), a name in `PAIRS`, a pair (torch factory, Optax transformation), or a torch factory
            alone, a callable from parameters to an optimizer, which is translated.

    Raises InputError for anything else, and for a torch optimizer that has no translation yet.
    """
    if optimizer is None:
        return PAIRS["adam"]
    if isinstance(optimizer, OptimizerPair):
        return optimizer
    if isinstance(optimizer, str):
        if optimizer not in PAIRS:
            raise unknown("optimizer", optimizer, PAIRS)
        return PAIRS[optimizer]
    if isinstance(optimizer, tuple) and len(optimizer) == 2 and callable(optimizer[0]):
        factory, transformation = optimizer
        if not (hasattr(transformation, "init") and hasattr(transformation, "update")):
            raise InputError("optimizer=(torch factory, Optax transformation): the second has no init and update")
        return OptimizerPair(
            "yours", "your own pair", _rate(factory), lambda p, _: factory(p), lambda _: transformation, False
        )
    if callable(optimizer):
        return _translated(optimizer)
    raise InputError(
        "optimizer= takes None, a name, a torch factory, or (torch factory, Optax transformation),"
        f" not {type(optimizer).__name__}"
    )


def _probe(factory: Callable[..., Any]) -> Any:
    import torch

    try:
        return factory([torch.nn.Parameter(torch.zeros(1))])
    except Exception as error:
        raise InputError(f"the torch optimizer factory fails on one parameter: {error}") from None


def _rate(factory: Callable[..., Any]) -> float:
    return float(_probe(factory).param_groups[0]["lr"])


def _translated(factory: Callable[..., Any]) -> OptimizerPair:
    """A torch factory alone: its optimizer's options read and translated, and the report says so."""
    made = _probe(factory)
    kind, options = type(made).__name__, made.param_groups[0]
    ignored = {"params", "lr", "foreach", "fused", "capturable", "differentiable", "decoupled_weight_decay"}
    rest = {name: value for name, value in options.items() if name not in ignored and value not in (False, None)}
    if kind == "SGD" and type(made).__module__.startswith("torch.optim"):
        allowed, make = {"momentum", "dampening", "weight_decay", "nesterov"}, _sgd
    elif kind in ("Adam", "AdamW") and type(made).__module__.startswith("torch.optim"):
        allowed, make = {"betas", "eps", "weight_decay"}, _adam
    else:
        raise InputError(f"no translation of {kind} yet: pass optimizer=(torch factory, Optax transformation)")
    beyond = [name for name, value in rest.items() if name not in allowed or (name == "dampening" and value)]
    if beyond:
        raise InputError(
            f"no translation of {kind} with {', '.join(beyond)} yet: pass (torch factory, Optax transformation)"
        )
    settings = {name: value for name, value in rest.items() if name != "dampening"}
    decoupled = {"decoupled": True} if kind == "AdamW" else {}
    _, port = make(**decoupled, **settings)
    note = f"{kind} was translated to Optax by this project; it is not your own transformation that was checked"
    return OptimizerPair(
        kind.lower(),
        f"{kind}, translated",
        float(options["lr"]),
        lambda params, _: factory(params),
        port,
        True,
        note,
    )
