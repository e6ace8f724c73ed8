"""The cache of the reference's training: everything is in the key, and a recording is believed only when rerun."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("flax")

from equivalence import losses, recordings, trained, training  # noqa: E402 - they need the frameworks
from equivalence.conclusion import Conclusions  # noqa: E402
from equivalence.frameworks import adapt  # noqa: E402
from equivalence.observation import Batch, load, save  # noqa: E402
from equivalence.optimizers import resolve  # noqa: E402
from equivalence.runs import Example  # noqa: E402
from equivalence.runtimes.torch import TorchRunner  # noqa: E402
from equivalence.sources import Parts, compared  # noqa: E402
from equivalence.spec import BatchPlan, TrainingData  # noqa: E402
from tests.pairings import NnxMLP, rows, torch_mlp, torch_step  # noqa: E402


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EQUIVALENCE_CACHE", str(tmp_path))


def select(outputs: Any) -> Any:
    return outputs


def other_select(outputs: Any) -> Any:
    return outputs * 1.0


def plan(epochs: int = 2, seed: int = 0) -> BatchPlan:
    rng = np.random.default_rng(seed)
    return BatchPlan(np.stack([rng.permutation(10) for _ in range(epochs)]), 4)


DATA = TrainingData((rows(0, 10, 5),), (rows(1, 10, 3),), (), (), plan(), must_learn=False)


def everything(
    model: Any = None,
    loss: Any = "mse",
    step: Any = None,
    pick: Any = select,
    rate: float = 0.0,
    frozen: bool = False,
    optimizer: Any = "adam",
    data: TrainingData = DATA,
    seed: int = 0,
    nudge: float = 0.0,
) -> str | None:
    """The key of a run, with any one thing changed."""
    module = torch_mlp(rate) if model is None else model
    if frozen:
        module.fc1.bias.requires_grad_(False)
    subject = adapt(module)
    weights = {path: np.asarray(value) for path, value in subject.params.items()}
    weights["fc2.bias"] = weights["fc2.bias"] + np.float32(nudge)
    pair = losses.resolve(loss) or (None, None)
    return recordings.key(TorchRunner(subject, pair[0], pick, step), weights, resolve(optimizer), data, seed)


def double(outputs: Any, targets: Any) -> Any:
    return 2.0 * ((outputs - targets) ** 2).mean()


def of(scale: float) -> Callable[..., Any]:
    return lambda outputs, targets: scale * ((outputs - targets) ** 2).mean()


def scheduled(gamma: float) -> Callable[[Any], Any]:
    """A factory of an optimizer with its scheduler."""

    def factory(params: Any) -> Any:
        optimizer = torch.optim.Adam(params, lr=0.01)
        return optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma)

    return factory


def stepped(scheduler: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A factory of an optimizer with a scheduler that the first epoch may not show."""

    def factory(params: Any) -> Any:
        optimizer = torch.optim.SGD(params, lr=0.1)
        return optimizer, scheduler(optimizer)

    return factory


PERIOD = 30


def of_a_global(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.StepLR(optimizer, PERIOD)


CHANGES: dict[str, dict[str, Any]] = {
    "scheduler": {"optimizer": scheduled(0.9)},
    "an option of the scheduler": {"optimizer": scheduled(0.99)},
    "seed": {"seed": 1},
    "weights": {"nudge": 1e-6},
    "dropout": {"rate": 0.1},
    "frozen": {"frozen": True},
    "loss": {"loss": (double, double)},
    "loss by a name": {"loss": "bce_with_logits"},
    "step": {"step": torch_step},
    "select": {"pick": other_select},
    "optimizer": {"optimizer": "sgd"},
    "an option of the optimizer": {"optimizer": lambda p: torch.optim.Adam(p, lr=0.01, eps=1e-7)},
    "learning rate": {"optimizer": lambda p: torch.optim.Adam(p, lr=0.011)},
    "inputs": {"data": dataclasses.replace(DATA, inputs=(rows(2, 10, 5),))},
    "targets": {"data": dataclasses.replace(DATA, targets=(rows(3, 10, 3),))},
    "one input": {"data": dataclasses.replace(DATA, inputs=(np.nextafter(DATA.inputs[0], np.float32(9)),))},
    "order": {"data": dataclasses.replace(DATA, plan=plan(seed=1))},
    "epochs": {"data": dataclasses.replace(DATA, plan=plan(epochs=3))},
    "batch size": {"data": dataclasses.replace(DATA, plan=BatchPlan(DATA.plan.order, 5))},
}


def test_the_same_run_has_the_same_key() -> None:
    assert everything() is not None
    assert everything() == everything()


def test_two_lambdas_that_differ_in_a_number_alone() -> None:
    one = everything(optimizer=stepped(lambda o: torch.optim.lr_scheduler.StepLR(o, 30)))
    other = everything(optimizer=stepped(lambda o: torch.optim.lr_scheduler.StepLR(o, 100)))
    nested = [everything(optimizer=stepped(lambda o: [(lambda: k)() for k in (2,)] and of_a_global(o)))]
    nested += [everything(optimizer=stepped(lambda o: [(lambda: k)() for k in (3,)] and of_a_global(o)))]
    assert None not in (one, other, *nested)
    assert len({one, other, *nested}) == 4


def test_a_global_value_that_a_function_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    before = everything(optimizer=stepped(of_a_global))
    monkeypatch.setitem(globals(), "PERIOD", 100)
    assert None is not before != everything(optimizer=stepped(of_a_global))


@pytest.mark.parametrize("change", CHANGES)
def test_changing_anything_changes_the_key(change: str) -> None:
    changed = everything(**CHANGES[change])
    assert changed is not None
    assert changed != everything()


def test_no_two_changes_share_a_key() -> None:
    keys = [everything(**change) for change in CHANGES.values()]
    assert len(set(keys)) == len(keys)


def test_what_a_loss_closes_over_is_in_the_key() -> None:
    half, third = (everything(loss=(of(scale), double)) for scale in (0.5, 1 / 3))
    assert half != third
    assert half == everything(loss=(of(0.5), double))


def test_the_engines_own_arithmetic_is_in_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    before = everything()
    for module, name in ((recordings, "FORMAT"), (recordings, "JITTERED"), (recordings, "TWINS")):
        with monkeypatch.context() as patched:
            patched.setattr(module, name, 99)
            assert everything() != before
    with monkeypatch.context() as patched:
        patched.setattr(torch, "__version__", "0.0")
        assert everything() != before
    with monkeypatch.context() as patched:
        source = recordings._source
        patched.setattr(recordings, "_source", lambda m: source(m) + (b"#" if m == training.__name__ else b""))
        assert everything() != before


def test_what_cannot_be_known_is_not_cached() -> None:
    class Opaque:
        __slots__ = ("secret",)

        def __call__(self, outputs: Any, targets: Any) -> Any:
            return double(outputs, targets)

    assert everything(loss=(Opaque(), double)) is None


# --- what is kept, and what is believed -------------------------------------------------------------------------------


def a_run(rate: float = 0.0) -> tuple[Any, Example]:
    ours, theirs = adapt(torch_mlp(rate)), adapt(NnxMLP(rate))
    _, comparison = compared(ours, theirs, None, Parts(losses.resolve("mse"), None, resolve("adam")), 0)
    weights = {path: np.asarray(value) for path, value in ours.params.items()}
    return comparison, Example(0, "ordinary", True, weights, (Batch(*DATA.rows(DATA.plan.batch(0))),), 0, "")


def judged(rate: float = 0.0) -> tuple[int, str]:
    """How many steps the reference was run for, and the verdict."""
    comparison, example = a_run(rate)
    conclusions = Conclusions(("training",), 1e-6, False)
    steps = list(trained.train(comparison, example, DATA, 0, conclusions))
    return len(steps), conclusions.finished["training"].verdict


def recorded(rate: float = 0.0) -> training.Recorded:
    comparison, example = a_run(rate)
    *_, found = training.record(comparison.stepping_reference, example.weights, comparison.optimizer, DATA, 0)
    assert isinstance(found, training.Recorded)
    return found


def test_a_recording_comes_back_as_it_was_written() -> None:
    before = recorded(0.3)
    recordings.write("one", before)
    after = recordings.read("one")
    assert after is not None
    for field in dataclasses.fields(before):
        ours, theirs = getattr(before, field.name), getattr(after, field.name)
        if isinstance(ours, np.ndarray):
            np.testing.assert_array_equal(ours, theirs)
        elif field.name == "twin_ends":
            assert [loss for loss, _ in ours] == [loss for loss, _ in theirs]
        elif field.name == "draws":
            assert ours == theirs
            assert {len(draws) for draws in ours.values()} == {1}
        else:
            assert list(ours) == list(theirs), "a report must read the same from a recording"
            assert all(
                np.array_equal(ours[path], theirs[path]) and ours[path].dtype == theirs[path].dtype for path in ours
            )


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts how often the reference is recorded anew."""
    counted: list[int] = []
    original = trained.record

    def counting(*arguments: Any) -> Any:
        counted.append(1)
        return original(*arguments)

    monkeypatch.setattr(trained, "record", counting)
    return counted


def test_a_second_run_does_not_train_the_reference_again(runs: list[int], tmp_path: Path) -> None:
    first = judged()[1]
    assert len(list(tmp_path.glob("*.safetensors"))) == len(runs) == 1
    assert judged()[1] == first == "equivalent"
    assert len(runs) == 1
    judged(0.3)
    assert len(runs) == 2


def tampered(path: Path, change: Callable[[dict[str, np.ndarray]], None]) -> None:
    arrays, provenance = load(path)
    arrays = {name: value.copy() for name, value in arrays.items()}
    change(arrays)
    save(path, arrays, provenance)


def nudge_a_loss(arrays: dict[str, np.ndarray]) -> None:
    arrays["losses"][0] = np.nextafter(arrays["losses"][0], 9.0)


def nudge_a_parameter(arrays: dict[str, np.ndarray]) -> None:
    arrays["parameters/fc1.bias"][1, 2] *= 1 + 1e-15


@pytest.mark.parametrize("change", [nudge_a_loss, nudge_a_parameter])
def test_a_recording_that_a_rerun_contradicts_is_not_used(
    change: Callable[[dict[str, np.ndarray]], None], runs: list[int], tmp_path: Path
) -> None:
    judged()
    (path,) = tmp_path.glob("*.safetensors")
    tampered(path, change)
    assert judged()[1] == "equivalent"
    assert len(runs) == 2
    assert judged()[1] == "equivalent"
    assert len(runs) == 2


@pytest.mark.parametrize("spoil", [b"", b"not a recording", None])
def test_a_file_that_cannot_be_read_is_no_recording(spoil: bytes | None, runs: list[int], tmp_path: Path) -> None:
    judged()
    (path,) = tmp_path.glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-100] if spoil is None else spoil)
    assert recordings.read(path.stem) is None
    assert judged()[1] == "equivalent"
    assert len(runs) == 2


def test_another_format_is_no_recording(tmp_path: Path) -> None:
    save(tmp_path / "old.safetensors", {"losses": np.zeros(3)}, {"format": recordings.FORMAT - 1})
    assert recordings.read("old") is None
    assert recordings.read("none") is None


def test_a_folder_that_cannot_be_written_keeps_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("EQUIVALENCE_CACHE", str(tmp_path / "file" / "inside"))
    assert judged()[1] == "equivalent"


def test_nothing_half_written_is_left(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import safetensors.numpy

    def interrupted(arrays: Any, name: str, **options: Any) -> None:
        Path(name).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(safetensors.numpy, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path / "x.safetensors", {"a": np.zeros(2)}, {})
    assert list(tmp_path.iterdir()) == []
