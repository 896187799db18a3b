"""How much accuracy is kept at which size, by how a pruned model is recovered: the table of docs/compression.md.

    python -m experiments.compression                      run what is not done yet, then write table and plot
    python -m experiments.compression page                 write them again from results.json
    python -m experiments.compression folds=2 fractions=[0.1] kinds=[plain] output=try runs=try/runs

scikit-learn's digits (a residual network of 115 thousand parameters) and breast cancer (a multilayer perceptron), in
folds, so that each row is tested once; three sites train the teacher, without privacy or by DP-SGD with epsilon 8.
The last line is a JSON object. It can be interrupted, and goes on: a finished cell is recognised by its configuration.
"""

if __name__ == "__main__":
    from fedclaw.startup import begin

    begin("experiments.compression", __doc__)

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from rich.console import Console

from experiments.compression.settings import ExperimentSettings, StudentCell, TeacherCell, references, students
from experiments.pace import Pace
from experiments.workers import in_workers
from fedclaw import startup
from fedclaw.cli import compose_settings, make_console, run_main, split
from fedclaw.errors import UsageError

if TYPE_CHECKING:
    from experiments.compression.cells import CellResult, Store
    from experiments.compression.results import Results

C = TypeVar("C", TeacherCell, StudentCell)

_USUAL_SECONDS = 20.0
"""Of a cell, before one is known."""


def main(arguments: Sequence[str]) -> None:
    """Do what the command line says."""
    line = split(arguments)
    settings = compose_settings("model_compression", line.overrides, ExperimentSettings)
    console = make_console()
    with startup.loading("torch, Opacus, Flower and the pruning library"):
        from experiments.compression.results import Results, collect
    if line.words in ((), ("run",)):
        store = run(settings, console)
        results = collect(settings, store)
        results.write(settings.runs / "results.json")
    elif line.words == ("page",):
        results = Results.read(settings.runs / "results.json")
    else:
        raise UsageError(f"unknown command {' '.join(line.words)!r}; there are: run, page")
    write_page(results, settings, console)
    print(json.dumps(results.model_dump(mode="json")))


def run(settings: ExperimentSettings, console: Console) -> "Store":
    """Train the teachers, then recover what is pruned of them. Raises FedClawError."""
    from experiments.compression.cells import Store, compress_teacher, train_teacher

    startup.next_step("give the same command again: cells that are done are not run again")
    store, cells = Store(settings.runs), list(students(settings))
    teachers = {cell.label: cell for cell in (*references(settings), *(cell.teacher for cell in cells))}
    _work(train_teacher, list(teachers.values()), store, settings, console)
    _work(compress_teacher, cells, store, settings, console)
    return store


def _work(
    function: "Callable[[tuple[C, Path]], CellResult]",
    cells: Sequence[C],
    store: "Store",
    settings: ExperimentSettings,
    console: Console,
) -> None:
    """Run the cells that are not done, and keep each result as it comes."""
    left = [cell for cell in cells if store.result(cell) is None]
    known = [result.seconds for cell in cells if (result := store.result(cell)) is not None]
    pace = Pace(console, len(cells), len(left), settings.workers, known, _USUAL_SECONDS)
    pace.announce()
    places = [(cell, store.teacher(cell.teacher if isinstance(cell, StudentCell) else cell)) for cell in left]
    for at, result in in_workers(function, places, settings.workers):
        store.write(left[at], result)
        shown = ", ".join(f"{name} {arm.accuracy:.4f}" for name, arm in sorted(result.arms.items()))
        pace.step(f"{left[at].label}: {shown}; {result.seconds:.1f} s")


def write_page(results: "Results", settings: ExperimentSettings, console: Console) -> None:
    """Put the table into docs/compression.md, or a page of its own, and draw the plot."""
    from experiments.compression import page, plot

    image, document = settings.output / "compression.png", settings.output / "compression.md"
    settings.output.mkdir(parents=True, exist_ok=True)
    plot.draw(results, image)
    page.write(results, document, image.name)
    console.print(page.shown(results))
    console.print(f"table: {document}\nplot:  {image}", soft_wrap=True)


if __name__ == "__main__":
    run_main("experiments.compression", __doc__ or "", main)
