"""The Titanic data: eight clean features, a split that does not leak, and the batches every framework is fed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from equivalence.errors import InputError
from equivalence.spec import BatchPlan
from fixtures import titanic

torch = pytest.importorskip("torch")

from fixtures.batches import PassengerDataset, batch_plan, loader, numpy_collate  # noqa: E402 - it needs torch


@pytest.fixture(scope="module")
def train() -> titanic.Passengers:
    return titanic.load()[0]


@pytest.fixture(scope="module")
def held_out() -> titanic.Passengers:
    return titanic.load()[1]


def test_shapes_and_types(train: titanic.Passengers, held_out: titanic.Passengers) -> None:
    assert (train.x.shape, train.survived.shape) == ((1047, 8), (1047,))
    assert (held_out.x.shape, held_out.survived.shape) == ((262, 8), (262,))
    for passengers in (train, held_out):
        assert passengers.x.dtype == passengers.survived.dtype == np.float32
        assert np.isfinite(passengers.x).all()
        assert set(np.unique(passengers.survived)) == {0.0, 1.0}


def test_columns_mean_what_they_say() -> None:
    raw, table = pd.read_csv(titanic.CSV), titanic.read(titanic.CSV)
    assert len(raw) == 1309
    assert {name: number for name, number in raw.isna().sum().items() if number} == {
        "age": 263,
        "fare": 1,
        "embarked": 2,
    }
    assert ((table["sex"] == 1.0) == (raw["sex"] == "female")).all()
    assert ((table["age_known"] == 1.0) == raw["age"].notna()).all()
    assert ((table["embarked"] == 2.0) == (raw["embarked"] == "Q")).all()
    assert not table[list(titanic.FEATURES)].columns.duplicated().any()


def test_features_keep_their_order(train: titanic.Passengers) -> None:
    """Each feature against a second, plain computation from its own column."""
    table = titanic.read(titanic.CSV)
    rows, _ = titanic.split(table["survived"].to_numpy(), seed=0)
    for number, name in enumerate(titanic.FEATURES):
        column = table[name].iloc[rows]
        filled = column.fillna(column.mode()[0] if name == "embarked" else column.median()).to_numpy()
        expected = (filled - filled.mean()) / filled.std()
        np.testing.assert_allclose(train.x[:, number], expected, rtol=1e-6, atol=1e-6, err_msg=name)


def learns_from_held_out_passengers(monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the training features move when one held-out passenger turns 1,000 years old and pays a fortune."""
    table = titanic.read(titanic.CSV)
    _, held_out = titanic.split(table["survived"].to_numpy(), seed=0)
    before = titanic.load()[0].x
    table.loc[held_out[0], ["age", "fare"]] = 1e3, 1e6
    monkeypatch.setattr(titanic, "read", lambda path: table)
    return not np.array_equal(before, titanic.load()[0].x)


def test_standardised_from_the_training_split_only(
    train: titanic.Passengers, held_out: titanic.Passengers, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.testing.assert_allclose(train.x.mean(0, dtype=np.float64), 0, atol=1e-6)
    np.testing.assert_allclose(train.x.std(0, dtype=np.float64), 1, atol=1e-6)
    assert np.abs(held_out.x.mean(0, dtype=np.float64)).min() > 1e-5
    assert not learns_from_held_out_passengers(monkeypatch)


def test_a_planted_leak_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = titanic.fit
    monkeypatch.setattr(titanic, "fit", lambda train: honest(titanic.read(titanic.CSV)))
    assert learns_from_held_out_passengers(monkeypatch)


def test_split_is_stratified_and_seeded() -> None:
    survived = titanic.read(titanic.CSV)["survived"].to_numpy()
    train, held_out = titanic.split(survived, seed=0)
    assert np.array_equal(np.sort(np.concatenate([train, held_out])), np.arange(1309))
    assert (survived[train].sum(), survived[held_out].sum()) == (400, 100)
    assert np.array_equal(held_out, titanic.split(survived, seed=0)[1])
    assert not np.array_equal(held_out, titanic.split(survived, seed=1)[1])


def test_collate_gives_numpy(train: titanic.Passengers) -> None:
    dataset = PassengerDataset(train)
    x, survived = numpy_collate([dataset[3], dataset[5], dataset[4]])
    assert type(x) is type(survived) is np.ndarray
    assert x.dtype == survived.dtype == np.float32
    assert np.array_equal(x, train.x[[3, 5, 4]])
    assert np.array_equal(survived, train.survived[[3, 5, 4]])


def serves(plan: BatchPlan, train: titanic.Passengers, seed: int) -> bool:
    """Whether a fresh loader serves, over the plan's epochs, exactly the plan's batches."""
    batches = loader(PassengerDataset(train), plan.batch_size, seed)
    served = [batch for _ in range(plan.epochs) for batch in batches]
    planned = [plan.batch(step) for step in range(plan.steps)]
    return len(served) == len(planned) and all(
        np.array_equal(x, train.x[rows]) and np.array_equal(survived, train.survived[rows])
        for (x, survived), rows in zip(served, planned, strict=True)
    )


def test_plan_is_what_the_loader_serves(train: titanic.Passengers) -> None:
    plan = batch_plan(PassengerDataset(train), 64, epochs=3, seed=7)
    assert (plan.epochs, plan.batches, plan.steps, plan.order.dtype) == (3, 17, 51, np.int64)
    assert [len(plan.batch(step)) for step in range(17)] == [64] * 16 + [23]
    assert all(np.array_equal(np.sort(order), np.arange(1047)) for order in plan.order)
    assert not np.array_equal(plan.order[0], plan.order[1])
    assert serves(plan, train, seed=7)
    assert not serves(plan, train, seed=8)
    assert not serves(BatchPlan(plan.order[::-1], 64), train, seed=7)


def test_the_real_plan_has_8500_steps(train: titanic.Passengers) -> None:
    assert batch_plan(PassengerDataset(train), 64, epochs=500, seed=0).steps == 8500


def test_drawing_a_plan_leaves_the_global_generator_alone(train: titanic.Passengers) -> None:
    before = torch.get_rng_state()
    batches = loader(PassengerDataset(train), 64, seed=0)
    batch_plan(PassengerDataset(train), 64, epochs=2, seed=0)
    next(iter(batches))
    assert torch.equal(before, torch.get_rng_state())


HEADER = b"pclass,survived,sex,age,sibsp,parch,fare,embarked\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        (b"", "cannot be read as csv"),
        (b"\xff\xfe\x00\x01", "cannot be read as csv"),
        (b'a,b\n1,2\n"3', "cannot be read as csv|lacks the columns"),
        (b"pclass,survived,sex,age,sibsp,parch,embarked\n1,1,male,3,0,0,S\n", "lacks the column fare"),
        (HEADER + b"1,1,male,old,0,0,7,S\n", "age is not a number in row 1: 'old'"),
        (HEADER + b"1,1,mal,3,0,0,7,S\n", "sex in row 1 is 'mal'"),
        (HEADER + b",1,male,3,0,0,7,S\n", "pclass is missing in row 1"),
        (HEADER + b"1,2,male,3,0,0,7,S\n", "survived must hold 0 and 1"),
    ],
)
def test_unusable_files_get_one_clear_line(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "passengers.csv"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        titanic.load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
