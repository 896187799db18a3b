"""The libraries that launchers and sweepers are made of, imported when one is chosen."""

import importlib
from typing import Any

from hydra.errors import HydraException


def library(name: str, extra: str) -> Any:
    """The module `name`. Raises HydraException that says what to install when it is not there."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise HydraException(f"{name} is not installed; it comes with pip install 'fedclaw[{extra}]'") from error
