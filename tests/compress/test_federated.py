"""Recovery at the sites: real sites with policies and ledgers, in this process."""

import io
import socket
import threading
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from fedclaw.compress.__main__ import before_after, compared, notes
from fedclaw.compress.federated import DIRECTORY, distillation_record, recover_by_rounds
from fedclaw.compress.models import load_teacher, make_student
from fedclaw.compress.pruning_record import PruningSettings
from fedclaw.compress.record import (
    CompressSettings,
    GeneratorSettings,
    RecoverySettings,
    SiteRecovery,
    read_compressed,
)
from fedclaw.compress.stage import compress
from fedclaw.errors import CompressionError, RoundError, UsageError
from fedclaw.identity.provisioning import accept, approve, initialise, request_site
from fedclaw.identity.site_home import SiteKeys
from fedclaw.learning.workload import Table, schema_digest
from fedclaw.protocol.message_identity import assume_server_identity
from fedclaw.protocol.terms import CentralRequest
from fedclaw.server.run_directory import RunDirectory
from fedclaw.server.session import calibrated
from fedclaw.site.journal.ledger import Ledger
from fedclaw.site.policy.policy import Policy
from fedclaw.site.service import SiteService
from fedclaw.site.site import SiteData
from fedclaw.transport.grpc.limits import Limits
from fedclaw.transport.grpc.site_connection import SiteConnection
from fedclaw.transport.in_process import LocalGrid

NAMES = ("north", "south", "west")
EPSILON = 30.0


def make_site(name, index, workload, table, budget):
    rows = slice(200 * index, 200 * index + 160), slice(200 * index + 160, 200 * (index + 1))
    train, test = (Table(table.inputs[part], table.targets[part]) for part in rows)
    data = SiteData(train, test, f"data of {name}")
    return SiteService(
        name=name,
        federation="test",
        workload=workload,
        schema_digest=schema_digest(workload.schema.to_json()),
        data=data,
        policy=Policy(workloads=("tabular",), strategies=("fedavg",), epsilon=budget, delta=1e-3),
        ledger=Ledger.open(":memory:", data.fingerprint),
        outbound=None,
    )


@pytest.fixture
def sites(trained, digits):
    workload, _ = trained
    table = workload.schema.read_examples(digits.train)
    return {name: make_site(name, index, workload, table, 100.0) for index, name in enumerate(NAMES)}


@pytest.fixture
def recover(make_run, trained):
    """recover(sites, **settings) -> outcome, of one and the same teacher."""
    run = make_run(*trained)

    def go(sites, **changes):
        asked = {"rounds": 3, "epsilon": EPSILON} | changes
        settings = CompressSettings(
            run=run.root, mode="federated", fraction=0.4, federation=run.root, sites=SiteRecovery(**asked)
        )
        teacher = load_teacher(run.root)
        student = make_student(teacher, settings.fraction)
        assume_server_identity(1)
        return recover_by_rounds(LocalGrid(sites, 1), settings, teacher, student, student.model)

    go.run = run
    return go


def test_sites_recover_the_student_on_their_ledgers(sites, recover, trained):
    outcome = recover(sites)
    figures = outcome.figures
    assert figures.examples == 120
    assert figures.before.metrics["accuracy"] > 0.9
    assert figures.after.metrics["accuracy"] > figures.pruned.metrics["accuracy"] + 0.1
    assert figures.after.interval.low < figures.after.metrics["accuracy"] < figures.after.interval.high
    report = outcome.report
    assert report.rounds == 3
    assert sorted(report.epsilon) == list(NAMES)
    for name, site in sites.items():
        assert 0 < report.epsilon[name] <= EPSILON
        assert site.ledger.rounds(report.run) == 3
        assert site.ledger.spent(1e-4, run=report.run) == pytest.approx(report.epsilon[name])
    recovery = RunDirectory.open(recover.run.root / report.directory)
    assert recovery.record().distillation.teacher == recover.run.record().model
    assert recovery.read_receipts().keys() == set(NAMES)
    parameters = recovery.read_model()
    assert all(torch.equal(torch.from_numpy(parameters[k]), v) for k, v in outcome.model.state_dict().items())


def test_begun_again_it_costs_nothing(sites, recover):
    first = recover(sites)
    spent = {name: site.ledger.spent(1e-4) for name, site in sites.items()}
    again = recover(sites)
    assert {name: site.ledger.spent(1e-4) for name, site in sites.items()} == spent
    assert again.report == first.report
    assert again.figures == first.figures


def test_another_question_is_another_run(sites, recover):
    first, second = recover(sites, rounds=1), recover(sites, rounds=1, temperature=5.0)
    assert first.report.run != second.report.run
    runs = {path.name for path in (recover.run.root / DIRECTORY).iterdir()}
    assert runs == {first.report.run, second.report.run}
    assert sites["north"].ledger.spent(1e-4) > sites["north"].ledger.spent(1e-4, run=first.report.run)


def test_the_teacher_is_what_the_sites_learn_from(sites, recover):
    """Without the loss on targets nothing but the teacher can have taught the student."""
    learned = recover(sites, weight=1.0).figures
    assert learned.after.metrics["accuracy"] > learned.pruned.metrics["accuracy"] + 0.1


def test_a_site_without_budget_declines(trained, digits, recover):
    workload, _ = trained
    table = workload.schema.read_examples(digits.train)
    poor = {name: make_site(name, index, workload, table, 0.5) for index, name in enumerate(NAMES)}
    with pytest.raises(RoundError, match=r"epsilon 30 was asked for; .*same python -m fedclaw\.compress"):
        recover(poor)
    assert all(site.ledger.spent(1e-4) == 0 for site in poor.values())


def test_the_budget_is_the_runs_unless_said_otherwise(recover, trained):
    teacher = load_teacher(recover.run.root)
    student = make_student(teacher, 0.4)

    def record(**sites):
        settings = CompressSettings(run=recover.run.root, mode="federated", federation="x", sites=SiteRecovery(**sites))
        return distillation_record(settings, teacher, student)

    assert record().privacy == teacher.record.privacy
    assert record(epsilon=1.5).privacy == teacher.record.privacy.model_copy(update={"epsilon": 1.5})
    assert record().run == record().run != record(epsilon=1.5).run
    assert record().model == student.spec
    object.__setattr__(teacher, "record", teacher.record.model_copy(update={"privacy": None}))
    assert record().privacy is None
    with pytest.raises(CompressionError, match="without differential privacy"):
        record(epsilon=1.5)


def test_what_came_before_the_sites_makes_another_run(recover, digits):
    """A run's name is all that keeps a resumed recovery from going on with another student's checkpoint."""
    teacher = load_teacher(recover.run.root)
    student = make_student(teacher, 0.4)

    def name(*mode, **changes):
        usual = {"run": recover.run.root, "mode": (*mode, "federated"), "federation": "x"}
        return distillation_record(CompressSettings(**usual | changes), teacher, student).run

    def after(mode, **changes):
        settings = CompressSettings(
            run=recover.run.root, mode=("federated", mode), federation="x", pruning={"steps": 2}, **changes
        )
        return distillation_record(settings, teacher, student).run

    names = [
        name(),
        name("synthetic"),
        name("synthetic", synthetic=500),
        name("synthetic", recovery=RecoverySettings(steps=5)),
        name("synthetic", generator=GeneratorSettings(share=0)),
        name("proxy", inputs=digits.public),
        name("proxy", inputs=digits.train),
        name("proxy", "synthetic"),
        name("synthetic", "proxy"),
        name(pruning=PruningSettings(importance="magnitude")),
        name(pruning=PruningSettings(importance="taylor")),
        name(pruning=PruningSettings(importance="taylor"), synthetic=500),  # by which channels are ranked
        after("proxy", inputs=digits.public),  # recovers between the steps
        after("proxy", inputs=digits.train),
        after("synthetic"),
    ]
    assert len(set(names)) == len(names)
    assert name() == name(synthetic=500, recovery=RecoverySettings(steps=5)), "none of it was used"
    assert name("synthetic") == name("synthetic")


def test_noise_on_the_sum_is_made_for_the_recoverys_own_rounds(recover):
    found = load_teacher(recover.run.root)
    asked = CentralRequest(unit="site", noise_by="server", epsilon=8, delta=1e-3, clip=1)
    trained = found.record.model_copy(
        update={
            "privacy": None,
            "central": calibrated(asked, found.record.rounds),
            "weighting": "capped",
            "weight_cap": 50,
        }
    )
    teacher = replace(found, record=trained)
    student = make_student(teacher, 0.4)

    def central(**sites):
        settings = CompressSettings(run=recover.run.root, mode="federated", federation="x", sites=SiteRecovery(**sites))
        return distillation_record(settings, teacher, student).central

    assert central(rounds=50) == calibrated(asked, 50)
    assert central(rounds=50).noise_multiplier > central(rounds=2).noise_multiplier
    assert central(rounds=50, epsilon=3.0) == calibrated(asked.model_copy(update={"epsilon": 3.0}), 50)


def test_a_student_is_compared_under_capped_weights(sites, recover):
    """The questions of the comparison say all that a plan with capped weights has to say."""
    record = recover.run.record()
    capped = record.model_copy(update={"weighting": "capped", "weight_cap": 50})
    (recover.run.root / "run.json").write_text(capped.model_dump_json())
    assert recover(sites, rounds=1).figures.examples == 120


def test_the_federation_must_be_the_runs(recover, tmp_path):
    home = initialise(tmp_path / "federation", "another", "127.0.0.1:1")
    with pytest.raises(UsageError, match="a run of federation 'test', not of 'another'"):
        compress(CompressSettings(run=recover.run.root, mode="federated", federation=home.root))


@pytest.fixture
def connected(sites, tmp_path):
    """A federation directory, and the sites connected to its server's address over mutually authenticated gRPC."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    home = initialise(tmp_path / "federation", "test", address)
    stop, threads = threading.Event(), []
    for name, service in sites.items():
        root = tmp_path / name
        accept(root, approve(home.root, request_site(root, home.root / "federation.json", name)))
        link = SiteConnection(SiteKeys.open(root), service, root / "state", Limits())
        threads.append(threading.Thread(target=link.run, args=(stop,)))
        threads[-1].start()
    yield home
    stop.set()
    for thread in threads:
        thread.join(timeout=20)
        assert not thread.is_alive()


def test_the_whole_stage_over_grpc(connected, sites, recover):
    asked = SiteRecovery(rounds=2, epsilon=EPSILON, wait_for=3, wait=30)
    settings = CompressSettings(
        run=recover.run.root,
        mode=("synthetic", "federated"),
        fraction=0.4,
        synthetic=400,
        recovery=RecoverySettings(steps=30),
        federation=connected.root,
        sites=asked,
        latency_repeats=2,
    )
    record = compress(settings)
    assert [report.mode for report in record.recovery] == ["synthetic", "federated"]
    assert [(item.step, item.origin) for item in record.looked_at] == [
        ("importance", "none"),
        ("layer sensitivity", "synthetic"),
        ("recovery", "synthetic"),
        ("recovery", "sites"),
        ("controls", "synthetic"),
        ("measurement", "sites"),
        ("measurement", "synthetic"),
    ]
    assert "evaluation=FILE measures all models on one file" in record.verdict
    assert [control.accuracy for control in record.controls] == [None] * 3
    assert record.accuracy_measure == "federated evaluation"
    assert record.accuracy_after > record.accuracy_pruned
    assert record.parameters_after <= 0.4 * record.parameters_before
    written, parameters = read_compressed(recover.run)
    assert written == record
    assert sum(array.size for array in parameters.values()) == record.parameters_after
    assert all(0 < record.at_sites.epsilon[name] <= EPSILON for name in NAMES)
    assert all(site.ledger.rounds(record.at_sites.run) == 2 for site in sites.values())
    table = Console(width=120, file=io.StringIO())
    table.print(before_after(record), compared(record), *notes(record, recover.run.compressed))
    assert "Accuracy (federated evaluation)" in table.file.getvalue()
    assert "north" in table.file.getvalue()
