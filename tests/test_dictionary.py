"""The dictionary of training: every class of torch is in it, its page is current, its figures are found again."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from equivalence import cli, dictionary
from equivalence.dictionary import SECTIONS, Entry, Figures, Gaps
from equivalence.errors import InputError
from equivalence.numerics import AGREES, U32, U64
from equivalence.report import dictionary as report

torch = pytest.importorskip("torch")
pytest.importorskip("optax")

PAGE = Path(__file__).parents[1] / "docs" / "training-dictionary.md"
ENTRIES = [entry for section in SECTIONS for entry in dictionary.entries(section)]
MEASURED = dictionary.figures()


def named(section: str, torch_form: str) -> Entry:
    (found,) = [entry for entry in dictionary.entries(section) if torch_form in (entry.torch, entry.name)]
    return found


def test_every_class_of_torch_is_an_entry() -> None:
    def classes(module: Any, base: type) -> set[str]:
        kinds = {name: kind for name, kind in vars(module).items() if isinstance(kind, type) and name[0] != "_"}
        return {name for name, kind in kinds.items() if issubclass(kind, base) and kind is not base}

    schedulers = classes(torch.optim.lr_scheduler, torch.optim.lr_scheduler.LRScheduler)
    losses = {name for name in classes(torch.nn, torch.nn.Module) if name.endswith("Loss")}
    wanted = {"optimizers": classes(torch.optim, torch.optim.Optimizer), "schedules": schedulers, "losses": losses}
    assert {name: len(found) for name, found in wanted.items()} == {"optimizers": 15, "schedules": 15, "losses": 23}
    for section, found in wanted.items():
        assert found <= {entry.name for entry in dictionary.entries(section)}


def test_every_entry_was_measured_and_no_other() -> None:
    assert len({entry.key for entry in ENTRIES}) == len(ENTRIES)
    assert set(MEASURED.gaps) == {entry.key for entry in ENTRIES}, "run: python -m equivalence.report.dictionary"
    for entry in ENTRIES:
        gaps = MEASURED.of(entry)
        assert (gaps.form is None, gaps.exact is None) == (entry.form is None, entry.exact is None)


def test_what_is_committed_of_ours_is_rounding() -> None:
    for key, gaps in MEASURED.gaps.items():
        assert gaps.ours <= AGREES * gaps.rounding, key
        assert gaps.exact is None or gaps.exact <= AGREES * gaps.rounding, key


def test_a_form_that_is_said_to_be_the_same_is() -> None:
    for entry in ENTRIES:
        gap, rounding = MEASURED.of(entry).form, MEASURED.of(entry).rounding
        if gap is not None and entry.differs.lower().startswith(("none", "nothing")):
            # Optax divides its int32 counts in float32, also where everything else is float64
            assert gap <= AGREES * rounding * (U32 / U64 if entry.section == "schedules" else 1), entry.torch


AGAIN = {
    "optimizers": ("AdamW", "RMSprop", "SparseAdam", "Rprop"),
    "schedules": ("MultiplicativeLR", "PolynomialLR", "OneCycleLR", "SequentialLR", "ReduceLROnPlateau"),
    "losses": ("CrossEntropyLoss", "SmoothL1Loss", "CTCLoss", "HuberLoss", "MultiLabelMarginLoss"),
}


@pytest.mark.parametrize(("section", "name"), [(section, name) for section in AGAIN for name in AGAIN[section]])
def test_a_figure_is_found_again(section: str, name: str) -> None:
    entry = named(section, name)
    now, before = dictionary.measure(entry), MEASURED.of(entry)
    for kind in ("form", "exact", "ours"):
        gap, committed = getattr(now, kind), getattr(before, kind)
        if committed is None or committed <= AGREES * before.rounding:
            assert gap is committed or gap <= AGREES * now.rounding
        else:
            assert committed / 2 < gap < 2 * committed


@pytest.mark.parametrize(
    ("section", "name", "wrong"),
    [
        ("optimizers", "AdamW", "optax.adamw(1e-3, weight_decay=1.001e-2)"),
        ("optimizers", "AdamW", "optax.adamw(1.00001e-3, weight_decay=1e-2)"),
        ("optimizers", "LBFGS", "optax.lbfgs(1.0, linesearch=None)"),
        ("schedules", "CosineAnnealingWarmRestarts", "optax.cosine_decay_schedule(0.1, 11)"),
        ("schedules", "ExponentialLR", "lambda count: 0.1 * 0.9000001**count"),
        ("losses", "MSELoss", "optax.squared_error(x, y).mean() + 1e-9"),
        ("losses", "L1Loss", "(x - y).mean() + jax.lax.stop_gradient((jnp.abs(x - y) - x + y).mean())"),
    ],
)
def test_a_wrong_form_is_no_rounding(section: str, name: str, wrong: str) -> None:
    entry = named(section, name)
    row = dataclasses.replace(entry.row, form=wrong)
    gaps = dictionary.measure(dataclasses.replace(entry, form=wrong, exact=None, row=row))
    assert gaps.form is not None
    assert gaps.form > 1000 * AGREES * gaps.rounding
    assert gaps.ours <= AGREES * gaps.rounding


def test_the_metric_makes_a_plateau_reduce_several_times() -> None:
    from equivalence.optimizers import gaps

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    scheduler = named("schedules", "ReduceLROnPlateau").row.make(optimizer)
    assert len(set(gaps._torch_rates(optimizer, scheduler))) > 5


def test_the_page_is_current() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert text == report.page(MEASURED), "run: python -m equivalence.report.dictionary"
    for entry in ENTRIES:
        assert entry.torch in text.replace("\\|", "|")


def test_the_page_says_how_much_was_measured() -> None:
    from equivalence.optimizers import gaps

    assert f"{gaps.STEPS} steps of random gradients" in report.HEAD
    assert f"{gaps.COUNTS} counts" in report.HEAD.replace("\n", " ")


def test_the_page_says_how_to_call_what_is_not_called_like_the_others() -> None:
    from equivalence.optimizers.rules import RULES

    asked = {name for name, rule in RULES.items() if rule.in_reference_layout}
    assert asked == {name for name in dictionary.OURS if name != "ReduceLROnPlateau"}
    more = {name for name, rule in RULES.items() if rule.whole or rule.needs_rows}
    assert more == {name for name in dictionary.CALLS if name != "ReduceLROnPlateau"}
    text = PAGE.read_text(encoding="utf-8")
    assert all(f"\n- {name}: `" in text for name in (*dictionary.OURS, *dictionary.CALLS))


def example() -> str:
    (code,) = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return code


def test_the_example_of_a_handover_goes_on_in_jax_and_back() -> None:
    names: dict[str, Any] = {}
    with torch.random.fork_rng():
        exec(compile(example(), PAGE.name, "exec"), names)
    optimizer, model, state = names["optimizer"], names["model"], names["state"]
    assert names["scheduler"].last_epoch == 20
    assert [int(optimizer.state[p]["step"]) for p in model.parameters()] == [20, 20]
    assert optimizer.param_groups[0]["lr"] == names["scheduler"].get_last_lr()[0] < 1e-3
    moments = names["optax"].tree.get(state.leaves["kernel"], "mu")
    assert np.array_equal(optimizer.state[model.weight]["exp_avg"].numpy(), np.asarray(moments).T)
    assert np.array_equal(model.weight.detach().numpy(), np.asarray(names["params"]["kernel"]).T)


@pytest.mark.parametrize("section", SECTIONS)
def test_list_shows_forms_gaps_and_differences_in_80_columns(section: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["list", section]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    words = " ".join(out.split())
    for entry in dictionary.entries(section):
        for text in (entry.torch, entry.form, entry.exact, entry.ours, entry.call, entry.differs):
            assert text is None or " ".join(text.split()) in words


def test_list_names_what_verify_takes(capsys: pytest.CaptureFixture[str]) -> None:
    from equivalence import losses
    from equivalence.optimizers import PAIRS

    for section, names in (("optimizers", PAIRS), ("losses", losses.PAIRS)):
        assert cli.run(["list", section]) == 0
        first = capsys.readouterr().out.split("\n\n")[0]
        assert all(re.search(rf"^  {name} ", first, re.MULTILINE) for name in names)


def test_figures_that_cannot_be_read_are_said_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "dictionary.json"
    monkeypatch.setattr(dictionary, "FIGURES", broken)
    for text in (None, "{", "{}", "[]", '{"versions": {}, "lines": [{"measured": [], "gaps": {"form": 1}}]}'):
        if text is not None:
            broken.write_text(text, encoding="utf-8")
        with pytest.raises(InputError, match=r"cannot read dictionary\.json"):
            dictionary.figures()


def test_an_entry_without_figures_is_said_in_one_line() -> None:
    other = dataclasses.replace(named("optimizers", "AdamW"), form="optax.adamw(2e-3)")
    with pytest.raises(InputError, match=r"torch\.optim\.AdamW.* was not measured yet"):
        MEASURED.of(other)
    with pytest.raises(InputError, match=r"torch\.optim\.SGD.* was not measured yet"):
        report.page(Figures({}, {}))


def test_figures_keep_two_digits() -> None:
    gaps = {("losses", "F.mse_loss(x, y)", "x", None): Gaps(0.123456, None, 3.456e-16, 1e-15)}
    text = dictionary.as_json(Figures({"torch": "2.13"}, gaps))
    assert '"form": 0.12,' in text
    assert '"ours": 3.5e-16,' in text
    assert '"exact": null' in text
