"""What earlier commits left behind opens, says the same figures, and goes on: see README.md here."""

import csv
import json
import shutil
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, RecordDict

from fedclaw.compress.record import read_compressed
from fedclaw.errors import SecureAggregationError
from fedclaw.export.check import Trust, verify_bundle
from fedclaw.export.predictor import Predictor
from fedclaw.export.source import load_source
from fedclaw.identity import provisioning
from fedclaw.identity.federation_home import CA_CERTIFICATE, FederationHome
from fedclaw.identity.overview import federation_overview, site_overview
from fedclaw.identity.site_home import SiteKeys
from fedclaw.learning.registry import schema_class
from fedclaw.privacy.secure_aggregation import Sessions
from fedclaw.protocol.message_identity import assume_server_identity
from fedclaw.protocol.messages import JSON, PLAN
from fedclaw.protocol.questions import Outgoing, question, questions
from fedclaw.protocol.refusal import RefusalCode
from fedclaw.protocol.terms import PLAN_VERSION, Plan
from fedclaw.report.ledger_page import render
from fedclaw.server import checkpoint
from fedclaw.server.coordinator import make_plan, make_strategy
from fedclaw.server.run_directory import RunDirectory
from fedclaw.server.statistics_release import constants_from, read_release
from fedclaw.site.directory import open_service
from fedclaw.site.journal.ledger import Ledger
from fedclaw.site.journal.outbound import OutboundLog
from fedclaw.site.journal.reconciliation import open_journal
from fedclaw.site.service import SiteService
from fedclaw.site.settings import load_site_settings
from fedclaw.site.state import SiteStates
from fedclaw.transport.in_process import simulate
from tests import states
from tests.conftest import Background, run_module
from tests.ports import free_port
from tests.privacy.secure_aggregation.rehearsal import identities, parameters

MADE = Path(__file__).parent
OLDEST, NEWER = "437d1ac", "8eca11f"
WARDS, LABS = ("ward-a", "ward-b", "ward-c"), ("lab-a", "lab-b")
FINISHED = ("local", "central", "distributed")
STATES = ("scaffold", "feddyn", "fedper", "ditto", "topk")


def slowly(name: str):
    """A parameter of `make test-slow`."""
    return pytest.param(name, marks=pytest.mark.slow)


@pytest.fixture(params=[OLDEST, NEWER])
def commit(request) -> str:
    return request.param


@pytest.fixture
def past(tmp_path: Path, commit: str) -> Path:
    """A copy to work on. Git keeps no mode but for the x bit."""
    root = tmp_path / commit
    shutil.copytree(MADE / commit, root)
    for path in (*root.glob("federation/**/*"), *root.glob("sites/*/keys/*"), *root.glob("sites/*/state/**/*")):
        path.chmod(0o700 if path.is_dir() else 0o600)
    return root


@pytest.fixture
def opened(past: Path):
    """Opens sites' services as their clients do; what is opened is closed at the end."""
    with ExitStack() as stack:

        def open_them(names: tuple[str, ...]) -> dict[str, SiteService]:
            services = {}
            for name in names:
                site = past / "sites" / name
                keys = SiteKeys.open(site)
                services[name] = open_service(site, load_site_settings(site), keys.descriptor.name, keys=keys)
                stack.callback(services[name].ledger.close)
            return services

        yield open_them


def said(root: Path, name: str) -> dict:
    return json.loads((MADE / root.name / "said" / name).read_text())


@pytest.mark.parametrize("name", WARDS + LABS)
def test_a_ledger_says_what_it_said(past, name):
    """Every entry under its hash, every epsilon to the last bit."""
    journal = open_journal(past / "sites" / name)
    before, now = said(past, f"ledger-{name}.json"), journal.spending()
    assert (now.ledger, now.head, now.entries) == (before["ledger"], before["head"], before["entries"])
    assert [item.name for item in now.data_sets] == [item["name"] for item in before["data_sets"]]
    for item, told in zip(now.data_sets, before["data_sets"], strict=True):
        assert (item.epsilon if told["bounded"] else None) == told["spent"]
        assert (item.rounds, item.charges, item.open) == (told["rounds"], told["charges"], told["open"])
        figures = [(run.run, run.rounds, run.charges, run.open) for run in item.runs]
        assert figures == [(run["run"], run["rounds"], run["charges"], run["open"]) for run in told["runs"]]
        told_epsilons = [np.inf if run["spent"] is None else run["spent"] for run in told["runs"]]
        assert [run.epsilon for run in item.runs] == told_epsilons


@pytest.mark.parametrize("name", WARDS + LABS)
def test_its_page_is_made_and_its_books_are_whole(past, name):
    journal = open_journal(past / "sites" / name)
    page = render(journal)
    assert journal.index.head in page
    assert all(run.run in page for item in journal.spending().data_sets for run in item.runs)
    with OutboundLog(past / "sites" / name / "state" / "outbound.jsonl") as log:
        lines = (MADE / past.name / "sites" / name / "state" / "outbound.jsonl").read_text().splitlines()
        assert log.head() == json.loads(lines[-1])["hash"]
        assert [entry.message_id for entry in log.entries()] == [
            json.loads(line)["entry"]["message_id"] for line in lines
        ]


def test_all_kinds_of_charges_are_there(past):
    """Or these tests would show less than they say."""
    index = open_journal(past / "sites" / "ward-a").index
    charges = {(charge.run, charge.data_set) for charge in index.reservations.values()}
    assert {run for run, _ in charges} == {"release", *FINISHED, "interrupted"}
    assert ("local", "ward-a-2026/test") in charges
    assert any(open_ones for open_ones in index.open.values())
    assert all(charge.mechanism is None for charge in open_journal(past / "sites/lab-a").index.reservations.values())


def test_a_federation_and_its_sites_are_who_they_were(past):
    home = FederationHome.open(past / "federation")
    assert home.name == "clinic"
    assert {entry.state for entry in federation_overview(home.root).entries} == {"valid"}
    for name in WARDS + LABS:
        assert SiteKeys.open(past / "sites" / name).site_name == name
        assert {entry.state for entry in site_overview(past / "sites" / name).entries} == {"valid"}
    assert provisioning.revoke(home.root, "lab-b") == 1
    request = provisioning.renew_site(past / "sites" / "lab-a", rotate=False)
    provisioning.accept(past / "sites" / "lab-a", provisioning.approve(home.root, request))


@pytest.mark.parametrize("name", FINISHED)
def test_a_finished_run_says_what_it_said(past, name):
    directory = RunDirectory.open(past / "runs" / name)
    directory.check()
    record = directory.record()
    assert (record.run, record.rounds) == (name, 2)
    lines = [json.loads(line) for line in (MADE / past.name / "runs" / name / "metrics.jsonl").read_text().splitlines()]
    assert directory.read_metrics() == lines
    told = json.loads((MADE / past.name / "runs" / name / "receipts.json").read_text())
    receipts = directory.read_receipts()
    assert {site: receipts[site].receipt.epsilon_run for site in receipts} == {
        site: told[site]["receipt"]["epsilon_run"] for site in WARDS
    }
    with np.load(MADE / past.name / "runs" / name / "model.npz") as archive:
        model = directory.read_model()
        assert {key: array.tolist() for key, array in model.items()} == {key: archive[key].tolist() for key in archive}
    newest = checkpoint.newest(directory.root)
    assert newest is not None
    assert newest.round == 2
    assert all(np.array_equal(newest.parameters[key], model[key]) for key in model)


def test_a_release_of_statistics_prepares_what_it_prepared(past):
    path = past / "runs" / "release" / "statistics.json"
    release, told = read_release(path), json.loads(path.read_text())
    assert (release.run, set(release.sites)) == ("release", set(WARDS))
    # Histograms are told since; a release that was made before has none.
    columns = {name: {**column, "histogram": None} for name, column in told["statistics"]["columns"].items()}
    assert json.loads(release.statistics.model_dump_json())["columns"] == columns
    record = RunDirectory.open(past / "runs" / "local").record()
    schema = record.make_schema()
    assert not schema.needs_constants
    assert constants_from(path, schema_of(past)) == record.preprocessing


def schema_of(past: Path):
    return schema_class("tabular").parse((past / "sites/ward-a/schema.yaml").read_text(), "schema.yaml")


def test_a_bundle_verifies_and_predicts_what_it_predicted(past):
    bundle, trust = past / "runs" / "local" / "bundle", Trust((past / "federation" / CA_CERTIFICATE).read_bytes())
    verified = verify_bundle(bundle, trust)
    assert verified.pinned
    assert not verified.expired
    assert (verified.manifest.run, verified.manifest.federation) == ("local", "clinic")
    predictor = Predictor.open(bundle, trust)
    found = predictor.predict(predictor.read(past / "sites" / "ward-a" / "data" / "test.csv"))
    with (MADE / past.name / "said" / "predictions.csv").open(newline="") as file:
        header, *rows = csv.reader(file)
    classes = [header.index(column) for column in header if any(label in column for label in predictor.labels)]
    assert len(classes) == 2
    told = np.array([[float(row[column]) for column in classes] for row in rows])
    np.testing.assert_allclose(found, told, atol=1e-6)


def test_a_compressed_model_is_read_and_exported(past):
    run = RunDirectory.open(past / "runs" / "local")
    record, parameters = read_compressed(run)
    with np.load(MADE / past.name / "runs" / "local" / "compressed" / "model.npz") as archive:
        assert {name: array.tolist() for name, array in parameters.items()} == {
            name: archive[name].tolist() for name in archive
        }
    assert load_source(run, "compressed").variant == "compressed"
    assert record.after.parameters < record.before.parameters


@pytest.mark.parametrize("name", [name if name in ("scaffold", "topk") else slowly(name) for name in STATES])
def test_what_a_site_kept_is_what_its_next_round_begins_with(past, opened, name):
    """And the run that was stopped goes on with it to its end."""
    kept = {site: SiteStates(past / "sites" / site / "state" / "strategy").find("clinic", name) for site in LABS}
    directory = RunDirectory.open(past / "runs" / name)
    done, services = len(directory.read_metrics()), opened(LABS)
    begun: dict[str, dict] = {}
    for site, service in services.items():
        remembered = kept[site]
        assert remembered is not None
        assert (remembered.made is None) == (past.name == OLDEST)
        assert remembered.round >= done
        begun[site] = dict(states.before(service.states, "clinic", name, done + 1))
        assert begun[site]
    before = [json.dumps(line) for line in directory.read_metrics()]
    simulate(directory, services)
    after = [json.dumps(line) for line in directory.read_metrics()]
    assert after[: len(before)] == before
    assert [line["round"] for line in directory.read_metrics()] == [1, 2, 3, 4]
    assert all(set(line["answered"]) == set(LABS) for line in directory.read_metrics()[2:])
    assert directory.read_model()
    for site, service in services.items():
        newest = service.states.find("clinic", name)
        assert newest is not None
        assert newest.round == 4
        assert newest.made is not None
        assert newest.made.strategy == directory.record().strategy.name
        assert changed(begun[site], newest.after)


def test_what_a_site_kept_enters_no_private_round(past, opened):
    """Nobody noted what noise covers it, or that none does; it stays as it is, and nothing is charged."""
    service = opened(("lab-a",))["lab-a"]
    directory = RunDirectory.open(past / "runs" / "scaffold")
    record, newest = directory.record(), checkpoint.newest(directory.root)
    assert newest is not None
    plan = make_plan(record, make_strategy(record), newest.round + 1, 2)
    private = Plan.model_validate({**plan.model_dump(), "privacy": {"epsilon": 1, "delta": 1e-4, "max_grad_norm": 1}})
    control = {name: np.zeros_like(array) for name, array in newest.parameters.items()}
    head = service.ledger.head()
    assume_server_identity(1)
    sent = question(private, Outgoing(newest.parameters, None, {"control": control}))
    (message,) = questions([7], private.round, "train", sent, 100.0)
    reply = service.answer(message)
    assert reply.has_error()
    assert ("earlier version" if past.name == OLDEST else "was made under") in reply.error.reason
    assert service.ledger.head() == head


def changed(one, other) -> bool:
    """The same arrays by name, with other numbers: what was kept was gone on with, not begun anew."""
    assert {kind: set(arrays) for kind, arrays in one.items()} == {kind: set(arrays) for kind, arrays in other.items()}
    return any(not np.array_equal(one[kind][name], other[kind][name]) for kind in one for name in one[kind])


def test_an_interrupted_private_run_goes_on_to_its_end(past, opened):
    """Its processes were killed in round 2, which was charged: nothing that was spent is forgotten."""
    directory = RunDirectory.open(past / "runs" / "interrupted")
    (first,) = directory.read_metrics()
    services = opened(WARDS)
    before = {
        name: service.ledger.index().runs[f"{name}-2026", "clinic", "interrupted"].charges
        for name, service in services.items()
    }
    spent = {name: service.ledger.spent(1e-3) for name, service in services.items()}
    heads = {name: service.ledger.head() for name, service in services.items()}
    simulate(directory, services)
    lines = directory.read_metrics()
    assert lines[0] == first
    assert [line["round"] for line in lines] == [1, 2, 3]
    for name, service in services.items():
        assert heads[name] in service.ledger.index().heads
        assert service.ledger.spent(1e-3) > spent[name]
        charged = service.ledger.rounds("interrupted", "clinic") - before[name]
        # Round 3, and round 2 where it is another question now than it was when it was charged.
        assert charged == 2 if past.name == OLDEST else charged in (1, 2)
        receipt = directory.read_receipts()[name].receipt
        assert receipt.epsilon_run == pytest.approx(service.ledger.spent(1e-3, run="interrupted"))
    again = open_journal(past / "sites" / "ward-a")
    assert again.index.sequence > said(past, "ledger-ward-a.json")["entries"]


def reply_to(service: SiteService, plan: str, kind: str = "train") -> Message:
    assume_server_identity(1)
    content = RecordDict({PLAN: ConfigRecord({JSON: plan})})
    return service.answer(Message(content, dst_node_id=7, message_type=kind, group_id="1"))


@pytest.mark.parametrize("commit", [OLDEST], indirect=True)
@pytest.mark.parametrize("name", [*FINISHED, "scaffold"])
@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_a_plan_of_that_version_is_refused_by_its_version(past, opened, name, kind):
    """Nothing of it is read beyond that, and nothing is charged."""
    site = "lab-a" if name == "scaffold" else "ward-a"
    service = opened((site,))[site]
    head = service.ledger.head()
    plan = (MADE / past.name / "said" / f"plan-{name}.json").read_text()
    assert json.loads(plan)["version"] == 3
    reply = reply_to(service, plan, kind)
    assert reply.has_error()
    assert reply.error.code == RefusalCode.MALFORMED
    assert f"version 3 is asked for; this site speaks {PLAN_VERSION}" in reply.error.reason
    assert service.ledger.head() == head


@pytest.mark.parametrize("commit", [OLDEST], indirect=True)
def test_so_is_a_plan_of_a_version_to_come_whatever_else_it_says(opened):
    reply = reply_to(opened(("lab-a",))["lab-a"], '{"version": 99, "horizon": [1, 2], "rounds": "many"}')
    assert "version 99 is asked for" in reply.error.reason
    assert "install the same version" in reply.error.reason


def test_a_ledger_of_discrete_noise_says_what_it_said(past):
    told = said(past, "ledger-discrete.json")
    with Ledger.open(past / "ledgers" / "discrete.sqlite", "registry", "ab" * 32) as ledger:
        assert ledger.spent(1e-3) == told["spent"]
        assert (ledger.head(), ledger.rounds("run")) == (told["head"], told["rounds"])
        assert {charge.mechanism.family for charge in ledger.index().reservations.values()} == {"discrete", "gaussian"}
        assert [key for (_, key), waiting in ledger.index().open.items() if waiting] == ["key-3"]
        ledger.settle("key-3")


def test_what_a_site_fitted_to_its_rows_makes_the_same_inputs_of_them(past):
    directory = past / "constants"
    schema = schema_class("tabular").parse((directory / "schema.yaml").read_text(), "schema.yaml")
    fitted = schema.with_constants((directory / "preprocessing.json").read_text(), "preprocessing.json")
    assert fitted.read_inputs(past / "sites/ward-a/data/train.csv").tolist() == said(past, "inputs.json")


def test_a_simulated_run_is_read(past):
    directory = RunDirectory.open(past / "runs" / "simulated")
    directory.check()
    record, newest = directory.record(), checkpoint.newest(directory.root)
    assert record.simulated is not None
    assert record.simulated.clients == 6
    assert newest is not None
    assert newest.round == 2
    assert len(directory.read_metrics()) == 1


def test_a_round_that_was_unmasked_then_is_not_unmasked_again(past):
    sessions = Sessions(past / "sites" / "ward-a" / "state" / "unmasked.jsonl")
    signers, verifier = identities()
    for number in (1, 2):
        asked = parameters(3, federation="clinic", run="distributed", round=number)
        with pytest.raises(SecureAggregationError, match=f"round {number} of 'distributed' has been unmasked before"):
            sessions.start(asked, "site-a", signers["site-a"], verifier)


@pytest.mark.slow
def test_a_simulated_run_goes_on_by_todays_command(past):
    """8eca11f kept the settings beside the run; for 437d1ac the command that began it is given again."""
    began = ("runtime=simulation", "runtime.save_every=0", "dataset.sites=6", "workload.model.name=logistic")
    rest = ("run=simulated", "privacy=none", "tracking=none", "rounds=400", f"runs={past / 'runs'}")
    given = (*began, *rest) if past.name == OLDEST else ()
    done = run_module("experiments.run", *given, f"resume={past / 'runs' / 'simulated'}", timeout=300)
    assert done.code == 0, done.errors
    directory = RunDirectory.open(past / "runs" / "simulated")
    assert [line["round"] for line in directory.read_metrics()] == list(range(1, 401))
    assert directory.read_metrics()[-1]["metrics"]["accuracy"] > 0.95


@pytest.mark.slow
def test_over_grpc_the_interrupted_run_goes_on_by_todays_commands(past):
    """The federation's own certificates and keys, and each site's directory as it was found."""
    port = free_port()
    with ExitStack() as stack:
        for name in WARDS:
            log = past / f"{name}.log"
            client = Background(log, "fedclaw.client", f"site={past / 'sites' / name}", f"server=127.0.0.1:{port}")
            stack.callback(client.kill)
        resume = (f"federation={past / 'federation'}", f"resume={past / 'runs' / 'interrupted'}")
        done = run_module("fedclaw.server", *resume, f"address=127.0.0.1:{port}", "tracking=none", timeout=300)
    assert done.code == 0, done.errors
    directory = RunDirectory.open(past / "runs" / "interrupted")
    assert [line["round"] for line in directory.read_metrics()] == [1, 2, 3]
    assert directory.read_model()
    for name in WARDS:
        checked = run_module("fedclaw.ledger", "verify", f"site={past / 'sites' / name}")
        assert checked.code == 0, checked.errors
