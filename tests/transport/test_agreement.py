"""The same federation gives the same model, and costs the same, on every runtime.

Sites draw their batches from a cryptographic source, so what is compared takes all examples in each step; the private
run draws and adds noise, so there it is what was paid that is compared.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedclaw.protocol.arrays import Arrays
from fedclaw.server.session import initial_parameters
from fedclaw.site.journal.ledger import Ledger
from fedclaw.site.journal.reconciliation import ledger_file
from tests.transport.federations import RUNTIMES, config_of, deal

PRIVATE = "privacy.epsilon=4 privacy.delta=1e-3 training.batch_size=16"
PLAIN = "privacy=none strategy=fedadam training.epochs=null training.steps=2 training.batch_size=100000"


@dataclass(frozen=True)
class Finished:
    """What can be compared of a runtime's two runs."""

    start: Arrays
    parameters: Arrays
    metrics: list[dict[str, float]]
    receipts: dict[str, dict[str, Any]]
    sites: tuple[Path, ...]
    books: Path
    """Where the private run's sites kept their ledgers, if on disk."""


def run_both(runtime: str, root: Path) -> Finished:
    """The private run, then the plain one, on one federation of that runtime."""
    root.mkdir()
    sites = deal(root)
    with RUNTIMES[runtime](root, sites) as run:
        private = run(config_of(root, "private", PRIVATE))
        plain = run(config_of(root, "plain", PLAIN))
    receipts = {
        name: {"examples": item.examples, **item.receipt.model_dump(exclude={"ledger_head"})}
        for name, item in private.read_receipts().items()
    }
    metrics = [line["metrics"] for line in plain.read_metrics()]
    books = private.root / "sites" if runtime == "ray" else root / "sites"
    return Finished(initial_parameters(plain.record()), plain.read_model(), metrics, receipts, sites, books)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return run_both("local", tmp_path_factory.mktemp("agreement") / "local")


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "runtime", ["grpc", pytest.param("ray", marks=pytest.mark.slow), pytest.param("flower", marks=pytest.mark.slow)]
)
def test_a_runtime_gives_what_the_local_one_gives(runtime, reference, tmp_path):
    found = run_both(runtime, tmp_path / runtime)
    assert set(found.parameters) == set(reference.parameters)
    for name, array in reference.parameters.items():
        np.testing.assert_array_equal(found.start[name], reference.start[name])
        np.testing.assert_allclose(found.parameters[name], array, atol=1e-5)
        assert np.abs(array - reference.start[name]).max() > 0.05, "the run has gone somewhere"
    assert len(found.metrics) == 3
    for mine, theirs in zip(found.metrics, reference.metrics, strict=True):
        assert mine == pytest.approx(theirs, abs=1e-5)
    assert len(found.receipts) == 3
    assert found.receipts == reference.receipts
    for site in found.sites:
        with Ledger.open(ledger_file(found.books / site.name), site.name) as ledger:
            assert ledger.rounds("private") == 3
            assert ledger.spent(1e-3, run="private") == found.receipts[site.name]["epsilon_run"]
