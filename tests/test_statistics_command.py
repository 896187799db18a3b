"""python -m fedclaw.statistics over real processes, wires and ledgers; and a run that standardises by it."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml

from fedclaw import statistics as command
from fedclaw.errors import FedClawError
from fedclaw.identity import provisioning
from fedclaw.learning.registry import schema_class
from fedclaw.privacy.claims import Claim
from fedclaw.protocol.terms import ModelSpec
from fedclaw.server.run_directory import RunDirectory, SiteReceipt
from fedclaw.site.journal.reconciliation import check_site, site_spending
from tests.conftest import FEDERATION, Command, Deployment, run_module
from tests.made_tables import make_sites
from tests.ports import free_port
from tests.samples import receipt, run_record


@pytest.fixture
def deployed(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Deployment]:
    """Two sites whose schema says standardise: federated, provisioned; their processes are stopped at the end.

    Each has 200 training rows, or as many as a test's parameter says.
    """
    directories = make_sites(tmp_path, count=2, rows=getattr(request, "param", 200)).directories
    federation = tmp_path / "federation"
    provisioning.initialise(federation, FEDERATION, f"127.0.0.1:{free_port()}")
    for directory in directories:
        asked = provisioning.request_site(directory, federation / "federation.json", directory.name)
        provisioning.accept(directory, provisioning.approve(federation, asked))
    deployment = Deployment(tmp_path, federation, directories, [])
    yield deployment
    for process in deployment.background:
        if process.process.poll() is None:
            process.kill()


def arguments_for(deployed: Deployment, *arguments: str) -> tuple[str, ...]:
    common = (f"federation={deployed.federation}", f"workload.schema_file={deployed.schema}", f"runs={deployed.runs}")
    return (*common, "run=first", "epsilon=2", "delta=1e-4", *arguments)


def statistics(deployed: Deployment, *arguments: str) -> Command:
    return run_module("fedclaw.statistics", *arguments_for(deployed, *arguments))


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_statistics_are_made_charged_once_and_used(deployed: Deployment) -> None:
    """Openly and, with the same sites, through secure aggregation; then a private run with what they found."""
    clients = [deployed.client(index) for index in range(2)]
    done = statistics(deployed)
    assert done.code == 0, done.errors
    for word in ("dose", "age", "ward", "missing", "mean", "q0.5", "Labels", "Cost by site", "north", "east"):
        assert word in done.output
    path = deployed.runs / "first" / "statistics.json"
    release = json.loads(path.read_text())
    assert (release["epsilon"], release["delta"]) == (2.0, 1e-4)
    assert list(release["sites"]) == ["east", "north"]
    assert abs(release["statistics"]["count"]["value"] - 400) < 100

    # The coordinator lost the file and asks again: the same answers, sent again, at no further cost.
    path.rename(path.with_name("before.json"))
    assert statistics(deployed).code == 0
    assert json.loads(path.read_text())["statistics"] == release["statistics"]

    masked = deployed.runs / "masked.json"
    done = statistics(deployed, "run=masked", f"out={masked}", "secure=secagg", "secure.largest_weight=500")
    assert done.code == 0, done.errors
    assert json.loads(masked.read_text())["mechanism"]["placement"] == "secure sum"

    run = deployed.new_run("rounds=1", "privacy.epsilon=3", f"statistics={path}")
    assert run.finish() == 0, run.text()
    record = json.loads((deployed.runs / "test" / "run.json").read_text())
    assert set(json.loads(record["preprocessing"])["columns"]) == {"dose", "age"}
    for client in clients:
        assert client.stop() == 143
    for site in deployed.sites:
        check_site(site)
        (data_set,) = site_spending(site).data_sets
        spent = {run.run: (run.charges, run.open) for run in data_set.runs}
        assert spent == {"first": (1, 0), "masked": (1, 0), "test": (1, 0)}


def trained(deployed: Deployment) -> RunDirectory:
    """A finished run of a logistic model, made without training, of the deployed sites' schema and federation."""
    schema = schema_class("tabular").parse(deployed.schema.read_text(), "schema.yaml")
    record = run_record(
        run="run-1",
        federation=FEDERATION,
        schema_text=schema.to_json(),
        preprocessing=schema.shared_constants({}),
        model=ModelSpec(name="binary_logistic"),
    )
    directory = RunDirectory.create(deployed.runs / "run-1", record)
    # Dose decides, and half of its weight is lost in the bias: at one half hardly anybody is called positive.
    weights = np.zeros((1, *schema.input_shape), np.float32)
    weights[0, 0] = 20
    directory.write_model({"head.weight": weights, "head.bias": np.full(1, -6, np.float32)})
    directory.append_metrics(2, {"metrics": {"accuracy": 0.5}, "test_examples": 400})
    directory.write_receipts({name: SiteReceipt(examples=200, receipt=receipt()) for name in ("east", "north")})
    return directory


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("deployed", [1000], indirect=True)
def test_scores_of_the_training_rows_choose_the_threshold_that_a_bundle_carries(deployed: Deployment) -> None:
    for directory in deployed.sites:
        site = yaml.safe_load((directory / "site.yaml").read_text())
        site["policy"]["statistics"] = {"epsilon": 2, "scores": True}
        (directory / "site.yaml").write_text(yaml.safe_dump(site))
    run = trained(deployed)
    clients = [deployed.client(index) for index in range(2)]
    done = statistics(deployed, f"scores={run.root}")
    assert done.code == 0, done.errors
    assert "Cost by site" in done.output
    assert Claim().protects in " ".join(done.output.split())
    path = deployed.runs / "first" / "statistics.json"
    exported = run_module(
        "fedclaw.export", f"run={run.root}", f"federation={deployed.federation}", f"threshold_statistics={path}"
    )
    assert exported.code == 0, exported.errors
    decision = json.loads((run.root / "bundle" / "bundle.json").read_text())["decision"]
    assert decision["chosen_on"] == "training data, by statistics"
    assert decision["threshold"] < 0.45
    assert decision["value"] > decision["value_at_half"] + 0.1
    private = json.loads((run.root / "bundle" / "privacy.json").read_text())
    promised = {"relation": "zero-out", "trust": "nobody"}
    assert private["threshold"] == {"run": "first", "epsilon": 2.0, "delta": 1e-4, **promised}
    assert private["overall"]["epsilon"] == pytest.approx(4.0), "2 of the training and 2 of the scores"
    for client in clients:
        assert client.stop() == 143
    for directory in deployed.sites:
        check_site(directory)
        (data_set,) = site_spending(directory).data_sets
        assert {charged.run: charged.charges for charged in data_set.runs} == {"first": 1}


def test_scores_of_what_is_no_such_run(deployed: Deployment) -> None:
    run = trained(deployed)
    code, line = refused(deployed, f"scores={run.root}", "secure=secagg", "secure.largest_weight=500")
    assert code == 2
    assert "leave secure= out" in line
    schema = deployed.schema.read_text()
    code, line = refused(deployed, f"scores={run.root}", schema=schema.replace("15000", "16000"))
    assert code == 2
    assert "another federation, or with another schema" in line
    assert refused(deployed, "scores=nowhere", schema=schema)[0] in {1, 2}


def refused(deployed: Deployment, *arguments: str, schema: str | None = None) -> tuple[int, str]:
    """Exit code and message, in this process: a new one imports for seconds."""
    if schema is not None:
        deployed.schema.write_text(schema)
    with pytest.raises(FedClawError) as caught:
        command.main(arguments_for(deployed, *arguments))
    return caught.value.exit_code, str(caught.value)


def test_wrong_use_is_one_line_and_asks_nobody(deployed: Deployment) -> None:
    schema = deployed.schema.read_text()
    unbounded = re.sub(r"  range:\n  - .*\n  - .*\n", "", schema.replace("federated", "schema"))
    code, line = refused(deployed, schema=unbounded)
    assert code == 2
    assert "no bounds are declared of 'dose', 'age', and" in line, "all of them at once"
    assert "add range: [smallest, largest]" in line
    code, line = refused(deployed, "columns=[age,height]", schema=schema)
    assert code == 2
    assert "no column 'height'" in line
    assert refused(deployed, "quantiles=[2]")[0] == 2
    assert refused(deployed, "run=a/b")[0] == 2
    assert refused(deployed, "what=1")[0] == 2
    assert refused(deployed, "bins=-1")[0] == 2
    assert refused(deployed, "workload.schema_file=null")[0] == 2
    code, line = refused(deployed, "sites.wait=0.1")
    assert code == 1
    assert "nobody was asked, and nobody paid" in line
    assert not (deployed.runs / "first").exists()
    out = deployed.runs / "first" / "statistics.json"
    out.parent.mkdir(parents=True)
    out.write_text("{}")
    code, line = refused(deployed)
    assert code == 2
    assert "exists already" in line


def test_the_command_ends_with_one_line_and_no_traceback(deployed: Deployment) -> None:
    done = statistics(deployed, "columns=[height]")
    assert done.code == 2
    assert "no column 'height'" in done.lines[0]
    assert "Traceback" not in done.errors
