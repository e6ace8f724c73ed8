"""Training every implementation for the table and the picture: same start, same batches, honest clocks, clean ends."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from equivalence.errors import InputError
from equivalence.spec import BatchPlan, Spec, load

torch = pytest.importorskip("torch")
pytest.importorskip("flax")

from equivalence.loops import loops  # noqa: E402 - they need the frameworks
from equivalence.report.plot import save_curves  # noqa: E402
from equivalence.train import Trained, TrainProgress, _data, _task, _whole, adapt, train  # noqa: E402

pytestmark = pytest.mark.xdist_group("titanic_mlp")
EPOCHS = 3


@pytest.fixture(scope="module")
def spec() -> Spec:
    """Without dropout, which every framework draws by itself here, the runs are comparable."""
    titanic = load("titanic_mlp")
    return dataclasses.replace(titanic, config=dataclasses.replace(titanic.config, dropout=0.0))


@pytest.fixture(scope="module")
def events(spec: Spec) -> list[Trained | TrainProgress]:
    return list(train(spec, epochs=EPOCHS))


@pytest.fixture(scope="module")
def runs(events: list[Trained | TrainProgress]) -> list[Trained]:
    return [event for event in events if isinstance(event, Trained)]


def test_every_way_to_train_is_run(runs: list[Trained]) -> None:
    assert [(run.name, run.framework) for run in runs] == [
        ("torch with DataLoader", "torch"),
        ("nnx, step not compiled", "nnx"),
        ("nnx, compiled step", "nnx"),
        ("nnx, whole training", "nnx"),
        ("linen, compiled step", "linen"),
        ("linen, whole training", "linen"),
    ]


def test_same_weights_and_same_batches(runs: list[Trained]) -> None:
    for run in runs[1:]:
        np.testing.assert_allclose(run.losses, runs[0].losses[: run.epochs], rtol=1e-4, err_msg=run.name)
        if not run.extrapolated:
            assert run.accuracy == pytest.approx(runs[0].accuracy, abs=0.02)


def first_epoch(spec: Spec, framework: str, plan: BatchPlan | None = None, seed: int = 0) -> np.ndarray:
    """The losses of a loop's first epoch, on another plan or from another seed's weights if asked."""
    data = _data(spec, 1, 0)
    reference = adapt(spec.implementation("torch").build(spec.config, seed))
    if plan is not None:
        data = dataclasses.replace(data, plan=plan)
    return list(loops(framework, _task(spec, framework, reference, data, 0)))[-1].epoch(0)


def test_other_batches_or_weights_would_be_seen(spec: Spec) -> None:
    plan = _data(spec, 1, 0).plan
    right = first_epoch(spec, "torch")
    np.testing.assert_allclose(first_epoch(spec, "linen"), right, rtol=1e-4)
    for planted in (
        first_epoch(spec, "linen", BatchPlan(plan.order[:, ::-1], plan.batch_size)),
        first_epoch(spec, "linen", seed=1),
    ):
        assert not np.allclose(planted, right, rtol=1e-3)


def test_what_was_not_run_is_said_to_be_extrapolated(runs: list[Trained]) -> None:
    for run in runs:
        few = run.name == "nnx, step not compiled"
        assert (run.epochs, run.planned, run.extrapolated) == (2 if few else EPOCHS, EPOCHS, few)
        assert run.losses.shape == (run.epochs,)
        assert run.losses.dtype == np.float64
        assert run.seconds > 0
        assert (run.compile_seconds is None) == (run.framework == "torch")
        assert run.loss < run.losses[0]


def test_compiling_is_not_in_the_seconds(runs: list[Trained]) -> None:
    for run in runs[2:]:
        assert run.compile_seconds is not None
        assert run.seconds < run.compile_seconds


def test_progress_counts_every_epoch(events: list[Trained | TrainProgress]) -> None:
    told: dict[str, list[int]] = {}
    for event in events:
        if isinstance(event, Trained):
            whole = event.name.endswith("whole training")
            assert told[event.name] == ([0, event.epochs] if whole else [*range(event.epochs + 1)])
        else:
            assert (event.loss is None) == (event.done == 0)
            told.setdefault(event.name, []).append(event.done)


def test_a_run_that_is_dropped_leaves_the_process_as_it_was() -> None:
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    torch.set_num_threads(2)
    try:
        running = train(load("titanic_mlp"), epochs=2)
        next(running), next(running)
        running.close()
        assert torch.get_num_threads() == 2
        assert torch.equal(torch.get_rng_state(), state)
    finally:
        torch.set_num_threads(threads)


def test_an_interrupt_passes_through(spec: Spec, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = torch.get_num_threads()

    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(spec.implementation("torch"), "train_step", interrupted)
    running = train(spec, epochs=1)
    assert isinstance(next(running), TrainProgress)
    with pytest.raises(KeyboardInterrupt):
        next(running)
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize(("epochs", "message"), [(0, "epochs must be at least 1, not 0"), (-2, "at least 1")])
def test_unusable_epochs(spec: Spec, epochs: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        next(train(spec, epochs=epochs))


def test_a_spec_without_data(spec: Spec) -> None:
    with pytest.raises(InputError, match="titanic_mlp has no training data"):
        next(train(dataclasses.replace(spec, training=None)))


def test_a_whole_training_that_draws_has_dropout_in_it() -> None:
    """The same program with another rate of dropout takes other steps; with the same, the same ones."""
    titanic = load("titanic_mlp")

    def losses(rate: float) -> np.ndarray:
        spec = dataclasses.replace(titanic, config=dataclasses.replace(titanic.config, dropout=rate))
        events = list(_whole(spec, "linen", _data(spec, 2, 0), 0))
        run = events[-1]
        assert isinstance(run, Trained)
        return run.losses

    right = losses(0.25)
    np.testing.assert_array_equal(losses(0.25), right)
    assert not np.allclose(losses(0.0), right, rtol=1e-3)


def curves(*losses: list[float]) -> Iterator[Trained]:
    for number, loss in enumerate(losses):
        yield Trained(f"run {number}", "torch", len(loss), max(map(len, losses)), np.array(loss), 0.5, 1.0, None, False)


@pytest.mark.parametrize("losses", [[[0.7, 0.6]], [[0.7] * 300, [0.5, 0.4]], [[1.0, -1.0]], [[np.nan, 1.0]], [[0.0]]])
def test_curves_become_a_picture(tmp_path: Path, losses: list[list[float]]) -> None:
    path = tmp_path / "losses.png"
    save_curves(path, "a title", list(curves(*losses)))
    assert path.read_bytes().startswith(b"\x89PNG")
    assert list(tmp_path.iterdir()) == [path]


def test_an_interrupted_picture_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    def interrupted(canvas: object, place: Path, **options: object) -> None:
        Path(place).write_bytes(b"half")
        raise KeyboardInterrupt

    path = tmp_path / "losses.png"
    path.write_bytes(b"old")
    monkeypatch.setattr(FigureCanvasAgg, "print_figure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_curves(path, "a title", list(curves([0.7, 0.6])))
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_picture_that_cannot_be_written_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot write"):
        save_curves(tmp_path / "nowhere" / "losses.png", "a title", list(curves([0.7, 0.6])))
