"""What is audited: a run's settings, and sites in this process that would run it.

Sites are the operator's own, opened without their ledgers, or made up from the schema alone. The audit gives them
data of its choice and a policy that forbids nothing, since what a policy refuses cannot be audited; everything else is
theirs.
"""

import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from fedclaw.errors import PrivacyError, UsageError
from fedclaw.learning.step_loop import load_parameters
from fedclaw.learning.workload import Table
from fedclaw.privacy.secure_aggregation import Sessions, Signer, Verifier, local_identities
from fedclaw.protocol.arrays import Arrays
from fedclaw.protocol.plan import Plan
from fedclaw.protocol.questions import Outgoing
from fedclaw.protocol.terms import RoundRules
from fedclaw.server.exchange import ask as ask_cohort
from fedclaw.server.plans import make_plan, make_strategy
from fedclaw.server.run_directory import RunRecord
from fedclaw.server.session import initial_parameters, make_record
from fedclaw.server.settings import RunSettings
from fedclaw.server.training import TrainingQuestion, session_of
from fedclaw.site.journal.ledger import Ledger
from fedclaw.site.policy.policy import Policy, permissive
from fedclaw.site.secure import SecureIdentity
from fedclaw.site.service import SiteService
from fedclaw.site.site import SiteData
from fedclaw.site.state import SiteStates
from fedclaw.transport.in_process import local_grid

FEDERATION = "audit"
_DEADLINE = 600.0


@dataclass(frozen=True)
class Subject:
    """The configuration and the sites under audit. Raises UsageError when there is no site."""

    settings: RunSettings
    sites: Mapping[str, SiteService]

    def __post_init__(self) -> None:
        if not self.sites:
            raise UsageError("an audit needs at least one site")

    def record(self, settings: RunSettings | None = None) -> RunRecord:
        """The record of an audited run, of `settings` or the subject's own. Raises UsageError."""
        chosen = (settings or self.settings).model_copy(update={"metrics": ()})
        return make_record(chosen, FEDERATION, f"audit-{secrets.token_hex(4)}", RoundRules(minimum=1))

    def dressed(self, name: str, train: Table) -> SiteService:
        """The site of that name with `train` as its data, that refuses nothing.

        It has an empty ledger in memory and a certificate of the audit's own, and goes on with the site's noise source.
        """
        site = self.sites[name]
        policy = permissive(site.workload.name, str(self.settings.strategy["name"]), delta=0.5)
        signers, verifier = self._identities
        return replace(
            site,
            federation=FEDERATION,
            data=SiteData(train=train, test=None, fingerprint=""),
            policy=policy,
            ledger=Ledger.open(":memory:", site.name),
            device=torch.device("cpu"),
            outbound=None,
            states=SiteStates(),
            secure=SecureIdentity(signers[name], verifier, Sessions()),
        )

    @cached_property
    def _identities(self) -> tuple[Mapping[str, Signer], Verifier]:
        return local_identities(FEDERATION, sorted(self.sites))


def unspent(site: SiteService) -> SiteService:
    """The same site as if it had never been asked: what it was charged for and took part in would make it refuse."""
    site.ledger.close()
    site.ledger = Ledger.open(":memory:", site.name)
    assert site.secure is not None
    site.secure = replace(site.secure, sessions=Sessions())
    return site


def synthetic_sites(settings: RunSettings, sizes: Sequence[int]) -> dict[str, SiteService]:
    """Sites with `sizes` examples each, made from the schema and the initial model alone. Raises UsageError.

    The target of an example is what the run's initial model says of it, but for what it says of all.
    """
    if not sizes or min(sizes) < 1:
        raise UsageError("synthetic: give the number of examples of each site, each at least 1")
    record = make_record(settings, FEDERATION, "audit", RoundRules(minimum=1))
    workload = record.make_workload()
    if not settings.strategy.get("name"):
        raise UsageError("strategy.name is not set")
    generator = np.random.default_rng(settings.seed)
    inputs = workload.schema.synthetic_inputs(sum(sizes), generator)
    model = workload.build(record.model)
    load_parameters(model, initial_parameters(record))
    with torch.no_grad():
        logits = model(torch.from_numpy(inputs))
    targets = workload.task.answers(logits - logits.mean(dim=0))
    policy = Policy(workloads=(workload.name,), strategies=(str(settings.strategy["name"]),), epsilon=None)
    sites, start = {}, 0
    for number, size in enumerate(sizes, 1):
        name, rows = f"synthetic-{number}", slice(start, start + size)
        sites[name] = SiteService(
            name=name,
            federation=FEDERATION,
            workload=workload,
            schema_digest=record.schema_digest,
            data=SiteData(Table(inputs[rows], targets[rows]), None, ""),
            policy=policy,
            ledger=Ledger.open(":memory:", name),
        )
        start += size
    return sites


def ask(sites: Mapping[str, SiteService], record: RunRecord, parameters: Arrays) -> tuple[TrainingQuestion, Plan]:
    """One round's exchange with `sites`, by the server's own code. Raises PrivacyError when a site declines."""
    plan = make_plan(record, make_strategy(record), 1, len(sites), record.central)
    grid = local_grid(sites, record.run)
    nodes, outgoing = list(grid.get_node_ids()), Outgoing(parameters)
    if record.secure is not None:
        plan = session_of(plan, sorted(sites), outgoing, record.secure, record.rules.minimum)
    trained = ask_cohort(grid, nodes, TrainingQuestion(plan, outgoing), _DEADLINE)
    for declined in trained.declined:
        raise PrivacyError(f"the configuration cannot be audited: {declined.site} declined: {declined.reason}")
    if len(trained.answered) < len(sites):
        raise PrivacyError("the configuration cannot be audited: a round of secure aggregation failed")
    return trained, plan


def flat(arrays: Mapping[str, NDArray[np.float32]], names: Iterable[str]) -> NDArray[np.float64]:
    """The arrays of `names` as one float64 vector, in that order."""
    return np.concatenate([arrays[name].reshape(-1).astype(np.float64) for name in names])
