"""What names a question: a digest of all of it, made once for all who are asked."""

import numpy as np
import pytest
from flwr.app import ConfigRecord, RecordDict

from experiments.datasets import DatasetSettings, SitePolicy, write_sites
from fedclaw.protocol import questions as questions_module
from fedclaw.protocol.arrays import pack
from fedclaw.protocol.message_identity import assume_server_identity
from fedclaw.protocol.questions import questions
from fedclaw.protocol.records import hash_of
from fedclaw.protocol.terms import LocalTraining, ModelSpec, SecureRequest
from fedclaw.server import exchange
from fedclaw.server.coordinator import run_rounds
from fedclaw.server.run_directory import RunDirectory
from fedclaw.server.session import initial_parameters
from fedclaw.transport.in_process import LocalGrid, open_sites
from tests.samples import run_record

LARGE = 10_000
"""Bytes; in the model below only the first layer's weights are more."""


@pytest.fixture
def seen(monkeypatch):
    """Sizes of the large arrays that were hashed into questions' names."""
    found = []

    def counted(records):
        found.extend(size for record in records.values() for a in record.values() if (size := len(a.data)) > LARGE)
        return hash_of(records)

    monkeypatch.setattr(questions_module, "hash_of", counted)
    monkeypatch.setattr(exchange, "hash_of", counted)
    return found


@pytest.mark.parametrize("secure", [None, SecureRequest(dropouts=0.2, corrupt=0.0, largest_weight=1000)], ids=str)
def test_the_model_is_hashed_once_for_all_sites(tmp_path, seen, secure):
    """One round, five sites: once for what they train from, once for what they evaluate."""
    assume_server_identity(5)
    policy = SitePolicy(epsilon=None, delta=1e-3, allow_training_without_privacy=True)
    directories = write_sites(tmp_path / "sites", DatasetSettings(name="breast_cancer", sites=5), policy)
    sites = open_sites(directories, "clinic")
    record = run_record(
        schema_text=next(iter(sites.values())).workload.schema.to_json(),
        model=ModelSpec(name="mlp", args={"hidden": [128]}),
        rounds=1,
        training=LocalTraining(steps=1, batch_size=8, learning_rate=0.1),
        privacy=None,
        secure=secure,
    )
    directory = RunDirectory.create(tmp_path / "run", record)
    outcome = run_rounds(LocalGrid(sites, 5), directory, initial_parameters(record))
    assert len(directory.read_metrics()[0]["answered"]) == 5
    assert outcome.metrics
    assert len(seen) == 2


def test_a_name_is_the_same_wherever_the_hashing_began_and_another_for_anything_else():
    content = RecordDict({"arrays": pack({"w": np.ones(3, np.float32)}), "plan": ConfigRecord({"json": "{}"})})
    other = RecordDict({"arrays": content["arrays"], "plan": ConfigRecord({"json": "{} "})})
    (whole,) = questions([1], 1, "train", content)
    (shared,) = questions([1], 1, "train", content, arrays=hash_of(other.array_records))
    (another,) = questions([1], 1, "train", other, arrays=hash_of(other.array_records))
    assert whole.metadata.message_id == shared.metadata.message_id != another.metadata.message_id
