"""Attack x strategy: accuracy, accuracy under attack, and the backdoor's success: docs/strategies/robust.md.

    python -m experiments.attack_table                 run what is not done yet, then write page, plot and JSON
    python -m experiments.attack_table page            write page and plot again from robust.json
    python -m experiments.attack_table seeds=1 output=try runs=try/runs

It runs the server's loop and the sites' code in this process's workers, seed after seed, can be interrupted, and goes
on where it was: a finished run is recognised by its whole configuration. Remove the directory of runs= to begin anew.
"""

from collections.abc import Sequence

from rich.console import Console

from experiments.attack_table import page, plot
from experiments.attack_table.cells import Store, run_cell
from experiments.attack_table.results import Results, collect
from experiments.attack_table.settings import TableSettings, cells
from experiments.workers import in_workers
from fedclaw.cli import compose_settings, run_main, split
from fedclaw.errors import UsageError
from fedclaw.files import write_atomic
from fedclaw.report.console import make_console

NAME = "robust"


def main(arguments: Sequence[str]) -> None:
    """Do what the command line says."""
    line = split(arguments)
    settings = compose_settings("attack_table", line.overrides, TableSettings)
    console = make_console()
    if line.words in ((), ("run",)):
        run(settings, console)
    elif line.words == ("page",):
        write_page(Results.read(settings.output / f"{NAME}.json"), settings, console)
    else:
        raise UsageError(f"unknown command {' '.join(line.words)!r}; there are: run, page")


def run(settings: TableSettings, console: Console) -> Results:
    """Run what is not done yet, and write JSON, page and plot. Raises FedClawError."""
    store = Store(settings.runs)
    every = [cell for seed in range(1, settings.seeds + 1) for cell in cells(settings, seed)]
    left = [cell for cell in every if store.result(cell) is None]
    console.print(f"{len(every)} runs, of which {len(every) - len(left)} are done")
    for number, (at, result) in enumerate(in_workers(run_cell, left, settings.workers), 1):
        cell = left[at]
        store.write(cell, result)
        console.print(f"{number}/{len(left)} {cell.label}: accuracy {result.accuracy:.4f}, {result.seconds:.1f} s")
    results = collect(settings, store)
    results.write(settings.output / f"{NAME}.json")
    write_page(results, settings, console)
    return results


def write_page(results: Results, settings: TableSettings, console: Console) -> None:
    """Write robust.md and robust.png."""
    image = settings.output / f"{NAME}.png"
    plot.draw(results, image)
    document = settings.output / f"{NAME}.md"
    write_atomic(document, page.render(results, image.name).encode())
    console.print(f"table: {document}\nplot:  {image}", soft_wrap=True)


if __name__ == "__main__":
    run_main("experiments.attack_table", __doc__ or "", main)
