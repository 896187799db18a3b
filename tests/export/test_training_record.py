"""training.json says how the model came about, binds the files that say so, and tells nothing that may not leave."""

import hashlib
import json
import math
import shutil
import socket
from pathlib import Path

import pytest

from fedclaw.export import layout
from fedclaw.export.source import load_source
from fedclaw.export.training_record import TrainingRecord, rounds_of
from fedclaw.protocol.receipt import NO_LEDGER
from fedclaw.protocol.terms import CentralNoise
from fedclaw.server.run_directory import RunDirectory, Simulated, SiteReceipt
from fedclaw.server.software import software
from tests.samples import run_record


@pytest.fixture
def record(table_bundle):
    return TrainingRecord.model_validate_json((table_bundle / layout.TRAINING).read_bytes())


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_every_file_that_the_model_came_from_is_bound(record, table_run):
    (run,) = record.runs
    assert (run.run, run.purpose, run.federation) == ("table", "training", "test-federation")
    assert run.files.record == sha256(table_run.root / "run.json")
    assert run.files.model == sha256(table_run.root / "model.npz")
    assert run.files.metrics == sha256(table_run.root / "metrics.jsonl")
    assert run.files.receipts == sha256(table_run.root / "receipts.json")
    assert record.compression is None
    assert record.exported_with == run.software == software()


def test_the_configuration_is_the_runs(record, table_run):
    asked, told = table_run.record(), record.runs[0].configuration
    for name in ("workload", "model", "strategy", "rounds", "training", "privacy", "rules", "seed", "statistics"):
        assert getattr(told, name) == getattr(asked, name), name
    assert told.schema_sha256 == asked.schema_digest
    assert told.preprocessing_sha256 is None


def test_heads_and_rounds(record, samples):
    (run,) = record.runs
    assert [(head.site, head.head, head.charges) for head in run.ledger_heads] == [
        (name, entry.receipt.ledger_head, 3) for name, entry in sorted(samples.private.items())
    ]
    assert [(line.round, line.metrics["accuracy"], line.test_examples) for line in run.rounds] == [(3, 0.875, 40)]


def test_nothing_of_this_machine_is_in_it(table_bundle, table_run):
    text = (table_bundle / layout.TRAINING).read_text()
    for secret in (str(table_run.root), str(Path.home()), socket.gethostname(), "/tmp/"):
        assert len(secret) < 4 or secret not in text, secret


LINES = [
    {"round": 1, "metrics": {"loss": math.inf, "accuracy": 0.5, "seconds": 10**400}, "answered": ["south", "north"]}
]
SAMPLED = CentralNoise(
    unit="site", noise_by="server", epsilon=4, delta=1e-3, clip=1, noise_multiplier=2, sample_rate=0.5
)


def test_who_took_part_is_told_but_where_the_guarantee_counts_on_nobody_knowing():
    (told,) = rounds_of(run_record(), LINES)
    assert told.sites == ("north", "south")
    assert told.metrics == {"loss": None, "accuracy": 0.5, "seconds": None}
    (hidden,) = rounds_of(run_record(privacy=None, central=SAMPLED, weighting="uniform"), LINES)
    assert hidden.sites is None
    (simulated,) = rounds_of(run_record(simulated=Simulated(clients=2)), LINES)
    assert simulated.sites is None
    everybody = SAMPLED.model_copy(update={"sample_rate": 1.0})
    (told,) = rounds_of(run_record(privacy=None, central=everybody), LINES)
    assert told.sites == ("north", "south")


def test_a_seed_that_noise_was_made_from_is_not_told(tmp_path, table_run, samples):
    root = tmp_path / "simulated"
    shutil.copytree(table_run.root, root, ignore=shutil.ignore_patterns("bundle", "run.lock"))
    directory = RunDirectory(root)
    simulated = samples.receipt(ledger_head=NO_LEDGER)
    directory.write_receipts({"client-0": SiteReceipt(examples=9, receipt=simulated)})
    plain = json.loads(directory.record_path.read_text()) | {"seed": 12345}
    for repeatable, seed in ((False, 12345), (True, None)):
        plain["simulated"] = {"clients": 1, "repeatable_noise": repeatable}
        directory.record_path.write_text(json.dumps(plain))
        told = load_source(directory).training()
        assert told.runs[0].configuration.seed == seed
        assert ("12345" in told.model_dump_json()) is (seed is not None)
        assert told.runs[0].ledger_heads == (), "clients of a simulation keep no ledgers"


def test_a_run_from_before_software_was_noted_says_that_it_does_not_know(tmp_path, table_run):
    root = tmp_path / "earlier"
    shutil.copytree(table_run.root, root, ignore=shutil.ignore_patterns("bundle", "run.lock"))
    directory = RunDirectory(root)
    plain = json.loads(directory.record_path.read_text())
    del plain["software"]
    directory.record_path.write_text(json.dumps(plain))
    told = load_source(directory).training()
    assert told.runs[0].software is None
    assert told.exported_with == software()
