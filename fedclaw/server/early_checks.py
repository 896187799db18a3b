"""What can be wrong with a run and is told without torch or Flower: asked first, for those take seconds to load."""

import secrets
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedclaw.catalogue import WORKLOADS, did_you_mean, plugin_points
from fedclaw.errors import DataError, PluginError, UsageError
from fedclaw.learning.compatibility import early_refusal
from fedclaw.learning.registry import schema_class, strategy_class
from fedclaw.learning.workload import Schema
from fedclaw.protocol.frozen import check_settings
from fedclaw.protocol.plan import CentralPrivacy, check_numbers
from fedclaw.protocol.terms import RoundRules, StrategyRecord
from fedclaw.server.run_directory import RUN_NAME, RunRecord
from fedclaw.server.settings import RunSettings, WorkloadChoice
from fedclaw.server.statistics_release import constants_from
from fedclaw.server.terms import terms_of


def check_early(settings: RunSettings, run: str | None, rules: RoundRules) -> Schema:
    """Look at all that `session.make_record` would refuse and that needs no model; the schema of the run.

    Raises UsageError, DataError or PluginError, the same as `make_record`.
    """
    schema = read_schema(settings.workload)
    check_terms(settings, run, rules, schema)
    return schema


def check_terms(settings: RunSettings, run: str | None, rules: RoundRules, schema: Schema | None = None) -> None:
    """The same without reading a schema; raises UsageError or PluginError."""
    chosen = chosen_strategy(settings)
    known = plugin_points(WORKLOADS)
    if (name := settings.workload.name) not in known:
        raise PluginError(
            f"no clients plug-in is called {name!r}{did_you_mean(name, known)}; installed: {', '.join(sorted(known))}"
        )
    strategy = check_settings(chosen.settings, strategy_class(chosen.name))
    record = check_settings(_stand_in(settings, run_name(run), schema, chosen, rules), RunRecord)
    try:
        check_numbers(record.training, record.privacy, record.central, record.weight_cap)
    except ValueError as error:
        raise UsageError(f"configuration: {error}") from error
    if reason := early_refusal(terms_of(record), strategy):
        raise UsageError(f"strategy {strategy.name!r} {reason}")


def run_name(given: str | None) -> str:
    """The run's name, made from the time if none is given. Raises UsageError for one that is no directory's name."""
    name = given or f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
    if not RUN_NAME.match(name):
        raise UsageError(f"the run name {name!r} is not usable: letters, digits, dot, dash and underscore only")
    return name


def chosen_strategy(settings: RunSettings) -> StrategyRecord:
    """The strategy by name, and its own settings beside it. Raises UsageError if none is named."""
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


def _stand_in(
    settings: RunSettings, run: str, schema: Schema | None, strategy: StrategyRecord, rules: RoundRules
) -> dict[str, Any]:
    """The fields of a record that is as good as the run's own for whoever asks neither for its model nor its noise."""
    choice, central = settings.workload, settings.central
    return {
        **given_fields(settings),
        "run": run,
        "federation": "",
        "schema_text": "" if schema is None else schema.to_json(),
        "model": {"name": choice.model.name or "unbuilt", "args": choice.model.args or {}},
        "strategy": strategy,
        "central": None if central is None else CentralPrivacy(**central.model_dump(), noise_multiplier=1.0),
        "preprocessing": None if schema is None else constants_from(settings.statistics, schema),
        "rules": rules,
    }


def given_fields(settings: RunSettings) -> dict[str, Any]:
    """The fields of a run's record that are in its settings as they are."""
    return {
        "workload": settings.workload.name,
        "rounds": settings.rounds,
        "training": settings.training,
        "privacy": settings.privacy,
        "secure": settings.secure,
        "compression": settings.compression,
        "weighting": settings.weighting,
        "weight_cap": settings.weight_cap,
        "metrics": settings.metrics,
        "seed": settings.seed,
    }
