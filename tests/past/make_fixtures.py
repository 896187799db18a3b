"""What an older commit leaves behind: a federation, sites' books and states, runs, a release, a bundle.

    git archive COMMIT | tar x -C OLD
    PYTHONPATH=OLD python tests/past/make_fixtures.py tests/past/COMMIT

Everything is done by that commit's own commands, over gRPC on 127.0.0.1. Only the certificates differ from real ones:
they are good from ten years ago for a hundred years. The rows are made up; the keys are for these tests alone.
"""

import csv
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from fedclaw.federation.coordinator import make_plan, make_strategy
from fedclaw.federation.run_directory import RunDirectory
from fedclaw.privacy.ledger import Budget, Ledger
from fedclaw.security import pki, provisioning

from clients.tabular_schema import TabularSchema
from fedclaw.privacy.accounting import Mechanism

PRIVATE, OPEN = ("ward-a", "ward-b", "ward-c"), ("lab-a", "lab-b")
COLUMNS = {"age": (0.0, 100.0), "dose": (0.0, 10.0)}
MODEL = ("workload.model.name=mlp", "workload.model.args={hidden: [4]}")
LOCAL = ("privacy.epsilon=2", "privacy.delta=1e-3", "training.batch_size=8", *MODEL)
ONE_STEP = (
    "privacy=none",
    "privacy.epsilon=null",
    "privacy.delta=null",
    "privacy.max_grad_norm=null",
    "training=one_step",
    *MODEL,
)
CENTRAL = ("central=example", "central.epsilon=2", "central.delta=1e-3", "central.sample_rate=0.2")
WITHOUT = ("privacy=none", "training.batch_size=8", *MODEL)
SLOW = ("training.epochs=null", "training.steps=400")
RELEASE = "release"
SIMULATED = (
    *("runtime=simulation", "runtime.save_every=0", "dataset.sites=6", "workload.model.name=logistic", "run=simulated"),
    *("privacy=none", "tracking=none", "rounds=400"),
)
STATES = {
    "scaffold": ("strategy=scaffold",),
    "feddyn": ("strategy=feddyn",),
    "fedper": ("strategy=fedper",),
    "ditto": ("strategy=ditto",),
    "topk": ("compression=topk", "compression.fraction=0.25"),
}


def main(root: Path) -> None:
    """Make all of it in `root`, which must not exist yet."""
    root.mkdir(parents=True)
    pki.CA_DAYS, pki._CLOCK_SKEW = 36_600, timedelta(days=3653)
    provisioning.initialise(root / "federation", "clinic", f"127.0.0.1:{free_port()}", days=36_500)
    for number, name in enumerate(PRIVATE + OPEN):
        make_site(root, name, number)
    private_runs(root)
    open_runs(root)
    (root / "said").mkdir()
    simulated_run(root)
    discrete_ledger(root)
    fitted_constants(root)
    finish(root)


def make_site(root: Path, name: str, number: int) -> None:
    """A site's directory, its rows and its certificate."""
    site = root / "sites" / name
    (site / "data").mkdir(parents=True)
    for part, rows, seed in (("train", 40, 2 * number), ("test", 16, 2 * number + 1)):
        write_rows(site / "data" / f"{part}.csv", rows, seed)
    schema = schema_of("federated" if name in PRIVATE else "schema")
    for path in (site / "schema.yaml", root / f"{schema['standardise']}.yaml"):
        path.write_text(yaml.safe_dump(schema, sort_keys=False))
    (site / "site.yaml").write_text(yaml.safe_dump(settings_of(name), sort_keys=False))
    federation = root / "federation"
    request = provisioning.request_site(site, federation / "federation.json", name)
    provisioning.accept(site, provisioning.approve(federation, request, days=36_500))


def write_rows(path: Path, rows: int, seed: int) -> None:
    """Rows whose label follows from both columns, with some noise."""
    generator = np.random.default_rng(seed)
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*COLUMNS, "outcome"])
        for _ in range(rows):
            age, dose = generator.uniform(0, 100), generator.uniform(0, 10)
            ill = age / 100 + dose / 10 + generator.normal(0, 0.1) > 1
            writer.writerow([f"{age:.1f}", f"{dose:.2f}", "ill" if ill else "well"])


def schema_of(standardise: str) -> dict[str, Any]:
    """The schema of both kinds of site."""
    columns: list[dict[str, Any]] = [
        {"name": name, "kind": "numeric", "range": list(bounds)} for name, bounds in COLUMNS.items()
    ]
    if standardise == "schema":
        columns = [{**c, "center": sum(c["range"]) / 2, "scale": c["range"][1] / 2} for c in columns]
    target = {"name": "outcome", "labels": ["well", "ill"]}
    return {"columns": columns, "target": target, "standardise": standardise}


def settings_of(name: str) -> dict[str, Any]:
    """site.yaml: wards have budgets and noised metrics, labs train without privacy."""
    private = name in PRIVATE
    policy: dict[str, Any] = {
        "workloads": ["tabular"],
        "strategies": ["fedavg", "scaffold", "feddyn", "fedper", "ditto"],
        "epsilon": 40.0 if private else None,
        "delta": 1e-3,
        "minimum_cohort": 2,
    }
    if private:
        policy |= {
            "trust_server_noise": True,
            "metrics": ["accuracy"],
            "metrics_epsilon": 1.0,
            "metrics_budget": {"epsilon": 30.0, "delta": 1e-3},
            "statistics": {"epsilon": 1.0},
        }
    else:
        policy |= {"allow_training_without_privacy": True}
    data = {"train": "data/train.csv", "test": "data/test.csv", "name": f"{name}-2026"}
    return {"name": name, "workload": "tabular", "schema_file": "schema.yaml", "data": data, "policy": policy}


def private_runs(root: Path) -> None:
    """A release; one finished run by each way of making noise; one whose processes are all killed in round 2."""
    schema = f"workload.schema_file={root / 'federated.yaml'}"
    constants = f"statistics={root / 'runs' / RELEASE / 'statistics.json'}"
    with clients(root, PRIVATE) as running:
        where = (f"federation={root / 'federation'}", f"runs={root / 'runs'}", "sites.minimum=3", schema)
        command("statistics", *where, f"run={RELEASE}", "epsilon=1", "delta=1e-3", "bins=8")
        for name, settings in {
            "local": (*LOCAL, "rounds=2"),
            "central": (*ONE_STEP, *CENTRAL, "rounds=2"),
            "distributed": (
                *ONE_STEP,
                *CENTRAL,
                "central.noise_by=sites",
                "secure=secagg",
                "secure.corrupt=0",
                "rounds=2",
            ),
        }.items():
            command("server", *where, constants, "tracking=none", f"run={name}", *settings)
        with server(root, *where, constants, "run=interrupted", *LOCAL, *SLOW, "rounds=3") as process:
            wait(lambda: (root / "runs/interrupted/checkpoint-0001.ckpt").exists(), process)
            time.sleep(0.3)
            kill(process)
        time.sleep(0.3)
        for client in running:
            kill(client)


def open_runs(root: Path) -> None:
    """Runs whose sites keep something from round to round, stopped in round 3 of 4."""
    schema = f"workload.schema_file={root / 'schema.yaml'}"
    where = (f"federation={root / 'federation'}", f"runs={root / 'runs'}", "sites.minimum=2", schema)
    with clients(root, OPEN):
        for name, settings in STATES.items():
            with server(root, *where, f"run={name}", *WITHOUT, *SLOW, *settings, "rounds=4") as process:
                wait(lambda name=name: (root / f"runs/{name}/checkpoint-0002.ckpt").exists(), process)
                kill(process)
            time.sleep(2.0)


def simulated_run(root: Path) -> None:
    """Six clients of a table, killed after a checkpoint."""
    words = [sys.executable, "-m", "experiments.run", *SIMULATED, f"runs={root / 'runs'}"]
    process = subprocess.Popen(words, env=environment(), cwd="/")
    wait(lambda: (root / "runs/simulated/checkpoint-0002.ckpt").exists(), process)
    kill(process)
    for beside in (".hydra", "data"):
        shutil.rmtree(root / "runs" / beside)
    (root / "runs" / "simulated" / "partition.png").unlink()


def discrete_ledger(root: Path) -> None:
    """Charges of discrete noise beside Gaussian ones, one of them open."""
    path = root / "ledgers" / "discrete.sqlite"
    path.parent.mkdir()
    with Ledger.open(path, "registry", "ab" * 32) as ledger:
        for number, noise in enumerate((3.0, 3.0, 0.7), 1):
            family: Any = "discrete" if noise == 3.0 else "gaussian"
            mechanism = Mechanism(0.25, noise, 4, family)
            ledger.reserve(f"key-{number}", "clinic", "run", number, mechanism, Budget(None, 1e-3))
            if number < 3:
                ledger.settle(f"key-{number}")
        told = {"spent": ledger.spent(1e-3), "head": ledger.head(), "rounds": ledger.rounds("run")}
    (root / "said" / "ledger-discrete.json").write_text(json.dumps(told, indent=2))


def fitted_constants(root: Path) -> None:
    """A site's own constants for a schema that says so, and what they make of its rows."""
    directory = root / "constants"
    directory.mkdir()
    text = yaml.safe_dump(schema_of("site"), sort_keys=False)
    (directory / "schema.yaml").write_text(text)
    rows = root / "sites" / "ward-a" / "data" / "train.csv"
    fitted = TabularSchema.parse(text, "schema.yaml").fit(rows)
    (directory / "preprocessing.json").write_text(str(fitted.constants_json()))
    (root / "said" / "inputs.json").write_text(json.dumps(fitted.read_inputs(rows).tolist()))


def finish(root: Path) -> None:
    """A compressed model, a bundle, and in said/ what the commands of that commit print of all this."""
    said = root / "said"
    federation, run = root / "federation", root / "runs" / "local"
    for site in PRIVATE + OPEN:
        (said / f"ledger-{site}.json").write_text(
            command("ledger", "show", f"site={root / 'sites' / site}", "json=true")
        )
    command("compress", f"run={run}", "fraction=0.9", "synthetic=128", "recovery.steps=50", "latency_repeats=1")
    command("export", f"run={run}", f"federation={federation}", "model=final", "quantise=true")
    for name in ("local", "central", "distributed", "scaffold"):
        record = RunDirectory.open(root / "runs" / name).record()
        plan = make_plan(record, make_strategy(record), 1, 3)
        (said / f"plan-{name}.json").write_text(plan.model_dump_json())
    inputs, trust = root / "sites/ward-a/data/test.csv", f"ca={federation / 'ca.crt'}"
    command("verify", str(run / "bundle"), trust)
    command("predict", f"bundle={run / 'bundle'}", f"input={inputs}", trust, f"output={said / 'predictions.csv'}")
    for leftover in (*root.rglob("*.lock"), *root.rglob(".*.lock")):
        leftover.unlink(missing_ok=True)


@contextmanager
def clients(root: Path, names: Sequence[str]) -> Iterator[list[subprocess.Popen[bytes]]]:
    """The sites of these names, each a process."""
    processes = [start("client", f"site={root / 'sites' / name}") for name in names]
    try:
        yield processes
    finally:
        for process in processes:
            process.terminate()
            process.wait()


@contextmanager
def server(root: Path, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """A coordinator, to be killed."""
    process = start("server", "tracking=none", *arguments)
    try:
        yield process
    finally:
        kill(process)


def start(module: str, *arguments: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", f"fedclaw.{module}", *arguments], env=environment(), cwd="/")


def command(module: str, *arguments: str) -> str:
    """What a command that ends well prints."""
    words = [sys.executable, "-m", f"fedclaw.{module}", *arguments]
    done = subprocess.run(words, env=environment(), cwd="/", stdout=subprocess.PIPE, text=True, check=True, timeout=90)
    sys.stdout.write(done.stdout)
    return done.stdout


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}


def kill(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


def wait(condition: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    while not condition():
        if process.poll() is not None:
            raise SystemExit(f"a server ended with {process.returncode} before it was to be killed")
        time.sleep(0.01)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
