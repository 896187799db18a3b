"""What can be wrong with a run and is told without torch or Flower: asked first, for those take seconds to load."""

import secrets
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from fedclaw.catalogue import WORKLOADS
from fedclaw.errors import DataError, UsageError
from fedclaw.learning.compatibility import early_refusal, refusal
from fedclaw.learning.registry import require_installed, schema_class, strategy_class
from fedclaw.learning.strategy import Strategy
from fedclaw.learning.tasks.base import Task
from fedclaw.learning.tasks.classification import Classification
from fedclaw.learning.workload import Schema
from fedclaw.privacy.mechanisms.choice import mechanism_of
from fedclaw.protocol.frozen import check_settings, fields_of
from fedclaw.protocol.terms import CentralNoise, ModelSpec, RoundRules, SharedTerms, StrategyRecord
from fedclaw.server.run_directory import RUN_NAME, RunRecord
from fedclaw.server.settings import ALL_METRICS, RunSettings, WorkloadChoice
from fedclaw.server.statistics_release import constants_from

if TYPE_CHECKING:
    import torch


def check_early(settings: RunSettings, run: str | None, rules: RoundRules) -> None:
    """Check everything that `session.make_record` would refuse and that needs no model.

    Raises UsageError, DataError or PluginError, the same as `make_record`.
    """
    check_terms(settings, run, rules, read_schema(settings.workload))


def check_terms(settings: RunSettings, run: str | None, rules: RoundRules, schema: Schema | None = None) -> None:
    """The same checks without reading a schema. Raises UsageError or PluginError."""
    chosen = chosen_strategy(settings)
    require_installed(WORKLOADS, settings.workload.name)
    strategy = check_settings(chosen.settings, strategy_class(chosen.name))
    choice = settings.workload
    record = record_of(
        settings,
        rules,
        run=run_name(run),
        federation="unknown",
        strategy=chosen,
        schema=schema,
        model=ModelSpec(name=choice.model.name or "unbuilt", args=choice.model.args or {}),
        # These checks do not read how much noise there is.
        central=CentralNoise(**settings.central.model_dump(), noise_multiplier=1.0) if settings.central else None,
    )
    _raise(strategy, early_refusal(record, strategy) or strategy.refuse_rules(rules))


def check_combination(record: RunRecord, strategy: Strategy, model: "torch.nn.Module") -> None:
    """Raise UsageError if a run of `record` with `strategy` and `model` could not keep its promises."""
    _raise(strategy, refusal(record, strategy, model) or strategy.refuse_rules(record.rules))


def _raise(strategy: Strategy, reason: str | None) -> None:
    if reason is not None:
        raise UsageError(f"strategy {strategy.name!r} ", reason)


def run_name(given: str | None) -> str:
    """The given name, or one made from the time. Raises UsageError if it cannot be a directory's name."""
    name = given or f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
    if not RUN_NAME.match(name):
        raise UsageError(f"the run name {name!r} is not usable: letters, digits, dot, dash and underscore only")
    return name


def chosen_strategy(settings: RunSettings) -> StrategyRecord:
    """The strategy's name and its own settings. Raises UsageError if none is named."""
    strategy = dict(settings.strategy)
    name = strategy.pop("name", None)
    if not isinstance(name, str):
        raise UsageError("strategy.name is not set; see conf/strategy/")
    return StrategyRecord(name=name, settings=strategy)


def read_schema(choice: WorkloadChoice) -> Schema:
    """The schema that the federation agreed on. Raises UsageError, DataError or PluginError."""
    if choice.schema_file is None:
        raise UsageError("workload.schema_file is not set: give the schema file that the federation agreed on")
    return schema_class(choice.name).parse(_read(choice.schema_file), str(choice.schema_file))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"workload.schema_file={path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"the schema file {path} is not text in UTF-8 ({error.reason}, byte {error.start})") from error


def asked_metrics(settings: RunSettings, task: Task | None) -> tuple[str, ...]:
    """The metrics that the settings ask for. Raises UsageError for one that the task, if it is known, does not have."""
    if settings.metrics == ALL_METRICS:
        return () if task is None else task.metrics
    if task is None:
        return settings.metrics
    try:
        task.check_metrics(settings.metrics)
    except DataError as error:
        raise UsageError(f"metrics: {error}") from error
    return settings.metrics


def record_of(
    settings: RunSettings,
    rules: RoundRules,
    *,
    run: str,
    federation: str,
    strategy: StrategyRecord,
    schema: Schema | None,
    model: ModelSpec,
    central: CentralNoise | None,
) -> RunRecord:
    """The record of a run with these settings, model and noise. Raises UsageError."""
    metrics = asked_metrics(settings, None if schema is None else schema.task)
    fields = {
        **fields_of(settings, SharedTerms),
        "task": Classification.name if schema is None else schema.task.name,
        "metrics": metrics,
        "run": run,
        "federation": federation,
        "workload": settings.workload.name,
        "schema_text": "" if schema is None else schema.to_json(),
        "model": model,
        "strategy": strategy,
        "central": central,
        "secure": settings.secure,
        "score_bins": settings.score_bins if "auroc" in metrics else None,
        "preprocessing": None if schema is None else constants_from(settings.statistics, schema),
        "rules": rules,
        "seed": settings.seed,
    }
    record = check_settings(fields, RunRecord)
    if reason := mechanism_of(record).out_of_range():
        raise UsageError("configuration: ", reason)
    return record
