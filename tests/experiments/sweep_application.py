"""A Hydra application of a few lines, for the launchers and the sweeper: its job writes a file and returns a number."""

import os
import signal
from pathlib import Path

import hydra
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from fedclaw.cli import config_directory


class NoteLost(Callback):
    """Writes a file for each job that Hydra's callbacks are told has failed."""

    def on_job_end(self, config, job_return, **kwargs):
        """Called where the job ran, or by the launcher for a job that is lost."""
        if job_return.status.name == "FAILED":
            (Path(config.out) / f"lost-{config.x}").write_text(type(job_return._return_value).__name__)


@hydra.main(version_base="1.3", config_path=None)
def main(config: DictConfig) -> float:
    """x squared; x=13 kills its process, x=7 is not a number unless OUT/mended is there."""
    out = Path(config.out)
    if config.x == 13:
        os.kill(os.getpid(), signal.SIGKILL)
    with (out / f"job-{config.x}").open("a") as file:
        file.write(f"{os.getpid()}\n")
    if config.x == 7 and not (out / "mended").exists():
        return float("nan")
    return float(config.x) ** 2


def arguments(out: Path) -> list[str]:
    """What every command needs: fields, the configuration of launchers and sweepers, and where Hydra writes."""
    return [
        f"hydra.searchpath=[file://{config_directory()}]",
        f"+out={out}",
        f"hydra.sweep.dir={out}/sweep",
        "+hydra.callbacks.lost._target_=tests.experiments.sweep_application.NoteLost",
    ]


if __name__ == "__main__":
    main()
