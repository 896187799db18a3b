"""Batches: each request gets its own rows' answer, whatever else is in the batch, waits, fails or leaves."""

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedclaw.learning.preprocessing import Columns
from fedclaw.serve.models.batching import BatchFigures, BatchMoments, EagerBatcher, Execution, Outputs, QueueLimits
from fedclaw.serve.refusals import ServeRefusal

pytestmark = pytest.mark.anyio
POISON = -1.0
INLINE = Execution(max_batch=8, inline=True)
ELSEWHERE = Execution(max_batch=8)


def rows(*values: float) -> Columns:
    return {"x": np.array(values, np.float32)[:, None]}


class Squares:
    """A model that squares, remembers its batches, fails on POISON, and waits while it is held."""

    def __init__(self) -> None:
        self.batches: list[list[float]] = []
        self.go_on = threading.Event()
        self.go_on.set()
        self.begun = threading.Event()

    def __call__(self, columns: Columns) -> Outputs:
        x = columns["x"]
        self.batches.append(x[:, 0].tolist())
        self.begun.set()
        assert self.go_on.wait(60)
        if (x == POISON).any():
            raise ValueError("a value of a person: 4711")
        return {"y": x * x, "name": x.astype(object)}


@pytest.fixture
def model() -> Squares:
    return Squares()


@pytest.fixture
def executor() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as made:
        yield made


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


async def ask(batcher: EagerBatcher, *values: float, deadline: float | None = None) -> list[float]:
    outputs = await batcher.answer(rows(*values), len(values), deadline)
    found: list[float] = outputs["y"][:, 0].tolist()
    return found


async def begun(model: Squares) -> None:
    """The model is at work on a batch in another thread."""
    assert await asyncio.to_thread(model.begun.wait, 60)
    model.begun.clear()


async def turns(count: int = 5) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


@pytest.mark.parametrize("execution", [INLINE, ELSEWHERE])
async def test_what_comes_in_one_turn_goes_together(
    execution: Execution, model: Squares, executor: ThreadPoolExecutor
) -> None:
    batcher = EagerBatcher(model, execution, executor=executor)
    found = await asyncio.gather(*(ask(batcher, value, value + 0.5) for value in range(6)))
    assert found == [[value**2, (value + 0.5) ** 2] for value in range(6)]
    assert [len(batch) for batch in model.batches] == [8, 4]
    assert batcher.queued_rows == 0


async def test_an_idle_model_computes_at_once_and_what_comes_meanwhile_makes_the_next_batch(
    model: Squares, executor: ThreadPoolExecutor
) -> None:
    batcher = EagerBatcher(model, ELSEWHERE, executor=executor)
    model.go_on.clear()
    first = asyncio.create_task(ask(batcher, 1))
    await begun(model)
    later = []
    for value in (2, 3, 4):
        later.append(asyncio.create_task(ask(batcher, value)))
        await turns()
    assert batcher.queued_rows == 3
    model.go_on.set()
    assert await asyncio.gather(first, *later) == [[1], [4], [9], [16]]
    assert model.batches == [[1], [2, 3, 4]]


@pytest.mark.parametrize("execution", [INLINE, ELSEWHERE])
async def test_clients_that_come_back_within_a_few_turns_share_a_batch_and_one_that_is_alone_does_not_wait(
    execution: Execution, model: Squares, executor: ThreadPoolExecutor
) -> None:
    batcher = EagerBatcher(model, execution, executor=executor)

    async def after(count: int, value: float) -> list[float]:
        await turns(count)
        return await ask(batcher, value)

    await asyncio.gather(ask(batcher, 1), ask(batcher, 2))
    model.batches.clear()
    model.begun.clear()
    await asyncio.gather(*(after(count, count) for count in range(8)))
    assert model.batches == [[0, 1, 2, 3, 4, 5, 6, 7]], "one a turn, until the batch is full"
    await ask(batcher, 8)
    model.begun.clear()
    alone = asyncio.create_task(ask(batcher, 9))
    await turns(2)
    assert execution is not INLINE or model.begun.is_set(), "computed in the turn after it came"
    await alone


@pytest.mark.parametrize("inline", [True, False])
async def test_without_batching_every_request_is_computed_by_itself(
    inline: bool, model: Squares, executor: ThreadPoolExecutor
) -> None:
    batcher = EagerBatcher(model, Execution(max_batch=2, batching=False, inline=inline), executor=executor)
    found = await asyncio.gather(ask(batcher, 1), ask(batcher, 2, 3, 4), ask(batcher, 5))
    assert list(found) == [[1], [4, 9, 16], [25]]
    assert sorted(map(tuple, model.batches)) == [(1,), (2, 3), (4,), (5,)]


sizes = st.lists(st.integers(1, 40), min_size=1, max_size=12)


@given(sizes=sizes, most=st.integers(1, 16), batching=st.booleans(), inline=st.booleans())
def test_each_request_gets_the_answer_that_it_gets_alone(
    sizes: list[int], most: int, batching: bool, inline: bool
) -> None:
    async def run() -> None:
        model = Squares()
        with ThreadPoolExecutor(1) as executor:
            execution = Execution(max_batch=most, batching=batching, inline=inline)
            batcher = EagerBatcher(model, execution, executor=executor)
            given, begin = [], 0
            for size in sizes:
                given.append([float(value) for value in range(begin, begin + size)])
                begin += size
            found = await asyncio.gather(*(ask(batcher, *values) for values in given))
            assert found == [[value**2 for value in values] for values in given]
            assert max(map(len, model.batches)) <= most
            assert sum(map(len, model.batches)) == begin, "no row is computed twice"
            assert batcher.queued_rows == 0

    asyncio.run(run())


@pytest.mark.parametrize("execution", [INLINE, ELSEWHERE])
async def test_a_request_that_the_model_fails_on_spoils_no_other(
    execution: Execution, model: Squares, executor: ThreadPoolExecutor
) -> None:
    batcher = EagerBatcher(model, execution, executor=executor)
    good, bad, other = await asyncio.gather(
        ask(batcher, 1, 2), ask(batcher, 3, POISON), ask(batcher, 4), return_exceptions=True
    )
    assert (good, other) == ([1, 4], [16])
    assert isinstance(bad, ServeRefusal)
    assert bad.code == "internal"
    assert "4711" not in str(bad)
    assert await ask(batcher, 5) == [25]
    assert batcher.queued_rows == 0


async def test_a_long_request_that_the_model_fails_on_leaves_the_queue(
    model: Squares, executor: ThreadPoolExecutor
) -> None:
    batcher = EagerBatcher(model, ELSEWHERE, executor=executor)
    with pytest.raises(ServeRefusal):
        await ask(batcher, *range(20), POISON, *range(500))
    assert await ask(batcher, *range(20)) == [float(value**2) for value in range(20)]
    assert batcher.queued_rows == 0
    assert len(model.batches) < 10


async def test_a_full_queue_refuses_and_says_when_to_come_again(model: Squares, executor: ThreadPoolExecutor) -> None:
    clock = Clock()
    execution = Execution(max_batch=8, seconds_a_batch=1.0, seconds_a_row=0.5)
    batcher = EagerBatcher(model, execution, QueueLimits(queued_rows=10), executor, clock=clock)
    model.go_on.clear()
    running = asyncio.create_task(ask(batcher, 1))
    await begun(model)
    waiting = [asyncio.create_task(ask(batcher, *[2.0] * 5)) for _ in range(2)]
    await turns()
    with pytest.raises(ServeRefusal) as told:
        await ask(batcher, 3)
    assert told.value.code == "overloaded"
    # 10 rows in two batches take 7 seconds; the batch of one that runs takes 1.5, of which one has passed
    assert told.value.retry_after == pytest.approx(8.5)
    clock.now += 1
    with pytest.raises(ServeRefusal) as told:
        await ask(batcher, 3)
    assert told.value.retry_after == pytest.approx(7.5)
    waiting[0].cancel()
    await turns()
    assert batcher.queued_rows == 5
    taken = asyncio.create_task(ask(batcher, *[3.0] * 5))
    await turns()
    model.go_on.set()
    assert list(await asyncio.gather(running, waiting[1], taken)) == [[1], [4.0] * 5, [9.0] * 5]
    assert sum(map(len, model.batches)) == 11, "what was cancelled was not computed"


async def test_an_empty_queue_takes_what_is_longer_than_it(model: Squares, executor: ThreadPoolExecutor) -> None:
    batcher = EagerBatcher(model, ELSEWHERE, QueueLimits(queued_rows=10, request_rows=50), executor)
    assert len(await ask(batcher, *range(50))) == 50
    with pytest.raises(ServeRefusal, match="at most 50 rows") as told:
        await ask(batcher, *range(51))
    assert told.value.code == "too_large"


async def test_who_comes_too_late_is_refused_before_it_is_computed(
    model: Squares, executor: ThreadPoolExecutor
) -> None:
    clock = Clock()
    execution = Execution(max_batch=8, seconds_a_batch=1.0, seconds_a_row=0.001)
    batcher = EagerBatcher(model, execution, executor=executor, clock=clock)
    with pytest.raises(ServeRefusal, match="cannot be met"):
        await ask(batcher, 1, deadline=1000.0)
    model.go_on.clear()
    running = asyncio.create_task(ask(batcher, 1))
    await begun(model)
    with pytest.raises(ServeRefusal, match="cannot be met") as told:
        await ask(batcher, 2, deadline=1001.9)  # the running batch needs 1 s, and then this one too
    assert told.value.code == "deadline_exceeded"
    late = asyncio.create_task(ask(batcher, 3, deadline=1003.0))
    in_time = asyncio.create_task(ask(batcher, 4, deadline=1100.0))
    await turns()
    clock.now = 1003.0
    model.go_on.set()
    with pytest.raises(ServeRefusal, match="passed while the request waited"):
        await late
    assert list(await asyncio.gather(running, in_time)) == [[1], [16]]
    assert model.batches == [[1], [4]]
    assert batcher.queued_rows == 0


async def test_an_idle_model_that_was_slow_is_tried_again(model: Squares) -> None:
    clock = Clock()
    batcher = EagerBatcher(lambda columns: model(columns) if tick(clock, 50) else {}, INLINE, clock=clock)
    await ask(batcher, 1)
    assert await ask(batcher, 2, deadline=clock.now + 1) == [4]


def tick(clock: Clock, seconds: float) -> bool:
    clock.now += seconds
    return True


@pytest.mark.parametrize("inline", [True, False])
@pytest.mark.parametrize("batching", [True, False])
async def test_a_request_of_ten_thousand_rows_starves_nobody(
    inline: bool, batching: bool, model: Squares, executor: ThreadPoolExecutor
) -> None:
    execution = Execution(max_batch=16, inline=inline, batching=batching)
    batcher = EagerBatcher(model, execution, executor=executor)
    large = asyncio.create_task(ask(batcher, *range(10_000)))
    await turns(2)
    for value in range(5):
        before = len(model.batches)
        assert await ask(batcher, 0.5 + value) == [(0.5 + value) ** 2]
        assert len(model.batches) - before <= 4
    assert not large.done()
    assert await large == np.square(np.arange(10_000, dtype=np.float32)).tolist()


@pytest.mark.parametrize("batching", [True, False])
async def test_long_requests_take_turns(batching: bool, model: Squares) -> None:
    batcher = EagerBatcher(model, Execution(max_batch=2, inline=True, batching=batching))
    await asyncio.gather(ask(batcher, 1, 1, 1, 1, 1, 1), ask(batcher, 2, 2, 2, 2))
    assert model.batches == [[1, 1], [2, 2], [1, 1], [2, 2], [1, 1]]


@pytest.mark.parametrize("batching", [True, False])
async def test_a_long_request_goes_on_while_short_ones_keep_coming(
    batching: bool, model: Squares, executor: ThreadPoolExecutor
) -> None:
    batcher = EagerBatcher(model, Execution(max_batch=4, batching=batching), executor=executor)
    large = asyncio.create_task(ask(batcher, *range(40)))
    done = 0

    async def insist() -> None:
        nonlocal done
        while not large.done():
            await ask(batcher, 0.5)
            done += 1

    clients = [asyncio.create_task(insist()) for _ in range(8)]
    assert await asyncio.wait_for(large, 60) == [float(value**2) for value in range(40)]
    await asyncio.gather(*clients)
    assert done > 0


async def test_a_client_that_leaves_frees_its_place_and_a_batch_in_the_works_goes_on(
    model: Squares, executor: ThreadPoolExecutor
) -> None:
    batcher = EagerBatcher(model, ELSEWHERE, executor=executor)
    model.go_on.clear()
    gone, stays = asyncio.create_task(ask(batcher, 1)), asyncio.create_task(ask(batcher, 2))
    await begun(model)
    long = asyncio.create_task(ask(batcher, *range(100)))
    await turns()
    gone.cancel()
    long.cancel()
    await turns()
    assert batcher.queued_rows == 0
    model.go_on.set()
    assert await stays == [4]
    assert await ask(batcher, 3) == [9]
    assert model.batches == [[1, 2], [3]]


async def test_each_batch_is_observed(executor: ThreadPoolExecutor) -> None:
    seen: list[BatchFigures] = []
    clock = Clock()

    def slow(columns: Columns) -> Outputs:
        clock.now += 2
        return {"y": columns["x"], "refused": columns["x"] > 7}

    batcher = EagerBatcher(slow, INLINE, observe=seen.append, clock=clock)
    await asyncio.gather(*(ask(batcher, value) for value in range(10)))
    assert seen == [BatchFigures(8, 0, 2, 0), BatchFigures(2, 2, 2, 2)]
    seen.clear()
    await ask(EagerBatcher(slow, Execution(batching=False, inline=True), observe=seen.append, clock=clock), 9)
    assert seen == [BatchFigures(1, 0, 2, 1)]


async def test_whoever_fails_on_a_figure_keeps_nobody_waiting(model: Squares) -> None:
    def fail(_: BatchFigures) -> None:
        raise OSError("the disk is full")

    loop = asyncio.get_running_loop()
    failed: list[object] = []
    loop.set_exception_handler(lambda _, context: failed.append(context["exception"]))
    try:
        batcher = EagerBatcher(model, INLINE, observe=fail)
        found = await asyncio.gather(*(ask(batcher, value) for value in range(20)))
    finally:
        loop.set_exception_handler(None)
    assert found == [[value**2] for value in range(20)]
    assert len(failed) == 3


async def test_an_executor_that_has_ended_answers_with_a_refusal(model: Squares) -> None:
    executor = ThreadPoolExecutor(1)
    batcher = EagerBatcher(model, ELSEWHERE, executor=executor)
    executor.shutdown()
    with pytest.raises(ServeRefusal) as told:
        await ask(batcher, 1)
    assert told.value.code == "internal"
    with pytest.raises(ValueError, match="needs an executor"):
        EagerBatcher(model, ELSEWHERE)


@pytest.mark.parametrize("execution", [INLINE, ELSEWHERE, Execution(max_batch=8, batching=False, inline=True)])
async def test_who_traces_a_request_learns_when_it_was_queued_and_computed(
    execution: Execution, executor: ThreadPoolExecutor
) -> None:
    clock = Clock()

    def slow(columns: Columns) -> Outputs:
        clock.now += 10.0
        if (columns["x"] == POISON).any():
            raise ValueError
        return {"y": columns["x"]}

    batcher = EagerBatcher(slow, execution, executor=executor, clock=clock)
    one, long, failed = BatchMoments(), BatchMoments(), BatchMoments()
    await batcher.answer(rows(1.0), 1, None, one)
    assert (one.queued, one.began, one.ended) == (1000.0, 1000.0, 1010.0)
    # Three batches, of which the first one waits for nobody.
    await batcher.answer(rows(*range(20)), 20, None, long)
    assert (long.queued, long.began, long.ended) == (1010.0, 1010.0, 1040.0)
    with pytest.raises(ServeRefusal):
        await batcher.answer(rows(POISON), 1, None, failed)
    assert (failed.began, failed.ended) == (1040.0, 1050.0)


async def test_a_traced_request_that_waits_says_so_and_one_that_leaves_has_no_end(
    model: Squares, executor: ThreadPoolExecutor
) -> None:
    clock = Clock()
    batcher = EagerBatcher(model, ELSEWHERE, executor=executor, clock=clock)
    model.go_on.clear()
    left, waited, late = BatchMoments(), BatchMoments(), BatchMoments()
    first = asyncio.create_task(batcher.answer(rows(1.0), 1, None, left))
    await begun(model)
    others = asyncio.create_task(batcher.answer(rows(2.0), 1, None, waited))
    too_late = asyncio.create_task(batcher.answer(rows(3.0), 1, 1003.0, late))
    await turns()
    clock.now += 5.0
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    assert (left.began, left.ended) == (1000.0, None)
    model.go_on.set()
    await others
    assert (waited.queued, waited.began, waited.ended) == (1000.0, 1005.0, 1005.0)
    with pytest.raises(ServeRefusal):
        await too_late
    assert (late.queued, late.began, late.ended) == (1000.0, None, None)
