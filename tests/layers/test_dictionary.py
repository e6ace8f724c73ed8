"""The dictionary of layers: every class of torch.nn is in it, its figures are rounding, its page is current."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from equivalence.errors import InputError
from equivalence.layers import figures as kept
from equivalence.layers.figures import Line, as_json, figures
from equivalence.layers.measured import line
from equivalence.layers.registry import entries
from equivalence.numerics import DIFFERS
from equivalence.report import layers as report
from tests.torch_tables import MODULES

PAGE = Path(__file__).parents[2] / "docs" / "layers.md"
NO_LAYERS = {
    "Module": "the base of all",
    "Container": "a deprecated base",
    "RNNBase": "the base of RNN, LSTM and GRU",
    "RNNCellBase": "the base of their cells",
    "DataParallel": "a wrapper that splits batches over devices",
}
"""What `torch.nn` holds beside concrete layers, and why it is none."""


def classes() -> set[str]:
    kinds = {name: kind for name, kind in vars(torch.nn).items() if isinstance(kind, type)}
    return {name for name, kind in kinds.items() if issubclass(kind, torch.nn.Module)}


def test_every_class_of_torch_has_an_entry() -> None:
    concrete = {name for name in classes() if not name.startswith("Lazy")} - set(NO_LAYERS)
    assert concrete == set(entries())
    assert len(concrete) >= 130
    assert {name.removeprefix("Lazy") for name in MODULES} <= set(entries())


def test_a_lazy_class_becomes_the_class_without_lazy() -> None:
    assert {name.removeprefix("Lazy") for name in classes() if name.startswith("Lazy")} <= set(entries())


def test_every_entry_was_measured_and_no_other() -> None:
    lines = {held.name: held for held in figures().lines}
    assert set(lines) == set(entries()), "run: python -m equivalence.report.layers"
    for name, entry in entries().items():
        held = lines[name]
        assert (entry.family, entry.differs) == (held.family, held.differs), f"{name}: measure again"
        assert (entry.example is None) == (held.forward is None)
        assert entry.example is None or entry.example.torch == held.torch


def test_what_is_committed_is_rounding() -> None:
    for held in figures().lines:
        for gap in (held.forward, held.backward):
            assert gap is None or gap <= DIFFERS * held.rounding, held.name


AGAIN = ("Linear", "Conv2d", "BatchNorm2d", "LSTM", "MultiheadAttention", "MaxPool2d", "Upsample", "CrossEntropyLoss")


@pytest.mark.parametrize("name", AGAIN)
def test_a_line_is_found_again(name: str) -> None:
    now = line(entries()[name])
    (before,) = [held for held in figures().lines if held.name == name]
    words = ("torch", "nnx", "linen", "own")
    assert [getattr(now, word) for word in words] == [getattr(before, word) for word in words]
    for gap in (now.forward, now.backward):
        assert gap <= DIFFERS * now.rounding


def test_the_page_is_current() -> None:
    assert PAGE.read_text(encoding="utf-8") == report.page(figures()), "run: python -m equivalence.report.layers"


def test_every_line_teaches_in_one_line() -> None:
    for held in figures().lines:
        assert held.differs
        assert "\n" not in held.differs
        assert len(held.differs) <= 200, held.name


def test_unreadable_figures_are_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "FIGURES", tmp_path / "figures.json")
    for text in ("", "[]", '{"versions": {}, "lines": [{"name": 1}]}'):
        (tmp_path / "figures.json").write_text(text)
        with pytest.raises(InputError, match=r"cannot read figures\.json.*run python -m"):
            figures()


def test_figures_survive_their_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = figures()
    monkeypatch.setattr(kept, "FIGURES", tmp_path / "figures.json")
    (tmp_path / "figures.json").write_text(as_json(held))
    assert figures() == dataclasses.replace(held, lines=list(held.lines))


def test_a_wrong_translation_would_show_in_its_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = entries()["GELU"]

    def wrong(module: object, inside: object) -> object:
        other = torch.nn.GELU(approximate="tanh")
        return entry.translate(other, inside)  # type: ignore[arg-type]

    monkeypatch.setitem(entries(), "GELU", dataclasses.replace(entry, translate=wrong))  # type: ignore[arg-type]
    measured: Line = line(entries()["GELU"])
    assert measured.forward is not None
    assert measured.forward > DIFFERS * measured.rounding
