"""resume= of `experiments.run`: a run that was stopped goes on with the settings that it was begun with."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from experiments.settings import ExperimentSettings, with_own_data
from experiments.sweeps.identity import EXPERIMENT_FILE, Identity, is_relevant
from fedclaw.errors import CheckpointError, UsageError
from fedclaw.protocol.frozen import check_settings, explain
from fedclaw.server.run_directory import RunDirectory, RunRecord


def resumed(settings: ExperimentSettings, root: Path, overrides: Sequence[str]) -> ExperimentSettings:
    """The settings of the run in `root`, with what may change (`overrides` of the command) as `settings` have it.

    Raises UsageError for another override, for data of one's own that has changed and for a directory that holds no
    run, CheckpointError for a damaged file.
    """
    directory = RunDirectory.open(root)
    directory.check()
    placed = {"run": root.name, "runs": root.parent}
    path = root / EXPERIMENT_FILE
    if not path.is_file():
        _require_same(directory.record(), settings, root)
        return settings.model_copy(update=placed)
    for override in overrides:
        key = override.lstrip("+~").partition("=")[0]
        if is_relevant(key) and "/" not in key:
            raise UsageError(f"{key} cannot be changed on resume: a run goes on with what it was begun with")
    try:
        begun = Identity.model_validate_json(path.read_bytes()).configuration
    except ValidationError as error:
        raise CheckpointError(f"{path} is damaged: {explain(error)}") from error
    given = settings.model_dump(mode="json")
    # Its constants are in the run's own record.
    plain: dict[str, Any] = {
        **given,
        **begun,
        **{name: str(value) for name, value in placed.items()},
        "statistics": None,
    }
    if given["runtime"]["name"] == plain["runtime"]["name"]:
        plain["runtime"] = {**given["runtime"], **plain["runtime"]}
    then = check_settings(plain, ExperimentSettings)
    now = with_own_data(then)
    if now.dataset != then.dataset:
        raise UsageError(f"{now.dataset.data} is not what it was when {root} was begun: put it back, or begin anew")
    return now


def _require_same(record: RunRecord, settings: ExperimentSettings, root: Path) -> None:
    """Of a run of an earlier version, which kept no settings: the command has to say them again."""
    asked = (settings.strategy.get("name"), settings.workload.name, settings.rounds, settings.seed)
    if asked != (record.strategy.name, record.workload, record.rounds, record.seed):
        raise UsageError(
            f"{root} was begun by a version that did not keep its settings, and with others than these: give the "
            f"command that began it again, with resume={root}"
        )
