"""The shared front of all entry points: Hydra in, plain typed arguments onward.

A command line is `python -m fedclaw.X [command] key=value ...`; the configuration is composed from conf/X.yaml and its
groups, checked against a frozen settings class, and handed to a function. One clear line and an exit code is all
that a user's mistake gets: 0 done, 1 failed, 2 wrong use, 130 and 143 for Ctrl-C and SIGTERM (`fedclaw.startup`).

A command checks all that can be wrong without torch, Flower, Opacus or MLflow before it imports one of them.
"""

import logging
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, get_args, get_origin

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from pydantic import BaseModel
from rich.console import Console
from rich.logging import RichHandler

from fedclaw import startup
from fedclaw.catalogue import STRATEGIES, WORKLOADS, did_you_mean, one_of, plugin_points
from fedclaw.errors import FedClawError, UsageError
from fedclaw.protocol.frozen import S, check_settings

log = logging.getLogger(__name__)

PLAIN_WIDTH = 132
"""Columns when the output is a file or a pipe."""
_SECRET = re.compile(r"(?<![A-Za-z0-9+/])[A-Za-z0-9+/]{43}(?:=|(?![A-Za-z0-9+/]))")
"""32 bytes as base64, as keys are kept in files and in the environment."""
_LOGIN = re.compile(r"(?<=://)[^/\s@]*(?=@)")
_PKCS11 = re.compile(r"pkcs11:[^'\\\s]+")
"""A PKCS#11 URI, whose = and ; mean something else to Hydra."""
_LIKE_A_NUMBER = re.compile(r"[-+]?[0-9][0-9_.eE+-]*|true|false|yes|no|on|off", re.IGNORECASE)


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


def settings_of(arguments: Sequence[str], config_name: str, settings: type[S]) -> S:
    """The settings of a command that takes key=value and no bare word. Raises UsageError."""
    line = split(arguments)
    if line.words:
        raise UsageError(f"unknown command {' '.join(line.words)!r}; settings are written key=value")
    return compose_settings(config_name, line.overrides, settings)


def compose_settings(config_name: str, overrides: Sequence[str], settings: type[S]) -> S:
    """Compose conf/<config_name>.yaml with `overrides` and check it. Raises UsageError."""
    try:
        composed = _composed(config_name, as_text(with_plugins(overrides), settings))
        plain: Any = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise _wrong_configuration(error, config_name, overrides) from error
    checked = check_settings(plain, settings)
    startup.clear_line()
    return checked


def _composed(config_name: str, overrides: list[str]) -> DictConfig:
    GlobalHydra.instance().clear()
    with initialize_config_dir(version_base="1.3", config_dir=str(config_directory())):
        return compose(config_name, overrides=overrides)


def expanded(path: Path) -> Path:
    """`path` with a leading ~ as the home directory that it names; as it is where it names none (a file may be ~so)."""
    try:
        return path.expanduser()
    except RuntimeError:
        return path


def require_paths(**paths: Path | None) -> None:
    """Raise UsageError for a file or directory that was named on the command line and is not there; None: not named."""
    for name, path in paths.items():
        if path is not None and not expanded(path).exists():
            raise UsageError(f"{name}={path}: no such file or directory")


@contextmanager
def naming(**paths: Path | None) -> Iterator[None]:
    """While what was named on the command line is opened: an error is a wrong use if that is not there at all.

    It keeps its words, which say what to do. None: not named.
    """
    try:
        yield
    except FedClawError as error:
        if any(path is not None and not expanded(path).exists() for path in paths.values()):
            error.exit_code = UsageError.exit_code
        raise


def make_console(*, stderr: bool = False) -> Console:
    """The terminal, as wide as it is; a file or pipe, wide enough that no table is cut and no line broken."""
    console = Console(stderr=stderr, soft_wrap=True, highlight=False, emoji=False)
    if console.is_terminal:
        return console
    return Console(stderr=stderr, soft_wrap=True, highlight=False, emoji=False, width=PLAIN_WIDTH)


def run_main(module: str, usage: str, body: Callable[[Sequence[str]], None]) -> NoReturn:
    """Run an entry point and exit: help for --help, one line on stderr for whatever goes wrong."""
    arguments = sys.argv[1:]
    console = make_console(stderr=True)
    if any(argument in {"-h", "--help"} for argument in arguments):
        startup.give_help(usage)
    start_logging(console)
    _run(module, lambda: body(arguments), console)


def run_hydra(module: str, config_name: str, settings: type[BaseModel], main: Callable[[], object]) -> NoReturn:
    """Run an entry point that is a function of Hydra's, which can sweep, and exit as `run_main` does."""
    # Hydra prints its errors, in several lines, and exits with 1, unless it is asked to hand them on.
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")

    def body() -> None:
        sys.argv[1:] = as_text(with_plugins(sys.argv[1:]), settings)
        try:
            main()
        except (HydraException, OmegaConfBaseException) as error:
            raise _wrong_configuration(error, config_name, sys.argv[1:]) from error

    _run(module, body, make_console(stderr=True))


def _run(module: str, body: Callable[[], None], console: Console) -> NoReturn:
    """Run `body` and exit. A signal, or whatever a library makes of one, ends all that this process started as well."""
    try:
        startup.under_way()
        body()
    except SystemExit:
        if startup.is_stopping():
            startup.leave(startup.stop_code(SystemExit()))
        raise
    except BaseException as error:
        code = report_failure(module, error, console)
        if _is_stop(error):
            startup.leave(code)
        sys.exit(code)
    startup.clear_line()
    sys.exit(0)


def _is_stop(error: BaseException) -> bool:
    return isinstance(error, KeyboardInterrupt) or startup.is_stopping()


def report_failure(module: str, error: BaseException, console: Console) -> int:
    """Say in one line what ended the command, and return its exit code.

    What FedClaw did not foresee is told by its type and place alone: a library's text may quote a key or a record.
    The traceback, which has that text, goes to the log under FEDCLAW_LOG=DEBUG.
    """
    startup.clear_line()
    if _is_stop(error):
        console.print(startup.stop_line(module), style="bold red", markup=False, soft_wrap=True)
        return startup.stop_code(error)
    line = describe_failure(error)
    if not isinstance(error, FedClawError):
        log.debug("%s", type(error).__name__, exc_info=error)
    console.print(f"{module}: {visible(line)}", style="bold red", markup=False)
    code = error.exit_code if isinstance(error, FedClawError) else 1
    if code == UsageError.exit_code:
        console.print(f"see {startup.see_help(module)}", style="dim", markup=False)
    return code


def visible(text: str) -> str:
    """Without what moves a terminal's cursor: a stranger's file, and names in it, may be quoted."""
    return "".join(letter if letter.isprintable() or letter == "\n" else "?" for letter in text)


def describe_failure(error: BaseException) -> str:
    """What ended a command, in one line; the text of an error that FedClaw did not foresee is left out."""
    if isinstance(error, FedClawError):
        return str(error)
    if isinstance(error, KeyboardInterrupt):
        return "stopped"
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


def with_plugins(overrides: Sequence[str]) -> list[str]:
    """`overrides`, with strategies and workloads of other packages taken as those with a file in conf/ are.

    strategy=NAME is then such a plug-in by itself, with its own defaults, and strategy.KEY=VALUE a setting of it, which
    its class checks. strategy.name=NAME means the same as strategy=NAME.
    """
    given = list(overrides)
    for group, kind, empty in (
        ("strategy", STRATEGIES, {}),
        ("workload", WORKLOADS, {"schema_file": None, "model": {"name": None, "args": None}}),
    ):
        given = [re.sub(rf"^\+*{group}\.name=", f"{group}=", override) for override in given]
        chosen = [override.partition("=")[2] for override in given if override.partition("=")[0].lstrip("+") == group]
        named = {name.strip() for choice in chosen for name in choice.split(",")}
        theirs = {
            name
            for name in named & plugin_points(kind).keys()
            if not (config_directory() / group / f"{name}.yaml").is_file()
        }
        for name in theirs:
            ConfigStore.instance().store(name=name, node={"name": name, **empty}, group=group, provider="fedclaw")
        if theirs:
            given = [re.sub(rf"^\+*(?={group}\.[^=]+=)", "++", override) for override in given]
    return given


def as_text(overrides: Sequence[str], settings: type[BaseModel]) -> list[str]:
    """`overrides`, with what looks like a number quoted where a setting is text or a path: run=2024 is a name.

    A PKCS#11 URI is quoted as well.
    """
    return [_quoted(override, settings) for override in overrides]


def _quoted(override: str, settings: type[BaseModel]) -> str:
    key, _, value = override.partition("=")
    misread = _LIKE_A_NUMBER.fullmatch(value) or _PKCS11.fullmatch(value)
    if not misread or not _is_text(settings, key.lstrip("+").split(".")):
        return override
    return f"{key}='{value}'"


def _is_text(settings: type[BaseModel], steps: Sequence[str]) -> bool:
    """Whether the setting takes text, and no number."""
    named = {field.alias or name: field for name, field in settings.model_fields.items()}
    field = named.get(steps[0])
    if field is None:
        return False
    kinds = set(_kinds(field.annotation))
    if len(steps) > 1:
        below = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
        return any(_is_text(kind, steps[1:]) for kind in below)
    return bool(kinds & {str, Path}) and not kinds & {int, float, bool}


def _kinds(annotation: Any) -> Iterator[Any]:
    """The classes that a value may be of."""
    parts = () if get_origin(annotation) in (tuple, list, dict) else get_args(annotation)
    if not parts or isinstance(annotation, type):
        yield annotation
    for part in parts:
        yield from _kinds(part)


def _without_key(override: str) -> str:
    """What was typed, as it may be repeated: without an encryption key, and without who logs in at an address."""
    name, equals, _ = override.partition("=")
    if equals and name.endswith("key"):
        return f"{name}=…"
    return _LOGIN.sub("...", _SECRET.sub("…", override))


def _wrong_configuration(
    error: HydraException | OmegaConfBaseException, config_name: str, overrides: Sequence[str]
) -> UsageError:
    """What Hydra or OmegaConf found wrong with a command line, as FedClaw says it."""
    if isinstance(error, MissingMandatoryValue):
        return UsageError(f"{error.full_key}= is missing and has no default")
    if isinstance(error, OverrideParseException):
        typed = _without_key(str(error.override))
        return UsageError(
            f"cannot read {typed!r}: a value with spaces or special characters is quoted twice, "
            """as in 'name="two words"'"""
        )
    if isinstance(error, MissingConfigException) and error.options is not None and error.missing_cfg_file:
        group, _, name = str(error.missing_cfg_file).rpartition("/")
        known = {*error.options, *_installed_beside(group)}
        return UsageError(f"{group}={name}: there is none of that name{one_of(name, known)}")
    text = " ".join(str(error).split())
    if unknown := re.match(r"Could not override '([^']+)'", text):
        near = did_you_mean(unknown[1], _keys(config_name, overrides))
        name = _without_key(unknown[1])
        return UsageError(f"configuration: there is no setting {name}{near}; see conf/ for those that there are")
    return UsageError(f"configuration: {_plain(text)}")


def _installed_beside(group: str) -> frozenset[str]:
    """Plug-ins of the kind that a group of conf/ chooses from; they need no file there."""
    kind = {"strategy": STRATEGIES, "workload": WORKLOADS}.get(group)
    return frozenset(plugin_points(kind)) if kind else frozenset()


def _keys(config_name: str, overrides: Sequence[str]) -> list[str]:
    """Every setting of conf/<config_name>.yaml with the groups that `overrides` choose, as on the command line."""
    chosen = [override for override in overrides if (config_directory() / override.partition("=")[0]).is_dir()]
    try:
        plain = OmegaConf.to_container(_composed(config_name, chosen), resolve=False)
    except (HydraException, OmegaConfBaseException):
        return []
    return list(_paths(plain))


def _paths(plain: Any, prefix: str = "") -> Iterator[str]:
    for key, value in plain.items() if isinstance(plain, dict) else ():
        yield f"{prefix}{key}"
        yield from _paths(value, f"{prefix}{key}.")


def _plain(text: str) -> str:
    """Hydra's and OmegaConf's words, without what only their authors need."""
    return text.partition(" Config search path:")[0].partition(" See https://hydra.cc")[0]
