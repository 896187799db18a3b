"""What `import fedclaw` promises: these names and no others, documented, and not paid for before they are used."""

import inspect
import re
import shutil
import subprocess
import sys
import typing
from pathlib import Path

import pytest

import fedclaw
from fedclaw.identity.provisioning import initialise
from tests.conftest import environment
from tests.ledgers import make_site

NAMES = [
    "Bundle",
    "CentralPrivacy",
    "DataError",
    "FedClawError",
    "Federation",
    "LocalPrivacy",
    "PluginError",
    "PrivacyError",
    "RoundError",
    "Run",
    "Spending",
    "Strategy",
    "UsageError",
    "__version__",
    "read_bundle",
    "read_ledger",
    "read_run",
    "simulate",
]
PAGE = Path(__file__).parent.parent / "docs" / "notebook.md"


def test_the_public_names_are_these():
    assert fedclaw.__all__ == NAMES == dir(fedclaw)
    for name in NAMES:
        assert getattr(fedclaw, name) is not None
        assert name == "__version__" or getattr(fedclaw, name).__doc__
    with pytest.raises(AttributeError, match="has no attribute 'Federator'"):
        _ = fedclaw.Federator


def test_every_argument_of_theirs_has_a_type():
    functions = [fedclaw.simulate, fedclaw.read_run, fedclaw.read_bundle, fedclaw.read_ledger]
    functions += [fedclaw.Run.model, fedclaw.Run.export, fedclaw.Bundle.predict]
    functions += [getattr(fedclaw.Federation, name) for name in dir(fedclaw.Federation) if name.startswith("from_")]
    assert len(functions) == 11
    for function in functions:
        given = inspect.signature(function).parameters.keys() - {"cls", "self"}
        assert given
        assert given | {"return"} <= set(function.__annotations__)
        assert function.__doc__
    assert typing.get_type_hints(fedclaw.simulate)["return"] is fedclaw.Run


def test_the_import_loads_nothing_heavy():
    heavy = "{'torch', 'numpy', 'pydantic', 'flwr', 'opacus', 'mlflow', 'hydra', 'fedclaw.api'}"
    program = f"import sys, fedclaw; assert not {heavy} & set(sys.modules), sys.modules; fedclaw.UsageError"
    done = subprocess.run([sys.executable, "-c", program], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def blocks(page: Path, language: str = "python") -> list[str]:
    """The code on a page of docs/."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


def test_the_code_of_the_page_runs_as_it_stands(tmp_path):
    """In a directory with packages of the names that FedClaw's own once had, as a project may have them."""
    ten, strategy, export, read = blocks(PAGE)
    lines = [line for line in ten.splitlines() if line.strip()]
    assert len(lines) <= 10
    for name in ("strategies", "clients", "experiments"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise AssertionError('a package of the project')\n")
    after = """
import sys
assert run.metrics["accuracy"] > 0.5, run.metrics
assert 0 < run.epsilon <= 8 and run.delta == 1e-5
assert run.model()(torch.zeros(2, 64)).shape == (2, 10)
assert not {"hydra", "omegaconf", "mlflow", "experiments"} & set(sys.modules)
"""
    again = "\nassert len(run.history) == 5 and run.record.strategy.settings == {'share': 0.7}\n"
    home = initialise(tmp_path / "coordinator", "trial", "localhost:9443").root
    shutil.copy(home / "ca.crt", tmp_path)
    make_site(tmp_path / "sites" / "hospital-north")
    exported = "\nassert bundle.trusted and bundle.predict(x[:3] / 16).shape == (3, 10)\n"
    kept = "\nimport shutil\nshutil.copytree(run.path, 'runs/trial')\n"
    ends = "\nassert len(run.history) == 5 and bundle.trusted and spending.data_sets\n"
    program = ten + after + strategy + again + export + exported + kept + read + ends
    (tmp_path / "notebook.py").write_text(program)
    before = {path.name for path in tmp_path.iterdir()}
    values = environment() | {"PYTHONPATH": f"{tmp_path}:{Path(__file__).parent.parent}"}
    done = subprocess.run([sys.executable, "notebook.py"], env=values, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said, shown = (
        done.stdout.splitlines(),
        re.findall(r"^    (Federation\(.*|Run\(.*)$", PAGE.read_text(), re.MULTILINE),
    )
    assert said[0] == shown[0]
    assert re.sub(r"accuracy [0-9.]+", "", said[1]) == re.sub(r"accuracy [0-9.]+", "", shown[1])
    assert {path.name for path in tmp_path.iterdir()} - before == {"bundle", "runs"}


def test_what_the_page_names_is_there():
    text = PAGE.read_text()
    for name in set(re.findall(r"fedclaw\.([A-Za-z_]+)\b", text)):
        assert name in NAMES, name
    for name in set(re.findall(r"`run\.([a-z]+)", text)):
        assert hasattr(fedclaw.Run, name), name
