"""Wrong losses, one fault each, and the demand that the comparison of test_losses.py sees every one of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from equivalence import losses
from equivalence.losses import sequence
from tests.agreement import Side, disagreements
from tests.loss_cases import CASES, drawn, jax_side, torch_side

SEEDS = 3


@dataclass(frozen=True)
class Fault:
    """A case, the kind of arrays that shows the fault, one call, and the loss that is wrong."""

    case: str
    kind: str
    call: str
    loss: Callable[..., Any]


def _replaced(name: str, **options: Any) -> Callable[..., Any]:
    """The right loss with options that are not the caller's."""

    def wrong(*inputs: Any, **given: Any) -> Any:
        return getattr(losses, name)(*inputs, **{**given, **options})

    return wrong


def _scaled(name: str, factor: float) -> Callable[..., Any]:
    return lambda *inputs, **given: factor * getattr(losses, name)(*inputs, **given)


def _swapped(name: str) -> Callable[..., Any]:
    return lambda a, b, *rest, **given: getattr(losses, name)(b, a, *rest, **given)


def _hinge(rectify: Callable[[Any], Any]) -> Callable[..., Any]:
    return lambda a, b, y, margin, reduction: rectify(margin - y * (a - b))


def _average(x: Any, y: Any, w: Any, **_: Any) -> Any:
    """A weighted mean that divides by the batch."""
    picked = jnp.take_along_axis(jax.nn.log_softmax(x), y[:, None], 1)[:, 0]
    return jnp.where(y == -1, 0, -w[y] * picked).sum() / (y != -1).sum()


def _last_axis(x: Any, y: Any, **_: Any) -> Any:
    """Classes along the last axis: transposed, and cut to what is there."""
    logs = jax.nn.log_softmax(x, axis=-1)
    return jnp.where(y == -1, 0, -jnp.take_along_axis(logs, jnp.maximum(y, 0)[:, None], 1)[:, 0])


def _clamped_gradient(x: Any, y: Any, v: Any, reduction: str) -> Any:
    """A variance whose clamp stops the gradient."""
    return losses.gaussian_nll(x, y, jnp.maximum(v, 1e-6), reduction=reduction)


def _cosine(eps: float) -> Callable[..., Any]:
    def wrong(a: Any, b: Any, y: Any, margin: float, reduction: str) -> Any:
        cos = optax.cosine_similarity(a, b, epsilon=eps)
        return jnp.where(y == 1, 1 - cos, 0) + jnp.where(y == -1, jnp.maximum(cos - margin, 0), 0)

    return wrong


def _ctc_derivative(*inputs: Any, **given: Any) -> Any:
    """The derivative by the log-probabilities themselves: without the softmax term."""

    def extra(x: Any) -> Any:
        inside = (jnp.arange(x.shape[0])[:, None] < inputs[2])[..., None]
        return jnp.where(inside, jnp.exp(x), 0).sum((0, 2))

    x = inputs[0]
    return losses.ctc(*inputs, **given) - (extra(x) - jax.lax.stop_gradient(extra(x)))


CROSS = "loss(x[:, :, 0, 0], y[:, 0, 0], weight=w, ignore_index=-1, {}reduction='mean')"
NONE = "loss(x, y, reduction='none')"
CTC = "loss(x, y, t, s, reduction='none')"
SMOOTH = "loss(x[:, :, 0, 0], s[:, :, 0, 0], label_smoothing=0.3)"
TRIPLET = "loss(a, p, n, p=2, eps=0.1, reduction='none')"

FAULTS: dict[str, Fault] = {
    "mse with the factor 1/2 of l2_loss": Fault("mse", "ordinary", "loss(x, y)", _scaled("mse", 0.5)),
    "sum for mean": Fault("mse", "ordinary", "loss(x, y)", _replaced("mse", reduction="sum")),
    "mean over the first axis only": Fault(
        "l1", "ordinary", "loss(x, y)", lambda x, y: losses.l1(x, y, reduction="sum") / x.shape[0]
    ),
    "abs with JAX's slope at 0": Fault("l1", "ties", NONE, lambda x, y, reduction: jnp.abs(x - y)),
    "smooth_l1 as huber": Fault(
        "smooth_l1", "ordinary", "loss(x, y, beta=2)", lambda x, y, beta: losses.huber(x, y, delta=beta)
    ),
    "huber without its delta": Fault("huber", "ordinary", "loss(x, y, delta=2)", _replaced("huber", delta=1.0)),
    "poisson without eps": Fault(
        "poisson_nll", "ordinary", "loss(r, y, log_input=False, eps=1e-3)", _replaced("poisson_nll", eps=0.0)
    ),
    "poisson of a rate as of a log": Fault(
        "poisson_nll", "ordinary", "loss(r, y, log_input=False)", _replaced("poisson_nll", log_input=True)
    ),
    "poisson with the exact log of the factorial": Fault(
        "poisson_nll",
        "ordinary",
        "loss(x, y, full=True)",
        lambda x, y, full: -jax.scipy.stats.poisson.logpmf(y, jnp.exp(x)).mean(),
    ),
    "gaussian with the constant": Fault(
        "gaussian_nll", "ordinary", "loss(x, y, v)", _replaced("gaussian_nll", full=True)
    ),
    "gaussian without the clamp": Fault("gaussian_nll", "ties", "loss(x, y, v)", _replaced("gaussian_nll", eps=0.0)),
    "gaussian with a clamp that stops gradients": Fault(
        "gaussian_nll", "ties", "loss(x, y, v, reduction='none')", _clamped_gradient
    ),
    "kl_div with its arguments swapped": Fault("kl_div", "ordinary", "loss(x, y)", _swapped("kl_div")),
    "kl_div by the batch": Fault("kl_div", "ordinary", "loss(x, y)", _replaced("kl_div", reduction="batchmean")),
    "kl_div of logs as of probabilities": Fault(
        "kl_div", "ordinary", "loss(x, y, log_target=True)", _replaced("kl_div", log_target=False)
    ),
    "bce without the clamp at -100": Fault(
        "bce",
        "ties",
        NONE,
        lambda x, y, reduction: -(jax.scipy.special.xlogy(y, x) + jax.scipy.special.xlog1py(1 - y, -x)),
    ),
    "bce clamped by a small constant": Fault(
        "bce", "ordinary", "loss(x, y)", lambda x, y: -(y * jnp.log(x + 1e-7) + (1 - y) * jnp.log(1 - x + 1e-7)).mean()
    ),
    "pos_weight dropped": Fault(
        "bce_with_logits", "ordinary", "loss(x, y, pos_weight=v)", _replaced("bce_with_logits", pos_weight=None)
    ),
    "pos_weight on every term": Fault(
        "bce_with_logits",
        "ordinary",
        "loss(x, y, pos_weight=v)",
        lambda x, y, pos_weight: losses.bce_with_logits(x, y, weight=pos_weight),
    ),
    "signs taken for zeros and ones": Fault(
        "soft_margin", "ordinary", NONE, lambda x, y, reduction: optax.sigmoid_binary_cross_entropy(x, y)
    ),
    "a sum over the classes for a mean": Fault(
        "multi_label_soft_margin", "ordinary", "loss(x, y)", _scaled("multi_label_soft_margin", 5.0)
    ),
    "an ignored label is the last class": Fault(
        "cross_entropy",
        "ordinary",
        CROSS.format(""),
        lambda x, y, weight, **_: losses.nll(jax.nn.log_softmax(x), y % 4, weight=weight),
    ),
    "the weighted mean divides by the batch": Fault(
        "cross_entropy", "ordinary", CROSS.format(""), lambda x, y, weight, **_: _average(x, y, weight)
    ),
    "class weights dropped": Fault(
        "cross_entropy", "ordinary", CROSS.format(""), _replaced("cross_entropy", weight=None)
    ),
    "smoothing dropped": Fault(
        "cross_entropy",
        "ordinary",
        CROSS.format("label_smoothing=0.2, "),
        _replaced("cross_entropy", label_smoothing=0.0),
    ),
    "smoothing spread over the other classes only": Fault(
        "cross_entropy",
        "ordinary",
        CROSS.format("label_smoothing=0.2, "),
        _replaced("cross_entropy", label_smoothing=0.2 * 4 / 3),
    ),
    "a batch of ignored labels means 0": Fault(
        "cross_entropy",
        "ordinary",
        "loss(x[:, :, 0, 0], 0 * y[:, 0, 0] - 1, ignore_index=-1)",
        lambda *a, **k: jnp.nan_to_num(losses.cross_entropy(*a, **k)),
    ),
    "the classes on the last axis": Fault(
        "cross_entropy", "ordinary", "loss(x[:, :, :, 0], y[:, :, 0], ignore_index=-1, reduction='none')", _last_axis
    ),
    "probabilities not smoothed": Fault(
        "cross_entropy, probabilities", "ordinary", SMOOTH, _replaced("cross_entropy", label_smoothing=0.0)
    ),
    "nll of logits": Fault(
        "nll",
        "ordinary",
        "loss(x[:, :, 0, 0], y[:, 0, 0], ignore_index=-1)",
        lambda x, y, **k: losses.nll(jax.nn.log_softmax(x), y, **k),
    ),
    "the ranking's sign": Fault("margin_ranking", "ordinary", "loss(a, b, y, margin=0.5)", _swapped("margin_ranking")),
    "the ranking's margin dropped": Fault(
        "margin_ranking", "ordinary", "loss(a, b, y, margin=0.5)", _replaced("margin_ranking", margin=0.0)
    ),
    "a hinge that halves the slope where it is met": Fault(
        "margin_ranking", "ties", "loss(a, b, y, margin=0.5, reduction='none')", _hinge(lambda z: jnp.maximum(z, 0))
    ),
    "a hinge without slope where it is met": Fault(
        "margin_ranking", "ties", "loss(a, b, y, margin=0.5, reduction='none')", _hinge(jax.nn.relu)
    ),
    "the hinge of scores for that of distances": Fault(
        "hinge_embedding", "ordinary", "loss(x, y)", lambda x, y: optax.hinge_loss(x, y).mean()
    ),
    "the largest violation only": Fault(
        "multi_margin", "ordinary", "loss(x, y)", lambda x, y: optax.losses.multiclass_hinge_loss(x, y).mean()
    ),
    "the target among the classes": Fault(
        "multi_margin", "ordinary", "loss(x, y)", lambda x, y: losses.multi_margin(x, y) + 1 / x.shape[1]
    ),
    "p dropped": Fault("multi_margin", "ordinary", "loss(x, y, p=2)", _replaced("multi_margin", p=1)),
    "labels read beyond the first -1": Fault(
        "multi_label_margin",
        "ordinary",
        "loss(x, l)",
        lambda x, y: losses.multi_label_margin(x, jnp.take_along_axis(y, jnp.argsort(y == -1, axis=1, stable=True), 1)),
    ),
    "cosine with clamped lengths": Fault(
        "cosine_embedding", "ordinary", "loss(a, b, y, margin=0.5, reduction='none')", _cosine(0.0)
    ),
    "cosine of zero vectors": Fault(
        "cosine_embedding", "ties", "loss(a, b, y, margin=-0.5, reduction='none')", _cosine(0.0)
    ),
    "the triplet's eps under the root": Fault(
        "triplet_margin",
        "ordinary",
        TRIPLET,
        lambda a, b, c, eps, **_: optax.losses.triplet_margin_loss(a, b, c, eps=eps),
    ),
    "no swap": Fault("triplet_margin", "ordinary", "loss(a, p, n, swap=True)", _replaced("triplet_margin", swap=False)),
    "no swap of a distance of one's own": Fault(
        "triplet_margin_with_distance",
        "ordinary",
        "loss(a, p, n, swap=True)",
        _replaced("triplet_margin_with_distance", swap=False),
    ),
    "the other norm": Fault("triplet_margin", "ordinary", TRIPLET, _replaced("triplet_margin", p=1)),
    "the negative for the positive": Fault(
        "triplet_margin", "ordinary", TRIPLET, lambda a, b, c, **given: losses.triplet_margin(a, c, b, **given)
    ),
    "the blank off by one": Fault("ctc", "ordinary", CTC, _replaced("ctc", blank=4)),
    "ctc's mean without the target's length": Fault(
        "ctc", "ordinary", "loss(x, y, t, s)", lambda *a, **k: losses.ctc(*a, reduction="none").mean()
    ),
    "a large number for infinity": Fault(
        "ctc", "ties", CTC, lambda *a, **k: jnp.nan_to_num(losses.ctc(*a, **k), posinf=1e5)
    ),
    "zero_infinity dropped": Fault(
        "ctc", "ties", "loss(x, y, t, s, zero_infinity=True, reduction='none')", _replaced("ctc", zero_infinity=False)
    ),
    "ctc's own derivative": Fault("ctc", "ordinary", CTC, _ctc_derivative),
    "a frame too many": Fault("ctc", "ordinary", CTC, lambda x, y, t, s, **k: losses.ctc(x, y, t - 1, s, **k)),
    "the bias dropped": Fault(
        "linear_cross_entropy",
        "ordinary",
        "loss(x, w, y, linear_bias=b)",
        _replaced("linear_cross_entropy", linear_bias=None),
    ),
}


def wide(side: Side) -> Side:
    return lambda bits, arrays: side(64, {k: v.astype(float) if v.dtype.kind == "f" else v for k, v in arrays.items()})


def differs(fault: Fault, loss: Callable[..., Any]) -> bool:
    """Whether the comparison sees it; float64 alone is asked, which needs one compiled program and not two."""
    case = CASES[fault.case]
    both = wide(torch_side(case, (fault.call,))), wide(jax_side(case, (fault.call,), loss))
    return any(disagreements(*both, drawn(fault.case, fault.kind, seed), moved=()) for seed in range(SEEDS))


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_seen(name):
    assert differs(FAULTS[name], FAULTS[name].loss)


def test_the_right_losses_raise_no_alarm():
    calls = {(fault.case, fault.kind, fault.call): fault for fault in FAULTS.values()}
    sample = [calls[key] for key in sorted(calls)][::8]
    assert not [fault for fault in sample if differs(fault, getattr(losses, fault.case.partition(",")[0]))]


def test_a_lattice_that_repeats_labels_without_a_blank_is_seen(monkeypatch):
    lattice = sequence._lattice

    def skipping(*given: Any) -> Any:
        states, skips, emitted = lattice(*given)
        return states, skips | (jnp.arange(states.shape[1]) % 2 == 1) & (jnp.arange(states.shape[1]) >= 2), emitted

    monkeypatch.setattr(sequence, "_lattice", skipping)
    assert differs(Fault("ctc", "ties", CTC, losses.ctc), losses.ctc)


def test_every_case_has_a_fault():
    faulty = {fault.case.partition(",")[0] for fault in FAULTS.values()}
    assert faulty == {case.partition(",")[0] for case in CASES}
    assert len(FAULTS) >= 20
    assert np.all([fault.kind in ("ordinary", "ties") for fault in FAULTS.values()])
