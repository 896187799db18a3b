"""From a run's record to what its rounds need: the strategy, the task, and the plan of each round."""

from fedclaw.errors import PluginError
from fedclaw.learning.registry import strategy_class
from fedclaw.learning.strategy import Strategy
from fedclaw.learning.tasks.base import Task
from fedclaw.learning.tasks.classification import Classification
from fedclaw.protocol.frozen import check_settings, fields_of
from fedclaw.protocol.plan import CentralPrivacy, Plan, Terms
from fedclaw.server.run_directory import RunRecord


def make_strategy(record: RunRecord) -> Strategy:
    """The run's strategy with its settings. Raises PluginError, or UsageError for wrong settings."""
    return check_settings(record.strategy.settings, strategy_class(record.strategy.name))


def make_plan(
    record: RunRecord, strategy: Strategy, number: int, cohort: int, central: CentralPrivacy | None = None
) -> Plan:
    """What round `number` asks of each of `cohort` sites; `central` is the record's with what the round knows better.

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
    """What the run predicts.

    Classes without names where its workload is not installed beside the server: the rounds themselves need no workload,
    and figures other than means are then left out.
    """
    try:
        return record.make_schema().task
    except PluginError:
        return Classification()
