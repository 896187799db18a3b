"""A site's sessions: one at a time for a round, and no round is unmasked twice, not even after a restart.

Two sums over the same vectors with different survivors would reveal their difference: what one site sent. So before the
site reveals shares, it writes the round to a journal (an appended line, flushed to disk), and refuses it from then on.
"""

import errno
import json
import os
import threading
from collections import OrderedDict
from pathlib import Path

from pydantic import Field, ValidationError

from fedclaw.errors import SecureAggregationError
from fedclaw.files import PRIVATE_MODE, append_all, sync_directory
from fedclaw.privacy.secure_aggregation.keys import Signer, Verifier
from fedclaw.privacy.secure_aggregation.parameters import Parameters
from fedclaw.privacy.secure_aggregation.site import SiteSession
from fedclaw.protocol.frozen import Frozen

CAPACITY = 8
MAX_UNMASKED = 1_000_000
"""The most rounds that a site remembers. It refuses further ones rather than forget one."""


class _Unmasked(Frozen):
    federation: str
    run: str
    round: int = Field(ge=0)


class Sessions:
    """The open sessions of one site, and the rounds that it has unmasked. Thread-safe."""

    def __init__(self, journal: Path | None = None, capacity: int = CAPACITY) -> None:
        """`journal` is a file (mode 0600) that outlives the process; without one the rule holds in this process only.

        At most `capacity` sessions are open: a further one closes the oldest. Raises SecureAggregationError for a
        damaged journal.
        """
        self._journal = journal
        self._capacity = capacity
        self._open: OrderedDict[_Unmasked, SiteSession] = OrderedDict()
        self._unmasked = set() if journal is None else _read(journal)
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"Sessions({len(self._open)} open, {len(self._unmasked)} unmasked)"

    def start(self, parameters: Parameters, me: str, signer: Signer, verifier: Verifier) -> SiteSession:
        """Open a new session and close an earlier one of the same round: only one can ever be unmasked.

        Raises SecureAggregationError if the round has been unmasked, and where SiteSession does.
        """
        key = _Unmasked(federation=parameters.federation, run=parameters.run, round=parameters.round)
        with self._lock:
            self._refuse_second(key)
            session = SiteSession(parameters, me, signer, verifier, claim=lambda: self._record(key, parameters.session))
            if (earlier := self._open.pop(key, None)) is not None:
                earlier.close()
            self._open[key] = session
            while len(self._open) > self._capacity:
                self._open.popitem(last=False)[1].close()
        return session

    def get(self, federation: str, run: str, number: int, session: str) -> SiteSession:
        """The open session of round `number` with the id `session`. Raises SecureAggregationError if there is none."""
        with self._lock:
            found = self._open.get(_Unmasked(federation=federation, run=run, round=number))
        if found is None or found.parameters.session != session:
            raise SecureAggregationError(
                f"round {number} of {run!r:.80} has no open secure sum with the id {session!r:.40} at this site"
            )
        return found

    def close(self) -> None:
        """Close every session."""
        with self._lock:
            while self._open:
                self._open.popitem()[1].close()

    def _record(self, key: _Unmasked, session: str) -> None:
        with self._lock:
            self._refuse_second(key)
            if self._open.get(key) is None or self._open[key].parameters.session != session:
                raise SecureAggregationError(f"a newer secure sum of round {key.round} has replaced this one")
            if self._journal is not None:
                _append(self._journal, key)
            self._unmasked.add(key)
            del self._open[key]

    def _refuse_second(self, key: _Unmasked) -> None:
        if key in self._unmasked:
            raise SecureAggregationError(
                f"round {key.round} of {key.run!r:.80} has been unmasked before; "
                "the difference to a second sum could give away what one site sent"
            )
        if len(self._unmasked) >= MAX_UNMASKED:
            raise SecureAggregationError(
                f"this site has unmasked {MAX_UNMASKED} rounds and remembers no more; start a new journal of unmasked "
                "rounds once none of these runs can come back"
            )


def _append(journal: Path, key: _Unmasked) -> None:
    line = json.dumps(key.model_dump(), sort_keys=True) + "\n"
    new = not journal.exists()
    try:
        descriptor = os.open(journal, os.O_RDWR | os.O_APPEND | os.O_CREAT, PRIVATE_MODE)
        try:
            _require_whole(descriptor)
            append_all(descriptor, line.encode())
        finally:
            os.close(descriptor)
        if new:
            sync_directory(journal.parent)
    except OSError as error:
        raise SecureAggregationError(
            f"{journal} cannot be written ({error.strerror}); nothing is unmasked that is not written down first"
        ) from None


def _require_whole(descriptor: int) -> None:
    """Raise OSError for a file that ends within a line: a line appended to it could not be read again."""
    size = os.fstat(descriptor).st_size
    if size and os.pread(descriptor, 1, size - 1) != b"\n":
        raise OSError(errno.EIO, "it ends within a line; start the site again, which repairs it")


def _read(journal: Path) -> set[_Unmasked]:
    """The rounds in the journal. An incomplete last line is cut off: nothing was revealed after it."""
    try:
        content = journal.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            os.truncate(journal, len(whole))
    except FileNotFoundError:
        return set()
    except OSError as error:
        raise SecureAggregationError(f"{journal} cannot be read: {error.strerror}") from None
    unmasked = set()
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            unmasked.add(_Unmasked.model_validate_json(line))
        except ValidationError:
            raise SecureAggregationError(
                f"{journal}, line {number}, is no unmasked round; restore the file from a backup"
            ) from None
    return unmasked
