"""torch's schedulers against their translations, at every count."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch.optim import lr_scheduler as lrs
from torch.optim.swa_utils import SWALR

from equivalence.errors import InputError
from equivalence.optimizers.schedule_table import LR, ROWS, SchedulerRow
from equivalence.optimizers.schedules import position, schedules, to_schedule
from tests.agreement import assert_agree
from tests.schedule_sides import RATES, STEPS, Make, built, jax_side, optimizer, torch_side

counts = st.integers(1, 25)
factors = st.floats(0.05, 1.0)
gammas = st.floats(0.3, 1.0)
lows = st.sampled_from([0.0, 0.002])
kinds = st.sampled_from(["SGD", "AdamW"])
positions = st.integers(0, 40)


def maker(name: str, **options: st.SearchStrategy[Any]) -> st.SearchStrategy[Make]:
    """Schedulers of one class, with options drawn."""
    cls = SWALR if name == "SWALR" else getattr(lrs, name)
    return st.fixed_dictionaries(options).map(lambda drawn: lambda o: cls(o, **drawn))


functions = st.sampled_from(
    [
        lambda n: 0.95**n,
        lambda n: 1 / (1 + 0.1 * n),
        lambda n: min(1.0, (n + 1) / 9),
        lambda n: 0.5 * (1 + math.cos(math.pi * n / 17)),
        lambda n: [0.5, 0.9, 0.7][n % 3],
        lambda n: 1.0,
    ]
)
MULTIPLYING = {
    "MultiplicativeLR": maker("MultiplicativeLR", lr_lambda=functions),
    "StepLR": maker("StepLR", step_size=counts, gamma=gammas),
    "MultiStepLR": maker("MultiStepLR", milestones=st.lists(st.integers(0, 50), max_size=4), gamma=gammas),
    "ConstantLR": maker("ConstantLR", factor=factors, total_iters=st.integers(0, 25)),
    "LinearLR": maker("LinearLR", start_factor=factors, end_factor=factors, total_iters=counts),
    "ExponentialLR": maker("ExponentialLR", gamma=gammas),
    "PolynomialLR": maker("PolynomialLR", total_iters=counts, power=st.floats(0.5, 3.0)),
}
ANNEALING = {
    "LambdaLR": maker("LambdaLR", lr_lambda=functions),
    "CosineAnnealingLR": maker("CosineAnnealingLR", T_max=counts, eta_min=lows),
    "SWALR": maker(
        "SWALR",
        swa_lr=st.sampled_from([0.05, 0.5]),
        anneal_epochs=st.integers(0, 25),
        anneal_strategy=st.sampled_from(["cos", "linear"]),
    ),
    "CosineAnnealingWarmRestarts": maker(
        "CosineAnnealingWarmRestarts", T_0=counts, T_mult=st.integers(1, 3), eta_min=lows
    ),
    "OneCycleLR": maker(
        "OneCycleLR",
        max_lr=st.sampled_from([0.5, 0.9]),
        total_steps=st.integers(STEPS, STEPS + 9),
        pct_start=st.floats(0.05, 0.45),
        anneal_strategy=st.sampled_from(["cos", "linear"]),
        three_phase=st.booleans(),
        cycle_momentum=st.booleans(),
        final_div_factor=st.sampled_from([10.0, 1e4]),
    ),
    "CyclicLR": maker(
        "CyclicLR",
        base_lr=st.sampled_from([0.01, 0.02]),
        max_lr=st.just(0.4),
        step_size_up=counts,
        step_size_down=st.none() | counts,
        mode=st.sampled_from(["triangular", "triangular2", "exp_range"]),
        gamma=gammas,
        cycle_momentum=st.booleans(),
    ),
}
SIMPLE = MULTIPLYING | ANNEALING


@pytest.mark.parametrize("name", SIMPLE)
def test_simple_schedulers(name: str) -> None:
    @given(make=SIMPLE[name], kind=kinds, at=positions)
    @settings(max_examples={"MultiplicativeLR": 2, "LambdaLR": 6}.get(name, 10))  # its loops are compiled
    def agree(make: Make, kind: str, at: int) -> None:
        steps = 20 if name == "MultiplicativeLR" else STEPS  # it runs through all counts before, for each
        assert_agree(torch_side(make, kind, steps), jax_side(make, kind, steps, at), RATES)

    agree()


ONE = {"rates": RATES["rates"][:1]}


# --- schedulers of schedulers -----------------------------------------------------------------------------------------


def chained(makes: list[Make]) -> Make:
    return lambda o: lrs.ChainedScheduler([make(o) for make in makes])


def sequential(makes: list[Make], milestones: list[int]) -> Make:
    return lambda o: lrs.SequentialLR(o, [make(o) for make in makes], milestones)


def sequences(first: st.SearchStrategy[Make]) -> st.SearchStrategy[Make]:
    """A first scheduler, then simple ones."""
    return st.lists(st.integers(1, 45), min_size=1, max_size=2).flatmap(
        lambda ends: st.builds(
            lambda head, tail: sequential([head, *tail], sorted(ends)),
            first,
            st.lists(simple, min_size=len(ends), max_size=len(ends)),
        )
    )


simple = st.one_of(*SIMPLE.values())
chains = st.lists(simple, min_size=2, max_size=3).map(chained)
TREES = {
    "multiplying chains": (st.lists(st.one_of(*MULTIPLYING.values()), min_size=2, max_size=4).map(chained), 3),
    "chains": (chains, 3),
    "sequences": (sequences(simple), 5),
    "sequences of chains": (sequences(chains), 3),
    "sequences of sequences": (sequences(sequences(simple)), 4),
    "chains of sequences": (st.tuples(simple, sequences(simple)).map(list).map(chained), 2),
}


@pytest.mark.parametrize("name", TREES)
def test_schedulers_of_schedulers(name: str) -> None:
    strategy, examples = TREES[name]

    @given(make=strategy, kind=kinds, at=positions)
    @settings(max_examples=examples, phases=[Phase.generate])  # each shrinking step would compile loops
    def agree(make: Make, kind: str, at: int) -> None:
        assert_agree(torch_side(make, kind), jax_side(make, kind, at=at), ONE)

    agree()


def warm_up(o: Any) -> Any:
    return sequential(
        [lambda o: lrs.LinearLR(o, 0.1, total_iters=5), lambda o: lrs.CosineAnnealingLR(o, 40, 1e-3)], [5]
    )(o)


SPECIAL: dict[str, Make] = {
    "warm-up and cosine": warm_up,
    "a milestone at 0": sequential([lambda o: lrs.LinearLR(o), lambda o: lrs.ExponentialLR(o, 0.9)], [0]),
    "two milestones at once": sequential(
        [lambda o: lrs.LinearLR(o), lambda o: lrs.StepLR(o, 2), lambda o: lrs.ExponentialLR(o, 0.9)], [4, 4]
    ),
    "restarts that look at the present rate": sequential(
        [
            lambda o: lrs.LinearLR(o, 0.2),
            lambda o: lrs.MultiplicativeLR(o, lambda n: 0.9),
            lambda o: SWALR(o, 0.05, 6),
            lambda o: lrs.CyclicLR(o, 0.1, 0.5, 4),
            lambda o: lrs.ExponentialLR(o, 0.9),
        ],
        [3, 9, 20, 33],
    ),
    "closed forms that are no recursion": sequential(
        [lambda o: lrs.ConstantLR(o, 0.2, 0), lambda o: lrs.ConstantLR(o, 0.3, 0), lambda o: lrs.StepLR(o, 4, 0.5)],
        [7, 30],
    ),
    "absolute inside a chain": chained(
        [
            lambda o: lrs.ExponentialLR(o, 0.9),
            lambda o: lrs.LambdaLR(o, lambda n: 1 / (1 + n)),
            lambda o: lrs.LinearLR(o),
        ]
    ),
    "a cycle built second": chained([lambda o: lrs.StepLR(o, 5), lambda o: lrs.CyclicLR(o, 0.01, 0.4, 5)]),
    "a cosine of period 1": lambda o: lrs.CosineAnnealingLR(o, 1, 0.01),
    "a cosine of half a step": lambda o: lrs.CosineAnnealingLR(o, 6.5, 0.01),
    "steps of half a step": lambda o: lrs.StepLR(o, 2.5, 0.5),
    "a linear warm-up of no steps": lambda o: lrs.LinearLR(o, 0.2, 0.7, 0),
    "a polynomial of no steps": lambda o: lrs.PolynomialLR(o, 0),
    "milestones of all kinds": lambda o: lrs.MultiStepLR(o, [9, 3, 3, 0, -4, 5.5, 7.0], 0.5),
    "one cycle from its second phase": lambda o: lrs.OneCycleLR(o, 0.9, total_steps=59, pct_start=0.001),
    "a scale of the user's": lambda o: lrs.CyclicLR(
        o, 0.01, 0.4, 5, 3, scale_fn=lambda n: 1 / (1 + n), scale_mode="iterations"
    ),
    "a scale of the user's by cycle": lambda o: lrs.CyclicLR(o, 0.01, 0.4, 5, 3, scale_fn=lambda n: math.exp(-n)),
}


@pytest.mark.parametrize("name", SPECIAL)
def test_edges(name: str) -> None:
    assert_agree(torch_side(SPECIAL[name], "AdamW"), jax_side(SPECIAL[name], "AdamW", at=11), RATES)


# --- how schedules are evaluated --------------------------------------------------------------------------------------


def scanned(schedule: Callable[[Any], Any]) -> Any:
    return jax.jit(lambda first: jax.lax.scan(lambda n, _: (n + 1, schedule(n)), first, None, length=STEPS)[1])(0)


@pytest.mark.parametrize("name", ["warm-up and cosine", "absolute inside a chain", "a scale of the user's by cycle"])
def test_in_a_scan(name: str) -> None:
    assert_agree(torch_side(SPECIAL[name]), jax_side(SPECIAL[name], evaluate=scanned), RATES)


def test_translated_inside_jit() -> None:
    scheduler = built(SPECIAL["a scale of the user's by cycle"])
    inside = jax.jit(lambda n: schedules(scheduler)[1]["lr"](n))
    assert float(inside(9)) == float(schedules(scheduler)[1]["lr"](9))


def test_every_counts_epochs() -> None:
    scheduler = built(warm_up, stepped=7)
    steps = to_schedule(scheduler, group=1, every=4)
    epochs = to_schedule(scheduler, group=1)
    assert [float(steps(n)) for n in range(40)] == [float(epochs(n // 4)) for n in range(40)]


def test_an_optax_optimizer_takes_it() -> None:
    scheduler = built(lambda o: lrs.OneCycleLR(o, 0.5, total_steps=9), kind="AdamW")
    schedule = to_schedule(scheduler)
    sgd = optax.sgd(schedule)
    state = sgd.init(jnp.zeros(()))
    updates, _ = sgd.update(jnp.ones(()), state)
    assert float(updates) == -float(schedule(0)) == pytest.approx(-0.02)
    assert float(to_schedule(scheduler, value="beta1")(0)) == np.float32(0.95)


@pytest.mark.parametrize("count", [1000, 123_457, 1_000_000])
def test_large_counts_are_rounded_once(count: int) -> None:
    scheduler = built(lambda o: lrs.ExponentialLR(o, 0.99999))
    assert float(to_schedule(scheduler)(count)) == np.float32(0.3 * 0.99999**count)
    scheduler = built(lambda o: lrs.MultiplicativeLR(o, lambda n: 0.99999))
    assert float(to_schedule(scheduler)(count)) == np.float32(0.3 * 0.99999**count)
    scheduler = built(lambda o: lrs.CosineAnnealingLR(o, 1000))
    right = 0.15 * (1 + math.cos(math.pi * (count % 2000) / 1000))
    assert float(to_schedule(scheduler)(count)) == pytest.approx(np.float32(right), rel=0, abs=0)


def test_past_its_end_one_cycle_holds() -> None:
    schedule = to_schedule(built(lambda o: lrs.OneCycleLR(o, 0.5, total_steps=9)))
    assert float(schedule(9)) == float(schedule(10)) == float(schedule(10**6))


def test_a_function_that_overflows_when_traced_is_called_back() -> None:
    scheduler = built(lambda o: lrs.LambdaLR(o, lambda n: 1 / (1 + n**9 % 7)))
    with jax.enable_x64(True):
        assert float(to_schedule(scheduler)(2**20)) == 0.3 / (1 + 2**180 % 7)


def test_a_function_that_fails_fails_where_torchs_does() -> None:
    schedule = to_schedule(built(lambda o: lrs.LambdaLR(o, [0.5, 0.25].__getitem__)))
    assert float(schedule(1)) == np.float32(0.075)
    with pytest.raises(Exception, match="IndexError"):
        schedule(2).block_until_ready()


def test_from_a_checkpoint() -> None:
    before = built(warm_up, stepped=9)
    after = built(warm_up)
    after.load_state_dict(before.state_dict())
    after.optimizer.load_state_dict(before.optimizer.state_dict())
    assert position(after) == 9
    assert float(to_schedule(after)(30)) == float(to_schedule(before)(30))


def test_swalr_starts_from_the_rate_it_finds() -> None:
    o = optimizer()
    other, swa = lrs.ExponentialLR(o, 0.5), SWALR(o, 0.02, 4)
    o.step()
    for _ in range(3):
        other.step()
    schedule = to_schedule(swa)
    found = []
    for _ in range(6):
        found.append(o.param_groups[0]["lr"])
        swa.step()
    assert [float(schedule(n)) for n in range(6)] == [np.float32(rate) for rate in found]


def test_rates_held_in_tensors() -> None:
    o = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=torch.tensor(0.1))
    scheduler = lrs.ExponentialLR(o, 0.9)
    o.step()
    for _ in range(50):
        scheduler.step()
    assert float(to_schedule(scheduler)(0)) == np.float32(0.1)


@pytest.mark.parametrize("row", [row for row in ROWS if row.form], ids=lambda row: row.torch.split("(")[0])
def test_the_table(row: SchedulerRow) -> None:
    make = row.make
    assert_agree(torch_side(make), jax_side(make), {"rates": np.asarray([LR])})
    naive = eval(str(row.form), {"optax": optax, "jnp": jnp})
    assert jnp.shape(naive(jnp.asarray(3))) == ()


# --- what is refused --------------------------------------------------------------------------------------------------


class Mine(lrs.StepLR):
    """A stranger's."""


def moved(o: Any) -> Any:
    scheduler = lrs.StepLR(o, 3)
    for group in o.param_groups:
        group["lr"] *= 1.5
    return scheduler


def twice(o: Any) -> Any:
    one = lrs.ExponentialLR(o, 0.9)
    return lrs.ChainedScheduler([one, one])


def grown(o: Any) -> Any:
    scheduler = lrs.StepLR(o, 3)
    o.add_param_group({"params": [torch.nn.Parameter(torch.zeros(3))]})
    return scheduler


deep = sequential([sequential([warm_up, lambda o: lrs.StepLR(o, 3)], [9]), lambda o: lrs.StepLR(o, 3)], [12])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda o: Mine(o, 3), r"test_schedules\.Mine is not torch's own.*scheduler=that function"),
        (lambda o: lrs.ReduceLROnPlateau(o), "metric"),
        (moved, r"position 0.*group 0: lr is 0\.4\d*, the scheduler gives 0\.3; group 1"),
        (twice, "twice"),
        (grown, "3 parameter groups"),
        (sequential([lambda o: lrs.StepLR(o, 3), warm_up], [5]), "NotImplementedError"),
        (sequential([lambda o: lrs.StepLR(o, 3)] * 3, [5, 4]), "ascending"),
        (deep, "nest it less deeply"),
    ],
)
def test_refused(make: Make, message: str) -> None:
    with pytest.raises(InputError, match=message):
        schedules(built(make))


def test_a_momentum_changed_by_hand_is_refused() -> None:
    scheduler = built(lambda o: lrs.OneCycleLR(o, 0.5, total_steps=9), stepped=3)
    scheduler.optimizer.param_groups[1]["momentum"] = 0.5
    with pytest.raises(InputError, match=r"group 1: momentum is 0\.5"):
        schedules(scheduler)


def test_asking_for_what_is_not_there() -> None:
    scheduler = built(warm_up)
    with pytest.raises(InputError, match="every=0"):
        to_schedule(scheduler, every=0)
    with pytest.raises(InputError, match="2 parameter groups"):
        to_schedule(scheduler, group=2)
    with pytest.raises(InputError, match="beta1"):
        to_schedule(scheduler, value="beta1")


def test_positions() -> None:
    assert position(built(warm_up, stepped=9)) == 9
    assert position(built(chained([warm_up, lambda o: lrs.StepLR(o, 3)]), stepped=4)) == 4
    assert position(built(lambda o: lrs.ReduceLROnPlateau(o))) == 0
