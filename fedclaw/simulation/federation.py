"""A federation of simulated clients: one table of examples, held once, and whose rows are whose."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedclaw.errors import UsageError
from fedclaw.learning.workload import Table, Workload
from fedclaw.protocol.terms import Plan
from fedclaw.site.policy.policy import Policy, permissive

Rows = NDArray[np.int64]


class SimulatedFederation:
    """Clients as rows of shared tables. Client k is node k + 1.

    `shares` are by client the rows of `table` that it trains on, at least one. Tests: `tests`, by client, rows of
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

        Raises UsageError for wrong shares or names.
        """
        if not shares or min(len(share) for share in shares) == 0:
            raise UsageError("a simulated client needs at least one training example, and there has to be a client")
        if tests is not None and len(tests) != len(shares):
            raise UsageError(f"{len(shares)} clients have shares and {len(tests)} have tests")
        if names is not None and not len(shares) == len(names) == len(set(names)):
            raise UsageError(f"{len(shares)} clients need as many different names")
        self.workload = workload
        self.table = table
        self.test = test
        self._policy = policy
        self._names = None if names is None else tuple(names)
        self._rows, self._bounds = _joined(shares, len(table))
        self._tests: tuple[Rows, Rows] | None = None if tests is None else _joined(tests, len(table))

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

    def examples(self, client: int) -> int:
        """How many they are."""
        return int(self._bounds[client + 1] - self._bounds[client])

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
