"""Batches without waiting: what comes while the model computes, or in the same turn of the event loop, goes together.

No request waits for company by the clock. An idle model computes what it gets at once; what arrives meanwhile makes the
next batch, with whoever comes in the same few turns of the event loop: clients that were answered together come back
together, and would otherwise fall apart into two halves, each computed while the other one waits.

The rows of a batch are answered independently of each other, so a request gets the answer that it would get alone.

- The queue is bounded by rows. A request that finds it full is refused, with the time after which it would not.
- A request whose deadline has passed, or cannot be met, is refused before it costs inference.
- A request of more rows than a batch has is answered in pieces. While others wait, it gets a quarter of each batch.
- A client that has gone frees its place.

All methods belong to the event loop's thread; only inference may run in another one.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedclaw.learning.preprocessing import REFUSED, Columns
from fedclaw.serve.refusals import ServeRefusal

Outputs = Mapping[str, NDArray[Any]]
Infer = Callable[[Columns], Outputs]
_SMOOTHING = 0.2
_SHARE_OF_LONG = 4
_LEAST_RETRY = 0.01
_TURNS = 3
"""Of the event loop, from a socket that can be read to a request that is in the queue."""
_LEAST_SECONDS = 1e-9


@dataclass(frozen=True, slots=True)
class Execution:
    """How a model computes, as the probe found it or the operator set it."""

    threads: int = 1
    """Threads that one batch is computed with."""
    max_batch: int = 32
    """The most rows that are computed at once."""
    batching: bool = True
    """Whether rows of several requests are computed together."""
    inline: bool = False
    """Whether the event loop computes itself, which costs no change of threads; for models that take microseconds."""
    seconds_a_batch: float = 1e-4
    """What a batch costs beside its rows: the estimate that waiting times begin with."""
    seconds_a_row: float = 1e-5


@dataclass(frozen=True, slots=True)
class QueueLimits:
    """How much may wait."""

    queued_rows: int = 4096
    """Rows of requests that fit into a batch; and as many of longer ones, which stand in a queue of their own."""
    request_rows: int = 10_000
    """Rows of one request."""


@dataclass(frozen=True, slots=True)
class BatchFigures:
    """A batch that was computed, for metrics."""

    rows: int
    waited: float
    """Seconds from the queue to the batch, of its oldest request."""
    seconds: float
    """Until it was computed."""
    refused: int
    """Rows that get no answer."""


class BatchMoments:
    """When what became of a request, by `time.monotonic`, for who traces it. None: it did not get there."""

    __slots__ = ("began", "ended", "preparing", "queued")

    def __init__(self) -> None:
        self.preparing: float | None = None
        """Its preprocessing began, in batches of its own; None: there is none, or it is a part of the model's graph."""
        self.queued: float | None = None
        """It came into the model's queue."""
        self.began: float | None = None
        """Its first batch began."""
        self.ended: float | None = None
        """Its last batch ended."""


class _Queue:
    """Requests that wait, and how many rows of theirs are not in a batch yet."""

    __slots__ = ("jobs", "rows")

    def __init__(self) -> None:
        self.jobs: deque[_Job] = deque()
        self.rows = 0

    def add(self, job: "_Job") -> None:
        self.jobs.append(job)
        self.rows += job.rows

    def drop(self, job: "_Job") -> None:
        """Forget what is left of a request; its place is passed over."""
        self.rows -= job.rows - job.taken
        job.taken = job.rows


class _Job:
    """A request's rows on their way through batches."""

    __slots__ = ("columns", "deadline", "future", "moments", "parts", "rows", "since", "taken")

    def __init__(
        self,
        columns: Columns,
        rows: int,
        deadline: float | None,
        since: float,
        future: "asyncio.Future[Outputs]",
        moments: BatchMoments | None,
    ) -> None:
        self.columns = columns
        self.rows = rows
        self.deadline = deadline
        self.since = since
        self.future = future
        self.moments = moments
        self.taken = 0
        self.parts: list[Outputs] = []


_Piece = tuple[_Job, int, int]
"""A job, and which of its rows are in the batch: the first, and the one after the last."""
_Result = tuple[Sequence[_Piece], Outputs | Exception]
"""What a batch, or a part of it, came to."""


class EagerBatcher:
    """Answers requests to one model through `infer`, in batches where that is faster."""

    def __init__(
        self,
        infer: Infer,
        execution: Execution,
        limits: QueueLimits | None = None,
        executor: Executor | None = None,
        observe: Callable[[BatchFigures], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`infer` maps columns of N rows to outputs of N rows and may run in `executor`, one batch at a time.

        `observe` is told of each batch.
        """
        if executor is None and not execution.inline:
            raise ValueError("a model that is not computed inline needs an executor")
        self._infer = infer
        self.execution = execution
        self._limits = limits or QueueLimits()
        self._executor = executor
        self._observe = observe
        self._clock = clock
        self._short = _Queue()
        self._long = _Queue()
        self._running: tuple[float, int] | None = None
        self._scheduled = False
        self._patience = 0
        self._seen = 0
        self._crowded = False
        self._after_long = False
        self._slowness = 1.0
        self._traced = False

    @property
    def queued_rows(self) -> int:
        """Rows that wait for a batch."""
        return self._short.rows + self._long.rows

    async def answer(
        self, columns: Columns, rows: int, deadline: float | None = None, moments: BatchMoments | None = None
    ) -> Outputs:
        """The outputs of the N rows, in order. `moments` is filled in as they come.

        Raises ServeRefusal: `too_large`, `overloaded`, `deadline_exceeded`, or `internal` where the model fails.
        """
        execution = self.execution
        queue = self._short if rows <= execution.max_batch else self._long
        self._admit(queue, rows, deadline)
        if execution.inline and not execution.batching and queue is self._short and not queue.rows:
            return self._alone(columns, rows, moments)
        loop = asyncio.get_running_loop()
        job = _Job(columns, rows, deadline, self._clock(), loop.create_future(), moments)
        if moments is not None:
            self._traced, moments.queued = True, job.since
        queue.add(job)
        self._schedule(loop)
        try:
            return await job.future
        except asyncio.CancelledError:
            queue.drop(job)
            raise

    def expected_seconds(self, rows: int, requests: int = 1) -> float:
        """How long `rows` of so many `requests` take, by the probe's figures and what batches took lately."""
        execution = self.execution
        batches = -(-rows // execution.max_batch)
        if not execution.batching:
            batches = max(batches, requests)
        return self._slowness * (batches * execution.seconds_a_batch + rows * execution.seconds_a_row)

    def _admit(self, queue: _Queue, rows: int, deadline: float | None) -> None:
        if rows > self._limits.request_rows:
            raise ServeRefusal("too_large", f"a request has at most {self._limits.request_rows} rows; send it in parts")
        if queue.rows and queue.rows + rows > self._limits.queued_rows:
            wait = max(self._waiting_seconds(queue), _LEAST_RETRY)
            raise ServeRefusal("overloaded", "the model has more requests waiting than it can answer", wait)
        # An idle model tries: if nothing ran any more, nobody would notice that it has become fast again.
        busy = self._running is not None or queue.rows
        if deadline is None or (not busy and self._clock() < deadline):
            return
        wait = self._waiting_seconds(queue)
        if self._clock() + wait + self.expected_seconds(rows) >= deadline:
            raise ServeRefusal("deadline_exceeded", "the deadline cannot be met", max(wait, _LEAST_RETRY))

    def _waiting_seconds(self, queue: _Queue) -> float:
        """Until a request that comes into `queue` now is computed; a short one passes long ones by."""
        waiting = self.expected_seconds(queue.rows, len(queue.jobs))
        if self._running is None:
            return waiting
        started, rows = self._running
        return waiting + max(0.0, started + self.expected_seconds(rows) - self._clock())

    def _alone(self, columns: Columns, rows: int, moments: BatchMoments | None) -> Outputs:
        started = self._clock()
        if moments is not None:
            moments.queued = moments.began = started
        try:
            outputs = self._infer(columns)
        except Exception as error:
            raise _failed(error) from error
        finally:
            if moments is not None:
                moments.ended = self._clock()
        self._measured(rows, self._clock() - started)
        if self._observe is not None:
            self._observe(BatchFigures(rows, 0.0, self._clock() - started, _refused_rows(outputs)))
        return outputs

    def _schedule(self, loop: asyncio.AbstractEventLoop) -> None:
        if not self._scheduled and self._running is None:
            self._scheduled = True
            loop.call_soon(self._flush, loop)

    def _is_filling(self) -> bool:
        """Whether requests keep coming in, turn by turn, and the batch has room for them.

        Clients that were answered together come back together, within the turns that it takes to read them all. Who is
        alone is not made to wait.
        """
        rows = self._short.rows
        if not self._crowded or self._long.rows or rows >= self.execution.max_batch:
            return False
        if rows > self._seen:
            self._seen, self._patience = rows, _TURNS
        self._patience -= 1
        return self._patience >= 0

    def _flush(self, loop: asyncio.AbstractEventLoop) -> None:
        if self.execution.batching and self._is_filling():
            loop.call_soon(self._flush, loop)
            return
        self._scheduled, self._seen = False, 0
        batch = self._next_batch()
        if not batch:
            return
        self._crowded = len(batch) > 1
        started = self._clock()
        self._running = (started, sum(stop - start for _, start, stop in batch))
        if self._traced:
            _note_begin(batch, started)
        if self.execution.inline:
            self._finish(loop, started, self._compute(batch))
            return
        assert self._executor is not None
        try:
            self._executor.submit(self._compute_elsewhere, loop, batch, started)
        except RuntimeError as error:  # the executor was shut down
            self._finish(loop, started, [(batch, error)])

    def _compute_elsewhere(self, loop: asyncio.AbstractEventLoop, batch: Sequence[_Piece], started: float) -> None:
        results = self._compute(batch)
        try:
            loop.call_soon_threadsafe(self._finish, loop, started, results)
        except RuntimeError:  # the loop was closed: nobody waits any more
            return

    def _compute(self, batch: Sequence[_Piece]) -> list[_Result]:
        try:
            return [(batch, self._infer(_joined(batch)))]
        except Exception as error:
            if len(batch) == 1:
                return [(batch, error)]
        # Whose request the model fails on shows when each is computed by itself.
        return [result for piece in batch for result in self._compute([piece])]

    def _finish(self, loop: asyncio.AbstractEventLoop, started: float, results: Sequence[_Result]) -> None:
        rows = self._running[1] if self._running else 0
        self._running = None
        if self._traced:
            _note_end(results, self._clock())
        if len(results) == 1:
            self._measured(rows, self._clock() - started)
        for batch, found in results:
            if isinstance(found, Exception):
                for job, _, _ in batch:
                    _refuse(job, _failed(found))
            else:
                _hand_out(batch, found)
        if self._short.jobs or self._long.jobs:
            self._schedule(loop)
        if self._observe is not None:  # last: whoever fails on a figure keeps nobody waiting
            for batch, found in results:
                if not isinstance(found, Exception):
                    self._tell(batch, found, started)

    def _measured(self, rows: int, seconds: float) -> None:
        execution = self.execution
        expected = execution.seconds_a_batch + rows * execution.seconds_a_row
        self._slowness += _SMOOTHING * (seconds / max(expected, _LEAST_SECONDS) - self._slowness)

    def _tell(self, batch: Sequence[_Piece], outputs: Outputs, started: float) -> None:
        assert self._observe is not None
        rows = sum(stop - start for _, start, stop in batch)
        waited = started - min(job.since for job, _, _ in batch)
        self._observe(BatchFigures(rows, waited, self._clock() - started, _refused_rows(outputs)))

    def _next_batch(self) -> list[_Piece]:
        """Pieces of waiting requests, and no request that is too late."""
        execution, batch = self.execution, list[_Piece]()
        if execution.batching:
            reserved = execution.max_batch // _SHARE_OF_LONG if self._long.rows else 0
            taken = self._take(batch, self._short, execution.max_batch - reserved)
            self._take(batch, self._long, execution.max_batch - taken)
            return batch
        self._after_long = not self._after_long
        for queue in (self._long, self._short) if self._after_long else (self._short, self._long):
            if not batch:
                self._take(batch, queue, execution.max_batch, 1)
        return batch

    def _take(self, batch: list[_Piece], queue: _Queue, space: int, most: int | None = None) -> int:
        """Fill `batch` with up to `space` rows of at most `most` requests; how many rows were taken."""
        free, now = space, self._clock()
        while queue.jobs and free and len(batch) != most:
            job = queue.jobs.popleft()
            if job.taken == job.rows or job.future.done():
                queue.drop(job)
                continue
            if not job.taken and job.deadline is not None and now >= job.deadline:
                queue.drop(job)
                _refuse(job, ServeRefusal("deadline_exceeded", "the deadline passed while the request waited"))
                continue
            count = min(job.rows - job.taken, free)
            batch.append((job, job.taken, job.taken + count))
            job.taken += count
            queue.rows -= count
            free -= count
            if job.taken < job.rows:
                # A long request makes room for the next one; a short one is finished first.
                queue.jobs.append(job) if queue is self._long else queue.jobs.appendleft(job)
        return space - free


def _joined(batch: Sequence[_Piece]) -> Columns:
    if len(batch) == 1:
        job, start, stop = batch[0]
        whole = stop - start == job.rows
        return job.columns if whole else {name: values[start:stop] for name, values in job.columns.items()}
    return {
        name: np.concatenate([job.columns[name][start:stop] for job, start, stop in batch])
        for name in batch[0][0].columns
    }


def _hand_out(batch: Sequence[_Piece], outputs: Outputs) -> None:
    if len(batch) == 1 and batch[0][2] - batch[0][1] == batch[0][0].rows:
        _answer(batch[0][0], outputs)
        return
    begin = 0
    for job, start, stop in batch:
        end = begin + stop - start
        part = {name: values[begin:end] for name, values in outputs.items()}
        begin = end
        if stop - start == job.rows:
            _answer(job, part)
            continue
        job.parts.append(part)
        if stop == job.rows:
            _answer(job, {name: np.concatenate([own[name] for own in job.parts]) for name in part})


def _note_begin(batch: Sequence[_Piece], now: float) -> None:
    for job, _, _ in batch:
        if job.moments is not None and job.moments.began is None:
            job.moments.began = now


def _note_end(results: Sequence[_Result], now: float) -> None:
    for batch, _ in results:
        for job, _, stop in batch:
            if job.moments is not None and stop == job.rows:
                job.moments.ended = now


def _refused_rows(outputs: Outputs) -> int:
    refused = outputs.get(REFUSED)
    return 0 if refused is None else int(np.count_nonzero(refused))


def _answer(job: _Job, outputs: Outputs) -> None:
    if not job.future.done():
        job.future.set_result(outputs)


def _refuse(job: _Job, refusal: ServeRefusal) -> None:
    if not job.future.done():
        job.future.set_exception(refusal)


def _failed(error: Exception | None) -> ServeRefusal:
    if isinstance(error, ServeRefusal):
        return error
    refusal = ServeRefusal("internal", "the model failed on the request")
    refusal.__cause__ = error
    return refusal
