"""A site's directory with a ledger and an outbound log in it, as a client leaves them."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedclaw.privacy.accounting import NoiseEvent
from fedclaw.site.journal.ledger import Budget, Ledger
from fedclaw.site.journal.outbound import OutboundLog

SITE = """
name: hospital-north
workload: tabular
schema_file: schema.yaml
data: {train: data/train.csv, name: ward-4}
policy: {workloads: [tabular], strategies: [fedavg], epsilon: 8.0, delta: 1.0e-3}
"""
UNLIMITED = Budget(None, 1e-3)
ROUND = NoiseEvent(0.08, 1.5, 13)


@dataclass(frozen=True)
class Run:
    """Rounds of one run on one content of a data set; those in `kept` are charged and do not leave."""

    name: str
    rounds: int
    federation: str = "heart"
    data_set: str = "ward-4"
    fingerprint: str = "ab" * 32
    mechanism: NoiseEvent | None = ROUND
    kept: frozenset[int] = frozenset()


HISTORY = (
    Run("spring", 4),
    Run("summer", 3, fingerprint="cd" * 32, kept=frozenset({3})),
    Run("summer", 2, federation="icu", fingerprint="cd" * 32),
    Run("pilot", 1, data_set="outpatients", fingerprint="ef" * 32, mechanism=None),
)


def make_site(root: Path, history: Sequence[Run] = HISTORY, site: str = SITE) -> Path:
    """Write `root`/site.yaml and the books after `history`; returns `root`."""
    (root / "state").mkdir(parents=True)
    (root / "site.yaml").write_text(site)
    with OutboundLog(root / "state" / "outbound.jsonl") as log:
        for run in history:
            with Ledger.open(root / "state" / "ledger.sqlite", run.data_set, run.fingerprint) as ledger:
                for number in range(1, run.rounds + 1):
                    _round(ledger, log, run, number)
    return root


def _round(ledger: Ledger, log: OutboundLog, run: Run, number: int) -> None:
    key = f"{run.federation}/{run.name}/{number}"
    ledger.reserve(key, run.federation, run.name, number, run.mechanism, UNLIMITED)
    head = ledger.head()
    if number in run.kept:
        return
    ledger.settle(key)
    receipt = {"ledger_head": head, "trust": "nobody" if run.mechanism else "everybody"}
    log.append(
        federation=run.federation,
        run=run.name,
        round=str(number),
        kind="train",
        message_id=key,
        size=100,
        digest=f"{len(log.entries()):064x}",
        receipt=json.dumps(receipt),
    )
