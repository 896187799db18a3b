"""One process' HTTP server: uvicorn on a socket that the node's processes share, ended by a signal to this process."""

import asyncio
import signal
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn

from fedclaw.serve.security.tls import ServerTls
from fedclaw.serve.supervisor import listening

GRACE = 6
"""Seconds that answers under way have, once no more are taken."""


class HttpServer(uvicorn.Server):
    """uvicorn, whose signals are the process' own matter."""

    def __init__(
        self,
        app: Any,
        host: str,
        port: int,
        tls: ServerTls | None,
        *,
        protocol: type[asyncio.Protocol],
        on_started: Callable[[], None] = lambda: None,
    ) -> None:
        config = uvicorn.Config(
            app,
            http=protocol,
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            date_header=False,
            proxy_headers=False,
            timeout_keep_alive=75,
            timeout_graceful_shutdown=GRACE,
            ssl_context_factory=None if tls is None else lambda *_: tls.context,
        )
        super().__init__(config)
        self._address, self._on_started = (host, port), on_started

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Nothing: see `run_until_stopped`."""
        yield

    async def startup(self, sockets: Any = None) -> None:
        """Listen."""
        await super().startup(sockets)
        self._on_started()

    async def run_here(self) -> None:
        """Serve until `should_exit` is set."""
        await self.serve(sockets=[listening(*self._address)])


def run_until_stopped(work: Callable[[asyncio.Event], Coroutine[Any, Any, None]]) -> None:
    """Run `work` in an event loop; its event is set by SIGTERM. Ctrl-C is the supervisor's matter."""
    import uvloop

    async def guarded() -> None:
        stopping = asyncio.Event()
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, stopping.set)
        watch = asyncio.ensure_future(_orphaned(stopping))
        try:
            await work(stopping)
        finally:
            watch.cancel()

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    uvloop.run(guarded())


async def _orphaned(stopping: asyncio.Event) -> None:
    """Stop when the supervisor is gone: nobody would start this process again, or end it."""
    import multiprocessing

    parent = multiprocessing.parent_process()
    while parent is not None and parent.is_alive():
        await asyncio.sleep(0.5)
    stopping.set()
