"""Which tasks there are: the framework's own, and those that installed packages bring as `fedclaw.tasks` entry points.

A schema says which one is its own. This list is for who has to know names without a schema: a policy that lets metrics
leave, settings that ask for them. Plug-ins are imported only for a name that no task of the framework's has.
"""

from collections.abc import Iterable, Iterator, Sequence

from fedclaw.catalogue import plugin_points
from fedclaw.errors import PluginError
from fedclaw.learning.tasks.base import Task
from fedclaw.learning.tasks.classification import Classification
from fedclaw.learning.tasks.regression import Regression

TASKS = "fedclaw.tasks"
BUILT_IN: tuple[type[Task], ...] = (Classification, Regression)


def shared_by_default() -> tuple[str, ...]:
    """Metrics that leave a site unless its policy says otherwise; those of plug-ins need a policy that names them."""
    return _names(task.SHARED for task in BUILT_IN)


def metrics_and_clauses() -> tuple[str, ...]:
    """All that a policy can name under `metrics`, of the framework's own tasks."""
    return _names((*task.METRICS, *task.CLAUSES) for task in BUILT_IN)


def unknown(names: Iterable[str]) -> list[str]:
    """Those of `names` that no installed task has for a metric or a clause, in their order. Raises PluginError."""
    strange = set(names) - set(metrics_and_clauses())
    if strange:
        strange -= {name for task in _plugins() for name in (*task.METRICS, *task.CLAUSES)}
    return [name for name in dict.fromkeys(names) if name in strange]


def told_with(names: Sequence[str]) -> tuple[str, ...]:
    """Names of the sums that leave with these metrics beside their own (`Task.told_with`)."""
    return _names(task.told_with(names) for task in BUILT_IN)


def can_be_noised(name: str) -> bool:
    """Whether a metric, or a clause, can leave with noise. Raises PluginError."""
    if name in metrics_and_clauses():
        return any(name in task.NOISED for task in BUILT_IN)
    return any(name in task.NOISED for task in _plugins())


def _plugins() -> Iterator[type[Task]]:
    for name, point in sorted(plugin_points(TASKS).items()):
        try:
            task = point.load()
        except Exception as error:  # what its author did not foresee is nothing that a user could act on
            raise PluginError(f"the task plug-in {name!r} ({point.value}) cannot be imported: {error}") from error
        if not (isinstance(task, type) and issubclass(task, Task)):
            raise PluginError(f"the plug-in {name!r} ({point.value}) is not a Task")
        yield task


def _names(of_tasks: Iterable[tuple[str, ...]]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for names in of_tasks for name in names))
