"""The plug-ins of docs/plugins.md as they stand there: installed from another directory, run in every runtime."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from fedclaw.identity import provisioning
from fedclaw.server.run_directory import RunDirectory
from tests.conftest import PATIENCE, environment
from tests.plugin_runtimes import FEDERATION, PLAIN, SITES, deal
from tests.ports import free_port

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "plugins.md"
PRIVATE = f"{PLAIN} privacy=dp privacy.epsilon=4 privacy.delta=1e-3 training.batch_size=16"


def files() -> dict[str, str]:
    """The page's files by the name in their first line."""
    found = re.findall(r"^```\w+\n# (\S+)\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    return dict(found)


def lines(*names: str) -> int:
    return sum(bool(line.strip()) for name in names for line in files()[name].splitlines())


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment that finds the package, which pip has put where nothing else is; without a network."""
    source, target = tmp_path_factory.mktemp("author"), tmp_path_factory.mktemp("installed")
    (source / "ward").mkdir()
    (source / "ward" / "__init__.py").touch()
    for name, text in files().items():
        (source / name).write_text(text)
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--target", str(target))
    words = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", *options, str(source)]
    subprocess.run(words, check=True, timeout=PATIENCE, cwd=source)
    assert (target / "ward" / "fedpull.py").is_file()
    return environment() | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(target)])}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sites' directories and a place for runs, for all runtimes."""
    place = tmp_path_factory.mktemp("series")
    deal(place)
    return place


def run(installed: dict[str, str], root: Path, *runs: tuple[str, str, str]) -> None:
    """Run federations, (runtime, run, settings) each, in one process."""
    program, wanted = str(ROOT / "tests" / "plugin_runtimes.py"), [word for one in runs for word in one]
    words = [sys.executable, program, str(root), *wanted]
    done = subprocess.run(words, env=installed, cwd=root, capture_output=True, text=True, timeout=3 * PATIENCE)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module")
def runs(installed, root) -> Path:
    """Runs by runtime, and a private one: what the real server loop makes of the real sites' code."""
    plain = [(runtime, runtime, PLAIN) for runtime in ("in_process", "simulation", "flower")]
    run(installed, root, *plain, ("in_process", "private", PRIVATE))
    line = RunDirectory(root / "runs" / "in_process").read_metrics()[-1]
    assert line["metrics"]["accuracy"] > 0.7
    assert len(line["answered"]) == SITES
    return root / "runs"


def require_same(found: RunDirectory, runs: Path) -> None:
    """The same model and metrics as in one process."""
    reference = RunDirectory.open(runs / "in_process")
    mine, theirs = found.read_model(), reference.read_model()
    assert mine.keys() == theirs.keys() == {"0.weight", "0.bias", "2.weight", "2.bias"}
    for name, array in theirs.items():
        np.testing.assert_allclose(mine[name], array, atol=1e-5)
    metrics, expected = (directory.read_metrics()[-1]["metrics"] for directory in (found, reference))
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, abs=1e-5)


def test_the_page_keeps_what_it_promises():
    assert set(files()) == {"pyproject.toml", "ward/fedpull.py", "ward/series_schema.py", "ward/series.py"}
    assert lines("ward/fedpull.py") <= 30
    assert lines("ward/series_schema.py", "ward/series.py") <= 60
    text = (ROOT / "fedclaw" / "learning" / "strategy.py").read_text()
    table = re.findall(r"^\| (`.*?) \|", PAGE.read_text(), re.MULTILINE)
    for name in re.findall(r"`(\w+)`", " ".join(table)):
        assert f"def {name}(" in text or f"    {name}: ClassVar" in text, name


def test_the_plug_ins_are_listed_with_their_first_lines(installed):
    done = subprocess.run([sys.executable, "-m", "fedclaw", "--help"], env=installed, capture_output=True, text=True)
    assert "  fedpull           Momentum at the server, and a pull towards" in done.stdout
    assert "  series   The series workload: (N, steps) to logits (N, C)" in done.stdout


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("runtime", ["simulation", "flower"])
def test_a_runtime_runs_them_as_the_one_process_does(runs, runtime):
    require_same(RunDirectory.open(runs / runtime), runs)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ray_runs_them_as_the_one_process_does(installed, root, runs):
    pytest.importorskip("ray")
    run(installed, root, ("ray", "ray", PLAIN))
    require_same(RunDirectory.open(runs / "ray"), runs)


@contextmanager
def started(installed: dict[str, str], log: Path, *arguments: str) -> Iterator["subprocess.Popen[bytes]"]:
    with log.open("ab") as file:
        process = subprocess.Popen([sys.executable, "-m", *arguments], env=installed, stdout=file, stderr=file)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(PATIENCE)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_server_and_clients_run_them_over_grpc(installed, runs, tmp_path):
    home = provisioning.initialise(tmp_path / "federation", FEDERATION, f"127.0.0.1:{free_port()}").root
    sites = deal(tmp_path)
    for site in sites:
        request = provisioning.request_site(site, home / "federation.json", site.name)
        provisioning.accept(site, provisioning.approve(home, request))
    log = tmp_path / "log"
    with ExitStack() as processes:
        for site in sites:
            processes.enter_context(started(installed, log, "fedclaw.client", f"site={site}"))
        new = (f"federation={home}", f"runs={tmp_path / 'runs'}", "run=grpc", "tracking=none", f"sites.minimum={SITES}")
        schema = f"workload.schema_file={tmp_path / 'series.yaml'}"
        server = processes.enter_context(started(installed, log, "fedclaw.server", *new, schema, *PLAIN.split()))
        assert server.wait(3 * PATIENCE) == 0, log.read_text()
    require_same(RunDirectory.open(tmp_path / "runs" / "grpc"), runs)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_private_run_of_them_costs_what_was_asked_for(runs):
    receipts = RunDirectory.open(runs / "private").read_receipts()
    assert len(receipts) == SITES
    for receipt in receipts.values():
        assert 0 < receipt.receipt.epsilon_run <= 4
        assert receipt.receipt.mechanism == "dp-sgd"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_of_them_is_exported_and_predicts_elsewhere(installed, root, runs, tmp_path):
    provisioning.initialise(tmp_path / "federation", FEDERATION, "127.0.0.1:9443")
    rows = root / "sites" / "site-0" / "test.npz"
    for command in (
        (
            "export",
            f"run={runs / 'in_process'}",
            f"federation={tmp_path / 'federation'}",
            f"output={tmp_path / 'bundle'}",
        ),
        ("verify", str(tmp_path / "bundle"), f"federation={tmp_path / 'federation' / 'federation.json'}"),
        ("predict", f"bundle={tmp_path / 'bundle'}", f"input={rows}", f"output={tmp_path / 'answers.csv'}"),
    ):
        words = [sys.executable, "-m", "fedclaw", *command]
        done = subprocess.run(words, env=installed, capture_output=True, text=True, timeout=PATIENCE)
        assert done.returncode == 0, done.stderr
    assert len((tmp_path / "answers.csv").read_text().splitlines()) == 21
    session = onnxruntime.InferenceSession(tmp_path / "bundle" / "pipeline.onnx")
    labels, _, refused = session.run(None, {"inputs": np.load(rows)["x"].astype(np.float32)})
    told = [line.split(",")[1] for line in (tmp_path / "answers.csv").read_text().splitlines()[1:]]
    assert labels[:, 0].tolist() == told
    assert not refused.any()
