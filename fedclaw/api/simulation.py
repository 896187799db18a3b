"""`simulate`: a federation, a torch module and a strategy to a run, in one call."""

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import ValidationError

from fedclaw.api.arguments import argument, place, public, whole
from fedclaw.api.federation import Federation
from fedclaw.api.module import Model, ModuleWorkload, around, check_model, factory_of
from fedclaw.api.runs import Run
from fedclaw.errors import UsageError
from fedclaw.learning.registry import SCHEMAS, STRATEGIES, WORKLOADS, installed, lent, strategy_class
from fedclaw.learning.strategy import Strategy
from fedclaw.privacy.mechanisms.choice import mechanism_of
from fedclaw.privacy.mechanisms.mechanism import Mechanism
from fedclaw.privacy.mechanisms.sum_noise import noise_of_the_server
from fedclaw.protocol.frozen import explain
from fedclaw.protocol.terms import (
    CentralRequest,
    DataUnit,
    LocalTraining,
    PrivacyRequest,
    RoundRules,
    StrategyRecord,
    Unit,
    Weighting,
)
from fedclaw.server.round_report import Outcome, RoundReport
from fedclaw.server.run_directory import RunDirectory, RunRecord
from fedclaw.server.session import calibrated, with_strategy
from fedclaw.simulation import SimulatedFederation, SimulationSettings, simulate_cohorts, simulated

V = TypeVar("V")
OnRound = Callable[[int, Mapping[str, float]], None]

_RUN = "run"


@dataclass(frozen=True)
class LocalPrivacy:
    """Each client's own noise, DP-SGD: (epsilon, delta) for one example, or one person where the federation knows whose
    examples they are, whoever else may be dishonest.

    Relation: one of these is replaced by nothing, while the client's number of them stays public. Each client works out
    the noise with which the whole run costs it at most epsilon.
    """

    epsilon: float
    """Of all rounds together."""
    delta: float
    """Below one over the number of examples of any client."""
    clip: float
    """Of an example's gradient, L2."""

    def __post_init__(self) -> None:
        """Raises UsageError."""
        self._request()

    def _request(self) -> PrivacyRequest:
        fields = {"epsilon": self.epsilon, "delta": self.delta, "max_grad_norm": self.clip}
        return _checked(fields, PrivacyRequest, "privacy")


@dataclass(frozen=True)
class CentralPrivacy:
    """The server's noise on the sum: (epsilon, delta) for one client, or one example, if the server is honest.

    Relation: one client's contribution (unit "site"), or one example, is replaced by nothing, while the numbers of
    examples stay public. Unit "example": each round is one step (local_steps=1).
    """

    epsilon: float
    """Of all rounds together."""
    delta: float
    """Below one over the number of examples of any client."""
    clip: float
    """Of a client's update (unit "site") or of an example's gradient, L2."""
    unit: Unit = "site"
    sample_rate: float = 1.0
    """Rate at which clients (unit "site") or examples are sampled, each by itself."""

    def __post_init__(self) -> None:
        """Raises UsageError."""
        self._request()

    def _request(self) -> CentralRequest:
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return _checked(fields, noise_of_the_server, "privacy")


@public
def simulate(
    federation: Federation,
    model: Model,
    *,
    strategy: str | Strategy | type[Strategy] = "fedavg",
    rounds: int,
    learning_rate: float,
    local_epochs: float | None = None,
    local_steps: int | None = None,
    batch_size: int = 32,
    optimizer: Literal["sgd", "adam"] = "sgd",
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    fraction: float = 1.0,
    weighting: Weighting = "examples",
    weight_cap: int | None = None,
    privacy: LocalPrivacy | CentralPrivacy | None = None,
    workers: int = 1,
    seed: int = 0,
    repeatable_noise: bool = False,
    directory: str | Path | None = None,
    on_round: OnRound | None = None,
) -> Run:
    """Train `model` over the federation's clients and return the run.

    The server's loop, the strategies and the mechanisms are those of a federation of real sites. Clients are trained in
    this process, or in `workers` processes forked from it, each with one thread. The same data and seed give the same
    result, however many workers there are; with privacy only if the noise is to be repeatable.

    Args:
        federation: who has which examples.
        model: a torch.nn.Module's class, a module, or a function that makes one: (N, *D) to logits (N, C), no buffers.
        strategy: the name of one that is installed, or a `Strategy` of your own, its class or with settings.
        rounds: exchanges between server and clients.
        learning_rate: of the local optimiser.
        local_epochs: passes of a client over its data in a round; 1 unless `local_steps` is given.
        local_steps: or optimiser steps.
        batch_size: examples a step; with privacy the expected number.
        optimizer: sgd, or adam.
        momentum: of sgd.
        weight_decay: of either.
        fraction: share of the clients that each round asks, drawn anew.
        weighting: examples, a client counts by how many it has; uniform, by one; capped, by at most `weight_cap`.
        weight_cap: the largest weight, with weighting capped.
        privacy: whose noise, for which guarantee; None: no noise.
        workers: processes that train. They are forked, so the module may be defined in a notebook; each needs memory.
        seed: of the first parameters, batches and the clients asked.
        repeatable_noise: draw noise from the seed. For research only: such noise guarantees nothing.
        directory: where to keep the run, empty or not there yet; None: a temporary one, which goes with the `Run`.
        on_round: called with the number and the metrics of each round that is done.

    Raises UsageError, DataError or PluginError for what cannot be right, before a client trains; PrivacyError for a
    model that cannot be private; RoundError if a client cannot go on.
    """
    if not isinstance(federation, Federation):
        raise UsageError(
            f"federation is a {type(federation).__name__}: make one, fedclaw.Federation.from_arrays(x, y, ...)"
        )
    if on_round is not None and not callable(on_round):
        raise UsageError(f"on_round={on_round!r:.60}: a function is needed, on_round(number, metrics)")
    schema = federation.schema
    own = around(model, schema.name)
    name, lend, settings = _strategy(strategy)
    if privacy is not None and not isinstance(privacy, LocalPrivacy | CentralPrivacy):
        raise UsageError(f"privacy={privacy!r:.60}: give fedclaw.LocalPrivacy(...) or fedclaw.CentralPrivacy(...)")
    if local_epochs is None and local_steps is None:
        local_epochs = 1
    given = {
        "epochs": local_epochs,
        "steps": local_steps,
        "batch_size": batch_size,
        "optimizer": optimizer,
        "learning_rate": learning_rate,
        "momentum": momentum,
        "weight_decay": weight_decay,
    }
    way = _checked(
        {"workers": workers, "repeatable_noise": repeatable_noise, "save_every": 60.0}, SimulationSettings, "simulate"
    )
    with lent({(SCHEMAS, schema.name): type(schema), (WORKLOADS, schema.name): own, **lend}):
        workload = own(schema)
        fields = {
            "run": _RUN,
            "federation": "simulation",
            "workload": workload.name,
            "task": workload.task.name,
            "metrics": workload.task.metrics,
            "schema_text": schema.to_json(),
            "model": check_model(workload, federation.table.inputs),
            "strategy": StrategyRecord(name=name, settings=settings),
            "rounds": whole(rounds, "rounds", 1),
            "training": _checked(given, LocalTraining, "simulate"),
            "privacy": privacy._request() if isinstance(privacy, LocalPrivacy) else None,
            "central": calibrated(privacy._request(), rounds) if isinstance(privacy, CentralPrivacy) else None,
            "weighting": weighting,
            "weight_cap": weight_cap,
            "rules": _rules(len(federation), fraction),
            "seed": seed,
        }
        record = _checked(fields, RunRecord, "simulate")
        mechanism = mechanism_of(record)
        if reason := mechanism.out_of_range():
            raise UsageError("simulate: ", reason)
        _require_small_delta(mechanism, max(federation.units), federation.table.unit)
        record = with_strategy(simulated(record, way, len(federation)))
        path, holder = _place(directory)
        kept = RunDirectory.create(path, record)
        simulate_cohorts(kept, _simulated(federation, workload), way, [_Teller(on_round)] if on_round else [])
    return Run(path, factory_of(model), holder)


def _require_small_delta(mechanism: Mechanism, count: int, unit: DataUnit) -> None:
    """Raise UsageError where a client with so many units would refuse delta, as publishing one of them keeps it."""
    asked = mechanism.guarantee(trust_server_noise=True)
    if asked is not None and asked.delta * count >= 1:
        raise UsageError(
            f"privacy: delta={asked.delta:g} means nothing to a client with {count} {unit}s: it has to be below "
            f"one over their number, {1 / count:.2g}"
        )


def _simulated(federation: Federation, workload: ModuleWorkload) -> SimulatedFederation:
    return SimulatedFederation(
        workload,
        federation.table,
        federation.shares,
        test=federation.test,
        tests=federation.tests,
        names=federation.names,
    )


def _strategy(
    strategy: str | Strategy | type[Strategy],
) -> tuple[str, dict[tuple[str, str], type[Any]], dict[str, Any]]:
    """Its name, the class to lend if it is not installed under that name, and its settings. Raises UsageError."""
    if isinstance(strategy, str):
        strategy_class(strategy)
        return strategy, {}, {}
    made = strategy
    if isinstance(strategy, type) and issubclass(strategy, Strategy):
        if missing := sorted(getattr(strategy, "__abstractmethods__", ())):
            raise UsageError(f"strategy={strategy.__name__} does not say {', '.join(missing)}: define it in the class")
        made = _checked({}, strategy, f"strategy={strategy.__name__}")
    if not isinstance(made, Strategy):
        raise UsageError(
            f"strategy={strategy!r:.60} is no strategy: give a name, or a class or an object of fedclaw.Strategy"
        )
    kind = type(made)
    name = getattr(kind, "name", None)
    if not isinstance(name, str) or not name:
        raise UsageError(f'strategy={kind.__name__} has no name: write name: ClassVar[str] = "mine" in the class')
    known = name in installed(STRATEGIES) and strategy_class(name) is kind
    return name, {} if known else {(STRATEGIES, name): kind}, made.model_dump(mode="json")


def _checked(fields: dict[str, Any], make: Callable[..., V], where: str) -> V:
    """The value. Raises UsageError that names each wrong argument as the caller wrote it."""
    try:
        return make(**fields)
    except ValidationError as error:
        raise UsageError(f"{where}: {explain(error, words=argument)}") from None


def _rules(clients: int, fraction: float) -> RoundRules:
    """A round counts with all that it asks: simulated clients are never away."""
    rules = _checked({"minimum": clients, "fraction": fraction}, RoundRules, "simulate")
    return rules.model_copy(update={"minimum": max(1, round(rules.fraction * clients))})


def _place(directory: str | Path | None) -> tuple[Path, object]:
    """Where the run is kept, and what keeps that there."""
    if directory is not None:
        if (path := place(directory, "directory")).exists() and not path.is_dir():
            raise UsageError(f"directory={str(path)!r} is a file; name a directory that is empty, or not there yet")
        if (path / "run.json").exists():
            raise UsageError(f"{path} already holds a run: read it, fedclaw.read_run(...), or name another directory")
        if path.exists() and any(path.iterdir()):
            raise UsageError(f"{path} holds other files; name a directory that is empty, or not there yet")
        return path, None
    holder = tempfile.TemporaryDirectory(prefix="fedclaw-run-")
    return Path(holder.name) / _RUN, holder


@dataclass(frozen=True)
class _Teller:
    """Hands each round on."""

    tell: OnRound

    def started(self, record: RunRecord, first_round: int) -> None:
        """See Observer."""

    def finished_round(self, report: RoundReport) -> None:
        """See Observer."""
        self.tell(report.round, report.metrics)

    def finished(self, outcome: Outcome) -> None:
        """See Observer."""
