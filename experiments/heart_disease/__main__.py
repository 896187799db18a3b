"""UCI Heart Disease over its four hospitals: FLamby's table, FedClaw's recipe, and the same with privacy.

    python -m experiments.heart_disease data=DIRECTORY            run everything, write JSON, page and plot
    python -m experiments.heart_disease search data=DIRECTORY     choose settings again, without any test row
    python -m experiments.heart_disease data=DIRECTORY quick=true output=try
    python -m experiments.heart_disease data=DIRECTORY rows=[published.fedavg,shared,private.local] seeds=[42]

DIRECTORY has processed.cleveland.data, processed.hungarian.data, processed.switzerland.data and processed.va.data of
UCI Heart Disease (https://doi.org/10.24432/C52P4X), which are not shipped. Settings are in conf/heart_disease.yaml.
"""

if __name__ == "__main__":
    from fedclaw.startup import begin

    begin("experiments.heart_disease", __doc__)

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from experiments.heart_disease.prepare import Hospitals, prepare
from experiments.heart_disease.published import PUBLISHED
from experiments.heart_disease.settings import Cell, HeartSettings, cells
from experiments.heart_disease.source import read_centres
from experiments.pace import Pace
from experiments.workers import in_workers
from fedclaw import startup
from fedclaw.cli import compose_settings, make_console, run_main, split
from fedclaw.errors import UsageError
from fedclaw.files import write_atomic

if TYPE_CHECKING:
    from experiments.heart_disease.cells import CellResult
    from experiments.heart_disease.results import Results, Row

NAME = "heart_disease"
_USUAL_SECONDS = 5.0
"""Of one cell; a guess."""


def main(arguments: Sequence[str]) -> None:
    """Do what the command line says."""
    line = split(arguments)
    if line.words not in ((), ("run",), ("search",)):
        raise UsageError(f"unknown command {' '.join(line.words)!r}; there are: run, search")
    settings = compose_settings(NAME, line.overrides, HeartSettings)
    console = make_console()
    hospitals = prepare(read_centres(settings.data, verify=settings.verify))
    with startup.loading("torch, Opacus and Flower"):
        from experiments.heart_disease.search import search
    startup.next_step("give the same command again; it begins anew")
    if line.words == ("search",):
        found = search(settings, hospitals, console)
        write_atomic(settings.output / "search.json", (found.model_dump_json(indent=2) + "\n").encode())
        console.print(f"search: {settings.output / 'search.json'}", markup=False, soft_wrap=True)
    else:
        run(settings, hospitals, console)


def run(settings: HeartSettings, hospitals: Hospitals, console: Console) -> "Results":
    """Run every cell, and write JSON, page and plot. Raises FedClawError."""
    from experiments.heart_disease.cells import run_cell
    from experiments.heart_disease.results import Results
    from experiments.heart_disease.search import read_search

    found = read_search(settings.output / "search.json")
    wanted = list(cells(settings))
    done: dict[int, CellResult] = {}
    pace = Pace(console, len(wanted), len(wanted), settings.workers, usual=_USUAL_SECONDS)
    pace.announce()
    for at, result in in_workers(run_cell, wanted, settings.workers, hospitals):
        done[at] = result
        pace.step(f"{wanted[at].label}: {100 * result.mean:.2f}")
    results = Results(
        quick=settings.quick,
        rows=_grouped(wanted, done),
        search=found,
        sizes={name: (len(one.train), len(one.test)) for name, one in hospitals.splits.items()},
    )
    _write(settings, results, console)
    return results


def _grouped(wanted: Sequence[Cell], done: "dict[int, CellResult]") -> "tuple[Row, ...]":
    """A row for each run of cells that differ in their seeds alone."""
    from experiments.heart_disease.results import row_of

    grouped = groupby(range(len(wanted)), key=lambda at: (wanted[at].table, wanted[at].name))
    rows = [list(places) for _, places in grouped]
    return tuple(row_of([wanted[at] for at in row], [done[at] for at in row]) for row in rows)


def _write(settings: HeartSettings, results: "Results", console: Console) -> None:
    from experiments.heart_disease import page, plot

    image = settings.output / f"{NAME}.png"
    results.write(settings.output / f"{NAME}.json")
    plot.draw(results, image)
    document = settings.output / f"{NAME}.md"
    write_atomic(document, page.render(results, image.name).encode())
    console.print(_table(results))
    for what, path in (("results", settings.output / f"{NAME}.json"), ("page", document), ("plot", image)):
        console.print(f"{what}: {path}", markup=False, soft_wrap=True)


def _table(results: "Results") -> Table:
    table = Table("table", "row", "mean of hospitals", "published", "all test rows", "epsilon, ledger")
    for row in results.rows:
        known = PUBLISHED.get(row.name) if row.table == "published" else None
        table.add_row(
            row.table,
            row.name,
            f"{row.mean:.2f} ± {row.deviation:.2f}",
            "" if known is None else f"{known.mean:.2f} ± {known.deviation:.2f}" + ("" if row.within else " (outside)"),
            "" if row.pooled is None else f"{row.pooled:.2f}",
            "" if row.spending is None else f"{row.spending.together:.3f}",
        )
    return table


if __name__ == "__main__":
    run_main("experiments.heart_disease", __doc__ or "", main)
