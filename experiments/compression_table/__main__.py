"""Bytes against accuracy for every way of compressing updates, on two data sets: docs/update_compression.md.

    python -m experiments.compression_table                    run what is not done yet, then write page and plot
    python -m experiments.compression_table page               write them again from what is done
    python -m experiments.compression_table seeds=1 output=try runs=try/runs

It runs the server's loop and the sites' code in this process, can be interrupted, and goes on where it was.
"""

if __name__ == "__main__":
    from fedclaw.startup import begin

    begin("experiments.compression_table", __doc__)

from collections.abc import Sequence

from experiments.compression_table.settings import TableSettings, cells
from experiments.pace import Pace
from fedclaw import startup
from fedclaw.cli import compose_settings, make_console, run_main, split
from fedclaw.errors import UsageError
from fedclaw.files import write_atomic

_USUAL_SECONDS = 8.0
"""Of one run; a guess."""


def main(arguments: Sequence[str]) -> None:
    """Do what the command line says."""
    line = split(arguments)
    settings = compose_settings("compression_table", line.overrides, TableSettings)
    if line.words not in ((), ("page",)):
        raise UsageError(f"unknown command {' '.join(line.words)!r}; there is: page")
    with startup.loading("torch, Opacus and Flower"):
        from experiments.compression_table import page, plot
        from experiments.compression_table.cells import Store, run_cell
        from experiments.compression_table.results import rows
    startup.next_step("give the same command again: runs that are done are not run again")
    console, store = make_console(), Store(settings.runs)
    wanted = list(cells(settings))
    left = [cell for cell in wanted if store.result(cell) is None]
    if left and line.words:
        raise UsageError(f"{len(left)} of {len(wanted)} runs are not done; run them without 'page'")
    pace = Pace(console, len(wanted), len(left), usual=_USUAL_SECONDS)
    pace.announce()
    for cell in left:
        done = run_cell(cell)
        store.write(cell, done)
        pace.step(f"{cell.task}, {cell.method}, seed {cell.seed}: {done.accuracy[-1]:.4f}")
    found = rows(settings, [(cell, result) for cell in wanted if (result := store.result(cell))])
    image, document = settings.output / "update_compression.png", settings.output / "update_compression.md"
    plot.draw(found, settings, image)
    write_atomic(document, page.render(found, settings, image.name).encode())
    console.print(f"table: {document}\nplot:  {image}", soft_wrap=True)


if __name__ == "__main__":
    run_main("experiments.compression_table", __doc__ or "", main)
