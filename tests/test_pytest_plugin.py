"""The pytest plugin: items, options, selection, what a failure says, one run for each model and port."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

import pytest

from equivalence.spec import Spec
from equivalence.verdict import CHECKS
from tests.reports import check, divergent_port, equivalent_port, inconclusive_port, report, stream

# A run in this process forgets the modules that it was the first to load, and NumPy cannot be loaded twice.
for module in ("numpy", "hypothesis", "equivalence.frameworks", "equivalence.report.text", "impls.titanic_mlp.spec"):
    importlib.import_module(module)

TEST = "def test_model(model_check):\n    model_check.assert_equivalent()\n"


@pytest.fixture
def runs(monkeypatch):
    """A pipeline that judges ports as this list's `verdicts` says, and notes each run."""
    fake = ModuleType("equivalence.api")
    fake.calls = []
    fake.verdicts = {"nnx": equivalent_port, "linen": equivalent_port}

    def verify_spec(spec, *, ports, checks, examples, seed):
        fake.calls.append((ports, checks, examples, seed))
        made = fake.verdicts[ports[0]]
        if isinstance(made, Exception):
            raise made
        yield from stream(report(made(ports[0])))

    fake.verify_spec = verify_spec
    monkeypatch.setitem(sys.modules, "equivalence.api", fake)
    monkeypatch.setattr(Spec, "implementation", lambda self, framework: None)
    return fake


@pytest.fixture
def run(pytester, runs):
    """Run pytest in this process on a file with one `model_check` test."""
    pytester.makepyfile(TEST)
    return lambda *arguments: pytester.runpytest_inprocess("-p", "no:cacheprovider", *arguments)


def test_every_model_port_and_check_is_one_item(run):
    result = run("--collect-only", "-q")
    listed = [line for line in result.outlines if "::" in line]
    assert len(listed) == 2 * (len(CHECKS) + 1)
    assert any(line.endswith("::test_model[titanic_mlp-nnx-parameter_gradients]") for line in listed)
    assert any(line.endswith("::test_model[titanic_mlp-linen-verdict]") for line in listed)


def test_a_model_and_port_run_once(run, runs):
    run().assert_outcomes(passed=2 * (len(CHECKS) + 1))
    assert runs.calls == [(("nnx",), None, None, 0), (("linen",), None, None, 0)]


def test_options_choose(run, runs):
    options = ("--ports", "linen", "--checks", "outputs,loss", "--examples", "7", "--equivalence-seed", "3")
    run(*options).assert_outcomes(passed=3)
    assert runs.calls == [(("linen",), ("outputs", "loss"), 7, 3)]


def test_only_the_selected_checks_are_run(run, runs):
    run("-k", "nnx-outputs or nnx-step").assert_outcomes(passed=2, deselected=2 * (len(CHECKS) + 1) - 2)
    assert runs.calls == [(("nnx",), ("outputs", "step"), None, 0)]


def test_a_divergence_fails_with_its_explanation(run, runs):
    runs.verdicts["nnx"] = divergent_port
    result = run("-k", "nnx and (structure or outputs or verdict)")
    result.assert_outcomes(passed=1, failed=2, deselected=2 * (len(CHECKS) + 1) - 3)
    result.stdout.fnmatch_lines(
        [
            "titanic_mlp/nnx · outputs · divergent, first at blocks.3.act*",
            "  gap 0.00047, expected 3e-16*",
            "  cause (confirmed): *",
        ]
    )
    assert "Traceback" not in result.stdout.str()


def test_a_check_that_did_not_run_fails(run, runs):
    from dataclasses import replace

    runs.verdicts["nnx"] = lambda port: replace(equivalent_port(port), checks=(check("outputs"),))
    run("-k", "nnx-loss or nnx-outputs").assert_outcomes(passed=1, failed=1, deselected=2 * (len(CHECKS) + 1) - 2)


def test_checks_that_agree_do_not_hide_an_uncovered_leaf(run, runs):
    from dataclasses import replace

    runs.verdicts["nnx"] = lambda port: replace(inconclusive_port(port), checks=(check("outputs"),))
    result = run("--ports", "nnx", "--checks", "outputs")
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(["*not judged (25.0% of the parameters)*"])


def test_a_run_that_broke_is_not_repeated(run, runs):
    runs.verdicts["nnx"] = ZeroDivisionError("ours")
    run("--ports", "nnx").assert_outcomes(failed=len(CHECKS) + 1)
    assert len(runs.calls) == 1


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--checks", "output"), "--checks: unknown check 'output' (did you mean outputs"),
        (("--ports", "nxn"), "--ports: unknown port 'nxn' (did you mean nnx"),
        (("--ports", ","), "--ports: expected at least one name"),
        (("--ports", "function"), "no model has a port to function"),
        (("--examples", "0"), "--examples: 0 is less than 1"),
    ],
)
def test_unknown_names_are_usage_errors(run, runs, options, says):
    result = run(*options)
    assert result.ret == pytest.ExitCode.USAGE_ERROR or "Interrupted: 1 error" in result.stdout.str()
    assert says in result.stdout.str() + result.stderr.str()
    assert runs.calls == []


def test_a_missing_framework_is_a_visible_skip(run, monkeypatch):
    def implementation(self, framework):
        if framework == "linen":
            raise ModuleNotFoundError("No module named 'flax'", name="flax")

    monkeypatch.setattr(Spec, "implementation", implementation)
    result = run("-rs")
    result.assert_outcomes(passed=len(CHECKS) + 1, skipped=len(CHECKS) + 1)
    result.stdout.fnmatch_lines(["SKIPPED*linen: flax is not installed"])


def test_a_marked_test_judges_the_targets_it_names(pytester, runs):
    mark = 'import pytest\n@pytest.mark.equivalence("impls.titanic_mlp.spec:SPEC")\n'
    pytester.makepyfile(mark + TEST)
    result = pytester.runpytest_inprocess("-p", "no:cacheprovider", "--ports", "nnx", "--strict-markers")
    result.assert_outcomes(passed=len(CHECKS) + 1)


def test_an_unknown_target_is_an_error_that_names_the_nearest(pytester, runs):
    pytester.makepyfile('import pytest\n@pytest.mark.equivalence("titanic")\n' + TEST)
    result = pytester.runpytest_inprocess("-p", "no:cacheprovider")
    assert result.ret != 0
    assert "unknown model 'titanic' (did you mean titanic_mlp?" in result.stdout.str() + result.stderr.str()


def test_items_of_one_model_share_an_xdist_group(pytester, runs):
    pytester.makepyfile(TEST)
    items, _ = pytester.inline_genitems()
    groups = {mark.args for item in items for mark in item.iter_markers("xdist_group")}
    assert groups == {("titanic_mlp",)}
