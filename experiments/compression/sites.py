"""The sites of a fold in this process, each with its policy and a ledger, and the rounds that they train in."""

from collections.abc import Mapping
from pathlib import Path

from experiments.compression.dealing import Fold
from experiments.compression.settings import SiteTraining, TaskSettings
from fedclaw.learning.registry import workload_class
from fedclaw.learning.workload import schema_digest
from fedclaw.protocol.terms import PrivacyRequest, RoundRules, StrategyRecord
from fedclaw.server.run_directory import RunRecord
from fedclaw.site.journal.ledger import Ledger
from fedclaw.site.policy.policy import Policy
from fedclaw.site.service import SiteService
from fedclaw.site.site import SiteData

FEDERATION = "experiments"


def open_sites(
    task: TaskSettings, fold: Fold, epsilon: float | None, delta: float, ledgers: Path, copied: bool = False
) -> dict[str, SiteService]:
    """The fold's sites, whose whole budget is `epsilon`; None: they train without privacy too.

    `copied`: the ledgers in that directory are only begun from, and stay as they are.
    """
    workload = workload_class(task.workload)(fold.schema)
    policy = Policy(
        workloads=(task.workload,),
        strategies=("fedavg",),
        epsilon=epsilon,
        delta=delta,
        allow_training_without_privacy=epsilon is None,
    )
    services = {}
    for name, table in fold.sites.items():
        path = ledgers / f"{name}.db"
        services[name] = SiteService(
            name=name,
            federation=FEDERATION,
            workload=workload,
            schema_digest=schema_digest(fold.schema.to_json()),
            data=SiteData(table, None, name),
            policy=policy,
            ledger=Ledger.copied(path, name) if copied else Ledger.open(path, name),
            outbound=None,
        )
    return services


def record_of(
    task: TaskSettings, fold: Fold, training: SiteTraining, epsilon: float | None, delta: float, seed: int
) -> RunRecord:
    """The record of a teacher's run."""
    privacy = None
    if epsilon is not None:
        privacy = PrivacyRequest(epsilon=epsilon, delta=delta, max_grad_norm=training.clip)
    workload = workload_class(task.workload)(fold.schema)
    return RunRecord(
        run="teacher",
        federation=FEDERATION,
        workload=task.workload,
        schema_text=fold.schema.to_json(),
        model=task.model,
        task=workload.task.name,
        metrics=workload.task.metrics,
        strategy=StrategyRecord(name="fedavg"),
        rounds=training.rounds,
        training=training.training,
        privacy=privacy,
        rules=RoundRules(),
        seed=seed,
    )


def spent(sites: Mapping[str, SiteService], delta: float) -> float:
    """The largest epsilon of any site's ledger, over all that it was charged for."""
    return max(site.ledger.spent(delta) for site in sites.values())
