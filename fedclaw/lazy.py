"""Packages that hand out names without importing the modules that these come from before somebody asks."""

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def on_demand(package: str, places: Mapping[str, str]) -> Callable[[str], Any]:
    """A package's `__getattr__` (PEP 562) that gives each name of `places` from the module that it is in.

        __getattr__ = on_demand(__name__, {"simulate_on_ray": "fedclaw.transport.ray.simulate"})

    So a settings class beside something heavy costs only what it needs itself.
    """

    def give(name: str) -> Any:
        if name not in places:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(places[name]), name)

    return give
