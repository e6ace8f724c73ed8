"""Lifting on torch: code with float32 written into it gives, bit for bit, what the same code gives without."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from equivalence.frameworks.torch import subject
from equivalence.observation import Batch
from equivalence.optimizers import resolve
from equivalence.runtimes.constants import recovered, shaken_by
from equivalence.runtimes.torch import TorchRunner
from equivalence.runtimes.torch_found import Lifting
from equivalence.runtimes.torch_lift import Lift, lifting
from equivalence.runtimes.torch_rounding import Rounding
from tests.pairs import normal, seeded

LOW = (torch.float32, torch.bfloat16, torch.float16)


def table(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    steps = torch.arange(0, x.shape[-1], dtype=dtype) / x.shape[-1]
    return torch.outer(torch.arange(x.shape[0]).to(steps), 10000.0**-steps).cos()


def written(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    made = x.new_zeros(x.shape, dtype=dtype)
    made[1:] = x[:-1].to(made)
    made.add_(torch.full((), 1 / 3, dtype=dtype)).mul_(torch.tensor(0.7, dtype=dtype))
    return torch.mul(made, x, out=torch.empty(x.shape, dtype=dtype))


PROGRAMS: dict[str, Any] = {
    "cast": lambda x, d: (x.to(d) if d else x).exp().type_as(x),
    "softmax": lambda x, d: x.softmax(-1, dtype=d),
    "log_softmax": lambda x, d: x.log_softmax(0, dtype=d),
    "reductions": lambda x, d: x.sum(0, dtype=d) + x.mean(0, dtype=d) + x.cumsum(0, dtype=d) * x.prod(0, dtype=d),
    "norm": lambda x, d: torch.linalg.vector_norm(x, dim=0, dtype=d),
    "factories": lambda x, d: x * table(x, d) + torch.linspace(0.1, 0.7, x.shape[-1], dtype=d),
    "literals": lambda x, d: x * torch.tensor([1 / 3, 0.1, 2e-7, 7.0], dtype=d) + x.new_tensor(1 / 7, dtype=d),
    "ones": lambda x, d: x / torch.ones_like(x, dtype=d).mul(3) + torch.scalar_tensor(0.3, dtype=d),
    "complex": lambda x, d: torch.view_as_real(torch.polar(x.to(d or x.dtype), x.to(d or x.dtype)) ** 2),
    "foreach": lambda x, d: torch._foreach_mul([x, x], [torch.ones(4, dtype=d) / 3, torch.tensor(0.1, dtype=d)])[1],
    "written": written,
}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, dtype) for name in PROGRAMS for dtype in LOW if name != "complex" or dtype == torch.float32],
    ids=str,
)
def test_a_lifted_program_is_the_program_without_its_dtypes(name, dtype):
    run, x = PROGRAMS[name], torch.from_numpy(normal(3, 4)).double()
    slopes = []
    for given_dtype, mode in ((None, None), (dtype, Lift())):
        leaf = x.clone().requires_grad_(name != "written")
        torch.set_default_dtype(torch.float64)
        try:
            with lifting(mode):
                value = run(leaf * 1.0, given_dtype)
                slope = torch.autograd.grad(value.sin().sum(), leaf)[0] if leaf.requires_grad else value
        finally:
            torch.set_default_dtype(torch.float32)
        slopes.append((value, slope))
        if mode is not None:
            assert mode.found.float64 == "lifted"
            assert not mode.found.surviving
    for ours, theirs in zip(*slopes, strict=True):
        assert ours.dtype == theirs.dtype == torch.float64
        assert torch.equal(ours, theirs)


@given(st.lists(st.tuples(st.integers(-999999, 999999), st.integers(-30, 8)), min_size=1, max_size=9))
def test_short_decimals_are_recovered(parts):
    meant = np.array([0.7, 0.1, *(float(f"{digits}e{power}") for digits, power in parts)])
    found = recovered(meant.astype(np.float32))
    assert found is not None
    assert np.array_equal(found, meant) or (np.abs(meant) >= 2**24).any()


def test_a_number_that_is_a_short_decimal_by_chance_is_not_taken_for_it():
    numbers = np.arange(1.0, 1025.0)
    for value in (*(1 / numbers), *np.sqrt(numbers), *(1 / np.sqrt(numbers))):
        found = recovered(np.float32([value]))
        assert found is None or abs(found[0] / value - 1) < 2.0**-50


def test_autocast_is_noted_though_it_leaves_float64_alone():
    lift = Lift()
    with lifting(lift), torch.autocast("cpu", dtype=torch.bfloat16):
        torch.ones(3, 3, dtype=torch.float64) @ torch.ones(3, 3, dtype=torch.float64)
    assert lift.found.coarsest == 2.0**-8


def test_an_operation_that_rounds_inside_runs_in_float32_and_is_said():
    lift, x = Lift(), torch.from_numpy(normal(7)).double()
    with lifting(lift):
        made = torch.fake_quantize_per_tensor_affine(x, 0.1, 0, -128, 127)
    assert torch.equal(made, torch.fake_quantize_per_tensor_affine(x.float(), 0.1, 0, -128, 127).double())
    assert lift.found.float64 == "float32 only"


@given(st.integers(0, 2**31))
def test_long_ones_are_not_and_are_shaken_within_their_rounding(seed):
    values = np.random.default_rng(seed).standard_normal(100).astype(np.float32)
    assert recovered(values) is None
    mixed = np.concatenate([values, [0.0, 3.0, -7.0, np.inf, np.nan], values[:5]]).astype(np.float64)
    moved = shaken_by(mixed, seed)
    with np.errstate(invalid="ignore"):
        assert set(np.abs(moved[:100] / mixed[:100] - 1).round(12)) == {round(2.0**-24, 12)}
    assert np.array_equal(moved[100:105], mixed[100:105], equal_nan=True)
    assert np.array_equal(moved[105:], moved[:5])
    assert not np.array_equal(moved[:100], shaken_by(mixed, seed + 1)[:100])


@pytest.mark.parametrize("base", [10000.0, 500000.0, 1e6, 12345.0, 100.0])
@pytest.mark.parametrize("size", [4, 6, 64])
def test_frequencies_are_recovered(base, size):
    rotary = 1.0 / base ** (torch.arange(0, 2 * size, 2, dtype=torch.int64).float() / (2 * size))
    sinusoidal = torch.exp(torch.arange(size).float() * -(np.log(base) / (size - 1)))
    for held, last in ((rotary, size), (sinusoidal, size - 1)):
        found = recovered(held.numpy())
        assert found is not None
        assert np.abs(found * base ** (np.arange(size) / last) - 1).max() < 2**-48


@pytest.mark.parametrize("base", [10000 * 8.0 ** (64 / 62), 10000.01, 9999.9951])
def test_frequencies_of_no_short_base_are_not(base):
    assert recovered((base ** -(np.arange(64) / 64)).astype(np.float32)) is None


def test_a_table_with_one_element_moved_is_not_recovered():
    table = (10000 ** -(np.arange(64) / 64)).astype(np.float32)
    table[20] *= 1 + 1e-6
    assert recovered(table) is None


class Holds(nn.Module):
    """A module with float32 in every place that no state_dict shows."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.drop = nn.Linear(5, 6), nn.Dropout(0.3)
        self.decimal, self.third = torch.tensor(0.1), torch.tensor([1 / 3, 0.0, 2.0])
        self.cache = torch.zeros(2, 6)
        self.register_buffer("counted", torch.zeros(3, dtype=torch.int64))
        self.register_buffer("tables", 10000 ** -(torch.arange(6).float() / 7) / 3, persistent=False)
        self.register_buffer("average", torch.full((6,), 1 / 3))

    def forward(self, x: Tensor) -> Tensor:
        h = self.drop(self.linear(x).float()) * self.tables * self.decimal
        if self.training:
            self.average.lerp_(h.detach().mean(0), 0.25)
        self.cache[:, :3] = h[:2, :3] * 2
        self.cache.mul_(0.5)
        return h.bfloat16() + self.cache.sum(0).repeat(2)[:6] * self.third.repeat(2) + self.average


def runner(module: nn.Module, *constants: str, **options: Any) -> TorchRunner:
    found = subject(module)
    return TorchRunner(found, None, lambda outputs: outputs, lifted=Lifting(found, constants), **options)


def held(of: TorchRunner) -> dict[str, np.ndarray]:
    return {**of.subject.params, **of.subject.buffers}


@pytest.mark.parametrize("train", [False, True])
def test_what_a_module_holds_is_recovered_or_survives_by_name(train):
    ours = runner(seeded(Holds), "tables", "average")
    batch = Batch((normal(4, 5),))
    plain = ours.observe(64, held(ours), batch, train, 3)
    again, shaken, other = (ours.observe(64, held(ours), batch, train, 3, shaken=s) for s in (None, 1, 2))
    assert ours.float64 == "lifted"
    assert {"tables", "third"} <= set(ours.surviving)
    assert not {"decimal", "average", "counted", "linear.weight"} & set(ours.surviving)
    for path, value in plain.values.items():
        assert value.dtype in (np.float64, np.int64), path
        assert np.array_equal(value, again.values[path]), path
    outputs, *moved = (run.values["outputs.output"] for run in (plain, shaken, other))
    assert all(1e-10 < np.abs(value - outputs).max() < 1e-6 for value in moved)
    assert not np.array_equal(*moved)
    assert ours.subject.model.cache.dtype == torch.float32


class Meant(nn.Module):
    """`Holds`, as one would write it for float64."""

    def __init__(self, module: Holds) -> None:
        super().__init__()
        self.linear, self.cache = module.linear, torch.zeros(2, 6, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        h = self.linear(x) * 0.1
        self.cache[:, :3] = h[:2, :3] * 2
        return h + (self.cache * 0.5).sum(0)


class Cached(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.cache, self.scale = nn.Linear(5, 6), torch.zeros(2, 6), torch.tensor(0.1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.linear(x).float() * self.scale
        self.cache[:, :3] = h[:2, :3] * 2
        return h.half() + (self.cache * 0.5).sum(0)


def test_writing_into_float32_that_a_module_holds_is_lifted_and_differentiated():
    module = seeded(Cached)
    meant, lifted = runner(Meant(module)), runner(module)
    batch = Batch((normal(4, 5),))
    ours, theirs = (r.observe(64, held(r), batch, False, 3).values for r in (meant, lifted))
    assert ours.keys() == theirs.keys()
    for path, value in ours.items():
        assert np.array_equal(value, theirs[path]), path
    assert torch.equal(module.cache[:, :3], torch.from_numpy(theirs["outputs.output"] * 0).float()[:2, :3]) is False


def test_the_same_with_every_operation_rounded():
    module = seeded(Cached)
    ours, batch = runner(module), Batch((normal(4, 5),))
    plain = ours.observe(64, held(ours), batch, False, 3).values["outputs.output"]
    with Rounding(1):
        moved = ours.observe(64, held(ours), batch, False, 3).values["outputs.output"]
    assert 0 < np.abs(moved - plain).max() < 1e-14


def test_float32_runs_are_as_they_were():
    module = seeded(Cached)
    ours, batch = runner(module), Batch((normal(4, 5),))
    expected = module(torch.from_numpy(batch.inputs[0])).detach().numpy()
    assert np.array_equal(
        ours.observe(32, held(ours), batch, False, 3, gradients=False).values["outputs.output"], expected
    )


@torch.library.custom_op("equivalence_tests::only_float32", mutates_args=())
def only_float32(x: Tensor) -> Tensor:
    if x.dtype != torch.float32:
        raise RuntimeError("float32 only")
    return x.sin()


@pytest.mark.parametrize(
    ("name", "run"),
    [
        ("only_float32", lambda x: only_float32(x)),
        ("view", lambda x: (x.float().view(torch.int32) & -65536).view(torch.float32)),
    ],
)
def test_an_operation_without_float64_is_named(name, run):
    class Low(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(5, 6)

        def forward(self, x: Tensor) -> Tensor:
            return run(self.linear(x).detach()) + self.linear(x)

    ours = runner(seeded(Low))
    plain, shaken = (ours.observe(64, held(ours), Batch((normal(4, 5),)), False, 3, shaken=s) for s in (None, 1))
    assert ours.float64 == "float32 only"
    assert any(name in found for found in ours.surviving)
    assert plain.values["outputs.output"].dtype == np.float64
    assert not np.array_equal(plain.values["outputs.output"], shaken.values["outputs.output"])


def test_a_model_without_casts_is_watched_a_few_times_and_then_left_alone(monkeypatch):
    ours, batch = (
        runner(seeded(lambda: nn.Sequential(nn.Linear(5, 7), nn.Dropout(0.2), nn.Tanh()))),
        Batch((normal(4, 5),)),
    )
    made: list[Lift] = []
    init = Lift.__init__
    monkeypatch.setattr(Lift, "__init__", lambda self, *args: (made.append(self), init(self, *args))[1])
    runs = [ours.observe(64, held(ours), batch, True, 3).values for _ in range(6)]
    assert len(made) == 3
    assert ours.float64 == "native"
    for run in runs[1:]:
        assert all(np.array_equal(value, run[path]) for path, value in runs[0].items())


class Net(nn.Module):
    def __init__(self, cast: bool) -> None:
        super().__init__()
        self.linear, self.drop, self.head, self.cast = nn.Linear(5, 6), nn.Dropout(0.3), nn.Linear(6, 2), cast

    def forward(self, x: Tensor) -> Tensor:
        h = self.drop(self.linear(x))
        return self.head(torch.tanh(h.float() if self.cast else h))


def own_step(module: nn.Module, optimizer: Any, x: Tensor, y: Tensor) -> Tensor:
    optimizer.zero_grad()
    loss = ((module(x).float() - y.float()) ** 2).mean()
    loss.backward()
    nn.utils.clip_grad_norm_(module.parameters(), 0.5)
    optimizer.step()
    return loss


@pytest.mark.parametrize("step", [None, own_step], ids=["ours", "their own"])
@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_steps_are_lifted(step, name):
    batch = Batch((normal(4, 5),), (normal(4, 2),))
    found = []
    for cast in (False, True):
        module = seeded(lambda cast=cast: Net(cast))
        options: dict[str, Any] = {"own_step": step}
        what = subject(module)
        loss = lambda outputs, y: ((outputs.float() if cast else outputs) - y).square().mean()  # noqa: B023, E731
        ours = TorchRunner(what, loss, lambda outputs: outputs, **options)
        stepper = ours.stepper(64, held(ours), resolve(name), [0.1])
        losses = [stepper.step(batch, seed).values["loss"] for seed in range(5)]
        found.append((losses, {p: v.copy() for p, v in stepper.parameters().items()}))
    assert ours.float64 == "lifted"
    assert found[0][0] == found[1][0]
    assert all(np.array_equal(value, found[1][1][path]) for path, value in found[0][1].items())


def test_modes_are_gone_after_an_error():
    class Fails(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(5, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x.float()[:, :3])

    ours = runner(seeded(Fails))
    with contextlib.suppress(RuntimeError):
        ours.observe(64, held(ours), Batch((normal(4, 5),)), False, 3)
    assert torch.ones(1, dtype=torch.float32).dtype == torch.float32
