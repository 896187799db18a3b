"""A run over the hospitals' sites: opened from files, statistics asked for if it needs them, trained."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from experiments.heart_disease.prepare import Hospitals
from experiments.heart_disease.settings import Budget, Cell
from experiments.heart_disease.sites import HospitalPolicy, write_hospitals, write_pooled
from fedclaw.learning.statistics import design_of
from fedclaw.learning.workload import schema_digest
from fedclaw.privacy.accounting import NoiseEvent, calibrate, epsilon_of
from fedclaw.privacy.noise import GaussianSource
from fedclaw.protocol.statistics import StatisticsRequest
from fedclaw.protocol.terms import CentralRequest, PrivacyRequest, RoundRules
from fedclaw.server.round_report import Outcome
from fedclaw.server.run_directory import RunDirectory
from fedclaw.server.session import make_record
from fedclaw.server.settings import ModelChoice, RunSettings, WorkloadChoice
from fedclaw.server.statistics import release_statistics, with_session
from fedclaw.server.statistics_release import write_release
from fedclaw.site.service import SiteService
from fedclaw.transport.in_process import LocalGrid, local_grid, open_sites, simulate

FEDERATION = "heart-disease"
TRAINING_RUN, STATISTICS_RUN = "training", "statistics"
DEADLINE = 600.0
LARGEST_HOSPITAL = 1000.0
"""Training rows that no hospital exceeds: what a secure sum of statistics is made for."""
WHOLE = 1_000_000
"""A batch size that no hospital's rows fill: each step of local noise sees them all."""


@dataclass(frozen=True)
class Federation:
    """The sites of one run, opened."""

    sites: dict[str, SiteService]
    pooled: SiteService
    """One site with everybody's rows, standardised by their own mean and deviation."""
    root: Path

    @property
    def schema_file(self) -> Path:
        """What the hospitals agreed on."""
        return self.root / "sites" / "schema.yaml"


def open_federation(cell: Cell, hospitals: Hospitals, root: Path) -> Federation:
    """Write the sites under `root` and open them, each with an empty ledger. Raises FedClawError."""
    policy = HospitalPolicy(statistics_epsilon=cell.statistics.epsilon)
    if cell.budget is not None:
        budget = cell.budget
        policy = HospitalPolicy(
            epsilon=budget.epsilon,
            delta=budget.delta,
            statistics_epsilon=_statistics_cost(cell)[0],
            minimum_cohort=2,
        )
    sites = open_sites(write_hospitals(root / "sites", hospitals, cell.standardise, policy).values(), FEDERATION)
    pooled = open_sites([write_pooled(root / "pooled", hospitals)], FEDERATION)["pooled"]
    if cell.budget is None:
        # The same figures again for the same seed. The run spends without bound: no noise in it protects anybody.
        for site in (*sites.values(), pooled):
            key = hashlib.sha256(f"{FEDERATION}/{cell.seed}/{site.name}".encode()).digest()
            site.source = GaussianSource(insecure_fixed_key_for_tests=key)
    return Federation(sites, pooled, root)


def train(cell: Cell, made: Federation, trainers: Mapping[str, SiteService]) -> Outcome:
    """Train over `trainers`, some or all of the sites of `made`. Raises FedClawError."""
    pooled = cell.method.who == "pooled"
    shared = cell.standardise == "federated" and not pooled
    statistics = _release(cell, made) if shared else None
    schema = made.root / "pooled" / "schema.yaml" if pooled else made.schema_file
    settings = RunSettings(
        workload=WorkloadChoice(name="tabular", schema_file=schema, model=ModelChoice(name="binary_logistic")),
        strategy=cell.method.strategy,
        training=cell.method.training,
        privacy=None,
        rounds=cell.method.rounds,
        seed=cell.seed,
        weighting=cell.method.weighting,
        metrics=("accuracy",),
        statistics=statistics,
    )
    if cell.budget is not None:
        settings = settings.model_copy(update=_private(cell, cell.budget, made))
    rules = RoundRules(minimum=1 if cell.budget is None else len(trainers), deadline=DEADLINE)
    record = make_record(settings, FEDERATION, TRAINING_RUN, rules)
    name = "-".join((TRAINING_RUN, *trainers))
    return simulate(RunDirectory.create(made.root / "runs" / name, record), trainers)


def _release(cell: Cell, made: Federation) -> Path:
    """statistics.json, from all sites: in a secure sum, or each with noise of its own."""
    epsilon, delta = _statistics_cost(cell)
    schema = next(iter(made.sites.values())).workload.schema
    columns = tuple(column.name for column in schema.statistic_columns())
    grid: LocalGrid = local_grid(made.sites, STATISTICS_RUN)
    nodes = sorted(grid.get_node_ids())
    request = StatisticsRequest(
        federation=FEDERATION,
        run=STATISTICS_RUN,
        cohort=len(nodes),
        workload="tabular",
        schema_digest=schema_digest(schema.to_json()),
        columns=columns,
        labels=False,
        bins=0,
        epsilon=epsilon,
        delta=delta,
    )
    if cell.budget is None or cell.budget.placement == "distributed":
        design = design_of(schema, columns, labels=False, bins=0)
        names = [grid.site_name(node) for node in nodes]
        asked = cell.secure.model_copy(update={"largest_weight": LARGEST_HOSPITAL})
        request = with_session(request, names, asked, design, len(nodes))
    release = release_statistics(grid, nodes, schema, request, (), minimum=len(nodes), deadline=DEADLINE)
    path = made.root / "statistics.json"
    write_release(path, release)
    return path


def _statistics_cost(cell: Cell) -> tuple[float, float]:
    """Epsilon and delta that the release may cost."""
    if cell.budget is None:
        return cell.statistics.epsilon, cell.statistics.delta
    return cell.statistics.share * cell.budget.epsilon, cell.budget.delta


def _private(cell: Cell, budget: Budget, made: Federation) -> dict[str, object]:
    """The run's settings that make it private, with what the statistics have left of the budget."""
    spent = max(site.ledger.spent(budget.delta) for site in made.sites.values())
    method = budget.method
    rate = method.sample_rate if budget.placement == "distributed" else 1.0
    epsilon = left_for_training(budget.epsilon, budget.delta, spent, rate, method.rounds)
    if budget.placement == "local":
        training = cell.method.training.model_copy(update={"batch_size": WHOLE})
        return {
            "training": training,
            "privacy": PrivacyRequest(epsilon=epsilon, delta=budget.delta, max_grad_norm=method.clip),
        }
    central = CentralRequest(
        unit="example",
        noise_by="sites",
        epsilon=epsilon,
        delta=budget.delta,
        clip=method.clip,
        sample_rate=method.sample_rate,
    )
    return {"central": central, "secure": cell.secure}


@lru_cache(maxsize=64)
def left_for_training(budget: float, delta: float, spent: float, rate: float, steps: int) -> float:
    """The largest epsilon at `delta` that `steps` steps may cost beside one Gaussian release that has cost `spent`.

    Composed as the ledger does, not by adding epsilons, within a thousandth and from the safe side.
    """
    release = NoiseEvent(1.0, calibrate(spent, delta, 1.0, 1), 1)

    def fits(noise: float) -> bool:
        return epsilon_of([release, NoiseEvent(rate, noise, steps)], delta) <= budget

    low = high = calibrate(budget, delta, rate, steps)
    while not fits(high):
        low, high = high, high * 1.5
    while high / low > 1.001:
        middle = (low * high) ** 0.5
        low, high = (low, middle) if fits(middle) else (middle, high)
    return epsilon_of([NoiseEvent(rate, high, steps)], delta)
