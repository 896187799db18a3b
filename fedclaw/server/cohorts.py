"""The sites that a round asks. They are sampled once and written down first, so a resumed round asks the same ones."""

import random
from collections.abc import Collection, Sequence
from pathlib import Path

from flwr.serverapp import Grid

from fedclaw.errors import RoundError
from fedclaw.learning.strategy import Strategy
from fedclaw.privacy.mechanisms.choice import mechanism_of
from fedclaw.privacy.noise import GaussianSource
from fedclaw.server.grids import StreamingGrid, site_name
from fedclaw.server.run_directory import PendingRound, RunRecord
from fedclaw.server.waiting import poll

LOOK_AGAIN = 0.2
"""Seconds between two looks at who is connected."""


class Cohorts:
    """Selects the sites of each round of a run from those connected to `grid`. `root` is the run's directory."""

    def __init__(self, grid: Grid, root: Path, record: RunRecord, strategy: Strategy) -> None:
        self._grid = grid
        self._root = root
        self._record = record
        self._strategy = strategy

    def for_round(self, number: int) -> PendingRound:
        """The round in flight if that is round `number`; otherwise a newly sampled one, on disk on return.

        Raises RoundError when too few sites are connected until the rules' deadline.
        """
        pending = PendingRound.read(self._root)
        if pending and pending.round == number:
            return pending
        rules, connected = self._record.rules, self._connected()
        if len(connected) < rules.minimum:
            raise RoundError(
                f"round {number}: {len(connected)} sites are connected and {rules.minimum} are needed "
                f"(waited {rules.deadline:g} s). Continue with resume={self._root}"
            )
        nodes = tuple(sorted(self._select(number, connected)))
        pending = PendingRound(round=number, nodes=nodes, connected=len(connected))
        if self._record.simulated is None:
            pending.write(self._root)
        return pending

    def willing(self, nodes: Sequence[int]) -> list[int]:
        """`nodes` without those that the grid excludes from this run because of what they sent, or how slowly."""
        excluded = self._grid.excluded_nodes() if isinstance(self._grid, StreamingGrid) else {}
        return [node for node in nodes if node not in excluded]

    def names(self, nodes: Sequence[int]) -> dict[int, str]:
        """The sites' names, by node."""
        return {node: site_name(self._grid, node) for node in nodes}

    def evaluators(self, pending: PendingRound) -> Sequence[int]:
        """Nodes to evaluate: those that the round asked. If the strategy selects its clients itself: all nodes."""
        if self._strategy.select_clients(pending.round, pending.nodes, self._record.seed) is None:
            return pending.nodes
        return sorted({*self._grid.get_node_ids(), *pending.nodes})

    def answering(self, pending: PendingRound, silent: Collection[str], busy: Collection[int]) -> list[int]:
        """Nodes to evaluate, without sites that were `silent` in the round and nodes that are still `busy`."""
        names = self.names(self.willing(self.evaluators(pending)))
        return [node for node, name in names.items() if name not in silent and node not in busy]

    def _select(self, number: int, connected: list[int]) -> list[int]:
        """Nodes to ask: the strategy's choice; each node at random, if privacy relies on that; else a sample."""
        rules, seed, mechanism = self._record.rules, self._record.seed, mechanism_of(self._record)
        if (chosen := self._strategy.select_clients(number, connected, seed)) is not None:
            return list(chosen)
        if mechanism.site_rate < 1:
            asked = GaussianSource().bernoulli(len(connected), mechanism.site_rate)
            return [node for node, chosen in zip(connected, asked, strict=True) if chosen]
        size = max(rules.minimum, round(rules.fraction * len(connected)))
        return random.Random(f"{seed}/{number}").sample(connected, min(size, len(connected)))  # noqa: S311

    def _connected(self) -> list[int]:
        """The connected nodes, once there are as many as a round needs or the deadline has passed."""
        rules = self._record.rules
        return poll(lambda: self.willing(sorted(self._grid.get_node_ids())), rules.minimum, rules.deadline, LOOK_AGAIN)
