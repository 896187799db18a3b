"""A site's directory, opened: settings, data, ledger and log as one service.

site.yaml  schema file  data files  keys/  federation.json        what the operator put there
ledger.json        that a ledger was begun: see `fedclaw.site.journal.reconciliation`
state/ledger.sqlite  state/outbound.jsonl  state/outbox/  state/strategy/          what the client keeps there
"""

import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from fedclaw.errors import DataError, UsageError
from fedclaw.files import PRIVATE_MODE, write_atomic
from fedclaw.identity.site_home import SiteKeys
from fedclaw.learning.registry import schema_class, workload_class
from fedclaw.learning.workload import Schema, schema_digest
from fedclaw.privacy.secure_aggregation import CertificateVerifier, Sessions
from fedclaw.site.data import load_data
from fedclaw.site.device import choose_device
from fedclaw.site.journal.ledger import Ledger
from fedclaw.site.journal.outbound import OutboundLog
from fedclaw.site.journal.reconciliation import check, check_mark, check_site, losses, write_mark
from fedclaw.site.layout import ledger_file, outbound_file, strategy_directory
from fedclaw.site.layout import state_directory as state_directory
from fedclaw.site.policy.policy import TEST
from fedclaw.site.secure import SecureIdentity
from fedclaw.site.service import SiteService
from fedclaw.site.settings import SiteSettings
from fedclaw.site.shared_rows import note
from fedclaw.site.site import SiteData
from fedclaw.site.state import SiteStates

log = logging.getLogger(__name__)


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
    is refused. With `durable` off (simulation) nothing is written: the ledger lives in memory and nothing is logged.
    """
    agreed = read_schema(settings)
    schema, train = agreed.fit_examples(settings.data.train)
    data = load_data(settings.data, schema, train)
    state = state_directory(root)
    if durable:
        require_ledger(root)
        state.mkdir(parents=True, exist_ok=True, mode=0o700)
        if constants := schema.constants_json():
            write_atomic(state / "preprocessing.json", constants.encode(), PRIVATE_MODE)
    with ExitStack() as opened:
        # Whatever fails below, what was opened until then is closed.
        ledger = Ledger.open(
            ledger_file(root) if durable else ":memory:", settings.data_set, fingerprint=data.fingerprint
        )
        opened.callback(ledger.close)
        if (test_ledger := _test_ledger(root, settings, data, durable=durable)) is not None:
            opened.callback(test_ledger.close)
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
            states=SiteStates(strategy_directory(root) if durable else None),
            secure=_secure_identity(state, keys) if keys and durable else None,
        )
        if durable:
            _compare_journal(root, service)
            if data.test is not None and (told := note(service.policy, service.shared_test_rows, len(data.test))):
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
    content = data.test_fingerprint
    if content == data.fingerprint:
        raise DataError(
            f"{settings.data.test} has the content of the training data; with metrics_epsilon the test data has a "
            "budget of its own and has to be held out"
        )
    return Ledger.open(ledger_file(root) if durable else ":memory:", settings.data_set + TEST, fingerprint=content)


def read_schema(settings: SiteSettings) -> Schema:
    """The schema that the federation agreed on, for files as this site writes them. Raises DataError."""
    try:
        text = settings.schema_file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"the schema file {settings.schema_file} cannot be read: {error}") from error
    schema = schema_class(settings.workload).parse(text, str(settings.schema_file))
    return schema.written_as(settings.data.written)
