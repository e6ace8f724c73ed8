"""The command line: exit statuses, one clear line for bad input, JSON alone on stdout, a clean end on Ctrl-C."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from types import ModuleType

import pytest

from equivalence import cli
from equivalence.errors import InputError, MappingError, UnsupportedDraw
from equivalence.verdict import CHECKS
from tests.reports import divergent_port, equivalent_port, inconclusive_port, report, stream


@pytest.fixture
def pipeline(monkeypatch):
    """A pipeline that says what the test wants and remembers what it was asked for."""
    fake = ModuleType("equivalence.api")
    fake.calls = []
    fake.outcome = report(equivalent_port(), equivalent_port("linen"))

    def verify_spec(spec, **options):
        fake.calls.append((spec.name, options))
        if isinstance(fake.outcome, BaseException):
            raise fake.outcome
        yield from stream(fake.outcome)

    fake.verify_spec = verify_spec
    monkeypatch.setitem(sys.modules, "equivalence.api", fake)
    return fake


def lines(text):
    return text.strip().splitlines()


@pytest.mark.parametrize(
    ("port", "status"),
    [(equivalent_port(), 0), (divergent_port(), 1), (inconclusive_port(), 3)],
    ids=lambda p: str(p)[:9],
)
def test_the_exit_status_is_the_verdict(pipeline, capsys, port, status):
    pipeline.outcome = report(equivalent_port("linen"), port)
    assert cli.run(["verify", "titanic_mlp"]) == status
    assert lines(capsys.readouterr().out)[-1].startswith(f"titanic_mlp: {port.verdict}")


def test_options_reach_the_pipeline(pipeline):
    arguments = "verify titanic_mlp --port nnx --checks outputs,loss --optimizer all --examples 7 --seed 3 --power"
    assert cli.run(arguments.split()) == 0
    assert pipeline.calls == [
        (
            "titanic_mlp",
            {
                "ports": ("nnx",),
                "checks": ("outputs", "loss"),
                "optimizer": "all",
                "examples": 7,
                "seed": 3,
            },
        )
    ]


def test_json_on_stdout_stands_alone(pipeline, capsys):
    pipeline.outcome = report(divergent_port())
    assert cli.run(["verify", "titanic_mlp", "--json", "-"]) == 1
    out, err = capsys.readouterr()
    assert json.loads(out)["reports"][0]["verdict"] == "divergent"
    assert lines(err)[-1] == "titanic_mlp: divergent (nnx)"


def test_reports_are_written_to_files(pipeline, tmp_path):
    places = [tmp_path / "report.json", tmp_path / "report.html"]
    assert cli.run(["verify", "titanic_mlp", "--json", str(places[0]), "--html", str(places[1])]) == 0
    assert json.loads(places[0].read_text())["schema"] == 1
    assert places[1].read_text().startswith("<!doctype html>")
    assert sorted(tmp_path.iterdir()) == sorted([*places])


BAD = [
    (["verfy"], "unknown command 'verfy' (did you mean verify?"),
    (["verify"], "Missing argument 'TARGET'"),
    (["verify", "titanic"], "unknown model 'titanic' (did you mean titanic_mlp?"),
    (["verify", "titanic_mlp", "--port", "nxn"], "unknown port 'nxn' (did you mean nnx"),
    (["verify", "titanic_mlp", "--port", "torch"], "unknown port 'torch'"),
    (["verify", "titanic_mlp", "--checks", "outputs,los"], "unknown check 'los' (did you mean loss"),
    (["verify", "titanic_mlp", "--checks", ","], "expected at least one name"),
    (["verify", "titanic_mlp", "--optimizer", "adm"], "unknown optimizer 'adm' (did you mean adam"),
    (["verify", "titanic_mlp", "--examples", "0"], "0 is not in the range x>=1"),
    (["verify", "titanic_mlp", "--examples", "many"], "'many' is not a valid integer"),
    (["verify", "titanic_mlp", "--exmples", "3"], "No such option"),
    (["verify", "titanic_mlp", "--json", "missing/report.json"], "cannot write missing/report.json: no such folder"),
    (["verify", "titanic_mlp", "--html", "."], "cannot write .: it is a folder"),
    (["verify", "missing.py:SPEC"], "no such file: missing.py"),
    (["verify", "no.such.module:SPEC"], "cannot import 'no.such.module'"),
    (["verify", "math:pi"], "math:pi is a float, not an equivalence.Spec"),
    (["verify", "impls.titanic_mlp.spec:SPCE"], "impls.titanic_mlp.spec has no 'SPCE'"),
    (["show", "titanic"], "unknown model 'titanic'"),
    (["train", "titanic_mlp", "--plot", "missing/a.png"], "cannot write missing/a.png"),
    (["list", "model"], "unknown section 'model' (did you mean models?"),
]


@pytest.mark.parametrize(
    ("arguments", "says"), BAD, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_bad_input_gets_one_clear_line(pipeline, capsys, tmp_path, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    assert cli.run(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(lines(err)) == 1
    assert err.startswith("equivalence: ")
    assert says in err
    assert pipeline.calls == []
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_no_spec_is_bad_input(capsys, tmp_path):
    place = tmp_path / "broken.py"
    place.write_text("SPEC = (\n")
    assert cli.run(["verify", f"{place}:SPEC"]) == 2
    assert "cannot be loaded as a spec: SyntaxError" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (InputError("inputs hold NaN"), 2),
        (MappingError("left over: a.b\nmissing: c.d"), 2),
        (UnsupportedDraw("poisson cannot be served"), 3),
    ],
)
def test_our_own_errors_become_their_message_and_status(pipeline, capsys, tmp_path, error, status):
    pipeline.outcome = error
    place = tmp_path / "report.json"
    assert cli.run(["verify", "titanic_mlp", "--json", str(place)]) == status
    assert capsys.readouterr().err.strip() == f"equivalence: {error}"
    assert not place.exists()


def test_an_error_of_ours_is_one_line_and_a_hint(pipeline, capsys, monkeypatch):
    monkeypatch.delenv(cli.TRACEBACK, raising=False)
    pipeline.outcome = ZeroDivisionError("float\ndivision")
    assert cli.run(["verify", "titanic_mlp"]) == 70
    assert capsys.readouterr().err == (
        "equivalence: internal error: ZeroDivisionError: float division"
        " (set EQUIVALENCE_TRACEBACK=1 to see the traceback)\n"
    )
    monkeypatch.setenv(cli.TRACEBACK, "1")
    assert cli.run(["verify", "titanic_mlp"]) == 70
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_a_missing_framework_is_named_with_its_extra(pipeline, capsys):
    pipeline.outcome = ModuleNotFoundError("No module named 'flax.nnx'", name="flax.nnx")
    assert cli.run(["verify", "titanic_mlp"]) == 2
    assert capsys.readouterr().err == "equivalence: flax is not installed: pip install 'equivalence-suite[jax]'\n"


def test_ctrl_c_ends_cleanly(pipeline, capsys):
    pipeline.outcome = KeyboardInterrupt()
    assert cli.run(["verify", "titanic_mlp"]) == 130
    assert capsys.readouterr().err.strip() == "equivalence: interrupted"


def test_a_real_interrupt_ends_a_real_process_cleanly():
    # a runner in the background ignores SIGINT, and so would its children
    script = """
import signal, sys, time, types
signal.signal(signal.SIGINT, signal.default_int_handler)
fake = types.ModuleType("equivalence.api")
def verify_spec(spec, **options):
    print("running", flush=True)
    time.sleep(60)
    yield
fake.verify_spec = verify_spec
sys.modules["equivalence.api"] = fake
from equivalence.cli import main
main(["verify", "titanic_mlp"])
"""
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "running\n"
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.strip() == "equivalence: interrupted"


def test_a_reader_that_goes_away_is_no_divergence():
    command = f'{sys.executable} -c \'from equivalence.cli import main; main(["show", "titanic_mlp"])\'; echo $? >&2'
    done = subprocess.run(
        ["bash", "-c", f"( {command} ) | head -c 1"], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.stderr.strip() in ("0", "130")


def test_list_says_what_there_is(capsys):
    assert cli.run(["list"]) == 0
    out = capsys.readouterr().out
    for word in (*cli.SECTIONS, *CHECKS, "titanic_mlp", "nnx", "linen", "adam"):
        assert word in out
    assert cli.run(["list", "models"]) == 0
    assert capsys.readouterr().out.startswith("titanic_mlp  ")


def test_list_shows_each_layer_with_its_forms_in_80_columns(capsys):
    assert cli.run(["list", "layers"]) == 0
    out = capsys.readouterr().out
    for word in ("nn.Linear(5, 3)", "nnx.Linear(5, 3", "nn.Dense(3", "differs:"):
        assert word in out
    assert max(map(len, out.splitlines())) <= 80


def test_show_stands_side_by_side_in_160_columns(capsys):
    assert cli.run(["show", "titanic_mlp", "--width", "160"]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 160
    head = next(line for line in text.splitlines() if line.startswith("torch"))
    assert head.split() == ["torch", "│", "nnx", "│", "linen"]
    assert "# differs:" in text


@pytest.mark.parametrize("arguments", [[], ["--help"], ["verify", "-h"]])
def test_help_is_not_an_error(capsys, arguments):
    assert cli.run(arguments) == 0
    assert "Usage: equivalence" in capsys.readouterr().out


def test_version(capsys):
    import equivalence

    assert cli.run(["--version"]) == 0
    assert capsys.readouterr().out == f"equivalence {equivalence.__version__}\n"


def test_train_shows_a_table_and_saves_the_picture(monkeypatch, capsys, tmp_path):
    np = pytest.importorskip("numpy")
    train = pytest.importorskip("equivalence.train")

    def few(spec, *, epochs, seed):
        assert (epochs, seed) == (2, 5)
        for name, planned in (("torch with DataLoader", 2), ("nnx, step not compiled", 500)):
            yield train.TrainProgress(name, 0, 2)
            yield train.TrainProgress(name, 2, 2, 0.5)
            losses = np.array([0.75, 0.5])
            yield train.Trained(name, "torch", 2, planned, losses, 0.8125, planned / 4, None, planned > 2)

    monkeypatch.setattr(train, "train", few)
    place = tmp_path / "curves.png"
    assert cli.run(["train", "titanic_mlp", "--epochs", "2", "--seed", "5", "--plot", str(place)]) == 0
    out = capsys.readouterr().out
    assert "torch with DataLoader: 2 epochs" in out
    row = next(line for line in out.splitlines() if line.startswith("nnx, step not compiled ")).split()
    assert row[-7:] == ["0.5000", "81.2", "%", "~125", "–", "1.0", "x"]
    assert place.read_bytes().startswith(b"\x89PNG")
