"""Implementations of a model lie side by side: same names, same order, and every difference pointed out."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from equivalence.spec import Spec, load, models

IMPLEMENTATIONS = [(name, framework) for name in models() for framework in load(name).implementations]


def source(spec: Spec, framework: str) -> str:
    found = importlib.util.find_spec(spec.implementations[framework])
    assert found is not None
    assert found.origin is not None
    return Path(found.origin).read_text()


def top_level(code: str) -> list[str]:
    return [node.name for node in ast.parse(code).body if isinstance(node, (ast.ClassDef, ast.FunctionDef))]


def attributes(code: str) -> list[str]:
    """The submodules every class assigns to self, in the order of the source."""
    return [
        target.attr
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call)
        for target in node.targets
        if isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name) and target.value.id == "self"
    ]


@pytest.mark.parametrize(("model", "framework"), IMPLEMENTATIONS)
def test_names_and_their_order_are_those_of_the_reference(model: str, framework: str) -> None:
    spec = load(model)
    reference, port = source(spec, "torch"), source(spec, framework)
    names = top_level(reference)
    assert {"build", "loss_fn", "make_optimizer", "train_step"} <= set(names)
    assert [name for name in top_level(port) if name in names] == names
    assert attributes(port) == attributes(reference) != []


def differences(code: str) -> list[tuple[str, str]]:
    """Every `# differs:` line, with the name of the top-level class or function that holds it."""
    nodes = [node for node in ast.parse(code).body if isinstance(node, (ast.ClassDef, ast.FunctionDef))]
    return [
        (node.name, line.strip())
        for number, line in enumerate(code.splitlines(), 1)
        for node in nodes
        if "# differs:" in line and node.lineno <= number <= (node.end_lineno or 0)
    ]


@pytest.mark.parametrize(("model", "framework"), IMPLEMENTATIONS)
def test_every_file_says_where_the_frameworks_part(model: str, framework: str) -> None:
    spec = load(model)
    found = differences(source(spec, framework))
    assert [place for place, _ in found] == [place for place, _ in differences(source(spec, "torch"))] != []
    assert all(line.startswith("# differs: ") and line.endswith(".") for _, line in found), "whole sentences"


@pytest.mark.parametrize(("model", "framework"), IMPLEMENTATIONS)
def test_two_files_fit_side_by_side(model: str, framework: str) -> None:
    assert max(map(len, source(load(model), framework).splitlines())) <= 78


@pytest.mark.parametrize(("model", "framework"), IMPLEMENTATIONS)
def test_config_fields_are_used_alike(model: str, framework: str) -> None:
    """Every implementation is built from the same fields, and what none of them reads is read by the training."""
    spec = load(model)

    def fields(code: str) -> set[str]:
        return {
            node.attr
            for node in ast.walk(ast.parse(code))
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("config", "self.config")
        }

    known = {field.name for field in dataclasses.fields(spec.config)}
    used = fields(source(spec, framework))
    assert used == fields(source(spec, "torch")) != set()
    assert used <= known
    assert known - used <= {"batch_size", "epochs", "learning_rate"}


@pytest.mark.parametrize(("model", "framework"), IMPLEMENTATIONS)
def test_a_model_file_holds_a_model_and_nothing_else(model: str, framework: str) -> None:
    tree = ast.parse(source(load(model), framework))
    calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    assert not calls & {"open", "print", "np.load", "torch.load"}
    assert not [node for node in ast.walk(tree) if isinstance(node, (ast.While, ast.Assert))]


@pytest.mark.parametrize("model", models())
def test_a_spec_loads_no_framework(model: str) -> None:
    program = (
        f"import sys; from equivalence.spec import load; load({model!r})\n"
        "print(sorted({'torch', 'jax', 'flax', 'pandas'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_titanic_batches_and_examples() -> None:
    import numpy as np

    spec = load("titanic_mlp")
    assert spec.first is not None
    (x,), (survived,) = spec.first(spec.config)
    assert (x.shape, survived.shape) == ((64, 8), (64,))
    for kind in ("ordinary", "large", "tiny", "zeros", "repeated", "ties"):
        (x,), (survived,) = spec.example(spec.config, np.random.default_rng(0), kind)
        assert (x.shape, survived.shape, x.dtype, survived.dtype) == ((64, 8), (64,), np.float32, np.float32)
        assert (kind in ("zeros", "repeated")) == bool((x == x[0]).all())
        assert (kind in ("zeros", "ties")) == bool((x * 2 == np.round(x * 2)).all())
