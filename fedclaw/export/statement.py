"""privacy.json: what training cost each site by its own receipts, and what that does and does not guarantee.

The sentences about unit, relation, trust and what is not covered are those of `fedclaw.privacy.claims`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from fedclaw.errors import BundleError
from fedclaw.privacy.claims import Claim, claim_of, claim_of_sum, weakest
from fedclaw.protocol.frozen import Frozen, fields_of
from fedclaw.protocol.receipt import TrainingCost
from fedclaw.protocol.terms import CentralNoise, DataUnit, PrivacyRequest
from fedclaw.server.run_directory import ReleaseUse, Simulated, SiteReceipt

SOURCE = (
    "Figures are the sites' own, from the last receipt of each that arrived: what a site spent on a later round whose "
    "answer never arrived is on its ledger, not here. The coordinator cannot check the figures, but each names the "
    "head of the site's hash-chained ledger, against which the site can be audited."
)
SIMULATED_SOURCE = (
    "Figures are the simulation's own: its clients keep no ledgers, and there is nothing that they could be audited "
    "against."
)


_NAMED: Mapping[DataUnit, str] = {"example": "training example", "person": "person"}

Guarantee = Literal["every site", "some sites", "no site", "unknown"]


class RunCost(TrainingCost):
    """What one run cost a site, from the last receipt that it sent in it. The mechanism is that of its last round."""

    run: str
    purpose: Literal["training", "recovery after pruning"]
    examples: int
    epsilon: float | None
    """Spent in this run. None: unbounded, because it trained without differential privacy."""


class SiteStatement(Frozen):
    """What this model cost one site. Several runs add up by basic composition (Dwork and Roth, theorem 3.16)."""

    site: str
    differential_privacy: bool
    epsilon: float | None
    """None: unbounded, because one of the runs trained without differential privacy."""
    delta: float
    runs: tuple[RunCost, ...]


class Bound(Frozen):
    """(epsilon, delta)."""

    epsilon: float
    delta: float


class PrivacyStatement(Frozen):
    """privacy.json."""

    format_version: Literal[1] = 1
    guarantee: Guarantee
    warnings: tuple[str, ...]
    """Read these first. Empty only if every site trained with differential privacy, preprocessing included."""
    summary: str
    overall: Bound | None
    """The largest epsilon and delta of all sites, if every site has one. Holds for a unit at one site only."""
    sites: tuple[SiteStatement, ...]
    requested: PrivacyRequest | None
    """What the coordinator asked each site for. What counts is what the sites report."""
    requested_central: CentralNoise | None = None
    """The noise on the sum that the coordinator asked for. For the unit site `unit` says what that promises, too."""
    statistics: ReleaseUse | None = None
    """The release that the preprocessing constants come from; included in `overall`."""
    threshold: ReleaseUse | None = None
    """The release of the model's scores that the decision threshold comes from; included in `overall`."""
    compression_statistics: tuple[ReleaseUse, ...] = ()
    """The releases that the compression looked at; included in `overall`."""
    marginals: ReleaseUse | None = None
    """The release that marginals.json comes from; included in `overall`."""
    compression: str
    unit: str
    """Unit and relation of `overall`: the sites' own, and of relations that differ the weakest."""
    holds_against: str
    """The trust that `overall` needs: the most that any of these sites does."""
    not_covered: tuple[str, ...]
    source: str = SOURCE


@dataclass(frozen=True)
class Receipts:
    """The last receipts of one run, by site name."""

    run: str
    purpose: Literal["training", "recovery after pruning"]
    by_site: Mapping[str, SiteReceipt]


def state(
    runs: Sequence[Receipts],
    requested: PrivacyRequest | None,
    compression: str,
    data_dependent: bool = False,
    central: CentralNoise | None = None,
    statistics: ReleaseUse | None = None,
    threshold: ReleaseUse | None = None,
    simulated: Simulated | None = None,
    unit: DataUnit = "example",
    compression_statistics: Sequence[ReleaseUse] = (),
    marginals: ReleaseUse | None = None,
) -> PrivacyStatement:
    """The statement for a model that came out of `runs`.

    `compression` is a sentence about its cost. A release that was used twice was charged once. `data_dependent`: sites
    standardised their inputs with constants of their own training data. `simulated`: the sites are clients of a
    simulation. `unit`: what the schema protects. Raises BundleError for a receipt that says another unit.
    """
    _check_units(runs, unit)
    names = sorted({name for run in runs for name in run.by_site})
    random = simulated is None or not simulated.repeatable_noise
    sites = tuple(_site(name, runs, random) for name in names)
    exposed = tuple(site.site for site in sites if not site.differential_privacy)
    complete = all(run.by_site for run in runs) and bool(sites)
    guarantee = _guarantee(len(sites), len(exposed), complete)
    overall = None
    used = dict.fromkeys((statistics, threshold, *compression_statistics, marginals))
    further = [release for release in used if release is not None]
    if guarantee == "every site":
        overall = Bound(
            epsilon=max(site.epsilon or 0.0 for site in sites) + sum(release.epsilon for release in further),
            delta=max(site.delta for site in sites) + sum(release.delta for release in further),
        )
    claim = _claim(sites, further, unit)
    return PrivacyStatement(
        guarantee=guarantee,
        warnings=(
            *(_simulated_warnings(simulated, exposed) if simulated else ()),
            *_warnings(() if simulated else exposed, complete, data_dependent),
            *_loss_warnings(sites),
            *_trust_warnings(sites),
            *_cohort_warnings(central),
        ),
        summary=_summary(guarantee, overall, len(sites), len(exposed), unit),
        overall=overall,
        sites=sites,
        requested=requested,
        requested_central=central,
        statistics=statistics,
        threshold=threshold,
        compression_statistics=tuple(compression_statistics),
        marginals=marginals,
        compression=compression,
        unit=" ".join([claim.protects, *_of_whole_sites(sites)]),
        holds_against=claim.against,
        not_covered=claim.not_covered,
        source=SIMULATED_SOURCE if simulated else SOURCE,
    )


def _check_units(runs: Sequence[Receipts], unit: DataUnit) -> None:
    """Raise BundleError, naming site and run, for a receipt of another unit than the schema's."""
    for run in runs:
        for name, entry in sorted(run.by_site.items()):
            if entry.receipt.unit != unit:
                raise BundleError(
                    f"the receipt of {name} in run {run.run} is for the unit {entry.receipt.unit}, and the run's "
                    f"schema makes it {unit}: no bound holds for both; look at that site's ledger, and train again "
                    "without it"
                )


def _claim(sites: Sequence[SiteStatement], releases: Sequence[ReleaseUse], unit: DataUnit) -> Claim:
    """What holds for every site that trained with differential privacy, the releases included."""
    claims = [claim_of(run) for site in sites if site.differential_privacy for run in site.runs]
    counted = [Claim(unit, release.relation, release.trust) for release in releases]
    return weakest([*claims, *counted]) if claims else Claim(unit, trust="everybody")


def _of_whole_sites(sites: Sequence[SiteStatement]) -> tuple[str, ...]:
    """What noise on the sum promises to whole sites, where it is made for them."""
    central = [run.central for site in sites for run in site.runs if run.central and run.central.unit == "site"]
    claims = dict.fromkeys(claim_of_sum(noise.noise_by) for noise in central)
    return tuple(f"{claim.protects} {claim.against}" for claim in claims)


def _site(name: str, runs: Sequence[Receipts], random: bool) -> SiteStatement:
    """`random`: whether nobody can know the noise, without which no epsilon counts."""
    costs = tuple(cost_of(run, run.by_site[name]) for run in runs if name in run.by_site)
    bounded = [cost.epsilon for cost in costs if cost.epsilon is not None]
    private = random and len(bounded) == len(costs)
    return SiteStatement(
        site=name,
        differential_privacy=private,
        epsilon=sum(bounded) if private else None,
        delta=sum(cost.delta for cost in costs),
        runs=costs,
    )


def _simulated_warnings(simulated: Simulated, exposed: Sequence[str]) -> tuple[str, ...]:
    warnings = [
        f"SIMULATED: the sites below are {simulated.clients} clients to whom one machine dealt data that it holds. No "
        "site trained, checked or refused anything; the figures are what such a federation would have spent."
    ]
    if simulated.repeatable_noise:
        warnings.append(
            "NO DIFFERENTIAL PRIVACY: the noise was drawn from the run's seed, and whoever knows that can subtract it."
        )
    elif exposed:
        warnings.append(
            f"NO DIFFERENTIAL PRIVACY FOR {len(exposed)} OF THE CLIENTS: they trained without noise. Nothing bounds "
            "what this model may reveal about their examples, up to reproducing them."
        )
    return tuple(warnings)


def cost_of(run: Receipts, entry: SiteReceipt) -> RunCost:
    """What a site's last receipt of `run` says that it cost."""
    shared = fields_of(entry.receipt, TrainingCost)
    return RunCost(
        run=run.run, purpose=run.purpose, examples=entry.examples, epsilon=entry.receipt.epsilon_run, **shared
    )


def _trust_warnings(sites: Sequence[SiteStatement]) -> tuple[str, ...]:
    """Whom a reader has to trust for the figures of these sites to hold."""
    trusting: dict[str, list[str]] = {trust: [] for trust in _BELIEVED}
    for site in sites:
        for trust in trusting:
            if any(run.trust == trust for run in site.runs):
                trusting[trust].append(site.site)
    return tuple(f"AT {', '.join(names)} {_BELIEVED[trust]}" for trust, names in trusting.items() if names)


def _loss_warnings(sites: Sequence[SiteStatement]) -> tuple[str, ...]:
    lost = [site.site for site in sites if any(run.ledger_losses for run in site.runs)]
    if not lost:
        return ()
    return (
        f"AT {', '.join(lost)} THE LEDGER WAS LOST and begun again by the operator's word: what had been spent before "
        "is in none of the figures over all runs, nor, if this run was under way, in this run's.",
    )


def _cohort_warnings(central: CentralNoise | None) -> tuple[str, ...]:
    if central is None or central.unit != "site" or central.sample_rate == 1:
        return ()
    return (
        "THE SITE-LEVEL EPSILON THAT WAS ASKED FOR COUNTS ON NOBODY KNOWING WHO WAS ASKED IN A ROUND, and the number "
        "of rounds of each site below tells something of that: it does not hold towards readers of this statement.",
    )


_BELIEVED = {
    "server": "the noise is the server's: towards the server itself, and whoever controls it, there is no differential "
    "privacy.",
    "aggregation": "each site brings a share of the noise, and only the sum has all of it: the figures hold as long as "
    "no more sites than the plan allows for work against the others.",
}


def _guarantee(sites: int, exposed: int, complete: bool) -> Guarantee:
    if not complete:
        return "unknown"
    if not exposed:
        return "every site"
    return "no site" if exposed == sites else "some sites"


def _warnings(exposed: tuple[str, ...], complete: bool, data_dependent: bool) -> tuple[str, ...]:
    warnings = [
        f"NO DIFFERENTIAL PRIVACY AT SITE {name}: it trained without noise. Nothing bounds what this model may reveal "
        "about that site's training examples, up to reproducing them."
        for name in exposed
    ]
    if not complete:
        warnings.insert(
            0, "NO RECEIPTS: a run that made this model holds no privacy receipts. Its privacy cost is unknown."
        )
    if data_dependent:
        warnings.append(
            "PREPROCESSING IS NOT COVERED: each site standardised its inputs with constants computed from its own "
            "training data. No epsilon below counts what the updates reveal through these constants."
        )
    return tuple(warnings)


def _summary(guarantee: str, overall: Bound | None, sites: int, exposed: int, unit: DataUnit) -> str:
    if overall is not None:
        who = "The one site" if sites == 1 else f"All {sites} sites"
        return (
            f"{who} trained with {unit}-level differential privacy: this model cost no {_NAMED[unit]} more than "
            f"epsilon = {overall.epsilon:.4g} at delta = {overall.delta:.4g} (as long as one site alone holds it)."
        )
    if guarantee == "unknown":
        return "The privacy cost of this model is unknown."
    if guarantee == "no site":
        return f"None of the {sites} sites trained with differential privacy: this model carries no privacy guarantee."
    return (
        f"{exposed} of {sites} sites trained without differential privacy. The model carries no guarantee for their "
        "examples; the others' examples are protected as listed."
    )
