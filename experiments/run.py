"""One experiment, or a sweep, in process: the code of the server and of the sites, without the wires.

    python -m experiments.run strategy=fedprox privacy.epsilon=4
    python -m experiments.run -m strategy=fedavg,fedadam privacy.epsilon=2,8
    python -m experiments.run +experiment=digits_dp rounds=40
    python -m experiments.run dataset=csv data=table.csv sites=hospital privacy=none
    python -m experiments.run sites=[sites/hospital-north,sites/hospital-east]
    python -m experiments.run resume=runs/NAME        go on with a run that was stopped
    python -m experiments.run strategy=median attack=sign_flip attack.sites=1

Every run leaves a directory under runs/, where partition.json and partition.png say who had which data, and an MLflow
run (mlflow ui --backend-store-uri sqlite:///runs/mlflow.db).
A sweep (-m) that was interrupted is continued by the same command: runs that are finished are not run again, half a run
goes on from its checkpoint. It ends with a table and plots in runs/sweeps/NAME; hydra/launcher=joblib, submitit or ray
runs several at once, hydra/sweeper=optuna chooses them.
"""

if __name__ == "__main__":
    from fedclaw.startup import begin

    begin("experiments.run", __doc__, plugins=True)

import sys

import hydra
from omegaconf import DictConfig

from experiments.settings import ExperimentSettings
from experiments.sweeps import AGAIN, PROGRAM
from fedclaw import startup
from fedclaw.cli import config_directory, run_hydra


@hydra.main(version_base="1.3", config_path=str(config_directory()), config_name="run")
def main(config: DictConfig) -> float:
    """Hydra's entry: the last accuracy is the objective that a sweeper maximises."""
    # By name, for launchers send this function to other processes, to which this module is not __main__.
    from experiments.sweeps.job import run_job

    return run_job(config)


def run() -> None:
    """`main`, and an end in MLflow for a sweep that does not come to its own."""
    startup.next_step(AGAIN)
    try:
        main()
    except BaseException as error:
        if "experiments.sweeps.callback" in sys.modules:
            from experiments.sweeps.callback import break_off

            break_off(error)
        raise


if __name__ == "__main__":
    run_hydra(PROGRAM, "run", ExperimentSettings, run)
