"""What is on disk, read and checked: a run, a bundle, a ledger."""

import sqlite3

import pytest
import torch

import fedclaw
from tests.api.conftest import Net
from tests.ledgers import make_site


@pytest.fixture
def kept(federation, tmp_path):
    return fedclaw.simulate(federation, Net, rounds=2, learning_rate=0.1, batch_size=8, directory=tmp_path / "run")


def test_a_run_is_read_again(kept):
    run = fedclaw.read_run(str(kept.path))
    assert (run.record, run.history, run.metrics) == (kept.record, kept.history, kept.metrics)
    same = run.model(Net)
    for name, value in kept.model().named_parameters():
        assert torch.equal(dict(same.named_parameters())[name], value)
    with pytest.raises(fedclaw.PluginError, match="give its class, model=MyNet"):
        run.model()
    with pytest.raises(fedclaw.UsageError, match=r"is not a Linear: bias nothing against \(3,\)"):
        run.model(torch.nn.Linear(5, 3))
    with pytest.raises(fedclaw.UsageError, match=r"has no run.json"):
        fedclaw.read_run(kept.path.parent)
    (kept.path / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(fedclaw.FedClawError, match=r"metrics.jsonl is damaged in line 1"):
        fedclaw.read_run(kept.path)


@pytest.mark.parametrize("read", [fedclaw.read_run, fedclaw.read_bundle, fedclaw.read_ledger])
def test_what_is_no_path(read):
    with pytest.raises(fedclaw.UsageError, match="=3: the path of a file or a directory is needed"):
        read(3)


def test_a_ledger_is_walked_and_read(tmp_path):
    site = make_site(tmp_path / "site")
    spending = fedclaw.read_ledger(str(site))
    assert isinstance(spending, fedclaw.Spending)
    ward = spending.data_set("ward-4")
    assert (ward.rounds, ward.budget.epsilon) == (9, 8.0)
    assert 0 < ward.epsilon < 8
    assert ward.left == 8 - ward.epsilon
    assert [run.run for run in ward.runs] == ["spring", "summer", "summer"]
    with pytest.raises(fedclaw.UsageError, match="does not exist"):
        fedclaw.read_ledger(tmp_path / "nowhere")
    with sqlite3.connect(site / "state" / "ledger.sqlite") as file:
        file.execute("DROP TRIGGER no_update")
        file.execute("UPDATE entries SET body = replace(body, 'spring', 'autumn') WHERE sequence = 2")
    with pytest.raises(fedclaw.FedClawError, match="entry 2"):
        fedclaw.read_ledger(site)
