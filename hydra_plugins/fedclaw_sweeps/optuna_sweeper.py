"""hydra/sweeper=optuna: a study that chooses the next runs by what the runs so far came to.

The study is kept on disk. A sweep that was interrupted goes on with it: trials that were under way, and those that
failed, are asked again with the same parameters, and `n_trials` counts all that are complete.
"""

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra.errors import CompactHydraException
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from hydra_plugins.fedclaw_sweeps._libraries import library

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.distributions import BaseDistribution

log = logging.getLogger(__name__)

_SAMPLERS = {"tpe": "TPESampler", "random": "RandomSampler", "gp": "GPSampler"}


class OptunaSweeper(Sweeper):
    """Options: conf/hydra/sweeper/optuna.yaml."""

    def __init__(
        self,
        *,
        direction: Literal["minimize", "maximize"],
        n_trials: int,
        n_jobs: int,
        sampler: Mapping[str, Any],
        storage: str | None,
        study_name: str,
        params: Mapping[str, Any] | None,
    ) -> None:
        self._direction, self._trials, self._at_once = direction, n_trials, n_jobs
        self._sampler = dict(sampler)
        self._storage, self._name = storage, study_name
        self._params = dict(params or {})

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Take the context, and the launcher that it says."""
        self.hydra_context, self.config = hydra_context, config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        """Run trials until `n_trials` are complete, or as many as were lacking have been tried."""
        library("optuna", "sweeps")
        from hydra_plugins.fedclaw_sweeps._search_space import split

        assert self.config is not None
        directory = Path(str(self.config.hydra.sweep.dir))
        directory.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(self.config, directory / "multirun.yaml")
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader if self.hydra_context else None)
        searched = [f"{key}={value}" for key, value in self._params.items()]
        space, fixed = split(parser.parse_overrides([*searched, *arguments]))
        study = self._open(directory)
        done = _take_up(study)
        for first in range(done, self._trials, self._at_once):
            self._batch(study, space, fixed, first, min(self._at_once, self._trials - first))
        _write_best(study, directory)

    def _open(self, directory: Path) -> "Study":
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        return optuna.create_study(
            storage=self._storage or f"sqlite:///{directory.resolve() / 'optuna.db'}",
            study_name=self._name,
            direction=self._direction,
            load_if_exists=True,
        )

    def _batch(
        self, study: "Study", space: "dict[str, BaseDistribution]", fixed: list[str], first: int, size: int
    ) -> None:
        assert self.launcher is not None
        study.sampler = _make_sampler(self._sampler, len(study.trials))
        trials = [study.ask(space) for _ in range(size)]
        batch = [[*fixed, *(f"{key}={value}" for key, value in trial.params.items())] for trial in trials]
        self.validate_batch_is_legal(batch)
        for trial, result in zip(trials, self.launcher.launch(batch, initial_job_idx=first), strict=True):
            _tell(study, trial, result)


def _make_sampler(options: Mapping[str, Any], asked: int) -> Any:
    """A sampler whose numbers go on where those of the study's first `asked` trials ended."""
    import optuna

    arguments = dict(options)
    name = str(arguments.pop("name"))
    if name not in _SAMPLERS:
        raise CompactHydraException(f"hydra.sweeper.sampler.name={name} is unknown; there are: {', '.join(_SAMPLERS)}")
    if arguments.get("seed") is not None:
        arguments["seed"] += asked
    return getattr(optuna.samplers, _SAMPLERS[name])(**arguments)


def _take_up(study: "Study") -> int:
    """Ask again what is not complete; the number of trials that are."""
    from optuna.trial import TrialState

    trials = study.get_trials(deepcopy=False)
    known = [trial.params for trial in trials if trial.state is TrialState.COMPLETE]
    known += [trial.system_attrs.get("fixed_params", {}) for trial in trials if trial.state is TrialState.WAITING]
    complete = sum(trial.state is TrialState.COMPLETE for trial in trials)
    for trial in trials:
        if trial.state is TrialState.RUNNING:
            study.tell(trial.number, state=TrialState.FAIL)
        if trial.state in (TrialState.RUNNING, TrialState.FAIL) and trial.params not in known:
            study.enqueue_trial(trial.params)
            known.append(trial.params)
    if trials:
        log.info("the study has %d complete trials", complete)
    return complete


def _tell(study: "Study", trial: "Trial", result: JobReturn) -> None:
    from optuna.trial import TrialState

    try:
        value = float(result.return_value)
    except Exception as error:  # the task's own
        log.error("trial %d failed: %s", trial.number, error)
        value = math.nan
    if math.isnan(value):
        study.tell(trial, state=TrialState.FAIL)
    else:
        study.tell(trial, value)


def _write_best(study: "Study", directory: Path) -> None:
    from optuna.trial import TrialState

    if not study.get_trials(deepcopy=False, states=[TrialState.COMPLETE]):
        return
    best = {"name": "optuna", "best_params": study.best_params, "best_value": study.best_value}
    OmegaConf.save(OmegaConf.create(best), directory / "optimization_results.yaml")
    log.info("best: %s with %s", study.best_value, study.best_params)
