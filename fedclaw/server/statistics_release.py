"""statistics.json: what a release of statistics says, what it cost whom, and the constants that are made from it."""

import json
import math
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from fedclaw.errors import DataError, UsageError
from fedclaw.files import write_atomic
from fedclaw.learning.workload import Schema, schema_digest
from fedclaw.privacy.claims import Claim, claim_of, weakest
from fedclaw.privacy.distributed import Shares
from fedclaw.privacy.statistics import Statistics, moments_of
from fedclaw.privacy.survival import SurvivalDesign
from fedclaw.privacy.survival_estimates import Curve, LogRank
from fedclaw.protocol.frozen import Frozen, explain
from fedclaw.protocol.receipt import Trust
from fedclaw.protocol.statistics import StatisticsReceipt, StatisticsRequest, SurvivalQuestion
from fedclaw.server.run_directory import ReleaseUse

STATISTICS_FILE = "statistics.json"
"""What a release is called, in a run directory of its own."""


class ReleaseMechanism(Frozen):
    """How the figures became private."""

    name: Literal["gaussian", "discrete gaussian"]
    placement: Literal["sites", "secure sum"]
    """Each site adds all the noise it needs before anything leaves it; or its share, in a sum that alone is seen."""
    trust: Trust
    sensitivity: float = 1.0
    """Of each site's vector, in the L2 norm: one example, or as many as are used of one person, count for so much."""
    noise: dict[str, float]
    """By site, the standard deviation of the noise that it added to each coordinate of its vector."""
    dropouts_tolerated: int = 0
    colluding_tolerated: int = 0
    """In a secure sum, how many sites may fail, or tell the server their noise, without harm to the guarantee."""
    deviation: float = Field(gt=0)
    """That of the noise in the sum."""


class ScoresOf(Frozen):
    """Whose scores the figures are of."""

    model: str
    """SHA-256 of the model's parameters."""
    bins: int = Field(ge=3)
    labels: tuple[str, str]


class SurvivalCurves(Frozen):
    """Kaplan-Meier curves by group, and whether the groups differ."""

    question: SurvivalQuestion
    ends: tuple[float, ...] = Field(min_length=1)
    """Of the bins, in units of the time column. A curve has a number for each bin that it reaches."""
    level: float = Field(gt=0, lt=1)
    """With what probability a band holds the true share, at each end by itself, noise included."""
    groups: dict[str, Curve]
    log_rank: LogRank | None
    """None: there is one group, or too few are at risk to compare."""


class Release(Frozen):
    """statistics.json."""

    format_version: Literal[1] = 1
    federation: str
    run: str
    """The name under which each site's ledger has it."""
    created: datetime
    workload: str
    schema_digest: str
    epsilon: float = Field(gt=0)
    delta: float = Field(gt=0, lt=1)
    """At most what the release cost each site, for one unit."""
    unit: str = Claim().protects
    """Unit and relation, in a sentence."""
    rows_per_person: int | None = None
    """How many examples of a person, the first ones, the figures are of at most; None: the unit is no person."""
    mechanism: ReleaseMechanism
    sites: dict[str, StatisticsReceipt]
    """Who is in it, with what its ledger then said."""
    statistics: Statistics
    scores: ScoresOf | None = None
    """Of a histogram of a model's scores."""
    survival: SurvivalCurves | None = None

    @property
    def claim(self) -> Claim:
        """What holds at every site. Raises PrivacyError for sites that say different units."""
        return weakest(map(claim_of, self.sites.values()))

    @property
    def use(self) -> ReleaseUse:
        """What a run says of the release that it uses."""
        claim = self.claim
        return ReleaseUse(
            run=self.run, epsilon=self.epsilon, delta=self.delta, relation=claim.relation, trust=claim.trust
        )


def make_release(
    request: StatisticsRequest,
    schema: Schema,
    receipts: Mapping[str, StatisticsReceipt],
    mechanism: ReleaseMechanism,
    statistics: Statistics,
    scores: ScoresOf | None = None,
    survival: SurvivalCurves | None = None,
) -> Release:
    """The release of `statistics` that came of what the sites with these receipts sent."""
    most = schema.rows_per_person
    return Release(
        federation=request.federation,
        run=request.run,
        created=datetime.now(UTC).replace(microsecond=0),
        workload=request.workload,
        schema_digest=request.schema_digest,
        epsilon=request.epsilon,
        delta=request.delta,
        unit=weakest(map(claim_of, receipts.values())).protects,
        rows_per_person=most and SurvivalDesign.rows_per_person if survival is not None else most,
        mechanism=mechanism,
        sites=dict(sorted(receipts.items())),
        statistics=statistics,
        scores=scores,
        survival=survival,
    )


def release_mechanism(
    request: StatisticsRequest, receipts: Mapping[str, StatisticsReceipt], shares: Shares | None, sensitivity: float
) -> ReleaseMechanism:
    """How the sum of what the sites with these receipts sent became private; `shares` of a secure sum."""
    if shares is None:
        noise = {site: receipt.noise_multiplier * sensitivity for site, receipt in sorted(receipts.items())}
        return ReleaseMechanism(
            name="gaussian",
            placement="sites",
            trust="nobody",
            sensitivity=sensitivity,
            noise=noise,
            deviation=math.hypot(*noise.values()),
        )
    noise = dict.fromkeys(sorted(receipts), shares.sigma * shares.step)
    return ReleaseMechanism(
        name="discrete gaussian",
        placement="secure sum",
        trust="aggregation",
        sensitivity=sensitivity,
        noise=noise,
        deviation=math.hypot(*noise.values()),
        dropouts_tolerated=request.secure.tolerated if request.secure else 0,
        colluding_tolerated=request.secure.colluding if request.secure else 0,
    )


def write_release(path: Path, release: Release) -> None:
    """Write statistics.json, whole or not at all."""
    plain = release.model_dump(mode="json")
    for later in ("scores", "survival", "rows_per_person"):
        if plain[later] is None:
            # As a release was before there was any: an older reader knows no such field.
            del plain[later]
    for column in plain["statistics"]["columns"].values():
        if column["histogram"] is None:
            del column["histogram"]
    write_atomic(path, (json.dumps(plain, indent=2) + "\n").encode())


def read_release(path: Path) -> Release:
    """A statistics.json. Raises UsageError when it cannot be read, DataError when it is none."""
    try:
        return Release.model_validate_json(path.read_bytes())
    except OSError as error:
        raise UsageError(f"statistics={path} cannot be read: {error.strerror}") from error
    except ValidationError as error:
        raise DataError(f"{path} is not a statistics.json of FedClaw: {explain(error)}") from error


def constants_from(path: Path | None, schema: Schema) -> str | None:
    """The constants for a run with `schema`, from the release at `path`; None for a schema that takes none.

    Raises UsageError if the schema takes some and there is no release, or takes none and there is one; DataError if
    the release is of another schema.
    """
    if not schema.needs_constants:
        if path is not None:
            raise UsageError(
                f"statistics={path} goes with a schema that says standardise: federated; this one does not"
            )
        return None
    if path is None:
        raise UsageError(
            "the schema says standardise: federated: make a statistics.json with python -m fedclaw.statistics, and "
            "give it as statistics=FILE"
        )
    release = read_release(path)
    if release.schema_digest != schema_digest(schema.to_json()):
        raise DataError(f"{path} was made with another schema; make the statistics again, with the run's own")
    moments = moments_of(release.statistics)
    return schema.shared_constants(
        {name: (mean.value, max(variance.value, variance.error)) for name, (mean, variance) in moments.items()}
    )
