"""What is audited, a run's settings and sites in this process that would run it, and the canary that is planted in it.

Sites are the operator's own, opened without their ledgers, or made up from the schema alone. The audit gives them
data of its choice and a policy that forbids nothing, since what a policy refuses cannot be audited; everything else is
theirs.

The adversary plants a canary, an example with a large gradient, or the blank that takes its place. The server may send
whatever parameters it likes, so the adversary chooses them such that the same input has no gradient with one target,
and with another one as large a gradient as it likes:

    classes   the initial parameters times a factor: under a saturated softmax the model is sure of one label
    a number  the same with a last layer of zeros: the model answers every input with the same value

A data set of blanks then has no gradient at all, and a canary among them has one whose direction the adversary knows.
Whatever else is in an update is noise.
"""

import os
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from fedclaw.errors import PrivacyError, UsageError
from fedclaw.learning.tasks.base import Targets
from fedclaw.learning.workload import Floats, Table, Workload, load_parameters
from fedclaw.privacy.secure_aggregation import Sessions, Signer, Verifier, local_identities
from fedclaw.protocol.arrays import Arrays
from fedclaw.protocol.questions import Outgoing
from fedclaw.protocol.terms import DataUnit, ModelSpec, Plan, Relation, RoundRules
from fedclaw.server.exchange import ask as ask_cohort
from fedclaw.server.run_directory import RunRecord
from fedclaw.server.session import initial_parameters, make_plan, make_record, make_strategy
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

    @property
    def unit(self) -> DataUnit:
        """What the guarantee protects of the sites' data."""
        return next(iter(self.sites.values())).workload.schema.unit

    def relation(self, name: str) -> Relation:
        """Between which data sets of that site the guarantee holds."""
        return self.sites[name].relation

    def dressed(self, name: str, train: Table, stated: int | None = None) -> SiteService:
        """The site of that name with `train` as its data, that refuses nothing.

        It has an empty ledger in memory and a certificate of the audit's own, and goes on with the site's noise source.
        `stated`: the number of units that it states, whatever there are; None: it counts them.
        """
        site = self.sites[name]
        policy = permissive(site.workload.name, str(self.settings.strategy["name"]), delta=0.5)
        signers, verifier = self._identities
        return replace(
            site,
            federation=FEDERATION,
            data=SiteData(train=train, test=None, fingerprint="", public_examples=stated),
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


ROWS_OF_A_PERSON = 3
"""Rows of a person that the audit makes up: more than one, so that clipping them one by one shows."""


def rows_of(unit: DataUnit) -> int:
    """Rows of a unit that the audit makes up."""
    return ROWS_OF_A_PERSON if unit == "person" else 1


def owned(table: Table, unit: DataUnit) -> Table:
    """The rows in the hands of made-up persons, in their order, if that is the unit."""
    owners = np.arange(len(table)) // rows_of(unit)
    return table if unit == "example" else table.owned_by(owners, [str(owner) for owner in range(len(table))])


def unspent(site: SiteService) -> SiteService:
    """The same site as if it had never been asked: what it was charged for and took part in would make it refuse."""
    site.ledger.close()
    site.ledger = Ledger.open(":memory:", site.name)
    assert site.secure is not None
    site.secure = replace(site.secure, sessions=Sessions())
    return site


def synthetic_sites(settings: RunSettings, sizes: Sequence[int]) -> dict[str, SiteService]:
    """Sites with `sizes` examples each, made from the schema and the initial model alone. Raises UsageError.

    The target of an example is what the run's initial model says of it, but for what it says of all. Where the unit is
    a person, each has ROWS_OF_A_PERSON examples.
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
            data=SiteData(owned(Table(inputs[rows], targets[rows]), workload.schema.unit), None, ""),
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
    unit = next(iter(sites.values())).workload.schema.unit
    trained = ask_cohort(grid, nodes, TrainingQuestion(plan, outgoing, unit=unit), _DEADLINE)
    for declined in trained.declined:
        raise PrivacyError(f"the configuration cannot be audited: {declined.site} declined: {declined.reason}")
    if len(trained.answered) < len(sites):
        raise PrivacyError("the configuration cannot be audited: a round of secure aggregation failed")
    return trained, plan


def flat(arrays: Mapping[str, NDArray[np.float32]], names: Iterable[str]) -> NDArray[np.float64]:
    """The arrays of `names` as one float64 vector, in that order."""
    return np.concatenate([arrays[name].reshape(-1).astype(np.float64) for name in names])


LOUD = 20.0
"""The norm of a canary's gradient, at least, in units of the clipping bound."""

_SILENT = 1e-4
# A blank's gradient over the clipping bound.
_FACTORS = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)
_CANDIDATES = 16


@dataclass(frozen=True)
class Canary:
    """A row (1, *D) with its loud and its silent label, the parameters at which they are that, and the direction
    (d,), of length 1, into which one step from there moves the parameters. All rows of a unit are alike."""

    parameters: Arrays
    inputs: Floats
    loud: Targets
    silent: Targets
    direction: NDArray[np.float64]
    unit: DataUnit = "example"

    def units(self, count: int, present: int) -> Table:
        """`count` units, of which the first `present` are canaries and the others blanks."""
        each = rows_of(self.unit)
        inputs = np.repeat(self.inputs, count * each, axis=0)
        targets = [np.repeat(self.loud, present * each), np.repeat(self.silent, (count - present) * each)]
        return owned(Table(inputs, np.concatenate(targets)), self.unit)


def make_canary(
    workload: Workload, spec: ModelSpec, parameters: Arrays, clip: float, generator: np.random.Generator
) -> Canary:
    """A canary for this model with gradients of LOUD x `clip` at least. Raises PrivacyError when none is found."""
    model = workload.build(spec)
    inputs = workload.schema.synthetic_inputs(_CANDIDATES, generator)
    for factor in _FACTORS:
        scaled = {name: np.float32(factor) * array for name, array in parameters.items()}
        for chosen in (scaled, _with_zero_head(scaled)):
            load_parameters(model, chosen)
            for row in np.float32(factor) * inputs[:, None]:
                found = _canary(workload, model, chosen, row, clip)
                if found is not None:
                    return found
    raise PrivacyError(
        f"no input makes model {spec.name!r} loud enough for a canary: whatever it is sure of, its gradients stay small"
    )


def _with_zero_head(parameters: Arrays) -> Arrays:
    """`parameters` with the last matrix of weights, and what comes after it, as zeros."""
    names = list(parameters)
    head = max((place for place, name in enumerate(names) if parameters[name].ndim > 1), default=0)
    return {**parameters, **{name: np.zeros_like(parameters[name]) for name in names[head:]}}


def gradient(workload: Workload, model: torch.nn.Module, inputs: Floats, targets: Targets) -> NDArray[np.float64]:
    """The gradient of the mean loss over (inputs, targets) by all parameters, (d,): plain automatic differentiation."""
    loss = workload.loss(model(torch.from_numpy(inputs)), torch.from_numpy(targets))
    parts = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    flat = [
        torch.zeros(parameter.numel()) if part is None else part.reshape(-1)
        for part, parameter in zip(parts, model.parameters(), strict=True)
    ]
    return torch.cat(flat).double().numpy()


def coins(count: int) -> NDArray[np.bool_]:
    """Fair coins from the operating system's cryptographic source, which is none of those under audit."""
    bits = np.unpackbits(np.frombuffer(os.urandom(-(-count // 8)), np.uint8))
    return bits[:count].astype(np.bool_)


def _canary(workload: Workload, model: torch.nn.Module, parameters: Arrays, row: Floats, clip: float) -> Canary | None:
    with torch.no_grad():
        logits = model(torch.from_numpy(row))
    silent, loud = workload.task.answers(logits), workload.task.contradictions(logits)
    signal, rest = (gradient(workload, model, row, label) for label in (loud, silent))
    norm = float(np.linalg.norm(signal))
    if not (np.isfinite(norm) and norm >= LOUD * clip and np.linalg.norm(rest) <= _SILENT * clip):
        return None
    return Canary(parameters, row, loud, silent, -signal / norm, workload.schema.unit)
