"""A federation of simulated clients: one table of examples, held once, and whose rows are whose."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedclaw.errors import UsageError
from fedclaw.learning.workload import Table, Workload, evenly
from fedclaw.privacy.units import Units
from fedclaw.protocol.terms import Plan
from fedclaw.site.policy.policy import Policy, permissive

Rows = NDArray[np.int64]


class SimulatedFederation:
    """Clients as rows of shared tables. Client k is node k + 1.

    `shares` are by client the rows of `table` that it trains on, at least one; where the table says whose they are, a
    person who has some at two clients is one at each. Tests: `tests`, by client, rows of
    `table` that it is evaluated on; or `test`, a table of its own that the federation is evaluated on as a whole.
    """

    def __init__(
        self,
        workload: Workload,
        table: Table,
        shares: Sequence[Rows],
        *,
        test: Table | None = None,
        tests: Sequence[Rows] | None = None,
        policy: Policy | None = None,
        names: Sequence[str] | None = None,
    ) -> None:
        """`policy` is every client's; None: it allows whatever is asked. `names` are the clients', all different.

        A test counts as many rows of each person as the schema says. Raises UsageError for wrong shares or names, and
        for a table that does not say whose its rows are although the schema does, or the other way round.
        """
        if table.unit != workload.schema.unit:
            raise UsageError(f"the unit is the {workload.schema.unit} by the schema, and the {table.unit} by the data")
        if not shares or min(len(share) for share in shares) == 0:
            raise UsageError("a simulated client needs at least one training example, and there has to be a client")
        if tests is not None and len(tests) != len(shares):
            raise UsageError(f"{len(shares)} clients have shares and {len(tests)} have tests")
        if names is not None and not len(shares) == len(names) == len(set(names)):
            raise UsageError(f"{len(shares)} clients need as many different names")
        self.workload = workload
        self.table = table
        most = workload.schema.rows_per_person or 1
        self.test = test if test is None or test.persons is None else test.take(test.evenly(most))
        self._policy = policy
        self._names = None if names is None else tuple(names)
        self._rows, self._bounds = _joined(shares, len(table))
        self._persons = (
            None
            if table.persons is None
            else [Units.of(table.persons[self.share(client)]) for client in range(len(self))]
        )
        self._tests: tuple[Rows, Rows] | None = None if tests is None else _joined(tests, len(table))
        if table.persons is not None and tests is not None:
            self._tests = _joined([rows[evenly(table.persons[rows], most)] for rows in tests], len(table))

    def __len__(self) -> int:
        """The number of clients."""
        return len(self._bounds) - 1

    def name(self, client: int) -> str:
        """As receipts and reports have it."""
        if self._names is not None:
            return self._names[client]
        return f"client-{client:0{len(str(len(self) - 1))}d}"

    def share(self, client: int) -> Rows:
        """The rows that a client trains on."""
        return self._rows[self._bounds[client] : self._bounds[client + 1]]

    def units(self, client: int) -> Rows:
        """What a client's batches are drawn from: its rows; or, where persons are known, the numbers of its own."""
        return self.share(client) if self._persons is None else np.arange(len(self._persons[client]))

    def rows_of(self, client: int, units: Rows) -> Rows:
        """The rows of some of a client's `units`: all that each of them has, by person."""
        if self._persons is None:
            return units
        rows: Rows = self.share(client)[self._persons[client].rows_of(np.sort(units))]
        return rows

    def examples(self, client: int) -> int:
        """How many units a client has; what a site states."""
        return len(self.share(client) if self._persons is None else self._persons[client])

    @property
    def sizes(self) -> Rows:
        """(clients,) training examples."""
        return np.diff(self._bounds)

    @property
    def has_tests(self) -> bool:
        """Whether clients have test data of their own."""
        return self._tests is not None

    def tests(self, client: int) -> Rows:
        """The rows that a client is evaluated on."""
        if self._tests is None:
            return np.zeros(0, np.int64)
        rows, bounds = self._tests
        return rows[bounds[client] : bounds[client + 1]]

    def policy(self, plan: Plan) -> Policy:
        """What every client allows."""
        asked = plan.privacy or plan.central
        return self._policy or permissive(plan.workload, plan.strategy, asked.delta if asked else 1e-5)


def _joined(shares: Sequence[Rows], count: int) -> tuple[Rows, Rows]:
    """All rows one after another, and where each client's begin."""
    bounds = np.zeros(len(shares) + 1, np.int64)
    np.cumsum([len(share) for share in shares], out=bounds[1:])
    rows = np.concatenate([np.asarray(share, np.int64) for share in shares])
    if len(rows) and not (rows.min() >= 0 and rows.max() < count):
        raise UsageError(f"a client has rows outside the table, which has {count}")
    return rows, bounds
