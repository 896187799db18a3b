"""From settings to a run's record, and from that to what its rounds need: strategy, task, model, each round's plan.

The server, the experiments and the compression stage share it.
"""

import torch

from fedclaw.errors import PluginError, PrivacyError, UnknownModel, UsageError
from fedclaw.learning.registry import strategy_class, workload_class
from fedclaw.learning.strategy import Strategy
from fedclaw.learning.tasks.base import Task
from fedclaw.learning.tasks.classification import Classification
from fedclaw.privacy.accounting import calibrate
from fedclaw.protocol.arrays import Arrays
from fedclaw.protocol.frozen import check_settings, fields_of
from fedclaw.protocol.terms import CentralNoise, CentralRequest, ModelSpec, Plan, RoundRules, Terms
from fedclaw.server.early_checks import check_combination, chosen_strategy, read_schema, record_of, run_name
from fedclaw.server.run_directory import RunRecord
from fedclaw.server.settings import RunSettings
from fedclaw.server.statistics_release import read_release


def make_strategy(record: RunRecord) -> Strategy:
    """The run's strategy with its settings. Raises PluginError, or UsageError for wrong settings."""
    return check_settings(record.strategy.settings, strategy_class(record.strategy.name))


def make_plan(
    record: RunRecord, strategy: Strategy, number: int, cohort: int, central: CentralNoise | None = None
) -> Plan:
    """The plan of round `number` for `cohort` sites. `central` is the record's with this round's values.

    A round of secure aggregation adds its session.
    """
    fields = {
        **fields_of(record, Terms),
        "round": number,
        "cohort": cohort,
        "schema_digest": record.schema_digest,
        "strategy": record.strategy.name,
        "strategy_fields": dict(strategy.client_fields()),
        "strategy_settings": strategy.model_dump(mode="json"),
        "central": central or record.central,
        "secure": None,
    }
    return Plan(**fields)


def task_of(record: RunRecord) -> Task:
    """The run's task, as its schema has it.

    Where the workload is not installed beside the server, classification by the record's own word, without labels:
    rounds need no workload, and only means are then reported. Raises PluginError for any other task.
    """
    try:
        return record.make_schema().task
    except PluginError:
        if record.task != Classification.name:
            raise
        return Classification()


def make_record(settings: RunSettings, federation: str, run: str | None, rules: RoundRules) -> RunRecord:
    """The record of a new run, checked as far as can be without a site. Raises UsageError, DataError, PluginError."""
    name = run_name(run)
    choice = settings.workload
    schema = read_schema(choice)
    model = workload_class(choice.name)(schema).default_model()
    if choice.model.name is not None:
        model = ModelSpec(name=choice.model.name, args=choice.model.args or {})
    record = record_of(
        settings,
        rules,
        run=name,
        federation=federation,
        strategy=chosen_strategy(settings),
        schema=schema,
        model=model,
        central=calibrated(settings.central, settings.rounds) if settings.central else None,
    )
    if settings.statistics is not None:
        release = read_release(settings.statistics)
        record = record.model_copy(update={"statistics": release.use})
    try:
        return with_strategy(record)
    except UnknownModel as error:
        raise UsageError(f"workload.model: {error}") from error


def with_strategy(record: RunRecord) -> RunRecord:
    """`record` with what its strategy makes of its model. Raises UsageError for a combination that cannot be right."""
    chosen, built = make_strategy(record), _initial_model(record)
    check_combination(record, chosen, built)
    return record.model_copy(update={"personal": tuple(sorted(chosen.personal(built)))})


def calibrated(asked: CentralRequest, rounds: int) -> CentralNoise:
    """The noise on the sum that keeps all `rounds` together within the epsilon asked for. Raises UsageError."""
    try:
        noise = calibrate(asked.epsilon, asked.delta, asked.sample_rate, rounds)
    except PrivacyError as error:
        raise UsageError(f"central: {error}") from error
    return CentralNoise(**asked.model_dump(), noise_multiplier=noise)


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
