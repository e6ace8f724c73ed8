"""torch.optim beside what one would write in Optax: a row an optimizer, and what quietly differs.

Strings are expressions that see `optax`; they are evaluated and measured where the documentation is made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class OptimizerRow:
    """One torch optimizer and its naive counterpart.

    Attributes:
        torch: the torch form, as one writes it.
        make: parameters -> that torch optimizer.
        form: the Optax form one would write first.
        exact: the plain Optax form that is the same function, None where there is none.
        differs: what differs between `torch` and `form`, in one line.
    """

    torch: str
    make: Callable[[Iterable[Any]], Any]
    form: str
    exact: str | None
    differs: str


def _row(name: str, options: dict[str, Any], form: str, exact: str | None, differs: str) -> OptimizerRow:
    def make(params: Iterable[Any]) -> Any:
        import torch

        return getattr(torch.optim, name)(params, **options)

    written = ", ".join(f"{key}={value!r}" for key, value in options.items())
    return OptimizerRow(f"torch.optim.{name}(params, {written})", make, form, exact, differs)


ROWS: tuple[OptimizerRow, ...] = (
    _row(
        "SGD",
        {"lr": 1e-2, "momentum": 0.9},
        "optax.sgd(1e-2, momentum=0.9)",
        "optax.sgd(1e-2, momentum=0.9)",
        "nothing: both are heavy balls",
    ),
    _row(
        "SGD",
        {"lr": 1e-2, "momentum": 0.9, "weight_decay": 1e-2},
        "optax.chain(optax.trace(0.9), optax.add_decayed_weights(1e-2), optax.scale_by_learning_rate(1e-2))",
        "optax.chain(optax.add_decayed_weights(1e-2), optax.sgd(1e-2, momentum=0.9))",
        "torch adds the decay to the gradient, before the momentum",
    ),
    _row(
        "SGD",
        {"lr": 1e-2, "momentum": 0.9, "dampening": 0.9},
        "optax.chain(optax.ema(0.9, debias=False), optax.scale_by_learning_rate(1e-2))",
        None,
        "torch takes the first gradient whole: dampening starts at the second step",
    ),
    _row(
        "Adam",
        {"lr": 1e-3, "weight_decay": 1e-2},
        "optax.adamw(1e-3, weight_decay=1e-2)",
        "optax.chain(optax.add_decayed_weights(1e-2), optax.adam(1e-3))",
        "torch's Adam adds the decay to the gradient; optax.adamw decouples it",
    ),
    _row(
        "Adam",
        {"lr": 1e-3, "amsgrad": True},
        "optax.amsgrad(1e-3)",
        None,
        "torch takes the maximum of the second moment before its bias is corrected, Optax after",
    ),
    _row(
        "AdamW",
        {"lr": 1e-3},
        "optax.adamw(1e-3)",
        "optax.adamw(1e-3, weight_decay=1e-2)",
        "torch decays by 1e-2 unless told, Optax by 1e-4",
    ),
    _row("Adamax", {"lr": 2e-3}, "optax.adamax(2e-3)", "optax.adamax(2e-3)", "nothing"),
    _row(
        "NAdam",
        {"lr": 2e-3},
        "optax.nadam(2e-3)",
        None,
        "torch raises the momentum on a schedule, beta1 (1 - 0.96^(0.004 t) / 2); Optax keeps beta1",
    ),
    _row(
        "RAdam",
        {"lr": 1e-3},
        "optax.radam(1e-3)",
        None,
        "torch adds eps before the second moment's bias is corrected, Optax after",
    ),
    _row(
        "SparseAdam",
        {"lr": 1e-3},
        "optax.adam(1e-3)",
        None,
        "torch moves only the rows that the sparse gradient holds, and adds eps before the bias is corrected",
    ),
    _row("Adadelta", {"lr": 1.0}, "optax.adadelta(1.0)", "optax.adadelta(1.0)", "nothing"),
    _row(
        "Adagrad",
        {"lr": 1e-2},
        "optax.adagrad(1e-2)",
        None,
        "torch starts the sum at 0 (Optax 0.1) and adds eps 1e-10 to the root (Optax 1e-7 inside it)",
    ),
    _row(
        "RMSprop",
        {"lr": 1e-2},
        "optax.rmsprop(1e-2)",
        "optax.rmsprop(1e-2, decay=0.99, eps_in_sqrt=False)",
        "torch decays by 0.99 (Optax 0.9) and adds eps to the root (Optax inside it)",
    ),
    _row(
        "Rprop",
        {"lr": 1e-2},
        "optax.rprop(1e-2)",
        None,
        "Optax takes every step one gradient late",
    ),
    _row(
        "ASGD",
        {"lr": 1e-2},
        "optax.sgd(1e-2)",
        None,
        "torch decays parameters and learning rate by lambd, a step late, and keeps an average; Optax has no ASGD",
    ),
    _row(
        "Adafactor",
        {"lr": 1e-2},
        "optax.adafactor(1e-2)",
        None,
        "torch factors every matrix (Optax from 128 on), bounds 1 / sqrt(t) by lr, and takes eps as a lower bound",
    ),
    _row(
        "Muon",
        {"lr": 1e-3},
        "optax.contrib.muon(1e-3)",
        None,
        "torch orthogonalizes in bfloat16, decays by 0.1 (Optax 0) and does not correct the momentum's bias",
    ),
    _row(
        "LBFGS",
        {"lr": 1.0},
        "optax.lbfgs(1.0, linesearch=None)",
        None,
        "torch takes up to 20 iterations a step, the first one scaled by the gradient's size; Optax takes one",
    ),
)
"""Every optimizer of torch.optim at its defaults or near them, in the order of its documentation's table of rules."""
