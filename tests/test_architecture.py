"""The floors of the design hold: a module imports its own floor or a lower one; frameworks load only when needed."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "equivalence"

FLOORS: dict[str, int] = {
    **dict.fromkeys(("errors", "paths", "numerics", "verdict", "events", "environment"), 0),
    **dict.fromkeys(("weights", "observation", "spec", "randomness"), 1),
    **dict.fromkeys(("frameworks", "runtimes", "loops", "optimizers", "losses", "layers"), 2),
    **dict.fromkeys(("checks", "search", "training", "diagnosis", "judgement"), 3),
    **dict.fromkeys(
        (
            "comparison",
            "handover",
            "noise",
            "runs",
            "survivors",
            "coverage",
            "recordings",
            "structural",
            "conclusion",
            "trained",
            "work",
            "plants",
            "probing",
            "rearrangements",
            "transfer",
            "conventions",
        ),
        3,
    ),
    **dict.fromkeys(("pipeline", "sources", "api", "train", "dictionary"), 4),
    **dict.fromkeys(("report", "cli", "pytest_plugin"), 5),
}

FRAMEWORKS = {"torch", "jax", "jaxlib", "flax", "optax", "equinox", "transformers"}
ADAPTERS = ("frameworks", "runtimes", "loops", "optimizers", "losses", "layers")

EXCEPTIONS = {
    # `assert_equivalent` words its own error; imported inside the method, so that data still flows down.
    ("equivalence.verdict", "equivalence.report.text"),
}


@dataclass(frozen=True)
class Import:
    """One imported module, and whether importing the file is enough to import it."""

    importer: str
    imported: str
    at_load: bool


def imports_of(source: str, importer: str, *, is_package: bool = False) -> Iterator[Import]:
    """Every import in a file; those under `if TYPE_CHECKING` run never and are left out."""
    yield from _walk(ast.parse(source).body, importer, is_package, True)


def _walk(body: list[ast.stmt], importer: str, is_package: bool, at_load: bool) -> Iterator[Import]:
    for node in body:
        if isinstance(node, ast.Import):
            yield from (Import(importer, alias.name, at_load) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                up = importer.split(".")[: len(importer.split(".")) - node.level + is_package]
                base = ".".join([*up, base] if base else up)
            if base == "equivalence":
                yield from (Import(importer, f"equivalence.{alias.name}", at_load) for alias in node.names)
            else:
                yield Import(importer, base, at_load)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from _walk(node.orelse, importer, is_package, at_load)
        else:
            inner = at_load and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            for name in ("body", "orelse", "finalbody", "handlers", "cases"):
                for child in getattr(node, name, []):
                    nested = child.body if isinstance(child, ast.ExceptHandler | ast.match_case) else [child]
                    yield from _walk(nested, importer, is_package, inner)


def floor(module: str) -> int | None:
    """The floor of a module of ours; None for the package itself and for what is not ours."""
    parts = module.split(".")
    return FLOORS.get(parts[1]) if len(parts) > 1 and parts[0] == "equivalence" else None


def climbs(imports: list[Import]) -> list[str]:
    """Imports of a higher floor."""
    return [
        f"{item.importer} (F{low}) imports {item.imported} (F{high})"
        for item in imports
        if (low := floor(item.importer)) is not None and (high := floor(item.imported)) is not None
        if high > low and (item.importer, item.imported) not in EXCEPTIONS
    ]


def framework_leaks(imports: list[Import]) -> list[str]:
    """Frameworks imported with a module outside the adapters' folders, or by an adapter package itself."""
    leaks = []
    for item in imports:
        if item.at_load and item.imported.partition(".")[0] in FRAMEWORKS:
            parts = item.importer.split(".")
            if len(parts) < 3 or parts[1] not in ADAPTERS:
                leaks.append(f"{item.importer} imports {item.imported} at module level")
    return leaks


def package_imports() -> list[Import]:
    found: list[Import] = []
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = ["equivalence", *path.relative_to(PACKAGE).with_suffix("").parts]
        is_package = parts[-1] == "__init__"
        module = ".".join(parts[:-1] if is_package else parts)
        found += imports_of(path.read_text(encoding="utf-8"), module, is_package=is_package)
    return found


def test_every_module_has_a_floor():
    names = {path.stem for path in PACKAGE.glob("*.py")} | {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert names - {"__init__"} <= set(FLOORS)


def test_no_module_imports_a_higher_floor():
    found = package_imports()
    assert len(found) > 50
    assert climbs(found) == []


def test_frameworks_are_imported_only_in_adapters_and_runtimes():
    assert framework_leaks(package_imports()) == []


@pytest.mark.parametrize(
    "source",
    [
        "from equivalence.report import terminal",
        "from equivalence import cli",
        "import equivalence.pipeline",
        "def later():\n    from equivalence.checks import CHECKS",
        "try:\n    import equivalence.frameworks.torch\nexcept ImportError:\n    pass",
        "try:\n    pass\nexcept ImportError:\n    import equivalence.cli",
        "class A:\n    with x:\n        from ..report import html",
        "match x:\n    case 1:\n        import equivalence.cli",
    ],
)
def test_a_planted_climb_is_seen(source):
    assert climbs(list(imports_of(source, "equivalence.weights.rules")))


def test_downward_imports_and_types_are_allowed():
    source = "from equivalence.paths import join\nif TYPE_CHECKING:\n    from equivalence.report import html"
    assert climbs(list(imports_of(source, "equivalence.weights.rules"))) == []


@pytest.mark.parametrize(
    ("importer", "source"),
    [
        ("equivalence.checks", "import torch"),
        ("equivalence.checks", "from jax import numpy"),
        ("equivalence.spec", "if True:\n    import flax.nnx"),
        ("equivalence.frameworks", "import optax"),
        ("equivalence.report.html", "class A:\n    import equinox"),
    ],
)
def test_a_planted_framework_is_seen(importer, source):
    assert framework_leaks(list(imports_of(source, importer)))


def test_frameworks_are_allowed_in_adapters_and_inside_functions():
    assert framework_leaks(list(imports_of("import torch", "equivalence.frameworks.torch"))) == []
    assert framework_leaks(list(imports_of("def f():\n    import torch", "equivalence.checks"))) == []


def loaded_by(code: str) -> set[str]:
    """Which frameworks a fresh process holds after running `code`."""
    script = f"import sys\n{code}\nprint(*sorted({FRAMEWORKS | {'hypothesis'}!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    return set(done.stdout.splitlines()[-1].split()) if done.stdout.strip() else set()


@pytest.mark.parametrize(
    "code",
    [
        "import equivalence; dir(equivalence); equivalence.Rule; equivalence.Spec; equivalence.Report",
        "from equivalence.cli import run; assert run(['--help']) == 0",
        "from equivalence.cli import run; assert run(['verify', '--help']) == 0",
        "from equivalence.cli import run; assert run(['list', 'checks']) == 0",
        "from equivalence.cli import run; assert not any(run(['list', f'{n}s']) for n in ('optimizer', 'schedule'))",
        "from equivalence.cli import run; assert run(['list', 'losses']) == 0",
        "from equivalence.cli import run; assert run(['show', 'titanic_mlp', '--width', '160']) == 0",
        "import equivalence.pytest_plugin",
        "import impls.titanic_mlp.spec",
    ],
)
def test_a_fresh_process_loads_no_framework(code):
    assert loaded_by(code) == set()


def test_a_planted_load_is_seen():
    assert loaded_by("import jax") >= {"jax"}


def test_every_public_name_is_there():
    import equivalence

    for name in equivalence.__all__:
        assert getattr(equivalence, name) is not None
    assert callable(equivalence.verify)
    with pytest.raises(AttributeError, match="no attribute 'verfy'"):
        equivalence.verfy  # noqa: B018 - the attribute access is what is tested


def test_an_instance_of_pytest_with_the_plugin_loads_no_framework(tmp_path):
    (tmp_path / "test_light.py").write_text(
        f"import sys\ndef test_light():\n    assert not {FRAMEWORKS!r} & set(sys.modules)\n", encoding="utf-8"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_light.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
