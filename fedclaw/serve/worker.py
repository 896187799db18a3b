"""A worker process: models in memory, HTTP and gRPC in one event loop.

It says that it is ready when every pinned model is loaded and warm. Told to stop, it says that it is not, waits until a
proxy has seen that, takes no more, and ends when what it had taken is answered.
"""

import asyncio
import gc
import logging
from contextlib import suppress
from functools import partial
from multiprocessing.synchronize import Event
from typing import Any

import grpc.aio

from fedclaw import processors
from fedclaw.errors import FedClawError
from fedclaw.serve.admission import admission_of, audit_log_of, authentication_of, grpc_clients, http_protocol, tls_of
from fedclaw.serve.app import HttpApplication
from fedclaw.serve.home import NodeHome, trust_of
from fedclaw.serve.http_server import GRACE, HttpServer, run_until_stopped
from fedclaw.serve.inference.grpc_service import add_inference, server_options
from fedclaw.serve.models.batching import QueueLimits
from fedclaw.serve.models.bundle_store import BundleStore
from fedclaw.serve.models.pool import BatchSeen, ModelPool, PoolSettings
from fedclaw.serve.monitoring.drift_watch import InputWatch
from fedclaw.serve.monitoring.metrics import WorkerMetrics
from fedclaw.serve.monitoring.tracing import open_tracer
from fedclaw.serve.node import NodeParts, ServingNode
from fedclaw.serve.routing.router import Router
from fedclaw.serve.security.tls import ServerTls
from fedclaw.serve.settings import NodeSettings
from fedclaw.serve.state.audit_log import AuditLog
from fedclaw.serve.state.feedback import FeedbackHandler
from fedclaw.serve.state.receipts import ReceiptKeys
from fedclaw.serve.state.store import StateStore
from fedclaw.serve.state.upkeep import anchor_head
from fedclaw.serve.supervisor import Launch
from fedclaw.serve.synchroniser import SynchronisedParts, Synchroniser

log = logging.getLogger("fedclaw.serve")

ANCHOR_SECONDS = PUSH_SECONDS = 10.0
REFRESH_SECONDS = 600.0
LEAST_DRAIN = 0.5
"""Seconds in which a client that keeps its connection busy is told, with an answer, that it is closed: one that is
closed without a word may have the next request on its way."""
_COLLECT = (5_000, 10, 10)
"""Objects made until the youngest are collected, and how often the older ones are with them."""


def run_worker(launch: Launch, ready: Event) -> None:
    """The process' main function."""
    run_until_stopped(lambda stopping: _run(launch, ready, stopping))


async def _run(launch: Launch, ready: Event, stopping: asyncio.Event) -> None:
    settings, home = launch.settings, NodeHome(launch.settings.state)
    store = await asyncio.to_thread(StateStore.open, home.database(settings.database))
    metrics = WorkerMetrics.open(home.metrics, launch.number)
    authentication = authentication_of(settings, home, metrics.token)
    await asyncio.to_thread(authentication.start)
    router = Router(store, on_tripped=metrics.tripped)
    await asyncio.to_thread(router.start)
    bundles = BundleStore(home.bundles)
    pool = ModelPool(
        bundles,
        trust_of(settings),
        _pool_settings(settings),
        _observer(metrics),
        on_loaded=metrics.loaded,
        on_unloaded=metrics.unloaded,
    )
    audit = audit_log_of(settings, home, launch.name)
    receipts = await asyncio.to_thread(partial(ReceiptKeys, store, days=settings.feedback_days))
    admission = admission_of(settings, home)
    writer = f"{settings.name}/{launch.name}"
    inputs = InputWatch(store, writer, settings.drift) if settings.drift.share > 0 else None
    tracer = open_tracer(settings.tracing, writer)
    node = ServingNode(NodeParts(authentication, admission, router, pool, metrics, audit, receipts, inputs, tracer))
    node.credit = FeedbackHandler(store, receipts, node.labels).credit
    synchroniser = Synchroniser(SynchronisedParts(launch, store, bundles, pool, node, metrics, inputs))
    await synchroniser.start()

    def started() -> None:
        _leave_to_stay()
        node.open = True
        metrics.ready(True)
        ready.set()

    tls = tls_of(settings)
    http = HttpServer(
        HttpApplication(node, settings.limits.body_bytes, settings.limits.deadline_seconds),
        settings.host,
        launch.ports.http,
        tls,
        protocol=http_protocol(settings),
        on_started=started,
    )
    grpc_server = await _grpc(launch, node, tls)
    serving = asyncio.ensure_future(http.run_here())
    works = (synchroniser.run(), _anchor(audit, store), _refresh(receipts), _push(inputs))
    others = [asyncio.ensure_future(work) for work in works]
    stop = asyncio.ensure_future(stopping.wait())
    try:
        await asyncio.wait([serving, stop], return_when=asyncio.FIRST_COMPLETED)
        node.open = False
        metrics.ready(False)
        if not serving.done():
            await asyncio.sleep(max(settings.drain_seconds, LEAST_DRAIN))
    finally:
        http.should_exit = True
        ends = [serving] if grpc_server is None else [serving, asyncio.ensure_future(grpc_server.stop(GRACE))]
        await asyncio.gather(*ends)
        for work in others:
            work.cancel()
        await node.close()
        await pool.close()
        await asyncio.to_thread(router.close)
        await asyncio.to_thread(anchor_head, audit, store)
        await asyncio.to_thread(_last_push, inputs)
        if tracer is not None:
            await asyncio.to_thread(tracer.close)
        audit.close()
        metrics.close()
        authentication.close()
        store.close()


def _leave_to_stay() -> None:
    """Have the garbage collector pass over what was made up to now: modules and models, which stay.

    It would go through all of it every few thousand requests, about 7% of the time of a small model's request.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_COLLECT)


async def _grpc(launch: Launch, node: ServingNode, tls: ServerTls | None) -> Any:
    """The gRPC server on the node's shared port; None where there is none."""
    if launch.ports.grpc is None:
        return None
    settings = launch.settings
    options = [*server_options(settings.limits.body_bytes), ("grpc.so_reuseport", 1)]
    server = grpc.aio.server(options=options)
    add_inference(server, node, grpc_clients(tls))
    address = f"{settings.host}:{launch.ports.grpc}"
    if tls is None:
        server.add_insecure_port(address)
    else:
        server.add_secure_port(address, tls.grpc_credentials())
    await server.start()
    return server


def _pool_settings(settings: NodeSettings) -> PoolSettings:
    limits = QueueLimits(settings.batching.queue, settings.limits.rows)
    cores = max(1, processors.usable() // settings.workers)
    return PoolSettings(settings.memory, settings.device, cores, limits)


def _observer(metrics: WorkerMetrics) -> Any:
    def observe(seen: BatchSeen) -> None:
        metrics.batch(seen.model, seen.version, seen.rows, seen.waited, seen.seconds)
        if seen.refused:
            metrics.rows_refused(seen.model, seen.version, seen.refused)

    return observe


async def _refresh(receipts: ReceiptKeys) -> None:
    """Learn of new feedback keys, until cancelled. While the store is away those known go on to sign."""
    while True:
        await asyncio.sleep(REFRESH_SECONDS)
        with suppress(FedClawError):
            await asyncio.to_thread(receipts.refresh)


async def _push(inputs: InputWatch | None) -> None:
    """Write what was counted of the inputs now and then, until cancelled."""
    while True:
        await asyncio.sleep(PUSH_SECONDS)
        await asyncio.to_thread(_last_push, inputs)


def _last_push(inputs: InputWatch | None) -> None:
    try:
        if inputs is not None:
            inputs.push()
    except Exception as error:
        log.warning("counts of inputs are not written for now: %s", error)


async def _anchor(audit: AuditLog, store: StateStore) -> None:
    """Tell the store the head of the audit log now and then, until cancelled."""
    while True:
        await asyncio.sleep(ANCHOR_SECONDS)
        await asyncio.to_thread(anchor_head, audit, store)
