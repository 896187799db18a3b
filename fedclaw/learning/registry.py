"""Finds plug-ins by name among the installed packages' entry points; never by an import path from elsewhere.

A program may lend classes of its own for as long as it runs something with them (`lent`): a notebook's strategy.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, TypeVar

from fedclaw.catalogue import STRATEGIES as STRATEGIES
from fedclaw.catalogue import WORKLOADS as WORKLOADS
from fedclaw.catalogue import one_of, plugin_points
from fedclaw.errors import PluginError
from fedclaw.learning.workload import Schema, Workload

if TYPE_CHECKING:
    from fedclaw.learning.strategy import Strategy

SCHEMAS = "fedclaw.schemas"

T = TypeVar("T")

_LENT: ContextVar[Mapping[tuple[str, str], type[Any]]] = ContextVar("fedclaw plug-ins of the caller")


@contextmanager
def lent(plugins: Mapping[tuple[str, str], type[Any]]) -> Iterator[None]:
    """Have the caller's own classes, by (group, name), stand before those that are installed, in this thread."""
    before = _LENT.set({**_LENT.get({}), **plugins})
    try:
        yield
    finally:
        _LENT.reset(before)


def installed(group: str) -> frozenset[str]:
    """Names of the plug-ins of one kind."""
    return frozenset(plugin_points(group))


def require_installed(group: str, name: str) -> None:
    """Raise PluginError unless a plug-in of that kind and name is there; nothing is imported."""
    known = {*plugin_points(group), *(own for kind, own in _LENT.get({}) if kind == group)}
    if name not in known:
        raise PluginError(f"no {group.rpartition('.')[2]} plug-in is called {name!r}{one_of(name, known, 'installed')}")


def _load(group: str, name: str, base: type[T]) -> type[T]:
    if (own := _LENT.get({}).get((group, name))) is not None:
        return own
    require_installed(group, name)
    try:
        plugin = (found := plugin_points(group))[name].load()
    except Exception as error:  # what its author did not foresee is nothing that a user could act on
        what = str(error) if isinstance(error, ImportError) else f"{type(error).__name__}: {error}"
        raise PluginError(f"the plug-in {name!r} ({found[name].value}) cannot be imported: {what}") from error
    if not (isinstance(plugin, type) and issubclass(plugin, base)):
        raise PluginError(f"the plug-in {name!r} ({found[name].value}) is not a {base.__name__}")
    return plugin


def strategy_class(name: str) -> "type[Strategy]":
    """The installed strategy of that name. Raises PluginError."""
    from fedclaw.learning.strategy import Strategy

    return _load(STRATEGIES, name, Strategy)  # type: ignore[type-abstract]


def workload_class(name: str) -> type[Workload]:
    """The installed workload of that name. Raises PluginError."""
    return _load(WORKLOADS, name, Workload)  # type: ignore[type-abstract]


def schema_class(name: str) -> type[Schema]:
    """The installed schema reader of that workload. Raises PluginError."""
    return _load(SCHEMAS, name, Schema)  # type: ignore[type-abstract]
