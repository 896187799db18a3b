"""From settings to a run: what the server, the experiments and the compression stage share."""

import logging
from pathlib import Path
from typing import Protocol

import torch

from fedclaw.errors import PluginError, PrivacyError, RoundError, UsageError
from fedclaw.learning.registry import workload_class
from fedclaw.privacy.accounting import calibrate
from fedclaw.protocol.arrays import Arrays
from fedclaw.protocol.plan import CentralPrivacy, CentralRequest, ModelSpec
from fedclaw.protocol.terms import RoundRules
from fedclaw.server.coordinator import drop_pending, make_strategy, pending_cohort
from fedclaw.server.early_checks import check_combination, chosen_strategy, make_terms, read_schema, run_name
from fedclaw.server.run_directory import ReleaseUse, RunDirectory, RunRecord
from fedclaw.server.settings import RunSettings
from fedclaw.server.statistics_release import read_release

log = logging.getLogger(__name__)

LATECOMERS = 20.0
"""Seconds that a resumed server waits for the rest of the cohort that it had asked."""


def make_record(settings: RunSettings, federation: str, run: str | None, rules: RoundRules) -> RunRecord:
    """The record of a new run, checked as far as can be without a site. Raises UsageError, DataError, PluginError."""
    name = run_name(run)
    choice = settings.workload
    schema = read_schema(choice)
    model = workload_class(choice.name)(schema).default_model()
    if choice.model.name is not None:
        model = ModelSpec(name=choice.model.name, args=choice.model.args or {})
    record = make_terms(
        settings,
        rules,
        run=name,
        federation=federation,
        strategy=chosen_strategy(settings),
        schema=schema,
        model=model,
        central=None if settings.central is None else calibrated(settings.central, settings.rounds),
    )
    return _with_strategy(record.model_copy(update={"statistics": _used(settings.statistics)}))


def _with_strategy(record: RunRecord) -> RunRecord:
    """`record` with what its strategy makes of its model. Raises UsageError for a combination that cannot be right."""
    chosen, built = make_strategy(record), _initial_model(record)
    check_combination(record, chosen, built)
    return record.model_copy(update={"personal": tuple(sorted(chosen.personal(built)))})


def _used(path: Path | None) -> ReleaseUse | None:
    if path is None:
        return None
    release = read_release(path)
    return ReleaseUse(run=release.run, epsilon=release.epsilon, delta=release.delta)


def calibrated(asked: CentralRequest, rounds: int) -> CentralPrivacy:
    """The noise on the sum that keeps all `rounds` together within the epsilon asked for. Raises UsageError."""
    try:
        noise = calibrate(asked.epsilon, asked.delta, asked.sample_rate, rounds)
    except PrivacyError as error:
        raise UsageError(f"central: {error}") from error
    return CentralPrivacy(**asked.model_dump(), noise_multiplier=noise)


def initial_parameters(record: RunRecord) -> Arrays:
    """The model that the run begins with: the same for the same record. Raises PluginError."""
    named = _initial_model(record).named_parameters()
    return {name: parameter.detach().numpy().copy() for name, parameter in named}


def _initial_model(record: RunRecord) -> torch.nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(record.seed)
        model = record.make_workload().build(record.model)
    if buffers := [name for name, _ in model.named_buffers()]:
        raise PluginError(
            f"model {record.model.name!r} has buffers ({', '.join(buffers)}); "
            "a federated model holds no batch statistics, use a normalisation without them"
        )
    return model


class Gathering(Protocol):
    """A grid whose sites come by themselves."""

    def wait_for_sites(self, count: int, timeout: float) -> tuple[str, ...]:
        """Names of the connected sites, once there are `count` or `timeout` seconds have passed."""


def wait_for_cohort(
    grid: Gathering, directory: RunDirectory, wait_for: int | None, wait: float, *, new_cohort: bool = False
) -> None:
    """Wait up to `wait` seconds for as many sites as a round needs, or `wait_for`.

    A round that was in flight when the run stopped is asked of the same sites again, so those are waited for too,
    but not for long: whoever does not come back is silent in that round. `new_cohort` gives that round up and asks
    it of whoever has come; see `drop_pending` for the price. Raises RoundError when too few came, and has given
    nothing up then.
    """
    needed = directory.record().rules.minimum
    expected = wait_for or needed
    log.info("waiting for %d sites", expected)
    names = grid.wait_for_sites(expected, wait)
    pending = 0 if new_cohort else len(pending_cohort(directory))
    if pending > len(names) >= expected:
        names = grid.wait_for_sites(pending, min(wait, LATECOMERS))
    if len(names) < needed:
        raise RoundError(
            f"{len(names)} sites came within {wait:g} s and {needed} are needed ({', '.join(names) or 'none'}); "
            f"continue with resume={directory.root} when they are back"
        )
    log.info("connected: %s", ", ".join(names))
    if new_cohort:
        drop_pending(directory)
