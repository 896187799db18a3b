"""Every client's privacy account, without a ledger: what was run is known from who took part in which round.

All rounds of a run ask for the same mechanism of clients with the same number of examples, so an account is a number of
rounds. What it comes to is worked out when somebody looks, by the code that a site's ledger uses, once for all clients
that have equally many examples and rounds.
"""

from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any, cast

from fedclaw.privacy.mechanisms.choice import mechanism_of
from fedclaw.privacy.mechanisms.mechanism import Charge
from fedclaw.protocol.receipt import NO_LEDGER, Receipt
from fedclaw.protocol.refusal import Refusal
from fedclaw.protocol.terms import Plan
from fedclaw.server.run_directory import SiteReceipt
from fedclaw.simulation.federation import SimulatedFederation
from fedclaw.site.journal.history import History
from fedclaw.site.policy.checks import check_plan
from fedclaw.site.privacy_budget import charge_for, delta_of


class Accounts:
    """Rounds by client, of one run."""

    def __init__(self, federation: SimulatedFederation) -> None:
        self._federation = federation
        self._rounds: dict[int, int] = {}
        self._charges: dict[tuple[object, ...], Charge | Refusal] = {}
        self._receipts: dict[tuple[object, ...], Receipt] = {}

    def charge(self, plan: Plan, examples: int, parameters: int) -> Charge | Refusal:
        """What a round costs a client with so many examples, or why it takes no part."""
        key = (plan.privacy, plan.central, plan.training, plan.rounds, examples)
        if key not in self._charges:
            policy = self._federation.policy(plan)
            try:
                check_plan(policy, plan, examples=examples, parameters=parameters)
                self._charges[key] = charge_for(policy, examples, mechanism_of(plan))
            except Refusal as refusal:
                self._charges[key] = refusal
        return self._charges[key]

    def took_part(self, clients: Iterable[int]) -> None:
        """In one more round."""
        for client in clients:
            self._rounds[client] = self._rounds.get(client, 0) + 1

    @property
    def clients(self) -> list[int]:
        """Who has ever taken part."""
        return sorted(self._rounds)

    def receipt(self, plan: Plan, client: int, parameters: int) -> SiteReceipt:
        """The client's account as it is now; its epsilons are worked out when they are looked at."""
        examples, rounds = self._federation.examples(client), self._rounds.get(client, 0)
        return cast(SiteReceipt, LateReceipt(self, plan, examples, rounds, parameters))

    def work_out(self, plan: Plan, examples: int, rounds: int, parameters: int) -> Receipt:
        """The receipt of a client with so many examples after so many rounds."""
        key = (plan.privacy, plan.central, plan.training, plan.rounds, examples, rounds)
        if key not in self._receipts:
            charge, policy = self.charge(plan, examples, parameters), self._federation.policy(plan)
            assert isinstance(charge, Charge)
            history = History()
            for _ in range(rounds):
                history.add(charge.mechanism)
            mechanism = mechanism_of(plan)
            delta = delta_of(policy, mechanism)
            spent = Receipt.figures(history.epsilon(delta), history.epsilon(policy.delta), policy.epsilon)
            told: dict[str, Any] = {**mechanism.receipt_fields(examples, charge), **spent, "delta": delta}
            told["unit"] = self._federation.table.unit
            self._receipts[key] = Receipt(**told, rounds=rounds, ledger_head=NO_LEDGER)
        return self._receipts[key]


class LateReceipt:
    """A `SiteReceipt` whose receipt is worked out when it is looked at: most never are."""

    def __init__(self, accounts: Accounts, plan: Plan, examples: int, rounds: int, parameters: int) -> None:
        self.examples = examples
        self._accounts = accounts
        self._asked = plan, examples, rounds, parameters

    @cached_property
    def receipt(self) -> Receipt:
        """See SiteReceipt."""
        return self._accounts.work_out(*self._asked)

    def model_dump(self, **options: Any) -> Mapping[str, Any]:
        """See pydantic's."""
        return SiteReceipt(examples=self.examples, receipt=self.receipt).model_dump(**options)
