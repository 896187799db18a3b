"""The libraries that launchers and sweepers are made of, imported when one is chosen."""

import importlib
from typing import Any

from hydra.errors import CompactHydraException


def library(name: str, extra: str) -> Any:
    """The module `name`. Raises CompactHydraException that says what to install when it is not there."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise CompactHydraException(f"{name} is not installed; it comes with pip install 'fedclaw[{extra}]'") from error
