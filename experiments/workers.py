"""One function over many items, in this process or over several."""

import multiprocessing
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from typing import TypeVar

Item = TypeVar("Item")
T = TypeVar("T")


def in_workers(
    function: Callable[..., T], items: Sequence[Item], workers: int, *more: object
) -> Iterable[tuple[int, T]]:
    """(position, function(item, *more)) as they are done; in this process if there is one worker.

    What an item's function raises ends the rest: those that have not begun do not.
    """
    if workers == 1 or len(items) < 2:
        yield from ((at, function(item, *more)) for at, item in enumerate(items))
        return
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        with without_interrupt():
            waiting: dict[Future[T], int] = {pool.submit(function, item, *more): at for at, item in enumerate(items)}
        try:
            for done in as_completed(waiting):
                yield waiting[done], done.result()
        except KeyboardInterrupt:
            # Who works is ended, not waited for; otherwise the pool would let everybody finish first.
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()
            raise
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


@contextmanager
def without_interrupt() -> Iterator[None]:
    """Processes that are started meanwhile do not hear Ctrl-C, of which each would tell by itself, at length.

    A terminal sends it to all of them; whoever started them ends them. It reaches this process a moment later.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
