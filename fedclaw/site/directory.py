"""A site's directory, opened: settings, data, ledger and log as one service.

site.yaml  schema file  data files  keys/  federation.json        what the operator put there
ledger.json        that a ledger was begun: see `fedclaw.site.journal.reconciliation`
state/ledger.sqlite  state/outbound.jsonl  state/outbox/  state/strategy/          what the client keeps there

With `encryption` in site.yaml all that is made from the site's data is encrypted (`fedclaw.identity.at_rest`): states
of strategies, answers that may be asked for again, and the site's own constants of preprocessing. The ledger, the
outbound log and the marks are not, for others have to read them: they hold what was charged and what left.

`begin_again` is the operator's explicit word that a site goes on though its privacy ledger is lost, or is older than
what it spent.

What was spent is not undone by losing the record of it, so the word is kept for ever: as an entry of the ledger that
the site goes on with, which `show`, the statement and every receipt from then on repeat. A ledger that is there and
whole, if only an older copy, is gone on with: what it has counts. All else is set aside, never deleted.
"""

import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from fedclaw.errors import DataError, LedgerError, UsageError
from fedclaw.files import PRIVATE_MODE
from fedclaw.identity.at_rest import PLAIN, FileStore
from fedclaw.identity.site_home import SiteKeys
from fedclaw.learning.registry import schema_class, workload_class
from fedclaw.learning.workload import Schema, schema_digest
from fedclaw.privacy.secure_aggregation import CertificateVerifier, Sessions
from fedclaw.site.device import choose_device
from fedclaw.site.journal.history import Index, read_ledger
from fedclaw.site.journal.ledger import Ledger
from fedclaw.site.journal.outbound import OutboundLog
from fedclaw.site.journal.reconciliation import (
    LedgerMark,
    answers_directory,
    check,
    check_mark,
    check_site,
    constants_file,
    ledger_file,
    losses,
    outbound_file,
    outbox_directory,
    read_mark,
    strategy_directory,
    write_mark,
)
from fedclaw.site.journal.reconciliation import state_directory as state_directory
from fedclaw.site.policy.policy import TEST
from fedclaw.site.secure import SecureIdentity
from fedclaw.site.service import SiteService
from fedclaw.site.settings import SiteSettings, load_site_settings
from fedclaw.site.shared_rows import note_on_shared_rows
from fedclaw.site.site import SiteData, fitted, load_data
from fedclaw.site.state import SiteStates, state_files

log = logging.getLogger(__name__)

LONGEST_REASON = 500


CONSTANTS = "state/preprocessing.json"
"""What the store calls the site's own constants."""


def site_store(root: Path, settings: SiteSettings) -> FileStore:
    """How files that are made from the site's data are read and written.

    Raises UsageError or EncryptionError if the key that site.yaml names is not to be had.
    """
    keys = settings.encryption.keyring(root)
    return PLAIN if keys is None else FileStore(keys, f"site/{settings.name}")


def personal_files(root: Path) -> list[tuple[Path, str]]:
    """Whole files that are made from the site's data, those that there are, with their names for its store."""
    answers = [(path, f"state/answers/{path.name}") for path in sorted(answers_directory(root).glob("*.answer"))]
    constants = [(constants_file(root), CONSTANTS)] if constants_file(root).is_file() else []
    return [*state_files(strategy_directory(root)), *answers, *constants]


@contextmanager
def only_client(root: Path) -> Iterator[None]:
    """Hold the site's directory against a second client. Raises UsageError when one is running."""
    state = state_directory(root)
    state.mkdir(parents=True, exist_ok=True, mode=0o700)
    descriptor = os.open(state / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"another client is already running on {root}; stop it first") from None
        yield
    finally:
        os.close(descriptor)


def open_service(
    root: Path, settings: SiteSettings, federation: str, *, keys: SiteKeys | None = None, durable: bool = True
) -> SiteService:
    """Load the site's data once and open its ledger and log. Raises DataError, LedgerError or UsageError.

    The ledger has to hold every head and charge that the outbound log says has left: an old copy that was put back
    is refused. So is, with EncryptionError, a file that is encrypted otherwise than site.yaml says. With `durable` off
    (simulation) nothing is written: the ledger lives in memory and nothing is logged.
    """
    agreed = read_schema(settings)
    schema, train = fitted(settings.data, agreed)
    data = load_data(settings.data, schema, train)
    state = state_directory(root)
    store = site_store(root, settings) if durable else PLAIN
    if durable:
        require_ledger(root)
        state.mkdir(parents=True, exist_ok=True, mode=0o700)
        store.check([path for path, _ in personal_files(root)])
        if constants := schema.constants_json():
            store.write(constants_file(root), constants.encode(), PRIVATE_MODE, CONSTANTS)
    with ExitStack() as opened:
        # Whatever fails below, what was opened until then is closed.
        ledger = Ledger.open(
            ledger_file(root) if durable else ":memory:",
            settings.data_set,
            # No rows are nobody's content: an empty test file may be the same.
            data.fingerprint if len(data.train) else None,
            data.public_examples,
        )
        opened.callback(ledger.close)
        ledger.check_declared(settings.data_set, data.public_examples)
        # Without noise on metrics the test data has no ledger, and what was charged to it before counts all the same.
        ledger.check_declared(settings.data_set + TEST, data.public_test_examples)
        ledger.check_unit(data.train.unit)
        if (test_ledger := _test_ledger(root, settings, data, durable=durable)) is not None:
            opened.callback(test_ledger.close)
            test_ledger.check_unit(data.train.unit)
        if (outbound := OutboundLog(outbound_file(root)) if durable else None) is not None:
            opened.callback(outbound.close)
        service = SiteService(
            name=settings.name,
            federation=federation,
            workload=workload_class(settings.workload)(schema),
            schema_digest=schema_digest(agreed.to_json()),
            data=data,
            policy=settings.policy.serving(settings.data_set),
            ledger=ledger,
            test_ledger=test_ledger,
            outbound=outbound,
            device=choose_device(settings.device),
            speed=settings.speed,
            states=SiteStates(strategy_directory(root) if durable else None, store),
            secure=_secure_identity(state, keys) if keys and durable else None,
        )
        if durable:
            _compare_journal(root, service)
            if data.test is not None and (
                told := note_on_shared_rows(service.policy, service.shared_test_rows, len(data.test))
            ):
                log.warning("%s", told)
        opened.pop_all()
    return service


def require_ledger(root: Path) -> None:
    """Raise LedgerError if the site's ledger is gone: before another is begun in its place."""
    if ledger_file(root).exists():
        return
    if outbound_file(root).exists():
        with Ledger.open(":memory:", "nothing") as begun, OutboundLog(outbound_file(root), read_only=True) as outbound:
            check(begun.index(), outbound.entries())
    check_mark(root, None)


def _compare_journal(root: Path, service: SiteService) -> None:
    """Raise LedgerError unless the ledger has all that left and was charged; from now on its charges are marked."""
    check_site(root)
    index = service.ledger.index()
    check_mark(root, index)
    write_mark(root, index)
    for sentence in losses(index):
        log.warning("%s", sentence)
    for ledger in (service.ledger, service.test_ledger):
        if ledger is not None:
            ledger.witness = partial(write_mark, root)


def _secure_identity(state: Path, keys: SiteKeys) -> SecureIdentity:
    return SecureIdentity(keys, CertificateVerifier(keys.descriptor), Sessions(state / "unmasked.jsonl"))


def _test_ledger(root: Path, settings: SiteSettings, data: SiteData, *, durable: bool) -> Ledger | None:
    """The same ledger, seen from the test data, if evaluations are charged to it."""
    if settings.policy.metrics_epsilon is None or settings.data.test is None:
        return None
    content = data.test_fingerprint if data.test is not None and len(data.test) else None
    if content == data.fingerprint:
        raise DataError(
            f"{settings.data.test} has the content of the training data; with metrics_epsilon the test data has a "
            "budget of its own and has to be held out"
        )
    where = ledger_file(root) if durable else ":memory:"
    return Ledger.open(where, settings.data_set + TEST, content, data.public_test_examples)


def read_schema(settings: SiteSettings) -> Schema:
    """The schema that the federation agreed on, for files as this site writes them. Raises DataError."""
    try:
        text = settings.schema_file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"the schema file {settings.schema_file} cannot be read: {error}") from error
    schema = schema_class(settings.workload).parse(text, str(settings.schema_file))
    return schema.written_as(settings.data.written)


def begin_again(root: Path, reason: str) -> str:
    """Have the site at `root` go on, and keep `reason`. Returns what was done, in a sentence.

    Raises UsageError if nothing is lost, no reason is given, or a client is running.
    """
    settings = load_site_settings(root)
    words = " ".join(reason.split())
    if not words or len(words) > LONGEST_REASON or not words.isprintable():
        raise UsageError(
            f'reason="…" is what stays of this in the ledger: one line, at most {LONGEST_REASON} characters'
        )
    with only_client(root):
        if (problem := what_is_lost(root)) is None:
            raise UsageError(
                f"nothing is lost at {root}: its ledger is whole, or none was begun yet; just start the client"
            )
        mark = _mark(root)
        kept = _readable(root)
        aside = _set_aside(root, with_ledger=kept is None)
        with Ledger.open(ledger_file(root), settings.data_set) as ledger:
            ledger.begin_again(words, problem, None if mark is None else mark.model_dump())
            write_mark(root, ledger.index())
    gone_on = "a new ledger was begun" if kept is None else f"the ledger of {kept.sequence} entries is gone on with"
    return f"{gone_on}; what was lost is not counted, which stays written in it; the rest is in {aside}"


def what_is_lost(root: Path) -> str | None:
    """Why the site at `root` does not start on its ledger; None: it does."""
    try:
        if ledger_file(root).exists():
            check_site(root)
            check_mark(root, read_ledger(ledger_file(root))[1])
        else:
            check_mark(root, None)
            if outbound_file(root).exists():
                check_site(root)
    except LedgerError as error:
        return str(error)
    return None


def _mark(root: Path) -> LedgerMark | None:
    try:
        return read_mark(root)
    except LedgerError as error:
        log.warning("%s", error)
        return None


def _readable(root: Path) -> Index | None:
    """The ledger that is there, if its own chain holds."""
    try:
        return read_ledger(ledger_file(root))[1]
    except LedgerError:
        return None


def _set_aside(root: Path, *, with_ledger: bool) -> Path:
    """Move what does not belong to the ledger that is gone on with, answers that wait to be sent again included."""
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S")
    aside = state_directory(root) / f"before-{stamp}"
    aside.mkdir(mode=0o700)
    ledger = ledger_file(root)
    moved = [outbound_file(root), outbox_directory(root), answers_directory(root)]
    moved += [ledger, ledger.with_name(ledger.name + "-journal")] if with_ledger else []
    for path in moved:
        if path.exists():
            path.replace(aside / path.name)
    return aside
