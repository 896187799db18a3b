"""One function over many items, in this process or over several."""

import multiprocessing
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
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
        waiting: dict[Future[T], int] = {pool.submit(function, item, *more): at for at, item in enumerate(items)}
        try:
            for done in as_completed(waiting):
                yield waiting[done], done.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
