"""The main job from end to end with real processes on loopback: four organisations and a coordinator.

    python -m experiments.demo                    the breast-cancer table (make demo)
    python -m experiments.demo scenario=vision    handwritten digits (make demo WORKLOAD=vision)
    python -m experiments.demo serve=true         and a node that goes on, with two versions (make demo SERVE=yes)

Each organisation has its own directory, keys, policy and privacy ledger, and its own process. What is left in
`output`: federation/ (the coordinator's keys), sites/NAME/, runs/demo/ (the run, its compressed model and its signed
bundle), logs/, and summary.json.
"""

if __name__ == "__main__":
    from fedclaw.startup import begin

    begin("experiments.demo", __doc__)

import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field
from rich.console import Console
from rich.table import Table

from experiments.datasets import SitePolicy, write_sites
from experiments.processes import Processes, free_port
from experiments.serving_demo import ROWS, ServedDemo
from experiments.sources import DatasetSettings
from fedclaw import startup
from fedclaw.cli import make_console, run_main, settings_of
from fedclaw.errors import UsageError
from fedclaw.files import write_atomic
from fedclaw.protocol.frozen import Frozen
from fedclaw.server.run_directory import RunDirectory
from fedclaw.simulation.partitions.settings import PartitionSettings
from fedclaw.site.journal.reconciliation import site_spending

if TYPE_CHECKING:
    from fedclaw.server.round_report import Outcome

FEDERATION = "demo"
MARKER = ".fedclaw-demo"


class BudgetSettings(Frozen):
    """What a site's policy allows on its data set, for ever."""

    epsilon: float = Field(gt=0)
    delta: float = Field(gt=0, lt=1)


class ScenarioSettings(Frozen):
    """conf/scenario/*.yaml."""

    dataset: DatasetSettings
    partition: PartitionSettings
    policy: BudgetSettings
    rounds: int = Field(ge=1)
    server: tuple[str, ...]
    compress: tuple[str, ...]


class DemoSettings(Frozen):
    """conf/demo.yaml, checked."""

    scenario: ScenarioSettings
    output: Path
    seed: int = Field(ge=0)
    serve: bool
    """Whether the node goes on, with two versions, until Ctrl-C."""


def main(arguments: Sequence[str]) -> None:
    """Run the demo as the command line says."""
    settings = settings_of(arguments, "demo", DemoSettings)
    console = make_console()
    began = time.monotonic()
    _clear(settings.output)
    demo = _Demo(settings, console)
    summary = demo.run()
    summary["seconds"] = round(time.monotonic() - began, 1)
    spent = _spent(settings.output, [site["name"] for site in summary["sites"]])
    write_atomic(settings.output / "summary.json", json.dumps(summary, indent=2).encode())
    write_atomic(settings.output / "privacy.json", json.dumps(spent, indent=2).encode())
    _show(console, summary, spent, settings.output)
    if settings.serve:
        demo.serve_on()


class _Demo:
    """The steps, in order; each is a command that a person could type."""

    def __init__(self, settings: DemoSettings, console: Console) -> None:
        self.settings = settings
        self.scenario = settings.scenario
        self.root = settings.output
        self.console = console
        self.federation = self.root / "federation"
        self.run_root = self.root / "runs" / "demo"

    def run(self) -> dict[str, Any]:
        with Processes(self.root / "logs", self.console) as processes:
            directories = self._deal_out()
            self._provision(processes, directories)
            self._train(processes, directories)
            self._compress(processes)
            bundle, verified = self._export(processes)
            answered = self._answer(processes, bundle)
        directory = RunDirectory.open(self.run_root)
        local, everything = self._baselines(directory, directories)
        return {**self._summary(directory, local, everything, bundle, verified), "answered": answered}

    def serve_on(self) -> None:
        """The model as it was trained, and the compressed one as its canary, until a signal comes."""
        self.console.rule("8. Two versions behind one address", align="left")
        inputs, original = _only(self.root / "public", "inputs"), self.root / "bundle-uncompressed"
        with Processes(self.root / "logs", self.console) as processes:
            where = (f"run={self.run_root}", f"federation={self.federation}", f"output={original}")
            processes.run("export", *where, "model=final", f"inputs={inputs}")
            shutil.rmtree(self.root / "node")
            node = ServedDemo.start(self.root, original, self.federation / "ca.crt", processes, self.console)
            node.canary(self.run_root / "bundle")
            node.answer(inputs, ROWS)
            node.stay(inputs)

    def _deal_out(self) -> tuple[Path, ...]:
        self.console.rule("1. Four organisations, each with its own data directory", align="left")
        dataset = self.scenario.dataset.model_copy(update={"seed": self.settings.seed})
        policy = SitePolicy(epsilon=self.scenario.policy.epsilon, delta=self.scenario.policy.delta)
        directories = write_sites(self.root, dataset, policy, self.scenario.partition)
        for directory in directories:
            self.console.print(f"{directory.name}: {directory}")
        return directories

    def _provision(self, processes: Processes, directories: Sequence[Path]) -> None:
        self.console.rule("2. Keys that never travel", align="left")
        address = f"127.0.0.1:{free_port()}"
        processes.run("provision", "init", f"federation={self.federation}", f"name={FEDERATION}", f"address={address}")
        descriptor = self.federation / "federation.json"
        for directory in directories:
            name = directory.name
            processes.run("provision", "request", f"site={directory}", f"name={name}", f"descriptor={descriptor}")
            request = directory / "keys" / "site.csr"
            processes.run("provision", "approve", f"federation={self.federation}", f"request={request}")
            certificate = self.federation / "sites" / f"{name}.crt"
            processes.run("provision", "install", f"site={directory}", f"certificate={certificate}")

    def _train(self, processes: Processes, directories: Sequence[Path]) -> None:
        self.console.rule("3. Training under differential privacy, over mutually authenticated gRPC", align="left")
        for directory in directories:
            processes.start(f"client-{directory.name}", "client", f"site={directory}")
        processes.run(
            "server",
            f"federation={self.federation}",
            f"workload.schema_file={self.root / 'schema.yaml'}",
            f"runs={self.root / 'runs'}",
            "run=demo",
            f"rounds={self.scenario.rounds}",
            f"seed={self.settings.seed}",
            f"sites.minimum={len(directories)}",
            *self.scenario.server,
            show=True,
        )

    def _compress(self, processes: Processes) -> None:
        self.console.rule("4. Pruning and distillation on public inputs, free in privacy", align="left")
        processes.run(
            "compress",
            f"run={self.run_root}",
            "mode=proxy",
            f"inputs={_only(self.root / 'public', 'inputs')}",
            f"evaluation={_only(self.root / 'public', 'labelled')}",
            *self.scenario.compress,
            show=True,
        )

    def _export(self, processes: Processes) -> tuple[Path, bool]:
        self.console.rule("5. A signed bundle, verified and used", align="left")
        inputs = _only(self.root / "public", "inputs")
        bundle = self.run_root / "bundle"
        processes.run("export", f"run={self.run_root}", f"federation={self.federation}", f"inputs={inputs}", show=True)
        authority = self.federation / "ca.crt"
        verified = processes.run("verify", str(bundle), f"ca={authority}", show=True, check=False) == 0
        predictions = self.root / "predictions.csv"
        processes.run("predict", f"bundle={bundle}", f"input={inputs}", f"ca={authority}", f"output={predictions}")
        self.console.print(f"predictions for {inputs}: {predictions}")
        return bundle, verified

    def _answer(self, processes: Processes, bundle: Path) -> int:
        self.console.rule("6. A node that answers, inside the walls", align="left")
        node = ServedDemo.start(self.root, bundle, self.federation / "ca.crt", processes, self.console)
        return node.answer(_only(self.root / "public", "inputs"), 1)

    def _baselines(self, directory: RunDirectory, directories: Sequence[Path]) -> "tuple[dict[str, Outcome], Outcome]":
        self.console.rule("7. For comparison: every site alone, and everything pooled", align="left")
        with startup.loading("torch, Opacus and Flower"):
            from experiments.simulate import local_only, pooled
            from fedclaw.transport.in_process import open_sites
        sites = open_sites(directories, FEDERATION)
        root = self.root / "runs" / "baselines"
        record = directory.record()
        return local_only(record, sites, root), pooled(record, sites, root)

    def _summary(
        self, directory: RunDirectory, local: "dict[str, Outcome]", everything: "Outcome", bundle: Path, verified: bool
    ) -> dict[str, Any]:
        receipts = directory.read_receipts()
        alone = [outcome.metrics["accuracy"] for outcome in local.values()]
        compression = json.loads((directory.compressed / "compression.json").read_text())
        parity = json.loads((bundle / "bundle.json").read_text())["parity"]
        metrics = directory.read_metrics()
        return {
            "sites": [
                {
                    "name": name,
                    "examples": item.examples,
                    "epsilon": item.receipt.epsilon_run,
                    "delta": item.receipt.delta,
                }
                for name, item in sorted(receipts.items())
            ],
            "rounds": len(metrics),
            "accuracy": {
                "federated": metrics[-1]["metrics"]["accuracy"],
                "majority_class": (metrics[-1].get("majority") or {}).get("accuracy"),
                "pooled": everything.metrics["accuracy"],
                "local_mean": sum(alone) / len(alone),
            },
            "compression": {
                key: compression[key]
                for key in ("parameters_before", "parameters_after", "accuracy_before", "accuracy_after")
            },
            "export": {
                "onnx_max_abs_diff": parity["files"]["model.onnx"]["max_abs_diff"],
                "bundle": str(bundle),
                "verified": verified,
            },
        }


def _spent(output: Path, names: Sequence[str]) -> dict[str, dict[str, float | None]]:
    """By site, what its own ledger says: epsilon spent by the demo's run, over the data set's lifetime, and left."""
    spent: dict[str, dict[str, float | None]] = {}
    for name in names:
        data_set = site_spending(output / "sites" / name).data_set(name)
        run = data_set.run("demo", FEDERATION)
        spent[name] = {
            "run": run.epsilon if run else 0.0,
            "lifetime": data_set.epsilon,
            "left": data_set.left,
            "budget": data_set.budget.epsilon,
            "delta": data_set.budget.delta,
        }
    return spent


def _show(console: Console, summary: dict[str, Any], spent: dict[str, dict[str, float | None]], output: Path) -> None:
    table = Table(title="What the federation did", title_justify="left", show_header=False)
    for site in summary["sites"]:
        epsilon = spent[site["name"]]
        table.add_row(
            site["name"],
            f"{site['examples']} examples; epsilon {epsilon['run']:.3f} by this run, {epsilon['lifetime']:.3f} in its "
            f"lifetime, {epsilon['left']:.3f} of {epsilon['budget']:g} left (delta {epsilon['delta']:g})",
        )
    accuracy, compression, export = summary["accuracy"], summary["compression"], summary["export"]
    table.add_section()
    table.add_row("accuracy, federated", f"{accuracy['federated']:.3f} after {summary['rounds']} rounds")
    if accuracy["majority_class"] is not None:
        table.add_row("accuracy, majority class", f"{accuracy['majority_class']:.3f} (always the commonest answer)")
    table.add_row("accuracy, each site alone", f"{accuracy['local_mean']:.3f} (mean, same budget, same test data)")
    distance = accuracy["pooled"] - accuracy["federated"]
    table.add_row(
        "accuracy, pooled", f"{accuracy['pooled']:.3f} (no privacy; {distance:+.3f} from the federated model)"
    )
    table.add_section()
    table.add_row("parameters", f"{compression['parameters_before']} -> {compression['parameters_after']}")
    table.add_row(
        "accuracy, compressed",
        f"{compression['accuracy_before']:.3f} -> {compression['accuracy_after']:.3f} (public reference set)",
    )
    table.add_row("bundle", f"{export['bundle']}, signature {'verified' if export['verified'] else 'NOT VERIFIED'}")
    table.add_row("ONNX against torch", f"largest difference {export['onnx_max_abs_diff']:.1e}")
    table.add_row("time", f"{summary['seconds']} s")
    console.print(table)
    console.print("What to try next:", style="bold")
    console.print(f"  python -m fedclaw.verify {export['bundle']}")
    console.print(f"  python -m fedclaw.lineage {export['bundle']} federation={output / 'federation'}")
    console.print(f"  python -m fedclaw.layouts triton {export['bundle']} output={output / 'triton'}")
    first = output / "sites" / summary["sites"][0]["name"]
    console.print(f"  python -m fedclaw.ledger statement site={first}")
    console.print(f"  python -m fedclaw.provision show federation={output / 'federation'}")
    console.print(f"  mlflow ui --backend-store-uri sqlite:///{output / 'runs' / 'mlflow.db'}")
    console.print("  python -m experiments.run -m strategy=fedavg,fedadam privacy.epsilon=2,8")
    console.print("  make demo SERVE=yes      (the node goes on, with two versions)")
    console.print("  make demo WORKLOAD=vision")


def _clear(output: Path) -> None:
    """Remove what an earlier demo left, and nothing else. Raises UsageError."""
    if output.exists():
        if not (output / MARKER).is_file():
            raise UsageError(f"{output} exists and is not an earlier demo's; choose another output=")
        shutil.rmtree(output)
    output.mkdir(parents=True)
    (output / MARKER).touch()


def _only(directory: Path, stem: str) -> Path:
    """The one file of that stem."""
    return next(directory.glob(f"{stem}.*"))


if __name__ == "__main__":
    run_main("experiments.demo", __doc__ or "", main)
