"""The same attacks by simulated clients: many at a time, without a message."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np

from experiments.attacks.base import Attack, Round, Vector
from experiments.attacks.federation import check_attack, hostile_names
from experiments.attacks.hostile import LARGEST
from fedclaw.errors import UsageError
from fedclaw.learning.workload import Table
from fedclaw.server.round_report import Observer, Outcome
from fedclaw.server.run_directory import RunDirectory
from fedclaw.simulation import SimulatedFederation, SimulationSettings, simulate_cohorts
from fedclaw.simulation.executors import Executor
from fedclaw.simulation.job import Answer, State
from fedclaw.simulation.job import Round as Asked


class HostileExecutor:
    """An `Executor` some of whose clients send what an attack makes of their updates.

    Holds all updates of a round at once, whatever the strategy: hostile clients answer when they know what they can.
    """

    def __init__(self, executor: Executor, attack: Attack, hostile: Sequence[int], seed: int) -> None:
        self._executor, self._attack, self._hostile = executor, attack, frozenset(hostile)
        self._generators = {client: np.random.default_rng([seed, number]) for number, client in enumerate(hostile)}

    def train(self, round: Asked, units: Sequence[Sequence[int]], memory: Mapping[int, State]) -> Iterator[Answer]:
        """See Executor."""
        answers = [
            replace(answer, numbers=answer.numbers[: len(answer.clients)].copy())
            for answer in self._executor.train(replace(round, single=True), units, memory)
        ]
        if self._attack.forges:
            self._forge(answers)
        for answer in answers:
            yield answer if round.single else replace(answer, numbers=answer.numbers.sum(axis=0, keepdims=True))

    def close(self) -> None:
        """See Executor."""
        self._executor.close()

    def _forge(self, answers: Sequence[Answer]) -> None:
        """Change the hostile clients' rows."""
        deltas = {
            client: answer.numbers[row].astype(np.float64) / weight
            for answer in answers
            for row, (client, weight) in enumerate(zip(answer.clients, answer.weights, strict=True))
            if client in self._hostile or self._attack.knowledge == "all"
        }
        asked, hostile = sum(len(answer.clients) for answer in answers), self._hostile.intersection(deltas)
        if not hostile:
            return
        known = Round(np.stack(list(deltas.values())), asked, len(hostile))
        for answer in answers:
            for row, (client, weight) in enumerate(zip(answer.clients, answer.weights, strict=True)):
                if client in hostile:
                    answer.numbers[row] = self._sent(client, deltas[client], known, weight)

    def _sent(self, client: int, own: Vector, known: Round, weight: float) -> Vector:
        forged = self._attack.forge(own, known, self._generators[client]) * weight
        return np.clip(forged, -LARGEST, LARGEST)


def simulate_attacked_cohorts(
    directory: RunDirectory,
    federation: SimulatedFederation,
    attack: Attack,
    settings: SimulationSettings | None = None,
    observers: Sequence[Observer] = (),
) -> Outcome:
    """`fedclaw.simulation.simulate_cohorts`, with `attack.sites` of the clients hostile from the first round on.

    Raises UsageError for an attack that this federation has no place for.
    """
    record = directory.record()
    check_attack(attack, record, len(federation))
    numbers = {federation.name(client): client for client in range(len(federation))}
    hostile = [numbers[name] for name in hostile_names(tuple(numbers), attack, record.seed)]
    return simulate_cohorts(
        directory,
        _poisoned(federation, attack, hostile, record.seed),
        settings,
        observers,
        around=lambda executor: HostileExecutor(executor, attack, hostile, record.seed),
    )


def _poisoned(
    federation: SimulatedFederation, attack: Attack, hostile: Sequence[int], seed: int
) -> SimulatedFederation:
    """The federation with other training data at its hostile clients; the one that was given stays as it was."""
    if not (attack.poisons and hostile):
        return federation
    inputs, targets = federation.table.inputs.copy(), federation.table.targets.copy()
    labels = len(federation.workload.schema.labels)
    for number, client in enumerate(hostile):
        rows = federation.share(client)
        generator = np.random.default_rng([seed, number, len(rows)])
        try:
            table = attack.poison(Table(inputs[rows], targets[rows]), labels, generator)
        except ValueError as error:
            raise UsageError(f"attack: {error}") from error
        inputs[rows], targets[rows] = table.inputs, table.targets
    changed = copy.copy(federation)
    changed.table = replace(federation.table, inputs=inputs, targets=targets)
    return changed
