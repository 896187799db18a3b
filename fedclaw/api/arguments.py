"""Errors in the caller's words: a setting of the commands is an argument of a notebook's function."""

from collections.abc import Callable
from functools import wraps
from numbers import Integral
from os import PathLike
from pathlib import Path
from typing import ParamSpec, TypeVar

from fedclaw.errors import FedClawError, Reason, Setting, UsageError

P = ParamSpec("P")
R = TypeVar("R")

_NAMES = {"epochs": "local_epochs", "steps": "local_steps", "max_grad_norm": "clip", "sites": "clients"}
_WORDS = {
    "privacy=dp": "fedclaw.LocalPrivacy(...)",
    "privacy=none": "privacy=None",
    "central.unit=site": 'fedclaw.CentralPrivacy(..., unit="site")',
    "central.unit=example": 'unit="example"',
    "sites.minimum": "clients= times fraction=",
    "overwrite=true": "overwrite=True",
    "output=…": "target=…",
    "runtime=sites": "fedclaw server",
}


def argument(setting: Setting) -> str:
    """What a setting of the commands is called among the arguments of `fedclaw.simulate` and `fedclaw.Federation`."""
    if (words := _WORDS.get(str(setting))) is not None:
        return words
    last = setting.path.rpartition(".")[2]
    name = _NAMES.get(last, last)
    return name if setting.value is None else f"{name}={setting.value!r}"


def public(function: Callable[P, R]) -> Callable[P, R]:
    """A function that a notebook calls: an error raised on purpose names arguments, and comes without frames of ours.

    Any other exception passes as it is, with all of its frames.
    """

    @wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except FedClawError as error:
            error.args = (Reason(error.said(argument)),)
            raise error.with_traceback(None) from None

    return called


def whole(value: object, name: str, least: int) -> int:
    """The argument of that name, as an integer. Raises UsageError unless it is one, and at least `least`."""
    if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < least:
        raise UsageError(f"{name}={value!r:.60}: a whole number of at least {least} is needed")
    return int(value)


def place(value: object, name: str) -> Path:
    """The argument of that name, as a path. Raises UsageError unless it is one."""
    if not isinstance(value, str | PathLike):
        raise UsageError(f"{name}={value!r:.60}: the path of a file or a directory is needed")
    return Path(value)
