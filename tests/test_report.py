"""What is said about a verdict: in text, on the terminal, as JSON, as HTML, and side by side."""

from __future__ import annotations

import io
import json
import os
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from rich.console import Console

from equivalence.errors import DivergenceError, InconclusiveError, InputError
from equivalence.report import html, json_report
from equivalence.report.files import check_writable, write_atomically
from equivalence.report.lessons import aligned, print_lesson, sections
from equivalence.report.terminal import Terminal, power_table
from equivalence.report.text import explain
from tests.reports import check, divergent_port, equivalent_port, inconclusive_port, report, stream


def shown(whole, *, terminal=False, width=80):
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=width, highlight=False)
    with Terminal(console) as listener:
        for event in stream(whole):
            listener.handle(event)
    return out.getvalue()


def test_a_divergence_names_place_figures_cause_fix_and_command():
    assert explain("gpt2", divergent_port()).splitlines() == [
        "gpt2/nnx · outputs · divergent, first at blocks.3.act (nnx: blocks.3.gelu)",
        "  gap 0.00047, expected 3e-16, resolution 1.4e-15 · worst at eval.outputs[0, 7]",
        "  cause (confirmed): the port's GELU is the <tanh> approximation",
        "  fix: jax.nn.gelu(x, approximate=False)",
        "  also: loss (divergent)",
        "  reproduce: equivalence verify gpt2 --port nnx --seed 0",
    ]


def test_a_chosen_check_comes_first():
    assert explain("gpt2", divergent_port(), "loss").startswith("gpt2/nnx · loss · divergent\n  gap")
    assert "also: outputs (divergent)" in explain("gpt2", divergent_port(), "loss")


def test_an_inconclusive_port_names_what_was_not_judged():
    text = explain("gpt2", inconclusive_port())
    assert text.startswith("gpt2/nnx · step · inconclusive")
    assert "nothing finite was left" in text
    assert "not judged (25.0% of the parameters): blocks.0.bias" in text
    assert "… and 3 more" in text


def test_a_port_with_no_failed_check_is_still_explained():
    from dataclasses import replace

    port = replace(inconclusive_port(), checks=(check("outputs"),))
    assert explain("gpt2", port).startswith("gpt2/nnx · inconclusive\n  not judged")


def test_assert_equivalent_raises_the_whole_reason():
    with pytest.raises(DivergenceError, match=r"first at blocks\.3\.act"):
        report(divergent_port()).assert_equivalent()
    with pytest.raises(InconclusiveError, match="not judged"):
        report(inconclusive_port(), equivalent_port("linen")).assert_equivalent()
    report(equivalent_port()).assert_equivalent()


@pytest.mark.parametrize("whole", [report(equivalent_port(), equivalent_port("linen")), report(divergent_port())])
def test_the_table_fits_80_columns_and_is_plain_off_a_terminal(whole):
    text = shown(whole)
    assert "\x1b" not in text
    tables = [line for line in text.splitlines() if "e-1" in line or line.startswith("check")]
    assert max(map(len, tables)) <= 80


def test_off_a_terminal_it_says_what_is_done_meanwhile():
    lines = shown(report(equivalent_port())).splitlines()
    assert lines[:4] == [
        "titanic_mlp: torch against nnx, 12 checks",
        "nnx: 40 examples",
        "nnx: examples (40)",
        "nnx: training steps (8500)",
    ]
    assert lines[-1] == "titanic_mlp: equivalent (nnx)"


def test_the_table_shows_every_figure_of_every_check():
    text = shown(report(equivalent_port()))
    row = next(line for line in text.splitlines() if line.startswith("parameter_gradients"))
    assert row.split() == ["parameter_gradients", "equivalent", "3.2e-16", "2.5e-16", "1.3", "1.4e-15", "40"]
    assert "coverage: 100 % of the parameters · inert: attn.key.bias" in text
    assert "caveat (tie): input_gradients · act1: the slope" in text
    assert "after 8500 steps" in text
    assert "port, float64" in text
    assert "75.0 %" in text


def test_brackets_in_a_leaf_are_text_not_markup():
    assert "worst at eval.outputs[0, 7]" in shown(report(divergent_port()))


def test_on_a_terminal_it_is_coloured_and_the_bar_is_gone_at_the_end():
    text = shown(report(divergent_port()), terminal=True)
    assert "\x1b[1;31mdivergent" in text
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1


def test_the_verdict_line_names_the_ports_that_differ():
    text = shown(report(divergent_port(), equivalent_port("linen")))
    assert text.splitlines()[-1] == "titanic_mlp: divergent (nnx, linen equivalent)"


def test_json_follows_the_schema():
    data = json.loads(json_report.render(report(divergent_port(), equivalent_port("linen"))))
    assert data["schema"] == 1
    assert set(data) == {"schema", "target", "reference", "environment", "reports"}
    first = data["reports"][0]
    assert {"port", "verdict", "checks", "coverage", "caveats", "mapping", "divergence"} <= set(first)
    assert set(first["checks"][0]) == {
        "name", "verdict", "gap", "expected_gap", "precision", "resolution", "examples", "worst", "message",
    }  # fmt: skip
    assert first["divergence"]["cause"]["confirmed"] is True
    assert data["environment"]["nan"] is None


def test_json_takes_numpy_numbers():
    from dataclasses import replace

    port = replace(equivalent_port(), training={"loss": np.float32(0.5), "curve": np.ones(2)})
    assert json.loads(json_report.render(report(port)))["reports"][0]["training"] == {"loss": 0.5, "curve": [1.0, 1.0]}


class _Balance(HTMLParser):
    void = frozenset({"meta", "link", "br"})

    def __init__(self):
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []

    def handle_starttag(self, tag, attrs):
        if tag not in self.void:
            self.open.append(tag)
        self.loads += [value for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.mark.parametrize("port", [equivalent_port(), divergent_port(), inconclusive_port()])
def test_html_is_well_formed_escaped_and_self_contained(port):
    text = html.render(report(port))
    parser = _Balance()
    parser.feed(text)
    assert parser.open == []
    assert parser.loads == []
    assert "<tanh>" not in text
    assert port.verdict in text
    if port.verdict == "divergent":
        assert "&lt;tanh&gt;" in text


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "report.json"
    path.write_text("old")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(InputError, match=r"cannot write .*report\.json: No space left"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.json"]


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write_atomically(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "new"


def test_an_unwritable_place_is_found_before_the_run(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        check_writable(tmp_path / "missing" / "report.json")
    with pytest.raises(InputError, match="it is a folder"):
        check_writable(tmp_path)


TORCH = (
    "import torch\n\n\nclass MLP(nn.Module):\n    def forward(self, x):\n        # differs: at 0\n        return x\n"
)
NNX = (
    "import jax\n\n\ndef extra():\n    pass\n\n\nclass MLP(nnx.Module):\n    def __call__(self, x):\n        return x\n"
)


def test_sections_keep_every_line():
    for source in (TORCH, NNX):
        kept = "\n".join(part.source for part in sections(source))
        assert kept.split() == source.split()


def test_methods_that_do_one_thing_share_a_row():
    rows = aligned({"torch": sections(TORCH), "nnx": sections(NNX)})
    assert [(key, list(row)) for key, row in rows] == [
        ("#0", ["torch", "nnx"]),
        ("extra", ["nnx"]),
        ("MLP", ["torch", "nnx"]),
        ("MLP.__call__", ["torch", "nnx"]),
    ]


@pytest.fixture
def modules(tmp_path, monkeypatch):
    (tmp_path / "lesson_torch.py").write_text(TORCH)
    (tmp_path / "lesson_nnx.py").write_text(NNX.replace("return x", "return " + " + ".join(["x"] * 40)))
    monkeypatch.syspath_prepend(tmp_path)
    return {"torch": "lesson_torch", "nnx": "lesson_nnx"}


@pytest.mark.parametrize(("width", "columns"), [(160, True), (94, True), (60, False)])
def test_a_lesson_stands_side_by_side_where_there_is_room(modules, width, columns):
    out = io.StringIO()
    print_lesson(Console(file=out, width=width), "a lesson", modules)
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    assert any("import torch" in line and "import jax" in line for line in lines) is columns
    assert out.getvalue().count("+") == 39


def test_what_differs_stands_out(modules):
    out = io.StringIO()
    print_lesson(Console(file=out, width=160, force_terminal=True, color_system="standard"), "a lesson", modules)
    assert re.search(r"\x1b\[1;33[;0-9]*m# differs: at 0", out.getvalue())


def test_a_module_without_source_is_bad_input():
    with pytest.raises(InputError, match=r"no\.such\.module has no source"):
        print_lesson(Console(file=io.StringIO()), "a lesson", {"torch": "no.such.module"})


def test_power_names_the_check_that_sees_the_smallest_change_of_each_leaf():
    power = {"outputs": {"fc.weight": 2e-13, "fc.bias": 1e-13}, "step": {"fc.weight": 3e-14}}
    console = Console(file=io.StringIO(), width=80)
    console.print(power_table(power))
    text = console.file.getvalue()
    assert [line.split() for line in text.strip().splitlines()[1:]] == [
        ["fc.weight", "3e-14", "step"],
        ["fc.bias", "1e-13", "outputs"],
    ]
