"""Attack x strategy: accuracy, accuracy under attack, and the backdoor's success: docs/strategies/robust.md.

    python -m experiments.attack_table                 run what is not done yet, then write page, plot and JSON;
                                                       it says first how long that takes (all: an hour of one core)
    python -m experiments.attack_table page            write page and plot again from robust.json
    python -m experiments.attack_table seeds=1 output=try runs=try/runs

It runs the server's loop and the sites' code in this process's workers, seed after seed, can be interrupted, and goes
on where it was: a finished run is recognised by its whole configuration. Remove the directory of runs= to begin anew.
What it writes goes to output=, runs/attack_table/page by default; output=docs/strategies renews the documentation's.
"""

if __name__ == "__main__":
    from fedclaw.startup import begin

    begin("experiments.attack_table", __doc__)

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console

from experiments.attack_table.settings import TableSettings, cells
from experiments.pace import Pace
from experiments.workers import in_workers
from fedclaw import startup
from fedclaw.cli import compose_settings, make_console, run_main, split
from fedclaw.errors import UsageError
from fedclaw.files import write_atomic

if TYPE_CHECKING:
    from experiments.attack_table.results import Results

NAME = "robust"
_USUAL_SECONDS = 6.0
"""Of one run with the settings of conf/attack_table.yaml: what docs/strategies/robust.json has, on average."""


def main(arguments: Sequence[str]) -> None:
    """Do what the command line says."""
    line = split(arguments)
    settings = compose_settings("attack_table", line.overrides, TableSettings)
    console = make_console()
    if line.words in ((), ("run",)):
        run(settings, console)
    elif line.words == ("page",):
        from experiments.attack_table.results import Results

        write_page(Results.read(settings.output / f"{NAME}.json"), settings, console)
    else:
        raise UsageError(f"unknown command {' '.join(line.words)!r}; there are: run, page")


def run(settings: TableSettings, console: Console) -> "Results":
    """Run what is not done yet, and write JSON, page and plot. Raises FedClawError."""
    with startup.loading("torch, Opacus and Flower"):
        from experiments.attack_table.cells import Store, run_cell
        from experiments.attack_table.results import collect
    startup.next_step("give the same command again: runs that are done are not run again")
    store = Store(settings.runs)
    every = [cell for seed in range(1, settings.seeds + 1) for cell in cells(settings, seed)]
    left = [cell for cell in every if store.result(cell) is None]
    known = [result.seconds for cell in every if (result := store.result(cell)) is not None]
    pace = Pace(console, len(every), len(left), settings.workers, known, _USUAL_SECONDS)
    pace.announce()
    for at, result in in_workers(run_cell, left, settings.workers):
        cell = left[at]
        store.write(cell, result)
        pace.step(f"{cell.label}: accuracy {result.accuracy:.4f}, {result.seconds:.1f} s")
    results = collect(settings, store)
    results.write(settings.output / f"{NAME}.json")
    write_page(results, settings, console)
    return results


def write_page(results: "Results", settings: TableSettings, console: Console) -> None:
    """Write robust.md and robust.png."""
    from experiments.attack_table import page, plot

    image = settings.output / f"{NAME}.png"
    plot.draw(results, image)
    document = settings.output / f"{NAME}.md"
    write_atomic(document, page.render(results, image.name).encode())
    console.print(f"table: {document}\nplot:  {image}", soft_wrap=True)


if __name__ == "__main__":
    run_main("experiments.attack_table", __doc__ or "", main)
