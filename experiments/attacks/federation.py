"""The real loop over real sites, some of them hostile."""

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
from flwr.app import Message, MessageType

from experiments.attacks.base import Attack
from experiments.attacks.hostile import Gang, HostileSite
from fedclaw.errors import UsageError
from fedclaw.protocol.message_identity import assume_server_identity, number_of
from fedclaw.server.coordinator import run_rounds
from fedclaw.server.round_report import Observer, Outcome
from fedclaw.server.run_directory import RunDirectory, RunRecord
from fedclaw.server.session import initial_parameters
from fedclaw.site.service import SiteService
from fedclaw.transport.base import SiteHandler
from fedclaw.transport.in_process import LocalGrid


class AttackedGrid(LocalGrid):
    """Sites in this process, the hostile ones last: what they can know of a round, they know before they answer.

    The server cannot tell by that: in a real federation too, whoever is asked may take the time to look around.
    """

    def __init__(self, sites: Mapping[str, SiteHandler], run_id: int, hostile: Mapping[str, HostileSite], gang: Gang):
        super().__init__({**sites, **hostile}, run_id)
        self._hostile = {number_of(name): site for name, site in hostile.items()}
        self._gang = gang

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        """See LocalGrid."""
        asked = list(messages)
        hostile = [message for message in asked if message.metadata.dst_node_id in self._hostile]
        honest = [message for message in asked if message.metadata.dst_node_id not in self._hostile]
        first, last = super().send_and_receive(honest), super().send_and_receive(hostile)
        self._gang.begin(len(asked), len(hostile))
        return self._in_turn(first, last, hostile)

    def _in_turn(
        self, first: Iterator[Message], last: Iterator[Message], hostile: Sequence[Message]
    ) -> Iterator[Message]:
        for reply in first:
            if self._gang.attack.knowledge == "all":
                self._gang.learn(reply)
            yield reply
        for message in hostile:
            if message.metadata.message_type == MessageType.TRAIN:
                self._hostile[message.metadata.dst_node_id].prepare(message)
        yield from last


def simulate_attacked(
    directory: RunDirectory, sites: Mapping[str, SiteService], attack: Attack, observers: Sequence[Observer] = ()
) -> Outcome:
    """Run the rounds of `directory` over `sites`, `attack.sites` of which are hostile from the first round on.

    Raises UsageError for an attack that this federation has no place for.
    """
    record = directory.record()
    check_attack(attack, record, len(sites))
    gang = Gang(attack)
    hostile = {
        name: HostileSite(sites[name], gang, np.random.default_rng([record.seed, number]))
        for number, name in enumerate(hostile_names(tuple(sites), attack, record.seed))
    }
    run_id = number_of(record.run)
    assume_server_identity(run_id)
    grid = AttackedGrid(sites, run_id, hostile, gang)
    return run_rounds(grid, directory, initial_parameters(record), observers=observers)


def hostile_names(names: Sequence[str], attack: Attack, seed: int) -> tuple[str, ...]:
    """The hostile ones of the sites, by the seed; with more of them, the same and others."""
    order = random.Random(f"{seed}/hostile").sample(sorted(names), len(names))
    return tuple(order[: attack.sites])


def check_attack(attack: Attack, record: RunRecord, sites: int) -> None:
    """Raise UsageError for an attack that a run of `record` over so many sites has no place for."""
    if attack.sites > sites:
        raise UsageError(f"attack.sites={attack.sites}: there are {sites} sites")
    if attack.sites and attack.forges and (record.secure is not None or record.compression is not None):
        raise UsageError(
            "attack: updates are changed as they leave, when secure aggregation has masked them or compression has "
            "given them another form; take secure=none and compression=none, or attack=label_flip"
        )
