"""FedClaw's aggregation server as a Flower ServerApp: `flwr run` submits it to a stock SuperLink.

The run's configuration holds the settings that `python -m fedclaw.server` takes on its command line, each under its
own name ("" leaves one at its default); what TOML cannot say stands in `settings`, as on a command line:

    [tool.flwr.app.config]
    federation = "clinic"
    runs = "/srv/fedclaw/runs"
    rounds = 10
    strategy = "fedprox"
    workload.schema_file = "/srv/fedclaw/schema.yaml"
    settings = "strategy.mu=0.1 privacy.delta=1e-6"

    flwr run . --run-config 'rounds=20'
    flwr run . --run-config 'resume="/srv/fedclaw/runs/NAME"'       go on with a run that was interrupted

The app runs on the SuperLink's machine, in a directory that Flower chooses, so paths are absolute. What FedClaw's own
server has and this has not: mutual TLS, the seal on the updates, and secure aggregation (which is refused).
"""

import logging
import shlex
from collections.abc import Mapping

from flwr.app import Context, UserConfigValue
from flwr.serverapp import Grid, ServerApp

from fedclaw.cli import compose_settings, make_console, start_logging
from fedclaw.errors import FedClawError, UsageError
from fedclaw.transport.flower.rounds import run_over
from fedclaw.transport.flower.settings import FlowerSettings, observed, open_run

log = logging.getLogger(__name__)

SETTINGS = "settings"
"""The key of the run's configuration that holds further settings, written as on a command line."""

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the federation that the run's configuration describes. Raises FedClawError; Flower then ends the run."""
    start_logging(make_console(stderr=True))
    try:
        settings = read_settings(context.run_config)
        directory = open_run(settings)
        with observed(directory, settings.tracking) as observers:
            run_over(grid, directory, settings.sites, observers)
    except FedClawError as error:
        log.error("%s", error)
        raise


def read_settings(run_config: Mapping[str, UserConfigValue]) -> FlowerSettings:
    """The settings that a run's configuration holds. Raises UsageError."""
    try:
        further = shlex.split(str(run_config.get(SETTINGS, "")))
    except ValueError as error:
        raise UsageError(f"{SETTINGS} cannot be read as a command line: {error}") from error
    overrides = [f"{key}={_word(value)}" for key, value in run_config.items() if key != SETTINGS and value != ""]
    settings = compose_settings("flower_app", [*overrides, *further], FlowerSettings)
    paths = {
        "runs": settings.runs,
        "resume": settings.resume,
        "workload.schema_file": settings.workload.schema_file,
        "statistics": settings.statistics,
    }
    for name, path in paths.items():
        if path is not None and not path.is_absolute():
            raise UsageError(f"{name}={path} is not absolute: Flower runs the app in a directory of its own")
    return settings


def _word(value: UserConfigValue) -> str:
    """A value of the run's configuration, written as in an override."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return f'"{escaped}"'
    return str(value)
