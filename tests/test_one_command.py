"""`fedclaw COMMAND`, and help in the terms of what is installed."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from fedclaw.__main__ import COMMANDS, _file_of
from fedclaw.catalogue import STRATEGIES, WORKLOADS, plugin_points
from fedclaw.cli import compose_settings
from fedclaw.server.__main__ import ServerSettings
from tests import warm
from tests.conftest import environment, run_module

SIGN = '''"""The sign of the mean (only a made-up strategy).

Not imported for help.
"""
import torch
from pydantic import Field
from typing import ClassVar
from fedclaw.learning.strategy import Strategy


class FedSign(Strategy):
    """Steps along the sign."""

    name: ClassVar[str] = "fedsign"
    server_learning_rate: float = Field(default=0.007, gt=0)
    smooth: float = Field(default=0.5, ge=0)

    def server_optimizer(self, parameters):
        return torch.optim.SGD(parameters, lr=self.server_learning_rate)
'''
WARDS = '''"""Wards: a made-up workload of another package."""
from typing import ClassVar
from fedclaw.clients.tabular import TabularWorkload
from fedclaw.clients.tabular_schema import TabularSchema
from fedclaw.protocol.terms import ModelSpec


class WardSchema(TabularSchema):
    name: ClassVar[str] = "wards"


class WardWorkload(TabularWorkload):
    name: ClassVar[str] = "wards"

    def default_model(self):
        return ModelSpec(name="logistic")
'''


@pytest.fixture
def outsider(tmp_path):
    """An installed package with a strategy and a workload that FedClaw has no file of; its place on the path."""
    place = tmp_path / "site-packages"
    package = place / "theirs"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("import torch\n")
    (package / "sign.py").write_text(SIGN)
    (package / "wards.py").write_text(WARDS)
    about = place / "theirs-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(
        "[fedclaw.strategies]\nfedsign = theirs.sign:FedSign\n"
        "[fedclaw.clients]\nwards = theirs.wards:WardWorkload\n"
        "[fedclaw.schemas]\nwards = theirs.wards:WardSchema\n"
    )
    return place


def with_outsider(outsider: Path, program: str, *arguments: str, fresh: bool = False):
    """Run a module or a line of Python where the package is installed; `fresh`: without libraries at hand."""
    values = environment()
    values["PYTHONPATH"] = os.pathsep.join([values["PYTHONPATH"], str(outsider)])
    words = ["-c" if " " in program else "-m", program, *arguments]
    if fresh:
        return subprocess.run([sys.executable, *words], capture_output=True, text=True, env=values, check=False)
    return warm.run(words, env=values, timeout=90)


def test_the_console_script_is_this_module():
    scripts = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"fedclaw": "fedclaw.__main__:main"}


def test_one_command_covers_all():
    package = Path(__file__).parent.parent / "fedclaw"
    files = [path for path in package.rglob("*.py") if "run_main(" in path.read_text() and path.name != "cli.py"]
    names = {".".join(["fedclaw", *path.relative_to(package).with_suffix("").parts]) for path in files}
    for_developers = {
        "fedclaw.transport.grpc.protocol.generate",
        "fedclaw.serve.inference.protocol.generate",
        "fedclaw.export.schemas",
    }
    assert names - {"fedclaw.__main__"} - for_developers == {_file_of(module) for module in COMMANDS.values()}


def test_the_commands_and_all_that_is_installed_are_listed():
    done = run_module("fedclaw", "--help")
    assert (done.code, done.errors) == (0, "")
    for name in (*COMMANDS, *plugin_points(STRATEGIES), *plugin_points(WORKLOADS)):
        (line,) = [line for line in done.output.splitlines() if line.startswith(f"  {name} ")]
        assert len(line.split()) > 2, "a line about each"
    assert max(map(len, done.output.splitlines()[5:])) <= 80
    assert run_module("fedclaw").output == done.output


def test_a_command_of_it_is_the_module(deployment):
    there = run_module("fedclaw", "provision", "show", f"federation={deployment.federation}")
    assert there.code == 0, there.errors
    assert there.output == run_module("fedclaw.provision", "show", f"federation={deployment.federation}").output
    wrong = run_module("fedclaw", "server", "federation=x", "rounds=many")
    assert wrong.code == 2
    assert wrong.lines[0].startswith("fedclaw.server: configuration: rounds")
    assert wrong.lines[1] == "see fedclaw server --help"
    package = run_module("fedclaw", "compress", "run=nowhere")
    assert package.lines[0].startswith("fedclaw.compress: nowhere")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("servr",), "there is no command 'servr'; did you mean server?"),
        (("server", "federation=x", "round=3"), "there is no setting round; did you mean rounds?"),
        (("server", "federation=x", "training.bath_size=3"), "did you mean training.batch_size?"),
        (("server", "federation=x", "strategy=fedprxo"), "strategy=fedprxo: there is none of that name; did you mean"),
        (("server", "federation=x", "strategy=fedprox", "strategy.muu=1"), "did you mean strategy.mu?"),
        (("server", "federation=x", "+sites.minimun=3"), "did you mean minimum?"),
    ],
)
def test_a_slip_is_told_with_what_comes_nearest(arguments, words):
    done = run_module("fedclaw", *arguments)
    assert done.code == 2
    assert words in done.lines[0]


def test_a_strategy_of_another_package_is_listed_and_not_imported(outsider):
    program = (
        "import sys; from fedclaw.__main__ import overview; print(overview()); "
        "assert not {'theirs', 'torch', 'fedclaw.strategies', 'fedclaw.clients'} & set(sys.modules)"
    )
    done = with_outsider(outsider, program, fresh=True)
    assert done.returncode == 0, done.stderr
    assert "  fedsign           The sign of the mean (only a made-up strategy)\n" in done.stdout
    assert "  wards    Wards: a made-up workload of another package\n" in done.stdout


@pytest.mark.parametrize("chosen", ["strategy=fedsign", "strategy.name=fedsign"])
def test_a_strategy_of_another_package_has_its_own_defaults_and_settings(outsider, chosen, tmp_path):
    words = (
        "tracking=none",
        "privacy=none",
        "rounds=1",
        "training.steps=1",
        "training.epochs=null",
        f"runs={tmp_path}",
    )
    done = with_outsider(
        outsider, "experiments.run", *words, f"runs={tmp_path}", "run=x", chosen, "strategy.smooth=0.25"
    )
    assert done.returncode == 0, done.stderr
    record = (tmp_path / "x" / "run.json").read_text()
    assert '"name":"fedsign"' in record.replace(" ", "")
    assert "server_learning_rate" not in record, "FedAvg's is none of its business"
    assert '"smooth":0.25' in record.replace(" ", "")
    wrong = with_outsider(outsider, "experiments.run", *words, chosen, "strategy.smoth=1")
    assert wrong.returncode == 2
    assert "smoth" in wrong.stderr
    assert "did you mean smooth?" in wrong.stderr


def test_a_workload_of_another_package_has_its_own_model(outsider, deployment):
    new = (f"federation={deployment.federation}", f"workload.schema_file={deployment.schema}", "tracking=none")
    program = (
        "import sys; from fedclaw.cli import compose_settings; from fedclaw.server.__main__ import ServerSettings; "
        "from fedclaw.server.session import make_record; from fedclaw.server.run_directory import RoundRules; "
        "settings = compose_settings('server', sys.argv[1:], ServerSettings); "
        "print(make_record(settings, 'f', 'x', RoundRules()).model.name)"
    )
    done = with_outsider(outsider, program, *new, "workload=wards")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "logistic\n"
    named = with_outsider(outsider, program, *new, "workload=wards", "workload.model.name=mlp")
    assert named.stdout == "mlp\n", named.stderr


@pytest.mark.parametrize("name", ["2024", "20241101", "007", "1e5", "true", "3.10"])
def test_a_number_is_a_name_where_a_name_belongs(name):
    settings = compose_settings("server", [f"federation={name}", f"run={name}", "rounds=3"], ServerSettings)
    assert (settings.run, str(settings.federation), settings.rounds) == (name, name, 3)
    assert compose_settings("server", ["federation=x", "run=null"], ServerSettings).run is None


def test_a_date_that_does_not_exist_is_text_and_a_number_is_to_be_quoted(deployment):
    path = deployment.sites[0] / "site.yaml"
    text = path.read_text()
    path.write_text(text.replace("data: {", "data: {name: 2024-02-30, "))
    done = run_module("fedclaw.client", f"site={deployment.sites[0]}", "check")
    assert done.code == 0, done.errors
    path.write_text(text.replace("data: {", "data: {name: 2024, ").replace("minimum_cohort", "minimal_cohort"))
    done = run_module("fedclaw.client", f"site={deployment.sites[0]}", "check")
    assert done.code == 2
    assert "data.name: 2024 is read as a number; text like it is put in quotes" in done.lines[0]
    assert "policy.minimal_cohort" in done.lines[0]
    assert "did you mean minimum_cohort?" in done.lines[0]
