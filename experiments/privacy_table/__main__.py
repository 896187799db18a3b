"""What privacy costs in accuracy, by who adds the noise, on two data sets over four sites: docs/privacy_table.md.

    python -m experiments.privacy_table                    run what is not done yet, then write the page and the plot
    python -m experiments.privacy_table page               write them again from table.json
    python -m experiments.privacy_table search             try the settings in tasks.*.search on the seed kept for that
    python -m experiments.privacy_table persons            the same data by row and by person: privacy_table_persons.md
    python -m experiments.privacy_table persons page       (or: persons search) as above
    python -m experiments.privacy_table seeds=2 audit=null output=try runs=try/runs

It runs the server's loop and the sites' code in this process's workers, can be interrupted, and goes on where it was: a
finished run is recognised by its whole configuration. Remove the directory of runs= to begin anew.
"""

if __name__ == "__main__":
    from fedclaw.startup import begin

    begin("experiments.privacy_table", __doc__)

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console

from experiments.pace import Pace
from experiments.privacy_table.settings import TableSettings, audits, rows
from experiments.workers import in_workers
from fedclaw import startup
from fedclaw.cli import compose_settings, make_console, run_main, split
from fedclaw.errors import UsageError
from fedclaw.files import write_atomic

if TYPE_CHECKING:
    from experiments.privacy_table.cells import Store
    from experiments.privacy_table.results import Results


NAME, PERSONS = "privacy_table", "persons"
_LIBRARIES = "torch, Opacus and Flower"
_USUAL_SECONDS, _USUAL_AUDIT_SECONDS = 30.0, 55.0
"""Of one run and one audit: the 89 minutes of docs/privacy_table.md for 130 runs and 26 audits, shared out."""


def main(arguments: Sequence[str]) -> None:
    """Do what the command line says."""
    line = split(arguments)
    of_persons = line.words[:1] == (PERSONS,)
    words, name = (line.words[1:], f"{NAME}_{PERSONS}") if of_persons else (line.words, NAME)
    settings = compose_settings(name, line.overrides, TableSettings)
    console = make_console()
    if words in ((), ("run",)):
        run(settings, console)
    elif words == ("page",):
        from experiments.privacy_table.results import Results

        write_page(Results.read(settings.runs / "table.json"), settings, console)
    elif words == ("search",):
        with startup.loading(_LIBRARIES):
            from experiments.privacy_table.cells import run_cell
            from experiments.privacy_table.search import search
        search(settings, lambda cells: in_workers(run_cell, cells, settings.workers), console)
    else:
        raise UsageError(f"unknown command {' '.join(line.words)!r}; there are: run, page, search, persons")


def run(settings: TableSettings, console: Console) -> "Results":
    """Run what is not done yet, and write the table's JSON, page and plot. Raises FedClawError."""
    with startup.loading(_LIBRARIES):
        from experiments.privacy_table.cells import Store, run_cell
        from experiments.privacy_table.results import collect
    startup.next_step("give the same command again: runs that are done are not run again")
    store = Store(settings.runs)
    cells = [cell for row in rows(settings) for cell in row]
    left = [cell for cell in cells if store.result(cell) is None]
    known = [result.seconds for cell in cells if (result := store.result(cell)) is not None]
    pace = Pace(console, len(cells), len(left), settings.workers, known, _USUAL_SECONDS)
    pace.announce()
    for at, result in in_workers(run_cell, left, settings.workers):
        cell = left[at]
        store.write(cell, result)
        pace.step(f"{cell.label}: accuracy {result.accuracy:.4f}, {result.seconds:.1f} s")
    _audit(settings, store, console)
    results = collect(settings, store)
    results.write(settings.runs / "table.json")
    write_page(results, settings, console)
    return results


def write_page(results: "Results", settings: TableSettings, console: Console) -> None:
    """Write the Markdown page and its plot, under the name of the configuration."""
    from experiments.privacy_table import page, persons_page, plot

    name, render = (f"{NAME}_{PERSONS}", persons_page.render) if results.compares_units else (NAME, page.render)
    image = settings.output / f"{name}.png"
    plot.draw(results, image)
    document = settings.output / f"{name}.md"
    write_atomic(document, render(results, image.name).encode())
    console.print(f"table: {document}\nplot:  {image}", soft_wrap=True)


def _audit(settings: TableSettings, store: "Store", console: Console) -> None:
    """Audit the first seed of each row."""
    from experiments.privacy_table.cells import audit_cell

    all_of_them = list(audits(settings))
    left = [attack for attack in all_of_them if store.audit(*attack) is None]
    known = [result.seconds for attack in all_of_them if (result := store.audit(*attack)) is not None]
    pace = Pace(console, len(all_of_them), len(left), settings.workers, known, _USUAL_AUDIT_SECONDS)
    if left:
        console.print("audits:")
        pace.announce()
    for at, result in in_workers(audit_cell, left, settings.workers):
        cell, options = left[at]
        store.write(cell, result, options)
        found = f"FLAGGED: {'; '.join(result.flagged)}" if result.flagged else "nothing exceeds the claim"
        by = f" by persons of {options.rows_together} rows" if options.rows_together > 1 else ""
        pace.step(f"audit {cell.label}{by}: epsilon >= {result.epsilon_lower:.3f}, {found}, {result.seconds:.1f} s")


if __name__ == "__main__":
    run_main("experiments.privacy_table", __doc__ or "", main)
