"""The pytest plugin: every model x port x check is one item, `titanic_mlp-nnx-parameter_gradients`.

A test that takes the fixture `model_check` becomes one item for each of them; `@pytest.mark.equivalence("TARGET", ...)`
names other targets than the models in `impls/`:

    from equivalence.pytest_plugin import ModelCheck

    @pytest.mark.equivalence("my/port.py:SPEC")
    def test_port(model_check: ModelCheck) -> None:
        model_check.assert_equivalent()

A model and port are run once in a process, for the checks of the items that are selected; the items of one model
stay together under `pytest -n auto --dist loadgroup`. Beside the checks, the item `…-verdict` demands the verdict of
the whole port, coverage included.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from equivalence.verdict import PortReport

VERDICT = "verdict"
"""The item that judges the whole port, beside those of single checks."""

FIXTURE = "model_check"

Run = tuple[str, str, tuple[str, ...] | None, int | None, int]
"""What a run depends on: target, port, checks, examples, seed."""


@dataclass(frozen=True)
class ModelCheck:
    """One check of one port of one model, to be run and judged."""

    target: str
    model: str
    port: str
    check: str
    config: pytest.Config
    selected: tuple[str, ...] = ()
    """The checks of this model and port that this session runs; `verdict` among them stands for all asked for."""

    @property
    def report(self) -> PortReport:
        """The report of the model and port, run once in this process."""
        option = self.config.getoption
        checks = self.selected
        if VERDICT in checks:
            checks = tuple(_split(option("checks")) or ())
        run = (self.target, self.port, checks or None, option("examples"), option("equivalence_seed"))
        runs = self.config.stash.setdefault(_RUNS, {})
        if run not in runs:
            try:
                runs[run] = _judge(run)
            except Exception as error:
                # Kept, so that eleven items of one broken model do not train it eleven times.
                runs[run] = error
        result = runs[run]
        if isinstance(result, Exception):
            raise result
        return result

    def assert_equivalent(self) -> None:
        """Fail the test, with the reason, unless the check (or the whole port) is equivalent."""
        from equivalence.report.text import explain

        __tracebackhide__ = True
        report = self.report
        if self.check == VERDICT:
            verdict = report.verdict
        else:
            try:
                verdict = report.check(self.check).verdict
            except KeyError:
                pytest.fail(f"{self.model}/{self.port} · {self.check} did not run", pytrace=False)
        if verdict != "equivalent":
            named = None if self.check == VERDICT else self.check
            pytest.fail(explain(self.model, report, named), pytrace=False)


_RUNS = pytest.StashKey[dict[Run, "PortReport | Exception"]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """The options that choose what is run."""
    group = parser.getgroup("equivalence", "equivalence of models and their ports")
    group.addoption("--ports", metavar="A,B", help="judge only these ports (default: all)")
    group.addoption("--checks", metavar="A,B", help="run only these checks (default: all that apply)")
    group.addoption("--examples", type=int, metavar="N", help="how many examples to try for each model and port")
    group.addoption("--equivalence-seed", type=int, default=0, metavar="N", help="seed of everything random (0)")


def pytest_configure(config: pytest.Config) -> None:
    """Refuse unknown names before anything is collected."""
    config.addinivalue_line("markers", "equivalence(*targets): models or specs that `model_check` stands for")
    config.addinivalue_line("markers", "xdist_group(name): items that one xdist worker runs (kept where xdist is not)")
    if (checks := _split(config.getoption("checks"))) is not None:
        from equivalence.verdict import CHECKS

        _known("check", "--checks", checks, CHECKS)
    if (ports := _split(config.getoption("ports"))) is not None:
        from equivalence import frameworks

        _known("port", "--ports", ports, [name for name in frameworks.names() if name != "torch"])
    if (examples := config.getoption("examples")) is not None and examples < 1:
        raise pytest.UsageError(f"--examples: {examples} is less than 1")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Turn a test that takes `model_check` into one item a model, port and check."""
    if FIXTURE not in metafunc.fixturenames:
        return
    from equivalence.errors import InputError

    marks = [target for mark in metafunc.definition.iter_markers("equivalence") for target in mark.args]
    try:
        cases = list(_cases(metafunc.config, marks))
    except InputError as error:
        raise pytest.UsageError(str(error)) from None
    metafunc.parametrize(
        FIXTURE,
        [
            pytest.param(case, id=f"{case.model}-{case.port}-{case.check}", marks=pytest.mark.xdist_group(case.model))
            for case in cases
        ],
        indirect=True,
    )


@pytest.fixture
def model_check(request: pytest.FixtureRequest) -> ModelCheck:
    """One check of one port of one model."""
    case: ModelCheck = request.param
    _demand_frameworks(case)
    selected = {
        other.check
        for item in request.session.items
        if isinstance(item, pytest.Function) and (other := _case_of(item)) is not None
        if (other.target, other.port) == (case.target, case.port)
    }
    return ModelCheck(case.target, case.model, case.port, case.check, request.config, tuple(_in_order(selected)))


def _demand_frameworks(case: ModelCheck) -> None:
    """Skip visibly where a framework is missing."""
    from equivalence.spec import REFERENCE, load

    spec = load(case.target)
    for framework in (REFERENCE, case.port):
        try:
            spec.implementation(framework)
        except ModuleNotFoundError as error:
            pytest.skip(f"{framework}: {error.name} is not installed")


def _case_of(item: pytest.Function) -> ModelCheck | None:
    callspec = getattr(item, "callspec", None)
    return None if callspec is None else callspec.params.get(FIXTURE)


def _in_order(selected: set[str]) -> list[str]:
    from equivalence.verdict import CHECKS

    return [name for name in (*CHECKS, VERDICT) if name in selected]


def _cases(config: pytest.Config, targets: Sequence[str]) -> list[ModelCheck]:
    from equivalence import spec as specs
    from equivalence.errors import InputError
    from equivalence.verdict import CHECKS

    ports = _split(config.getoption("ports"))
    checks = _split(config.getoption("checks")) or CHECKS
    cases = []
    for target in targets or specs.models():
        spec = specs.load(target)
        for port in spec.ports:
            if ports is None or port in ports:
                cases += [ModelCheck(target, spec.name, port, check, config) for check in (*checks, VERDICT)]
    if not cases:
        raise InputError(f"no model has a port to {' or '.join(ports or ('anything',))}")
    return cases


def _judge(run: Run) -> PortReport:
    """One run of the pipeline, for one port."""
    from equivalence.api import verify_spec
    from equivalence.events import Finished
    from equivalence.spec import load

    target, port, checks, examples, seed = run
    for event in verify_spec(load(target), ports=(port,), checks=checks, examples=examples, seed=seed):
        if isinstance(event, Finished):
            return event.report.reports[0]
    raise RuntimeError(f"{target}/{port}: the run ended without a report")


def _split(value: str | None) -> tuple[str, ...] | None:
    return None if value is None else tuple(dict.fromkeys(name.strip() for name in value.split(",") if name.strip()))


def _known(what: str, option: str, names: Sequence[str], choices: Sequence[str]) -> None:
    from equivalence.errors import unknown

    if not names:
        raise pytest.UsageError(f"{option}: expected at least one name")
    for name in names:
        if name not in choices:
            raise pytest.UsageError(f"{option}: {unknown(what, name, choices)}")
