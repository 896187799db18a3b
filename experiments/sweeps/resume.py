"""Sites in process, as they stood when a run stopped: a process that ends takes their memory with it."""

from collections.abc import Mapping, Sequence
from typing import Any

from fedclaw.privacy.mechanisms.choice import mechanism_of
from fedclaw.protocol.questions import Outgoing
from fedclaw.protocol.terms import Plan
from fedclaw.server import checkpoint
from fedclaw.server.run_directory import RunDirectory
from fedclaw.server.session import make_plan, make_strategy
from fedclaw.server.training import session_of
from fedclaw.site.journal.ledger import Budget
from fedclaw.site.privacy_budget import charge_for
from fedclaw.site.service import SiteService
from fedclaw.site.state import SiteStates

_UNLIMITED = Budget(epsilon=None, delta=0.5)


def remember(sites: Mapping[str, SiteService], directory: RunDirectory) -> None:
    """Have `sites` keep what strategies remember in the run's directory, and give them back what they had there.

    Their ledgers are charged again for the rounds that count, so that the receipts of a run that was continued say
    what all of it cost.
    """
    for name, site in sites.items():
        site.states = SiteStates(directory.root / "sites" / name)
    if (saved := checkpoint.newest(directory.root)) is None:
        return
    lines = {line["round"]: line for line in directory.read_metrics()}
    outgoing = Outgoing(saved.parameters)
    for number in range(1, saved.round + 1):
        answered, asked = _who(lines.get(number), list(sites))
        plan = _plan(directory, number, asked, outgoing)
        for name in answered:
            _charge(sites[name], plan)


def _who(line: Mapping[str, Any] | None, everybody: list[str]) -> tuple[list[str], list[str]]:
    """(sites that answered, sites that were asked), by a round's line of metrics.

    Of a round that counts, and whose server ended before it was evaluated, it is not known: everybody, to be safe.
    """
    if line is None or (not line["answered"] and not line["update_norm"]):
        return everybody, everybody
    return line["answered"], [*line["answered"], *line["declined"], *line["silent"]]


def _plan(directory: RunDirectory, number: int, asked: Sequence[str], outgoing: Outgoing) -> Plan:
    record = directory.record()
    plan = make_plan(record, make_strategy(record), number, len(asked), record.central)
    if record.secure is None:
        return plan
    return session_of(plan, sorted(asked), outgoing, record.secure, record.rules.minimum)


def _charge(site: SiteService, plan: Plan) -> None:
    key = f"{plan.run}, round {plan.round}, before the run was continued"
    site.ledger.reserve(
        key,
        federation=plan.federation,
        run=plan.run,
        round=plan.round,
        mechanism=charge_for(site.policy, site.examples, mechanism_of(plan)).mechanism,
        budget=_UNLIMITED,
    )
    site.ledger.settle(key)
