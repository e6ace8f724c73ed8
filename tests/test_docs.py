"""What the pages say is so: their code runs, their links lead somewhere, their generated parts are current."""

from __future__ import annotations

import re
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import equivalence as eq
from equivalence.report import differences
from equivalence.spec import load, models
from equivalence.verdict import CHECKS, EXIT_STATUS
from equivalence.weights import Leaves

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    heads = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith("http"):
            continue
        place, _, anchor = target.partition("#")
        linked = (page.parent / place).resolve() if place else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), target


def test_every_page_is_one_link_from_the_readme() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for page in PAGES[1:]:
        assert f"]({page.relative_to(ROOT).as_posix()}" in readme, page.name


def test_the_readme_asks_for_two_commands_and_shows_one_run() -> None:
    commands, transcript = blocks(ROOT / "README.md", "")
    targets = [line.split("#")[0].strip() for line in commands.splitlines()]
    assert targets == ["make verify", "make test"]
    for target in targets:
        assert f"\n{target.removeprefix('make ')}:" in (ROOT / "Makefile").read_text(encoding="utf-8")
    lines = transcript.splitlines()
    assert lines[0] == "$ equivalence verify titanic_mlp --port nnx"
    assert lines[-1] == "titanic_mlp: equivalent (nnx)"
    assert max(map(len, lines)) <= 80
    assert [line.split()[0] for line in lines if line.split()[1:2] == ["equivalent"]][: len(CHECKS)] == list(CHECKS)
    assert not (ROOT / "README.md").read_text(encoding="utf-8").count("<!--")


def test_the_table_of_differences_is_current() -> None:
    page = (ROOT / "docs" / "differences.md").read_text(encoding="utf-8")
    assert page == differences.page(), "run: python -m equivalence.report.differences > docs/differences.md"
    for name in models():
        for module in load(name).implementations.values():
            marked = differences.lines(differences.source_of(module))
            assert marked
            assert all(line in page for line in marked)


def test_the_command_that_writes_the_page_loads_no_framework() -> None:
    program = (
        "import sys; from equivalence.report.differences import page; page()\n"
        "print(sorted({'torch', 'jax', 'flax'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_the_command_line_page_knows_the_options_and_the_statuses() -> None:
    from equivalence.cli import cli

    page = (ROOT / "docs" / "command-line.md").read_text(encoding="utf-8")
    assert set(re.findall(r"`equivalence (\w+)", page)) - {"list"} == set(cli.commands) - {"list"}
    options = {
        option for command in cli.commands.values() for p in command.params for option in p.opts if option[:2] == "--"
    }
    assert set(re.findall(r"--[a-z]+", page)) == options
    assert all(f"| {status} | {verdict}" in page for verdict, status in EXIT_STATUS.items())


# --- code -----------------------------------------------------------------------------------------------------


def whole_example() -> str:
    (_, example, _) = blocks(ROOT / "docs" / "your-own-port.md", "python")
    return example


def test_the_example_of_a_port_of_ones_own_runs() -> None:
    pytest.importorskip("torch")
    pytest.importorskip("flax")
    names: dict[str, Any] = {}
    exec(compile(whole_example(), "your-own-port.md", "exec"), names)
    report = names["report"]
    assert report.verdict == "equivalent"
    assert {check.name for check in report.reports[0].checks if check.gap is not None} >= {"loss", "step", "training"}


@pytest.mark.parametrize(
    ("right", "wrong"),
    [(", approximate=False", ""), ("epsilon=1e-5", "epsilon=1e-6"), ("outputs - targets", "outputs")],
)
def test_the_example_with_a_mistake_raises(right: str, wrong: str) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("flax")
    code = whole_example()
    assert right in code
    with pytest.raises(eq.DivergenceError):
        exec(compile(code.replace(right, wrong), "your-own-port.md", "exec"), {})


def test_the_arguments_in_the_table_are_those_of_verify() -> None:
    import inspect

    page = (ROOT / "docs" / "your-own-port.md").read_text(encoding="utf-8")
    named = [n for cell in re.findall(r"^\| (`.+?) \|", page, re.MULTILINE) for n in re.findall(r"`(\w+)`", cell)]
    assert named == list(inspect.signature(eq.verify).parameters)[3:]


def test_the_rules_in_the_page_fit_what_they_say() -> None:
    (code,) = blocks(ROOT / "docs" / "adding-a-model.md", "python")
    rules: list[eq.Rule] = []
    exec(code, {"Rule": lambda *args, **kwargs: rules.append(eq.Rule(*args, **kwargs))})
    shapes: list[tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]] = [
        ({"wte.weight": (11, 5)}, {"wte.embedding": (11, 5)}),
        ({f"h.{i}.mlp.fc.weight": (2, 3) for i in range(2)}, {f"blocks.{i}.mlp.fc.kernel": (3, 2) for i in range(2)}),
        ({"h.0.attn.qkv.weight": (30, 7)}, {f"blocks.0.attn.{s}.kernel": (7, 2, 5) for s in ("query", "key", "value")}),
        ({f"h.{i}.mlp.fc.weight": (2, 3) for i in range(4)}, {"blocks.mlp.fc.kernel": (4, 3, 2)}),
        ({"fc.weight": (5, 24)}, {"fc.kernel": (24, 5)}),
        ({"rnn.weight_ih_l0": (16, 3)}, {f"cell.i{g}.kernel": (3, 4) for g in "ifgo"}),
    ]
    assert len(rules) == len(shapes)
    for rule, (source, target) in zip(rules, shapes, strict=True):
        bound = eq.Mapping([rule]).bind(Leaves(source), Leaves(target))
        given = {path: np.random.default_rng(0).standard_normal(shape) for path, shape in source.items()}
        got = bound.forward(given)
        assert {path: value.shape for path, value in got.items()} == target
        back = bound.backward(got)
        assert all(np.array_equal(back[path], value) for path, value in given.items())


@pytest.fixture
def my_framework(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A framework as small as the page's adapter takes it for."""
    module = types.ModuleType("my_framework")

    class Module:
        def __init__(self, **weights: Any) -> None:
            self.weights = {name.replace("__", "."): array for name, array in weights.items()}

        def call(self, params: Any, x: Any) -> Any:
            return x @ params["fc.weight"].T + params["fc.bias"]

    module.Module = Module  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "my_framework", module)
    return module


def test_the_adapter_in_the_page_makes_ports_that_are_judged(
    my_framework: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch = pytest.importorskip("torch")
    from equivalence import frameworks

    (code,) = blocks(ROOT / "docs" / "adding-a-framework.md", "python")
    adapter = types.ModuleType("my_package.equivalence_adapter")
    exec(compile(code, "adding-a-framework.md", "exec"), adapter.__dict__)
    monkeypatch.setattr(
        frameworks, "_adapters", lambda: [frameworks.importlib.import_module("equivalence.frameworks.torch"), adapter]
    )
    model = torch.nn.Sequential()
    model.fc = torch.nn.Linear(5, 3)
    port = my_framework.Module(fc__weight=np.zeros((3, 5), np.float32), fc__bias=np.zeros(3, np.float32))
    x = np.random.default_rng(0).standard_normal((6, 5)).astype(np.float32)
    report = eq.verify(model, port, (x,), checks=["outputs", "parameter_gradients", "step"], examples=3)
    assert (report.reports[0].port, report.verdict) == ("my_framework", "equivalent")
    assert eq.verify(model, port, (x,), port_weights="keep", checks=["outputs"], examples=2).verdict == "divergent"
    assert '[project.entry-points."equivalence.frameworks"]' in (ROOT / "docs" / "adding-a-framework.md").read_text()
