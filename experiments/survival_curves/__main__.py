"""Survival curves over sites: pooled, by site, federated without noise, and with differential privacy.

    python -m experiments.survival_curves data=DIRECTORY          run everything, write JSON, page and picture
    python -m experiments.survival_curves page                    write page and picture again from the JSON
    python -m experiments.survival_curves draws=20 output=try     of GBSG2 alone

DIRECTORY has brca.csv and train_test_split.csv of TCGA-BRCA as FLamby prepares them, which are not shipped. GBSG2 is
read from an installed lifelines or scikit-survival, or from gbsg2=FILE. Settings are in conf/survival_curves.yaml.
"""

if __name__ == "__main__":
    from fedclaw.startup import begin

    begin("experiments.survival_curves", __doc__)

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console

from experiments.pace import Pace
from experiments.survival_curves.settings import CurveSettings, cells
from experiments.survival_curves.studies import read_studies
from experiments.workers import in_workers
from fedclaw import startup
from fedclaw.cli import compose_settings, make_console, run_main, split
from fedclaw.errors import UsageError
from fedclaw.files import write_atomic

if TYPE_CHECKING:
    from experiments.survival_curves.results import Results

NAME = "survival_curves"
_USUAL_SECONDS = 20.0
"""Of one row; a guess."""


def main(arguments: Sequence[str]) -> None:
    """Do what the command line says."""
    line = split(arguments)
    if line.words not in ((), ("run",), ("page",)):
        raise UsageError(f"unknown command {' '.join(line.words)!r}; there are: run, page")
    settings = compose_settings(NAME, line.overrides, CurveSettings)
    console = make_console()
    if line.words == ("page",):
        from experiments.survival_curves.results import Results

        write_page(Results.read(settings.output / f"{NAME}.json"), settings, console)
    else:
        run(settings, console)


def run(settings: CurveSettings, console: Console) -> "Results":
    """Run every row, and write JSON, page and picture. Raises FedClawError."""
    studies = read_studies(settings)
    with startup.loading("torch and Flower"):
        from experiments.survival_curves.cells import run_cell, without_noise
        from experiments.survival_curves.results import Results, Row
    startup.next_step("give the same command again; it begins anew")
    known = {study.name: without_noise(study, settings) for study in studies}
    wanted = list(cells(settings, tuple(known)))
    pace = Pace(console, len(wanted), len(wanted), settings.workers, usual=_USUAL_SECONDS)
    pace.announce()
    done = {}
    for at, result in in_workers(run_cell, wanted, settings.workers, studies, settings):
        done[at] = Row(cell=wanted[at], result=result)
        pace.step(f"{wanted[at].label}: distance {result.distance.median:.3f}, {result.seconds:.0f} s")
    results = Results(settings=settings, studies=known, rows=tuple(done[at] for at in range(len(wanted))))
    results.write(settings.output / f"{NAME}.json")
    write_page(results, settings, console)
    return results


def write_page(results: "Results", settings: CurveSettings, console: Console) -> None:
    """Write survival_curves.md and survival_curves.png."""
    from experiments.survival_curves import page, plot

    image = settings.output / f"{NAME}.png"
    plot.draw(results, image)
    document = settings.output / f"{NAME}.md"
    write_atomic(document, page.render(results, image.name).encode())
    console.print(f"page: {document}\npicture: {image}", markup=False, soft_wrap=True)


if __name__ == "__main__":
    run_main("experiments.survival_curves", __doc__ or "", main)
