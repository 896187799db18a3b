"""How a model computes best on this machine, found by a short measurement before it is served.

Timed are batches of 1 to 64 rows, with one thread and, where the worker has more cores, with more; the rows are made
from the bundle's schema, so no data is needed. Then

- *threads* are the fewest to which more do not add a quarter of their rate;
- *max_batch* is the smallest batch within a tenth of the best rate, as long as it takes no more than 10 ms;
- *batching* is on where that rate is at least a quarter above the one of single rows;
- a pipeline is computed *in two*, its preprocessing by itself and shared with other versions that have the same, where
  it has many columns, and two versions then take at least a twentieth less, and one alone hardly more;
- *inline*, the event loop computes itself where a row takes less than a change of threads does, with batches of at
  most 2 ms, so that nothing else waits longer.

What the operator sets is taken as it is.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np

from fedclaw.errors import BundleError
from fedclaw.export.check import Verified
from fedclaw.export.layout import INPUT
from fedclaw.export.runtime import Device
from fedclaw.learning.preprocessing import Columns
from fedclaw.serve.models.batching import Execution, Infer
from fedclaw.serve.models.served_model import LoadedGraph, ServedPrecision, load_graph, split_graph

log = logging.getLogger(__name__)
SIZES = (1, 2, 4, 8, 16, 32, 64)
_NEAR = 0.9
_PAYS = 1.25
_LONGEST_BATCH = 10e-3
_LONGEST_INLINE = 2e-3
_SECONDS = 0.6
"""What all measurements of one model take, about."""
_LEAST_RUNS, _MOST_RUNS = 3, 50
_WARM_UP = 2
_MANY_COLUMNS = 8
_SHARED_GAIN, _ALONE_LOSS = 0.95, 1.1
_SECOND_QUEUE = 12e-6
"""Seconds that a request takes on its way through a batcher beside its batch, as measured."""
_HAND_OVER_RUNS = 50
_LOOP_TURNS = 3
"""How many times dearer a change of threads is where an event loop has to be woken than where a thread waits."""


@dataclass(frozen=True, slots=True)
class ExecutionSettings:
    """What the operator sets of how a model computes; None: the probe decides."""

    threads: int | None = None
    max_batch: int | None = None
    batching: bool | None = None
    inline: bool | None = None

    @property
    def complete(self) -> bool:
        """Whether nothing is left to be measured."""
        return None not in (self.threads, self.max_batch, self.batching, self.inline)


@dataclass(frozen=True, slots=True)
class ProbeFigures:
    """What was measured with one number of threads."""

    threads: int
    seconds: Mapping[int, float]
    """The fastest run by the batch's rows."""

    def rate(self, rows: int) -> float:
        """Rows a second in batches of so many."""
        return rows / self.seconds[rows]

    @property
    def best_rate(self) -> float:
        """The most rows a second of all batches."""
        return max(map(self.rate, self.seconds))


@dataclass(frozen=True, slots=True)
class Probed:
    """A graph that is loaded and warm, how it is to be run, and the figures that say so."""

    loaded: LoadedGraph
    execution: Execution
    figures: tuple[ProbeFigures, ...]
    hand_over: float
    """Seconds that a change of threads and back takes; 0: not measured."""
    preparing: Execution | None = None
    """How the preprocessing of a SplitGraph is run; `execution` is then its model's. None: it is one graph."""


def probe(
    verified: Verified,
    precision: ServedPrecision = "float32",
    cores: int = 1,
    settings: ExecutionSettings | None = None,
    device: Device = "cpu",
) -> Probed:
    """Load a verified bundle of which the files were kept, warm it, and find out how it computes best.

    `cores` are those of this worker. Raises what `load_graph` does, and BundleError for a graph that gives no answers
    to rows made from its own schema.
    """
    settings = settings or ExecutionSettings()
    loaded = load_graph(verified, precision, settings.threads or 1, device)
    rows = _synthetic(loaded, max(SIZES))
    _require_answers(loaded, rows)
    counts = (settings.threads,) if settings.threads else _thread_counts(cores)
    graphs = {counts[0]: loaded}
    for threads in counts[1:]:
        graphs[threads] = load_graph(verified, precision, threads, device)
    each = 0.0 if settings.complete else _SECONDS / len(counts) / len(SIZES)
    figures = tuple(
        ProbeFigures(threads, _time(loaded.graph.run, rows, each, _clock(threads, device)))
        for threads, loaded in graphs.items()
    )
    best = max(own.best_rate for own in figures)
    chosen = next(own for own in figures if _PAYS * own.best_rate >= best)
    hand_over = _hand_over() * _LOOP_TURNS if settings.inline is None else 0.0
    execution = decide_execution(chosen, hand_over, settings)
    found = Probed(graphs[chosen.threads], execution, figures, hand_over)
    found = _in_two(found, chosen, verified, rows, settings, device) or found
    log.info("%s: %s; %s", verified.manifest.run, _told(found.execution), _shown(found))
    return found


def _in_two(
    found: Probed,
    whole: ProbeFigures,
    verified: Verified,
    rows: Columns,
    settings: ExecutionSettings,
    device: Device,
) -> Probed | None:
    """The same with the preprocessing by itself, where that pays."""
    if len(found.loaded.interface.columns) < _MANY_COLUMNS:
        return None
    if (split := split_graph(verified, found.loaded, whole.threads, device)) is None:
        return None
    clock, each = _clock(whole.threads, device), _SECONDS / len(SIZES) / 2
    preparing = ProbeFigures(whole.threads, _time(split.features.run, rows, each, clock))
    model = ProbeFigures(whole.threads, _time(split.answer_prepared, split.features.run(rows), each, clock))
    if not sharing_pays(whole, preparing, model, found.execution.max_batch):
        return None
    return replace(
        found,
        loaded=replace(found.loaded, graph=split),
        execution=decide_execution(model, found.hand_over, settings),
        figures=(*found.figures, preparing, model),
        preparing=decide_execution(preparing, found.hand_over, settings),
    )


def sharing_pays(whole: ProbeFigures, preparing: ProbeFigures, model: ProbeFigures, most: int) -> bool:
    """Whether two versions gain if they prepare their rows together, and one alone does not lose: for single rows, and
    for the largest batch that all were measured with. A request pays for the second queue, whatever its batch."""
    common = [rows for rows in whole.seconds if rows <= most and rows in preparing.seconds and rows in model.seconds]
    for rows in (1, max(common)):
        once = preparing.seconds[rows] + rows * _SECOND_QUEUE
        if once + 2 * model.seconds[rows] > _SHARED_GAIN * 2 * whole.seconds[rows]:
            return False
        if once + model.seconds[rows] > _ALONE_LOSS * whole.seconds[rows]:
            return False
    return True


def decide_execution(figures: ProbeFigures, hand_over: float, settings: ExecutionSettings) -> Execution:
    """The rules at the head of this file, for a number of threads; `hand_over` is what a change of threads takes."""
    single = figures.seconds[1]
    inline = single < hand_over if settings.inline is None else settings.inline
    longest = _LONGEST_INLINE if inline else _LONGEST_BATCH
    fitting = [rows for rows, seconds in figures.seconds.items() if rows == 1 or seconds <= longest]
    best = max(figures.rate(rows) for rows in fitting)
    size = next(rows for rows in fitting if figures.rate(rows) >= _NEAR * best)
    pays = figures.rate(size) >= _PAYS * figures.rate(1)
    batching = pays if settings.batching is None else settings.batching
    largest = max(figures.seconds)
    per_row = max((figures.seconds[largest] - single) / max(largest - 1, 1), 1e-9)
    return Execution(
        threads=figures.threads,
        max_batch=settings.max_batch or (size if pays else max(fitting)),
        batching=batching,
        inline=inline,
        seconds_a_batch=max(single - per_row, 1e-6),
        seconds_a_row=per_row,
    )


def _clock(threads: int, device: Device) -> Callable[[], float]:
    """What batches are timed with: one thread by its own processor time, which other processes do not add to."""
    return time.thread_time if threads == 1 and device == "cpu" else time.perf_counter


def _thread_counts(cores: int) -> tuple[int, ...]:
    """1, 2, 4, and so on, and all cores."""
    powers = [2**power for power in range(cores.bit_length()) if 2**power < cores]
    return (*powers, max(cores, 1))


def _synthetic(loaded: LoadedGraph, rows: int) -> Columns:
    """Rows made from the schema alone, as the model's columns."""
    generator = np.random.default_rng(0)
    if not loaded.typed:
        return {INPUT: loaded.schema.synthetic_inputs(rows, generator)}
    return loaded.schema.preprocessing().synthetic(rows, generator)


def _require_answers(loaded: LoadedGraph, columns: Columns) -> None:
    rows = len(next(iter(columns.values())))
    try:
        outputs = loaded.graph.run(columns)
    except Exception as error:  # ONNX Runtime's exceptions have no public common base
        raise BundleError(f"{loaded.file} gives no answer to rows made from the bundle's own schema") from error
    for told in loaded.interface.outputs:
        if outputs[told.name].shape != (rows, *told.shape[1:]):
            raise BundleError(f"{loaded.file} gives {told.name!r} in another shape than the bundle says")


def _time(run: Infer, rows: Columns, seconds: float, clock: Callable[[], float]) -> dict[int, float]:
    """The fastest run by batch size, as `clock` says, up to the first size that takes longer than a batch may."""
    found = dict[int, float]()
    for size in SIZES:
        columns = {name: values[:size].copy() for name, values in rows.items()}
        for _ in range(_WARM_UP):
            run(columns)
        found[size] = _fastest(run, columns, seconds, clock)
        if found[size] > _LONGEST_BATCH:
            break
    return found


def _fastest(run: Infer, columns: Columns, seconds: float, clock: Callable[[], float]) -> float:
    best, runs, end = float("inf"), 0, time.perf_counter() + seconds
    while runs < _LEAST_RUNS or (runs < _MOST_RUNS and time.perf_counter() < end):
        started = clock()
        run(columns)
        best, runs = min(best, clock() - started), runs + 1
        if best > max(seconds, _LONGEST_BATCH):
            break
    return best


def _hand_over() -> float:
    """Seconds to give a thread something to do and to get it back; the median."""
    taken = list[float]()
    with ThreadPoolExecutor(1) as executor:
        for _ in range(_HAND_OVER_RUNS):
            started = time.perf_counter()
            executor.submit(int).result()
            taken.append(time.perf_counter() - started)
    return float(np.median(taken))


def _told(how: Execution) -> str:
    """How a model computes, in words."""
    together = f"requests together in batches of up to {how.max_batch} rows" if how.batching else "each request alone"
    where = "in the worker's event loop" if how.inline else "in a thread beside it"
    return f"{how.threads} thread{'s' * (how.threads > 1)}, {together}, {where}"


def _shown(found: Probed) -> str:
    def line(figures: ProbeFigures) -> str:
        sizes: Sequence[str] = [f"{rows}: {seconds * 1e6:.0f}" for rows, seconds in figures.seconds.items()]
        return f"{figures.threads} thread{'s' * (figures.threads > 1)}, us by rows: {', '.join(sizes)}"

    return f"{'; '.join(map(line, found.figures))}; change of threads: {found.hand_over * 1e6:.0f} us"
