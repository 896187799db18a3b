"""What a federation is compared with, in this process: sites that train alone, and one model on everybody's data."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from fedclaw.learning.workload import Table
from fedclaw.protocol.terms import PrivacyRequest, RoundRules
from fedclaw.server.round_report import Outcome
from fedclaw.server.run_directory import RunDirectory, RunRecord
from fedclaw.site.journal.ledger import Ledger
from fedclaw.site.service import SiteService
from fedclaw.site.site import SiteData
from fedclaw.transport.in_process import simulate


def local_only(record: RunRecord, sites: Mapping[str, SiteService], root: Path) -> dict[str, Outcome]:
    """Each site trains by itself, with the same model, steps and budget; all are tested on all sites' test data."""
    outcomes = {}
    test = _all_tests(sites)
    for name, service in sites.items():
        alone = _with_ledger(service, SiteData(service.data.train, test, service.data.fingerprint), name)
        alone.policy = service.policy.model_copy(update={"minimum_cohort": 1})
        outcomes[name] = simulate(_begin(record, f"local-{name}", root, record.privacy), {name: alone})
    return outcomes


def pooled(record: RunRecord, sites: Mapping[str, SiteService], root: Path) -> Outcome:
    """One model on everybody's data, without privacy: what pooling would give."""
    services = list(sites.values())
    train = _concatenated([service.data.train for service in services])
    everyone = _with_ledger(services[0], SiteData(train, _all_tests(sites), "pooled"), "pooled")
    changed = {"minimum_cohort": 1, "allow_training_without_privacy": True, "epsilon": None}
    everyone.policy = everyone.policy.model_copy(update=changed)
    return simulate(_begin(record, "pooled", root, None), {"pooled": everyone})


def _begin(record: RunRecord, run: str, root: Path, privacy: PrivacyRequest | None) -> RunDirectory:
    changed = {"run": run, "privacy": privacy, "central": None, "secure": None, "rules": RoundRules(minimum=1)}
    return RunDirectory.create(root / run, record.model_copy(update=changed))


def _with_ledger(service: SiteService, data: SiteData, name: str) -> SiteService:
    return SiteService(
        name=name,
        federation=service.federation,
        workload=service.workload,
        schema_digest=service.schema_digest,
        data=data,
        policy=service.policy,
        ledger=Ledger.open(":memory:", data.fingerprint),
        outbound=None,
        device=service.device,
    )


def _all_tests(sites: Mapping[str, SiteService]) -> Table:
    return _concatenated([service.data.test for service in sites.values() if service.data.test is not None])


def _concatenated(tables: Sequence[Table]) -> Table:
    """All of them; a person of one site is nobody of another, whatever they are called."""
    inputs = np.concatenate([table.inputs for table in tables])
    whole = Table(inputs, np.concatenate([table.targets for table in tables]))
    owners = [table.persons for table in tables if table.persons is not None]
    if len(owners) < len(tables):
        return whole
    begins = np.cumsum([0, *(table.units for table in tables)])
    names = [f"{number}/{name}" for number, table in enumerate(tables) for name in table.person_names]
    return whole.owned_by(np.concatenate([own + begin for own, begin in zip(owners, begins, strict=False)]), names)
