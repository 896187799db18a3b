"""From a run's record to what its rounds need: the strategy, the task, and the plan of each round."""

from fedclaw.errors import PluginError
from fedclaw.learning.registry import strategy_class
from fedclaw.learning.strategy import Strategy
from fedclaw.learning.tasks.base import Task
from fedclaw.learning.tasks.classification import Classification
from fedclaw.protocol.frozen import check_settings, fields_of
from fedclaw.protocol.plan import Plan
from fedclaw.protocol.terms import CentralNoise, Terms
from fedclaw.server.run_directory import RunRecord


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
