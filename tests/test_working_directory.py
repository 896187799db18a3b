"""A command run in a directory full of files that are called like modules: none is imported, and the command works."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from experiments.datasets import DatasetSettings, SitePolicy, write_sites
from fedclaw.__main__ import COMMANDS
from fedclaw.identity.provisioning import initialise
from tests.conftest import PATIENCE, Command, environment
from tests.ports import free_port

ROOT = Path(__file__).parent.parent
CODE = (
    *("clients", "strategies", "experiments", "conf", "hydra_plugins", "hydra_plugins/theirs", "torch", "onnxruntime"),
    *("yaml", "numpy", "pydantic", "omegaconf", "hydra", "rich", "flwr", "mlflow", "opacus", "grpc", "cryptography"),
    *("dataclasses", "signal", "threading", "logging", "tomllib", "sklearn", "PIL", "pyarrow", "scipy", "optuna"),
)
"""What a hostile directory offers, each as a package."""
APP = """
from pathlib import Path
from flwr.serverapp import ServerApp
from beside import PLACE

app = ServerApp()


@app.main()
def main(grid, context):
    Path(PLACE).write_text("run")
"""


class Hostile:
    """A directory whose every module leaves its name in a file when it is imported, and whose conf/ means harm."""

    def __init__(self, root: Path, program: tuple[str, ...] = (sys.executable, "-m")) -> None:
        self.root, self.program = root, program
        self.variables = {name: value for name, value in environment().items() if name != "PYTHONSAFEPATH"}
        self._told = root.parent / "imported.txt"
        for name in CODE:
            (root / name).mkdir(parents=True)
            (root / name / "__init__.py").write_text(f"open({str(self._told)!r}, 'a').write({name!r} + '\\n')\n")
        for group in ("strategy", "privacy", "workload"):
            (root / "conf" / group).mkdir()
        for name in ("server", "client", "provision", "run", "strategy/fedavg", "privacy/dp", "workload/tabular"):
            (root / "conf" / f"{name}.yaml").write_text("rounds: nonsense\n")

    @property
    def imported(self) -> set[str]:
        """Names of the modules in it that any process imported."""
        return set(self._told.read_text().split()) if self._told.exists() else set()

    def run(self, command: str, *arguments: str) -> Command:
        """Run a command in it to its end, and see to it that nothing of it was imported."""
        done = subprocess.run(
            [*self.program, command, *arguments],
            capture_output=True,
            text=True,
            env=self.variables,
            cwd=self.root,
            timeout=3 * PATIENCE,
            check=False,
        )
        assert self.imported == set(), done.stderr
        return Command(done.returncode, done.stdout, done.stderr)

    @contextmanager
    def running(self, command: str, *arguments: str) -> Iterator[None]:
        """Run a command in the background meanwhile."""
        with (self.root.parent / "background.log").open("ab") as log:
            words = [*self.program, command, *arguments]
            process = subprocess.Popen(words, stdout=log, stderr=log, env=self.variables, cwd=self.root)
        try:
            yield
            assert process.poll() is None
        finally:
            process.terminate()
            process.wait(PATIENCE)


@pytest.fixture
def hostile(tmp_path: Path) -> Hostile:
    return Hostile(tmp_path / "project")


@pytest.mark.parametrize("module", ["fedclaw", *COMMANDS.values()])
def test_help_imports_nothing_of_the_current_directory(hostile, module):
    done = hostile.run(module, "--help")
    assert (done.code, done.errors) == (0, "")


@pytest.mark.parametrize("module", ["fedclaw.server", "fedclaw.transport.ray"])
def test_a_wrong_use_imports_nothing_of_the_current_directory(hostile, module):
    done = hostile.run(module, "nonsense=1", "privacy=x")
    assert done.code == 2, done.errors
    assert done.lines[0].startswith(module)


@pytest.mark.parametrize(
    "words",
    [
        "-Bmfedclaw",
        *(pytest.param(w, marks=pytest.mark.slow) for w in ("-mfedclaw", "-W ignore -m fedclaw", "-P -m fedclaw")),
    ],
)
def test_however_python_is_told_to_run_a_command(hostile, words):
    hostile.program = (sys.executable, *words.split())
    assert hostile.run("server", "nonsense=1").code == 2


@pytest.mark.parametrize(
    "program",
    [pytest.param((sys.executable, "-m"), marks=pytest.mark.slow), (str(Path(sys.executable).parent / "fedclaw"),)],
)
def test_a_dot_in_the_path_names_no_directory(hostile, program):
    """PYTHONPATH=. is wherever one happens to be."""
    hostile.program, module = program, "fedclaw.server" if len(program) == 2 else "server"
    hostile.variables["PYTHONPATH"] = os.pathsep.join([".", str(ROOT)])
    assert hostile.run(module, "nonsense=1").code == 2


@pytest.mark.slow
def test_a_directory_that_is_named_in_full_is_found_and_hides_nothing(hostile):
    """An author at work on a plug-in has its directory on the path."""
    (hostile.root / "sign.py").write_text('"""The sign of the mean."""\n')
    about = hostile.root / "sign-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: sign\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[fedclaw.strategies]\nsign = sign:Sign\n")
    hostile.variables["PYTHONPATH"] = os.pathsep.join([str(hostile.root), str(ROOT)])
    assert "The sign of the mean" in hostile.run("fedclaw", "--help").output
    shutil.rmtree(hostile.root / "hydra_plugins")  # Hydra imports those of every directory that is named
    assert hostile.run("fedclaw.server", "nonsense=1").code == 2


def test_an_experiment_of_the_checkout_imports_nothing_else(hostile):
    """The directory has no experiments/ of its own; else that would be what `python -m experiments.run` names."""
    (hostile.root / "experiments" / "__init__.py").unlink()
    (hostile.root / "experiments").rmdir()
    assert hostile.run("experiments.run", "nonsense=1").code == 2


def test_an_app_that_is_named_comes_from_the_current_directory_and_nothing_else_does(hostile, tmp_path):
    home = initialise(hostile.root / "heart", "heart", f"127.0.0.1:{free_port()}").root
    (hostile.root / "grpc_app").mkdir()
    (hostile.root / "grpc_app" / "server.py").write_text(APP)
    (hostile.root / "beside.py").write_text(f"PLACE = {str(tmp_path / 'named')!r}")
    done = hostile.run("fedclaw.server", f"federation={home}", "app=grpc_app.server:app", "sites.wait=0.1")
    assert done.code == 0, done.errors
    assert (tmp_path / "named").read_text() == "run"


def provision(place: Hostile, prefix: str) -> list[str]:
    """Set a federation of two sites up with commands; the sites' directories."""
    sites = write_sites(place.root, DatasetSettings(name="breast_cancer", sites=2), SitePolicy(epsilon=8.0, delta=1e-3))
    steps = [("init", "federation=heart", "name=heart", f"address=127.0.0.1:{free_port()}")]
    for site in sites:
        where = f"site={site.relative_to(place.root)}"
        steps += [
            ("request", where, f"name={site.name}", "descriptor=heart/federation.json"),
            ("approve", "federation=heart", f"request={site}/keys/site.csr"),
            ("install", where, f"certificate=heart/sites/{site.name}.crt"),
        ]
    for step in steps:
        done = place.run(f"{prefix}provision", *step)
        assert done.code == 0, done.errors
    return [str(site.relative_to(place.root)) for site in sites]


def lead_a_life(place: Hostile, prefix: str) -> None:
    """Everything that a federation's people do, in that directory."""
    first, second = provision(place, prefix)
    assert place.run(f"{prefix}client", f"site={first}", "check", "epsilon=4").code == 0
    known = ("federation=heart", "workload.schema_file=schema.yaml", "tracking=none")
    with place.running(f"{prefix}client", f"site={first}"), place.running(f"{prefix}client", f"site={second}"):
        run = ("workload.model.name=logistic", "run=x", "rounds=2", "privacy.epsilon=4", "privacy.delta=1e-3")
        done = place.run(f"{prefix}server", *known, *run)
        assert done.code == 0, done.errors
    steps = [
        ("ledger", "verify", f"site={first}"),
        ("ledger", "statement", f"site={first}"),
        ("export", "run=runs/x", "federation=heart"),
        ("verify", "runs/x/bundle", "federation=heart/federation.json"),
        ("predict", "bundle=runs/x/bundle", "input=public/inputs.csv", "federation=heart/federation.json"),
    ]
    for step in steps:
        done = place.run(f"{prefix}{step[0]}", *step[1:])
        assert done.code == 0, done.errors


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_federation_lives_in_a_hostile_directory(hostile):
    lead_a_life(hostile, "fedclaw.")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment of its own in which FedClaw is installed from its wheel, beside the libraries of this one."""
    place = tmp_path_factory.mktemp("wheel")
    pip = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
    build = ("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(place), str(ROOT))
    subprocess.run([*pip, *build], check=True, timeout=PATIENCE)
    venv.create(place / "env", with_pip=False)
    python = place / "env" / "bin" / "python"
    (built,) = place.glob("*.whl")
    words = [*pip, "--python", str(python), "install", "--no-index", "--no-deps", str(built)]
    subprocess.run(words, check=True, timeout=PATIENCE)
    (packages,) = (place / "env").glob("lib/python*/site-packages")
    # As the last entry: what is installed from the wheel comes before the editable install that may be there.
    (packages / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python.parent


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_wheel_has_one_name_at_its_top_and_the_plug_ins_in_it(wheel, hostile):
    (packages,) = wheel.parent.glob("lib/python*/site-packages")
    assert {entry.name for entry in packages.iterdir() if "-" not in entry.name} == {"fedclaw", "libraries.pth"}
    del hostile.variables["PYTHONPATH"]
    hostile.program = (str(wheel / "python"), "-m")
    assert "  fedavgm " in hostile.run("fedclaw", "--help").output
    assert hostile.run("fedclaw.server", "nonsense=1").code == 2
    where = "import fedclaw.strategies.fedavg as it; print(it.__file__)"
    words, variables = [wheel / "python", "-c", where], hostile.variables
    done = subprocess.run(words, capture_output=True, text=True, cwd="/", env=variables, check=True)
    assert Path(done.stdout.strip()) == packages / "fedclaw" / "strategies" / "fedavg.py"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_federation_lives_in_a_hostile_directory_with_the_wheel(wheel, hostile):
    del hostile.variables["PYTHONPATH"]
    hostile.program = (str(wheel / "fedclaw"),)
    lead_a_life(hostile, "")
