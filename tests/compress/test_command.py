"""The command line: one clear line for each mistake, and the exit code."""

import json

import pytest

from fedclaw.compress.__main__ import main
from fedclaw.errors import CompressionError, DataError, FedClawError, ProvisionError, UsageError
from tests import warm
from tests.conftest import environment


@pytest.fixture
def run(make_run, trained):
    return make_run(*trained)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ([], UsageError, "run= is missing"),
        (["fraction=2"], UsageError, "fraction: Input should be less than 1 (given: 2)"),
        (["fraction=0"], UsageError, "fraction: Input should be greater than 0"),
        (["fraction=small"], UsageError, "fraction: Input should be a valid number"),
        (
            ["mode=magic"],
            UsageError,
            "mode.0: Input should be 'proxy', 'synthetic', 'federated' or 'none' (given: 'magic')",
        ),
        (["fractoin=0.3"], UsageError, "fractoin"),
        (["--fraction", "0.3"], UsageError, "unknown option --fraction; arguments are written key=value"),
        (["now"], UsageError, "unknown command 'now'"),
        (["inputs=/no/such.csv"], UsageError, "inputs=/no/such.csv: no such file or directory"),
        (["evaluation=/no/such.csv"], UsageError, "evaluation=/no/such.csv: no such file or directory"),
        (["controls=true", "labelled=/no/such.csv"], UsageError, "labelled=/no/such.csv: no such file or directory"),
        (["synthetic=3"], UsageError, "synthetic: Input should be greater than or equal to 10"),
        (["recovery.schedule=step"], UsageError, "recovery.schedule: Input should be 'cosine' or 'constant'"),
        (["mode=federated"], UsageError, "mode=federated needs federation=DIR"),
        (["mode=federated", "federation=x", "inputs=x"], UsageError, "inputs= belongs to mode=proxy"),
        (["mode=[proxy,proxy]"], UsageError, "names one kind of recovery twice"),
        (["mode=[none,proxy]"], UsageError, "mode=none is no recovery at all"),
        (["mode=[]"], UsageError, "mode=[] names no recovery; to prune only is mode=none"),
        (["seed=99999999999999999999"], UsageError, "seed: Input should be less than"),
        (["statistics=x"], UsageError, "statistics= belongs to mode=synthetic"),
        (["mode=federated", "federation=/no/such"], ProvisionError, "/no/such is not a federation directory"),
        (["device=cuda"], UsageError, "torch sees no CUDA device"),
        (["fraction=0.001"], CompressionError, "ask for at least that"),
    ],
)
def test_one_line_for_a_mistake(run, monkeypatch, arguments, error, message):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(FedClawError) as caught:
        main([f"run={run.root}", *arguments] if arguments else [])
    assert type(caught.value) is error
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not run.compressed.exists()


def test_not_a_run(tmp_path):
    with pytest.raises(UsageError, match="is not a run directory"):
        main([f"run={tmp_path}"])


def test_too_few_inputs_and_wrong_columns(run, digits, tmp_path):
    lines = digits.public.read_text().splitlines(keepends=True)
    few = tmp_path / "few.csv"
    few.write_text("".join(lines[:6]))
    with pytest.raises(CompressionError, match="there are 5 proxy inputs; recovery needs at least 10"):
        main([f"run={run.root}", f"inputs={few}"])
    wrong = tmp_path / "wrong.csv"
    wrong.write_text("a,b\n1,2\n")
    with pytest.raises(DataError, match=r"wrong\.csv"):
        main([f"run={run.root}", f"inputs={wrong}"])


def command(*arguments):
    return warm.run(["-m", "fedclaw.compress", *arguments], env=environment(), timeout=100)


def test_command_line(run, digits):
    asked = ["fraction=0.2", f"inputs={digits.public}", f"evaluation={digits.test}", "recovery.steps=100"]
    done = command(f"run={run.root}", *asked)
    assert done.returncode == 0, done.stderr
    assert "multiply-adds per example" in done.stdout
    assert "Accuracy (evaluation file)" in done.stdout
    record = json.loads((run.compressed / "compression.json").read_text())
    assert record["parameters_after"] <= 0.2 * record["parameters_before"]
    assert f"{record['parameters_after']:,}" in done.stdout
    assert record["model"]["name"] == "mlp"
    again = command(f"run={run.root}", *asked)
    assert again.returncode == 2
    assert again.stderr.splitlines()[0].endswith("compressed already holds a result; pass overwrite=true to replace it")


def test_exit_codes():
    assert (done := command("--help")).returncode == 0
    assert "python -m fedclaw.compress run=runs/demo" in done.stdout
    failed = command("run=/no/such/run")
    assert failed.returncode == 2
    assert failed.stderr.startswith("fedclaw.compress: /no/such/run is not a run directory")
    assert "Traceback" not in failed.stderr
