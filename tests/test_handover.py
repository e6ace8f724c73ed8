"""The `handover` check as users meet it: with schedulers, Optax's own transformations, and states that do not fit."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest

jax = pytest.importorskip("jax")
torch = pytest.importorskip("torch")
pytest.importorskip("flax")

import optax  # noqa: E402 - they need the frameworks

import equivalence as eq  # noqa: E402
from equivalence.errors import InputError  # noqa: E402
from tests.pairings import (  # noqa: E402
    NnxMLP,
    NnxNorm,
    TorchNorm,
    linen_mlp,
    nnx_step,
    rows,
    seeded,
    torch_mlp,
    torch_step,
)

X, Y = rows(0, 6, 5), rows(1, 6, 3)
SCHEDULES = torch.optim.lr_scheduler


def judged(optimizer: Any, port: Any = None, **options: Any) -> eq.Report:
    given = {"targets": (Y,), "loss": "mse", "checks": ["step", "handover"], "examples": 2, **options}
    reference = given.pop("reference", None) or torch_mlp()
    return eq.verify(reference, NnxMLP() if port is None else port, (X,), optimizer=optimizer, **given)


def scheduled(optimizer: Callable[[Any], Any], scheduler: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def factory(params: Any) -> Any:
        made = optimizer(params)
        return made, scheduler(made)

    return factory


def adam(params: Any) -> Any:
    return torch.optim.Adam(params, lr=0.1)


def momentum(params: Any) -> Any:
    return torch.optim.SGD(params, lr=0.1, momentum=0.9)


def warm_up_then_cosine(optimizer: Any) -> Any:
    first = SCHEDULES.LinearLR(optimizer, 0.5, total_iters=2)
    return SCHEDULES.SequentialLR(optimizer, [first, SCHEDULES.CosineAnnealingLR(optimizer, 4)], [2])


WITH_SCHEDULERS = {
    "step": (adam, lambda o: SCHEDULES.StepLR(o, 2, 0.5)),
    "one cycle": (adam, lambda o: SCHEDULES.OneCycleLR(o, 0.2, total_steps=9)),
    "warm-up": (momentum, warm_up_then_cosine),
    "cyclic momentum": (momentum, lambda o: SCHEDULES.CyclicLR(o, 0.01, 0.2, step_size_up=2)),
}


@pytest.mark.parametrize("name", WITH_SCHEDULERS)
def test_a_factory_may_bring_its_scheduler(name: str) -> None:
    report = judged(scheduled(*WITH_SCHEDULERS[name]))
    report.assert_equivalent()
    assert report.check("handover").examples == 2
    assert any(caveat.kind == "translated" for caveat in report.reports[0].caveats)


def test_another_schedule_is_a_divergence() -> None:
    factory = scheduled(momentum, lambda o: SCHEDULES.ExponentialLR(o, 0.5))
    judged((factory, optax.sgd(optax.exponential_decay(0.1, 1, 0.5), momentum=0.9))).assert_equivalent()
    late = optax.sgd(lambda count: 0.1 * 0.5 ** (count + 1), momentum=0.9)
    assert judged((factory, late)).verdict == "divergent"


@pytest.mark.parametrize(
    ("schedule", "exact"),
    [
        (optax.linear_schedule(0.1, 0.01, 3), lambda count: 0.1 + (0.01 - 0.1) * min(count, 3) / 3),
        (optax.exponential_decay(0.1, 1, 0.7), lambda count: 0.1 * 0.7**count),
    ],
    ids=["linear", "decay"],
)
def test_schedules_that_optax_computes_in_float32_are_lifted(schedule: Any, exact: Callable[[int], float]) -> None:
    factory = scheduled(momentum, lambda o: SCHEDULES.LambdaLR(o, lambda epoch: exact(epoch) / 0.1))
    judged((factory, optax.sgd(schedule, momentum=0.9))).assert_equivalent()


def test_the_users_own_steps_hand_over_too() -> None:
    judged("adam", train_step=(torch_step, nnx_step), loss=None).assert_equivalent()


def test_linen_hands_over() -> None:
    judged("rmsprop_centered", linen_mlp()).assert_equivalent()


def test_a_state_without_counterpart_is_said_to_be_inconclusive() -> None:
    odd = optax.chain(optax.trace(0.0), optax.adam(0.1))
    check = judged((adam, odd)).check("handover")
    assert check.verdict == "inconclusive"
    assert "TraceState.trace of" in str(check.message)
    assert "has no counterpart in torch's Adam" in str(check.message)


def test_an_optimizer_with_a_closure_steps_and_hands_over() -> None:
    lbfgs = judged(lambda params: torch.optim.LBFGS(params, lr=0.5, max_iter=3, history_size=4))
    assert {check.name: check.verdict for check in lbfgs.reports[0].checks} == dict.fromkeys(
        ("step", "handover"), "equivalent"
    )


def test_a_closure_has_no_draws_and_no_buffers() -> None:
    def lbfgs(params: Any) -> Any:
        return torch.optim.LBFGS(params)

    drawn = eq.verify(torch_mlp(0.3), NnxMLP(0.3), (X,), optimizer=lbfgs, checks=["step"], examples=1)
    assert drawn.check("step").verdict == "inconclusive"
    assert "several times a step" in str(drawn.check("step").message)
    with pytest.raises(InputError, match=r"moves bn.running_mean"):
        eq.verify(seeded(TorchNorm), NnxNorm(), (X,), optimizer=lbfgs, checks=["step"], examples=1)


def test_a_counter_that_the_port_lacks_goes_on() -> None:
    report = judged(adam, NnxNorm(), reference=seeded(TorchNorm))
    assert report.check("handover").verdict == "equivalent"
    assert all(caveat.check != "handover" for caveat in report.reports[0].caveats)


def test_an_optimizer_may_hold_some_parameters_alone() -> None:
    judged(lambda params: torch.optim.Muon([p for p in params if p.ndim == 2], lr=0.05)).assert_equivalent()
    some = judged(lambda params: torch.optim.Adam(list(params)[:2], lr=0.05), checks=["step", "training", "handover"])
    some.assert_equivalent()


def test_a_state_that_counts_no_steps_hands_over() -> None:
    port = optax.rmsprop(0.01, decay=0.99, eps=1e-8, eps_in_sqrt=False)
    judged((lambda params: torch.optim.RMSprop(params, lr=0.01), port)).assert_equivalent()


def test_a_state_that_pins_its_dtype_hands_over() -> None:
    judged((adam, optax.MultiSteps(optax.adam(0.1), 1).gradient_transformation())).assert_equivalent()


def test_a_scheduler_moves_beside_the_users_own_step() -> None:
    factory = scheduled(adam, lambda o: SCHEDULES.StepLR(o, 2, 0.5))
    judged(factory, train_step=(torch_step, nnx_step), loss=None).assert_equivalent()


def test_a_transformation_that_asks_for_the_loss_is_stepped() -> None:
    def asks(updates: Any, state: Any, params: Any = None, *, value: Any, grad: Any, **others: Any) -> Any:
        return jax.tree.map(lambda g, u: -0.1 * u + 0.0 * value * g, grad, updates), state

    port = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), asks)
    judged((lambda params: torch.optim.SGD(params, lr=0.1), port)).assert_equivalent()


OTHERS = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1)
REFUSED = {
    "a metric": (scheduled(adam, SCHEDULES.ReduceLROnPlateau), "stepped with a metric"),
    "nothing": (lambda params: None, "not NoneType"),
    "three": (lambda params: (adam(params), None, None), "not tuple"),
    "no scheduler": (lambda params: (adam(params), 5), "not int"),
    "other parameters": (lambda params: OTHERS, "other parameters than it is given"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_factory_that_cannot_be_used_is_refused(case: str) -> None:
    factory, message = REFUSED[case]
    for given in (factory, (factory, optax.sgd(0.1))):
        with pytest.raises(InputError, match=message):
            judged(given)


def test_optax_alone_has_no_reference() -> None:
    with pytest.raises(InputError, match="has no reference"):
        judged(optax.sgd(0.1))


def test_targets_stay_what_the_loss_takes() -> None:
    module = torch.nn.GaussianNLLLoss()
    judged("sgd", targets=(Y, np.abs(Y) + 0.1), loss=module, checks=["step", "training"]).assert_equivalent()


def test_a_translated_loss_says_so() -> None:
    report = judged("sgd", loss=torch.nn.HuberLoss(delta=0.5), checks=["loss"])
    report.assert_equivalent()
    assert any("HuberLoss was translated to JAX" in caveat.summary for caveat in report.reports[0].caveats)


def test_radam_is_followed_until_it_rectifies() -> None:
    """Its first five steps are SGD with momentum: that far, any eps and any threshold agree."""
    reference = partial(torch.optim.RAdam, lr=0.05)
    for wrong in (optax.radam(0.05, threshold=6.0), optax.radam(0.05, eps=1e-3)):
        assert judged((reference, wrong)).check("step").verdict == "divergent"
    assert judged(reference).verdict == "equivalent"


def test_a_schedule_that_never_moved_is_not_proven() -> None:
    def factory(period: int) -> Callable[[Any], Any]:
        return scheduled(partial(torch.optim.SGD, lr=0.1), lambda o: SCHEDULES.StepLR(o, period, 0.5))

    still = judged((factory(60), optax.sgd(0.1)))
    assert still.verdict == "inconclusive"
    assert [caveat.summary for caveat in still.reports[0].caveats if caveat.kind == "schedule"] == [
        "the scheduler first moves a rate after step 5, and 5 steps were run"
    ]
    moving = optax.sgd(lambda count: 0.1 * 0.5 ** (count // 2))
    followed = judged((factory(2), moving))
    assert followed.verdict == "equivalent"
    assert any("followed for 5 steps" in caveat.summary for caveat in followed.reports[0].caveats)


def test_what_optax_keeps_otherwise_is_not_compared() -> None:
    """optax.rmsprop's trace is -lr times torch's momentum: the steps are the same, the state is not a difference."""
    reference = partial(torch.optim.RMSprop, lr=0.01, momentum=0.5)
    port = optax.rmsprop(0.01, decay=0.99, eps_in_sqrt=False, momentum=0.5)
    report = judged((reference, port), checks=["step", "optimizer_state"])
    assert {check.verdict for check in report.reports[0].checks} == {"equivalent"}
    assert any("momentum_buffer" in caveat.summary for caveat in report.reports[0].caveats)


def test_what_follows_a_nan_on_both_sides_is_not_a_difference() -> None:
    model = torch_mlp()
    with torch.no_grad():
        model.fc1.bias[2] = -50.0  # a dead unit: its gradients are zero, and 0 / 0 is NaN without eps
    report = eq.verify(
        model, NnxMLP(), (X,), optimizer=partial(torch.optim.Adam, eps=0.0), examples=1,
        checks=["step", "optimizer_state", "handover"],
    )  # fmt: skip
    assert "divergent" not in {check.verdict for check in report.reports[0].checks}


def test_a_schedule_of_the_port_alone_that_never_moved_is_not_proven() -> None:
    constant = partial(torch.optim.SGD, lr=0.1)
    late = judged((constant, optax.sgd(optax.piecewise_constant_schedule(0.1, {60: 0.1}))))
    assert late.verdict == "inconclusive"
    assert any("the port's schedule first moves a rate" in caveat.summary for caveat in late.reports[0].caveats)
    assert judged((constant, optax.sgd(optax.constant_schedule(0.1)))).verdict == "equivalent"
    assert judged((constant, optax.sgd(0.1))).verdict == "equivalent"
