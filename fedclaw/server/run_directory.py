"""What a run leaves at the coordinator: its record, checkpoints, metrics, receipts and the final model.

The round in flight (`PendingRound`) is written down before its questions go out, in round.json. A server
that is killed in mid-round resumes with the same parameters, plan and cohort, so the questions are byte for byte the
same, and a site that has answered already answers from its outbox at no further cost.
"""

import fcntl
import hashlib
import json
import os
import re
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from fedclaw.errors import CheckpointError, DataError, PluginError, RunInUse, UsageError
from fedclaw.files import PRIVATE_MODE, append_all, write_atomic
from fedclaw.identity.at_rest import PLAIN, FileStore
from fedclaw.identity.data_keys import Keyring
from fedclaw.learning.tasks.classification import Classification
from fedclaw.learning.workload import Schema, Workload, schema_digest
from fedclaw.privacy.mechanisms.choice import mechanism_of
from fedclaw.protocol.arrays import Arrays, read_npz, write_npz
from fedclaw.protocol.frozen import Frozen, explain
from fedclaw.protocol.limits import MOST_EXAMPLES, Name
from fedclaw.protocol.receipt import Receipt, Trust
from fedclaw.protocol.terms import DataUnit, Relation, RoundRules, SecureRequest, StrategyRecord, Terms
from fedclaw.server.checkpoint import existing
from fedclaw.server.software import Software, software

PENDING = "round.json"
_BLOCK = 1 << 20


class PendingRound(Frozen):
    """The nodes that the round in flight asks."""

    round: int
    nodes: tuple[int, ...]
    connected: int = Field(default=0, ge=0)
    """Sites that the cohort was selected from."""
    unmasking: bool = False
    """Whether its sites were asked to unmask a secure sum, which they do once for a round: it is not asked again."""

    @classmethod
    def read(cls, root: Path) -> Self | None:
        """The round that was in flight when the run in `root` stopped. Raises CheckpointError for a damaged record."""
        path = root / PENDING
        if not path.is_file():
            return None
        try:
            return cls.model_validate_json(path.read_bytes())
        except ValueError as error:
            raise CheckpointError(f"{path} is damaged; remove it to sample a new cohort for the round") from error

    def write(self, root: Path) -> None:
        """Write the record; it is on disk on return."""
        write_atomic(root / PENDING, self.model_dump_json().encode(), PRIVATE_MODE)

    @classmethod
    def drop(cls, root: Path) -> None:
        """Give up the round in flight, so that it is asked of whoever is connected when it begins again.

        With another number of sites that is a new question: a site that had answered the old one trains, and pays,
        again. A round whose sites have begun to unmask a secure sum is not given up but passed over.
        """
        pending = cls.read(root)
        if pending is None or not pending.unmasking:
            cls.remove(root)

    @classmethod
    def remove(cls, root: Path) -> None:
        """Remove the record: no round is in flight."""
        (root / PENDING).unlink(missing_ok=True)


LOCK = "run.lock"
"""Held by the process that is at work on a run; the file stays."""

_HELD: set[Path] = set()
_HELD_LOCK = threading.Lock()

RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}\Z")


class Simulated(Frozen):
    """What is different in a run whose clients were simulated (`fedclaw.simulation`): nobody pays for a lost round."""

    clients: int = Field(ge=1)
    save_every: float = Field(default=0.0, ge=0)
    """Least seconds between two checkpoints; what came after the last one is computed again by a run that goes on."""
    repeatable_noise: bool = False
    """For research only: noise and Poisson samples were made from the run's seed, and so guarantee nothing."""


class ReleaseUse(Frozen):
    """The release of federated statistics that a run's preprocessing comes from, and what it cost each site."""

    run: str
    epsilon: float = Field(gt=0)
    delta: float = Field(gt=0, lt=1)
    relation: Relation = "zero-out"
    trust: Trust = "nobody"
    """The weakest of any site's. The unit is the schema's."""


class RunRecord(Terms):
    """What was asked for, written once when the run begins. `schema_text` is the schema's canonical JSON."""

    version: int = 1
    schema_text: str
    strategy: StrategyRecord
    secure: SecureRequest | None = None
    task: str = Classification.name
    """What is predicted; a record that does not say so is of classes."""
    metrics: tuple[Name, ...] = Field(default=Classification.METRICS, max_length=64)
    statistics: ReleaseUse | None = None
    """The release that `preprocessing` was made from."""
    rules: RoundRules = RoundRules()
    simulated: Simulated | None = None
    """None: a run with sites."""
    seed: int = 0
    created: datetime = Field(default_factory=lambda: datetime.now(UTC))
    software: Software | None = None
    """What the process that began it ran on; None in a record from before this was noted."""

    @model_validator(mode="after")
    def _promises(self) -> Self:
        """Settings whose guarantee would not hold are refused, with the reason."""
        if reason := mechanism_of(self).contradiction():
            raise ValueError(reason)
        return self

    @property
    def schema_digest(self) -> str:
        """SHA-256 of the schema: sites with another schema refuse."""
        return schema_digest(self.schema_text)

    def make_schema(self) -> Schema:
        """The run's schema, with the federation's constants if it takes any; needs no torch."""
        from fedclaw.learning.registry import schema_class

        origin = f"the record of run {self.run}"
        schema = schema_class(self.workload).parse(self.schema_text, origin)
        if schema.task.name != self.task:
            raise DataError(f"{origin}: it says {self.task}, and its schema is of {schema.task.name}")
        return schema if self.preprocessing is None else schema.with_constants(self.preprocessing, origin)

    @property
    def unit(self) -> DataUnit:
        """What the run's schema protects.

        A schema that is not installed here is taken to name no persons: the rounds need no workload.
        """
        try:
            return self.make_schema().unit
        except PluginError:
            return "example"

    def make_workload(self) -> Workload:
        """The run's workload, with its schema."""
        from fedclaw.learning.registry import workload_class

        return workload_class(self.workload)(self.make_schema())


class SiteReceipt(Frozen):
    """The last receipt of a site, and how many training examples it trained on."""

    examples: int = Field(ge=0, le=MOST_EXAMPLES)
    receipt: Receipt

    def after(self, before: "SiteReceipt | None") -> "SiteReceipt":
        """What is kept of a site that said `before` earlier in the same run: nothing in it gets better.

        A number that changes is none that was declared and stays, whatever the receipts call it.
        """
        if before is None:
            return self
        receipt = self.receipt.after(before.receipt)
        if self.examples != before.examples:
            receipt = receipt.model_copy(update={"relation": "zero-out"})
        return self.model_copy(update={"receipt": receipt})


_RECEIPTS = TypeAdapter(dict[str, SiteReceipt])


class _MetricsLine(BaseModel):
    """What every reader of metrics.jsonl relies on; the other fields are for people."""

    model_config = ConfigDict(strict=True)

    round: int = Field(ge=1)
    metrics: dict[str, float]


class RunDirectory:
    """runs/<run>/: run.json, checkpoint-NNNN.ckpt, metrics.jsonl, receipts.json, model.npz, compressed/, run.lock.

    With `keys` what holds parameters (checkpoints, model.npz, compressed/model.npz) is encrypted. What an auditor
    reads, the record, metrics and receipts, is not.
    """

    def __init__(self, root: Path, keys: Keyring | None = None) -> None:
        self.root = root
        self.keys = keys
        self._newest_line: int | None = None
        """Round of the last line of metrics.jsonl; None: it has not been looked at."""
        self._holds = False

    @classmethod
    def create(cls, root: Path, record: RunRecord, keys: Keyring | None = None) -> "RunDirectory":
        """Begin a run, and note what it is begun with. Raises UsageError when the directory already holds one."""
        directory = cls(root, keys)
        record = record.model_copy(update={"software": software()})
        with directory.held():
            directory.require_new()
            write_atomic(directory.record_path, record.model_dump_json(indent=2).encode())
        return directory

    @contextmanager
    def held(self) -> Iterator[None]:
        """Nobody else writes to the run as long as the block lasts. Raises RunInUse when somebody does already.

        A lock of the operating system's, which ends with the process, however it ends; reading needs none. The object
        that holds the run may hold it again.
        """
        if self._holds:
            yield
            return
        with _locked(self.root):
            self._holds = True
            try:
                yield
            finally:
                self._holds = False

    def require_new(self) -> None:
        """Raise UsageError when the directory already holds a run."""
        if self.record_path.exists():
            raise UsageError(
                f"{self.root} already holds a run; continue it with resume={self.root} or choose another run name"
            )

    @classmethod
    def open(cls, root: Path, keys: Keyring | None = None) -> "RunDirectory":
        """A run that was begun. Raises UsageError when `root` is not one."""
        directory = cls(root, keys)
        if not directory.record_path.is_file():
            raise UsageError(f"{root} is not a run directory: it has no run.json (a run is a directory like runs/NAME)")
        return directory

    @property
    def record_path(self) -> Path:
        """What was asked for."""
        return self.root / "run.json"

    @property
    def model_path(self) -> Path:
        """The final global parameters."""
        return self.root / "model.npz"

    @property
    def metrics_path(self) -> Path:
        """One JSON line a round."""
        return self.root / "metrics.jsonl"

    @property
    def receipts_path(self) -> Path:
        """The last receipt of every site."""
        return self.root / "receipts.json"

    @property
    def compressed(self) -> Path:
        """What the compression stage left, if it ran."""
        return self.root / "compressed"

    @property
    def compressed_model(self) -> Path:
        """The parameters that it left."""
        return self.compressed / "model.npz"

    def record(self) -> RunRecord:
        """The run's record. Raises CheckpointError when it is damaged."""
        with _damage_told(self.record_path):
            return RunRecord.model_validate_json(self.record_path.read_bytes())

    def workload(self) -> Workload:
        """The run's workload, with its schema."""
        return self.record().make_workload()

    def write_model(self, parameters: Mapping[str, NDArray[np.float32]]) -> None:
        """Write the final global parameters."""
        with self.store.replacing(self.model_path) as file:
            write_npz(file, parameters)

    def read_model(self) -> Arrays:
        """The final global parameters. Raises CheckpointError when the run has not finished or the file is damaged."""
        if not self.model_path.is_file():
            raise CheckpointError(
                f"{self.root} has no model.npz: the run has not finished; continue it with resume={self.root}"
            )
        with self.store.open(self.model_path) as file:
            return read_npz(file, self.model_path)

    @cached_property
    def store(self) -> FileStore:
        """How files with parameters are read and written. Raises CheckpointError when the record is damaged."""
        return PLAIN if self.keys is None else FileStore(self.keys, f"run/{self.record().run}")

    def parameter_files(self) -> list[tuple[Path, str]]:
        """The files that hold parameters, those that there are, with their names for `store`."""
        found = [*existing(self.root), self.model_path, self.compressed_model]
        return [(path, path.relative_to(self.root).as_posix()) for path in found if path.is_file()]

    def sha256_of(self, path: Path) -> str:
        """Hexadecimal SHA-256 of a file that holds parameters, as it is in the clear. Raises EncryptionError."""
        with self.store.open(path, path.relative_to(self.root).as_posix()) as file:
            digest = hashlib.sha256()
            while block := file.read(_BLOCK):
                digest.update(block)
            return digest.hexdigest()

    def require_whole(self) -> None:
        """Raise UsageError for a run whose model is not whole at the server, to be compressed or exported."""
        if personal := self.record().personal:
            raise UsageError(
                f"{self.root} holds no whole model: {', '.join(personal)} never left the sites "
                f"(strategy {self.record().strategy.name!r}) and are at its sites; export a run of a strategy that "
                "shares all parameters"
            )

    def append_metrics(self, round_number: int, values: Mapping[str, Any], *, durable: bool = True) -> None:
        """Add a line for `round_number`; a line of the same or a later round (before a resume) is replaced.

        On disk on return if it is to be `durable`.
        """
        line = json.dumps({"round": round_number, **values}) + "\n"
        newest, self._newest_line = self._newest_line, None
        # Until the line is written nothing is known: after a failure the next one is written with the whole file.
        if newest is not None and newest < round_number:
            with self.metrics_path.open("ab", buffering=0) as file:
                append_all(file.fileno(), line.encode(), durable=durable)
        else:
            kept = [json.dumps(line) + "\n" for line in self.read_metrics() if line["round"] < round_number]
            write_atomic(self.metrics_path, "".join([*kept, line]).encode())
        self._newest_line = round_number

    def read_metrics(self) -> list[dict[str, Any]]:
        """The rounds so far, in order. Raises CheckpointError when the file is damaged.

        A last line without an end was being written when the process stopped: it does not count.
        """
        if not self.metrics_path.is_file():
            return []
        with _damage_told(self.metrics_path):
            lines = self.metrics_path.read_text(encoding="utf-8").split("\n")[:-1]
        for number, line in enumerate(lines, 1):
            with _damage_told(self.metrics_path, f" in line {number}"):
                _MetricsLine.model_validate_json(line)
        return [json.loads(line) for line in lines]

    def write_receipts(self, receipts: Mapping[str, SiteReceipt]) -> None:
        """Replace the last receipt of every site, by site name, a line each: there may be very many."""
        lines = (
            f"  {json.dumps(name)}: {json.dumps(receipt.model_dump(mode='json'))}"
            for name, receipt in sorted(receipts.items())
        )
        write_atomic(self.receipts_path, ("{\n" + ",\n".join(lines) + "\n}\n").encode())

    def read_receipts(self) -> dict[str, SiteReceipt]:
        """The last receipt of every site that ever trained in this run, by site name. Raises CheckpointError."""
        path = self.receipts_path
        if not path.is_file():
            return {}
        with _damage_told(path):
            return _RECEIPTS.validate_json(path.read_bytes())

    def check(self) -> None:
        """Read what a run goes on with, before a site is asked for anything.

        Raises CheckpointError, or EncryptionError where files are encrypted otherwise than the keys say.
        """
        self.record()
        self.read_receipts()
        self.read_metrics()
        self.check_encryption()

    def check_encryption(self) -> None:
        """Raise EncryptionError for a file with parameters that is encrypted otherwise than the keys say."""
        self.store.check([path for path, _ in self.parameter_files()])


@contextmanager
def _locked(root: Path) -> Iterator[None]:
    # A lock of fcntl's belongs to the process, and forked workers do not inherit it: they may outlive a server that was
    # killed. Within a process the set below keeps order, and nothing else opens the file, for closing it would unlock.
    path = (root / LOCK).resolve()
    with _HELD_LOCK:
        if path in _HELD:
            raise RunInUse(f"{root} is being run already, in this process; end that run first")
        _HELD.add(path)
    try:
        root.mkdir(parents=True, exist_ok=True)
        with path.open("a+b") as file:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                file.seek(0)
                holder = file.read(200).decode("ascii", "replace").strip() or "another process"
                raise RunInUse(
                    f"{root} is being run by {holder}: two at once would ask the sites for different rounds under one "
                    "name; wait until it has ended, or stop it"
                ) from None
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode("ascii", "replace"))
            file.flush()
            yield
    finally:
        with _HELD_LOCK:
            _HELD.discard(path)


@contextmanager
def _damage_told(path: Path, where: str = "") -> Iterator[None]:
    """What cannot be read, as JSON or as text, is a CheckpointError that names the file."""
    try:
        yield
    except ValueError as error:
        wrong = explain(error) if isinstance(error, ValidationError) else str(error)
        raise CheckpointError(f"{path} is damaged{where}: {wrong}") from error
