"""Bytes against accuracy for every way of compressing updates, on two data sets: docs/update_compression.md.

    python -m experiments.compression_table                    run what is not done yet, then write page and plot
    python -m experiments.compression_table page               write them again from what is done
    python -m experiments.compression_table seeds=1 output=try runs=try/runs

It runs the server's loop and the sites' code in this process, can be interrupted, and goes on where it was.
"""

from collections.abc import Sequence

from experiments.compression_table import page, plot
from experiments.compression_table.cells import Store, run_cell
from experiments.compression_table.results import rows
from experiments.compression_table.settings import TableSettings, cells
from fedclaw.cli import compose_settings, run_main, split
from fedclaw.errors import UsageError
from fedclaw.files import write_atomic
from fedclaw.report.console import make_console


def main(arguments: Sequence[str]) -> None:
    """Do what the command line says."""
    line = split(arguments)
    settings = compose_settings("compression_table", line.overrides, TableSettings)
    if line.words not in ((), ("page",)):
        raise UsageError(f"unknown command {' '.join(line.words)!r}; there is: page")
    console, store = make_console(), Store(settings.runs)
    wanted = list(cells(settings))
    left = [cell for cell in wanted if store.result(cell) is None]
    if left and line.words:
        raise UsageError(f"{len(left)} of {len(wanted)} runs are not done; run them without 'page'")
    console.print(f"{len(wanted)} runs, of which {len(wanted) - len(left)} are done")
    for number, cell in enumerate(left, 1):
        done = run_cell(cell)
        store.write(cell, done)
        console.print(f"{number}/{len(left)} {cell.task}, {cell.method}, seed {cell.seed}: {done.accuracy[-1]:.4f}")
    found = rows(settings, [(cell, result) for cell in wanted if (result := store.result(cell))])
    image, document = settings.output / "update_compression.png", settings.output / "update_compression.md"
    plot.draw(found, settings, image)
    write_atomic(document, page.render(found, settings, image.name).encode())
    console.print(f"table: {document}\nplot:  {image}", soft_wrap=True)


if __name__ == "__main__":
    run_main("experiments.compression_table", __doc__ or "", main)
