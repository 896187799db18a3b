"""The control process of a node: the admin port, the metrics, and the decisions about versions.

Several nodes may share a state store; the control process of each makes decisions, and compare-and-swap lets one of
them be the first.
"""

import asyncio
import logging
import threading
import time
from multiprocessing.synchronize import Event

from fedclaw.serve.admin_access import AdminAccess
from fedclaw.serve.admin_port import AdminPort
from fedclaw.serve.admission import admin_rate, audit_log_of, authentication_of, http_protocol, tls_of
from fedclaw.serve.home import NodeHome, trust_of
from fedclaw.serve.http_server import HttpServer, run_until_stopped
from fedclaw.serve.models.bundle_store import MOST_BYTES, BundleStore
from fedclaw.serve.monitoring.metrics import NodeMetrics
from fedclaw.serve.observer import NodeObserver
from fedclaw.serve.repeated_work import RepeatedWork
from fedclaw.serve.routing.controller import Controller
from fedclaw.serve.state.audit_log import AuditLog
from fedclaw.serve.state.receipts import ReceiptKeys
from fedclaw.serve.state.store import StateStore
from fedclaw.serve.state.upkeep import anchor_head, keep_up
from fedclaw.serve.supervisor import Launch

log = logging.getLogger("fedclaw.serve")

PERIOD = 0.25
UPKEEP_SECONDS = 60.0


def run_control(launch: Launch, ready: Event) -> None:
    """The control process' main function."""
    run_until_stopped(lambda stopping: _run(launch, ready, stopping))


async def _run(launch: Launch, ready: Event, stopping: asyncio.Event) -> None:
    settings, home = launch.settings, NodeHome(launch.settings.state)
    store = await asyncio.to_thread(StateStore.open, home.database(settings.database))
    bundles = BundleStore(home.bundles)
    await asyncio.to_thread(home.sweep)
    await asyncio.to_thread(bundles.sweep)
    authentication = authentication_of(settings, home)
    authentication.start()
    metrics = NodeMetrics(home.metrics, settings.workers)
    observer = NodeObserver(settings, store, bundles, trust_of(settings), home.audit, metrics)
    audit = audit_log_of(settings, home, launch.name)
    access = AdminAccess(authentication, audit, metrics, admin_rate(settings))
    port = AdminPort(launch, store, access, metrics, observer)
    ended = threading.Event()
    decisions = threading.Thread(target=_decide, args=(store, ended), name="fedclaw-decisions", daemon=True)
    observing = threading.Thread(target=observer.run, args=(ended,), name="fedclaw-observer", daemon=True)
    decisions.start()
    upkeep = (store, port, audit, settings.feedback_days, ended)
    threading.Thread(target=_keep_up, args=upkeep, name="fedclaw-upkeep", daemon=True).start()
    observing.start()
    protocol = http_protocol(settings, body_bytes=MOST_BYTES)
    tls = tls_of(settings)
    server = HttpServer(port.app, settings.admin.host, launch.ports.admin, tls, protocol=protocol, on_started=ready.set)
    serving = asyncio.ensure_future(server.run_here())
    stop = asyncio.ensure_future(stopping.wait())
    await asyncio.wait([serving, stop], return_when=asyncio.FIRST_COMPLETED)
    server.should_exit = True
    await serving
    ended.set()
    await asyncio.to_thread(decisions.join, 5)
    await asyncio.to_thread(observing.join, 5)
    await asyncio.to_thread(anchor_head, audit, store)
    audit.close()
    authentication.close()
    store.close()


def _decide(store: StateStore, ended: threading.Event) -> None:
    """Make decisions until the process ends. The store may be away: then nothing is decided."""
    controller, work = Controller(store), RepeatedWork(log, "no decisions for now")
    while not ended.wait(PERIOD):
        with work.attempt():
            controller.step(time.time())


def _keep_up(store: StateStore, port: AdminPort, audit: AuditLog, feedback_days: float, ended: threading.Event) -> None:
    """Merge and drop what is old in the store, follow the feedback key with a new one, and anchor the audit log, until
    the process ends."""
    receipts: ReceiptKeys | None = None
    while not ended.wait(UPKEEP_SECONDS):
        anchor_head(audit, store)
        try:
            receipts = receipts or ReceiptKeys(store, days=feedback_days)
            keep_up(store, receipts, feedback_days=feedback_days)
            port.tidy(time.monotonic())
        except Exception as error:
            log.warning("the state store is not tidied for now: %s", error)
