"""The shared front of all entry points: Hydra in, plain typed arguments onward.

A command line is `python -m fedclaw.X [command] key=value ...`; the configuration is composed from conf/X.yaml and its
groups, checked against a frozen settings class, and handed to a function. One clear line and an exit code is all
that a user's mistake gets: 0 done, 1 failed, 2 wrong use.
"""

import logging
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from rich.console import Console
from rich.logging import RichHandler

from fedclaw.errors import FedClawError, UsageError
from fedclaw.frozen import S, check_settings
from fedclaw.report.console import make_console

log = logging.getLogger(__name__)

INTERRUPTED = 130


@dataclass(frozen=True)
class CommandLine:
    """`words` are the bare arguments, `overrides` the key=value ones in Hydra's grammar."""

    words: tuple[str, ...]
    overrides: tuple[str, ...]


def config_directory() -> Path:
    """Where the Hydra configuration is: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent
    installed = package / "conf"
    return installed if installed.is_dir() else package.parent / "conf"


def split(arguments: Sequence[str]) -> CommandLine:
    """Tell bare words from key=value overrides. Raises UsageError for an option nobody knows."""
    words: list[str] = []
    overrides: list[str] = []
    for argument in arguments:
        if argument.startswith("--"):
            raise UsageError(f"unknown option {argument}; arguments are written key=value, see --help")
        (overrides if "=" in argument or argument.startswith("~") else words).append(argument)
    return CommandLine(tuple(words), tuple(overrides))


def compose_settings(config_name: str, overrides: Sequence[str], settings: type[S]) -> S:
    """Compose conf/<config_name>.yaml with `overrides` and check it. Raises UsageError."""
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(version_base="1.3", config_dir=str(config_directory())):
            composed = compose(config_name, overrides=list(overrides))
        plain: Any = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise _wrong_configuration(error) from error
    return check_settings(plain, settings)


def run_main(module: str, usage: str, body: Callable[[Sequence[str]], None]) -> NoReturn:
    """Run an entry point and exit: help for --help, one line on stderr for whatever goes wrong."""
    arguments = sys.argv[1:]
    console = make_console(stderr=True)
    if any(argument in {"-h", "--help"} for argument in arguments):
        sys.stdout.write(usage.strip() + "\n")
        sys.exit(0)
    start_logging(console)
    try:
        body(arguments)
    except (Exception, KeyboardInterrupt) as error:
        sys.exit(report_failure(module, error, console))
    sys.exit(0)


def run_hydra(module: str, main: Callable[[], object]) -> NoReturn:
    """Run an entry point that is a function of Hydra's, which can sweep, and exit as `run_main` does."""
    # Hydra prints its errors, in several lines, and exits with 1, unless it is asked to hand them on.
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    try:
        main()
    except (HydraException, OmegaConfBaseException) as error:
        sys.exit(report_failure(module, _wrong_configuration(error), make_console(stderr=True)))
    sys.exit(0)


def report_failure(module: str, error: BaseException, console: Console) -> int:
    """Say in one line what ended the command, and return its exit code.

    What FedClaw did not foresee is told by its type and place alone: a library's text may quote a key or a record.
    The traceback, which has that text, goes to the log under FEDCLAW_LOG=DEBUG.
    """
    code = error.exit_code if isinstance(error, FedClawError) else 1
    if isinstance(error, KeyboardInterrupt):
        code = INTERRUPTED
    line = describe_failure(error)
    if not isinstance(error, FedClawError | KeyboardInterrupt):
        log.debug("%s", type(error).__name__, exc_info=error)
    console.print(f"{module}: {line}", style="bold red", markup=False)
    if isinstance(error, UsageError):
        console.print(f"see python -m {module} --help", style="dim", markup=False)
    return code


def describe_failure(error: BaseException) -> str:
    """What ended a command, in one line; the text of an error that FedClaw did not foresee is left out."""
    if isinstance(error, FedClawError):
        return str(error)
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, OSError) and error.strerror:
        names = [str(name) for name in (error.filename, error.filename2) if name is not None]
        return ": ".join([" -> ".join(names), error.strerror] if names else [error.strerror])
    return f"internal error: {type(error).__name__} at {_place(error)}; set FEDCLAW_LOG=DEBUG for the traceback"


def _place(error: BaseException) -> str:
    """file:line where `error` was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "an unknown place"


def start_logging(console: Console) -> None:
    """FedClaw's own log on stderr: for a person at a terminal, with full times in a file or pipe.

    The root logger is left alone: libraries underneath take it over when they are imported.
    """
    level = os.environ.get("FEDCLAW_LOG", "INFO").upper()
    handler: logging.Handler = RichHandler(console=console, show_path=False, markup=False, rich_tracebacks=False)
    handler.setFormatter(logging.Formatter("%(message)s", datefmt="%H:%M:%S"))
    if not console.is_terminal:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(
            logging.Formatter("%(asctime)s %(levelname)-7s %(message)s", datefmt="%Y-%m-%dT%H:%M:%S%z")
        )
    logger = logging.getLogger("fedclaw")
    logger.setLevel(level if level in logging.getLevelNamesMapping() else "INFO")
    logger.handlers = [handler]
    logger.propagate = False


def _wrong_configuration(error: HydraException | OmegaConfBaseException) -> UsageError:
    """What Hydra or OmegaConf found wrong with a command line, as FedClaw says it."""
    if isinstance(error, MissingMandatoryValue):
        return UsageError(f"{error.full_key}= is missing and has no default")
    if isinstance(error, OverrideParseException):
        return UsageError(
            f"cannot read {error.override!r}: a value with spaces or special characters is quoted twice, "
            """as in 'name="two words"'"""
        )
    return UsageError(f"configuration: {_plain(error)}")


def _plain(error: BaseException) -> str:
    """Hydra's and OmegaConf's words, without what only their authors need."""
    text = " ".join(str(error).split())
    if unknown := re.match(r"Could not override '([^']+)'", text):
        return f"there is no setting {unknown[1]}; see conf/ for those that there are"
    return text.partition(" Config search path:")[0].partition(" See https://hydra.cc")[0]
