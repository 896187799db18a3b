"""Every error that FedClaw raises on purpose.

    FedClawError                 exit code 1
    ├── UsageError               exit code 2: wrong command line or configuration
    ├── DataError                a data or schema file is not what it should be (file, row, column)
    │   └── NoExamples           a data file is well formed and holds no rows or images
    ├── ProvisionError           a key, certificate, descriptor or directory of a federation is missing or wrong
    ├── EncryptionError          a file encrypted at rest does not open, or its key cannot be had
    ├── SealError                a sealed update does not open: tampered, replayed or meant for another run
    ├── TransportError           a peer broke the protocol, or cannot be reached
    │   └── ConnectionRefused    the server will not have this site (revoked, wrong version); retrying is useless
    ├── UpdateError              an update that arrived cannot be added (shapes, NaN, weight)
    ├── CheckpointError          a checkpoint or run directory is missing or damaged
    ├── RunInUse                 another process is at work on the run
    ├── PrivacyError             a mechanism, model or loss cannot give the privacy that is asked of it
    ├── SecureAggregationError   a site or the server broke the protocol, or too few sites are left for it
    ├── LedgerError              the privacy ledger is damaged or cannot be written
    │   └── BudgetExceeded       a training round would exceed the budget of the data set
    ├── PluginError              a strategy, workload or schema is unknown or cannot be loaded
    ├── RoundError               too few sites answered, too often: the run cannot go on
    ├── CompressionError         a model cannot be pruned or distilled as asked
    └── BundleError              a bundle is incomplete, tampered with, or signed by someone else

A message says what was wrong, where, and what to do. It never contains a secret. Settings that it names may be values
in it (`Reason`): then a caller who sets them otherwise than the commands do is told in words of its own.
"""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Setting:
    """A setting by its path, and perhaps a value for it; as text `path` or `path=value`, as the commands write it."""

    path: str
    value: object = None

    def __str__(self) -> str:
        return self.path if self.value is None else f"{self.path}={self.value}"


class Reason(str):
    """Text in which settings are values: a string in the commands' words, and with `said` in anybody else's."""

    parts: tuple[str | Setting, ...]

    def __new__(cls, *parts: str | Setting) -> "Reason":
        """The parts one after another; those of a reason among them are taken over."""
        text = super().__new__(cls, "".join(map(str, parts)))
        text.parts = tuple(own for part in parts for own in (part.parts if isinstance(part, Reason) else (part,)))
        return text

    def said(self, words: Callable[[Setting], str]) -> str:
        """The text with each setting in these words."""
        return "".join(words(part) if isinstance(part, Setting) else part for part in self.parts)


class FedClawError(Exception):
    """Base of all FedClaw errors; a user sees its text, never a traceback."""

    exit_code = 1

    def __init__(self, *parts: str | Setting) -> None:
        super().__init__(Reason(*parts))

    def said(self, words: Callable[[Setting], str]) -> str:
        """The text with each setting that it names as a value in these words."""
        reason: Reason = self.args[0]
        return reason.said(words)


class UsageError(FedClawError):
    """Wrong command line or configuration."""

    exit_code = 2


class DataError(FedClawError):
    """A data or schema file is not what it should be."""


class NotInGraph(DataError):
    """A schema's preprocessing cannot be written as a graph; the message is a sentence that says why."""


class NoExamples(DataError):
    """A data file is well formed and holds no rows or images."""


class ProvisionError(FedClawError):
    """Something of a federation's keys, certificates or directories is missing or wrong."""


class EncryptionError(FedClawError):
    """A file that is encrypted at rest does not open, or the key for it cannot be had."""


class SealError(FedClawError):
    """A sealed update does not open under the binding it should have."""


class TransportError(FedClawError):
    """A peer broke the protocol or cannot be reached."""


class ConnectionRefused(TransportError):
    """The server refused this site for good; reconnecting would not help."""


class UpdateError(FedClawError):
    """An update cannot be added to the round's sum."""


class CheckpointError(FedClawError):
    """A checkpoint or run directory is missing or damaged."""


class RunInUse(FedClawError):
    """Another process is at work on the run."""


class PrivacyError(FedClawError):
    """A mechanism, model or loss cannot give the privacy that is asked of it."""


class SecureAggregationError(FedClawError):
    """Secure aggregation cannot go on: a peer broke its rules, or too few sites are left."""


class LedgerError(FedClawError):
    """The privacy ledger is damaged or cannot be written."""


class BudgetExceeded(LedgerError):
    """A training round would exceed the privacy budget of the data set."""


class PluginError(FedClawError):
    """A plug-in is unknown, not installed, or not of the promised type."""


class UnknownModel(PluginError):
    """A workload has no model of the name, none with those arguments, or none for the schema."""


class RoundError(FedClawError):
    """Too few sites answered, too often: the run cannot go on."""


class CompressionError(FedClawError):
    """A model cannot be pruned or distilled as asked."""


class BundleError(FedClawError):
    """A bundle is incomplete, tampered with, or not signed by the expected federation."""
