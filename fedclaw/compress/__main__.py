"""Prune a run's model to a fraction of its parameters and recover it by distillation from the run's own model.

python -m fedclaw.compress run=runs/NAME [key=value ...]

  run=DIR              the finished run; the result goes to DIR/compressed
  overwrite=true       replace an earlier result there, once the new one is whole
  fraction=0.3         largest share of the parameters that may be left
  mode=proxy           recover at the coordinator on public inputs; without any, on synthetic ones
  mode=synthetic       recover at the coordinator on inputs that are made there
  mode=federated       recover at the sites, on their ledgers; needs federation=DIR
  mode=none            prune only
  mode=[synthetic,federated]   one kind of recovery after the other, in this order
  inputs=FILE          proxy: public unlabelled inputs
  labelled=FILE        labelled public data to train with: recovery and the controls learn its labels
  evaluation=FILE      labelled public data for the accuracies; no step but the measurement looks at it
  controls=false       leave out the controls: without a teacher, and from scratch
  encryption.key=...   the key of a run that is encrypted at rest (docs/encryption.md)

python -m fedclaw.compress run=runs/NAME search [key=value ...] tries many and takes the smallest within a loss:

  search.loss=0.01     how much of the score it may lose
  search.fractions=[0.3,0.1]  search.modes=[proxy,synthetic]  search.precisions=[float32,int8]   what is tried
  search.selection=FILE   labelled public data to choose by; without it, agreement with the teacher on inputs kept back
  search.epsilon=2     what candidates that are recovered at the sites may cost each of them together

Examples:
  python -m fedclaw.compress run=runs/demo
  python -m fedclaw.compress run=runs/demo search search.loss=0.02 inputs=public.csv
  python -m fedclaw.compress run=runs/demo fraction=0.1 inputs=public.csv evaluation=test.csv
  python -m fedclaw.compress run=runs/demo mode=federated federation=DIR sites.rounds=5 sites.epsilon=1

All settings are in conf/compress.yaml, what they do in docs/compression.md.
"""

if __name__ == "__main__":
    from fedclaw.startup import begin

    begin("fedclaw.compress", __doc__)

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from fedclaw import startup
from fedclaw.cli import compose_settings, make_console, naming, require_paths, run_main, split
from fedclaw.compress.intervals import Difference, Interval
from fedclaw.compress.record import Compression, CompressSettings, CoordinatorReport, RecoveryReport, require_room
from fedclaw.errors import UsageError
from fedclaw.identity.federation_home import FederationHome
from fedclaw.server.run_directory import RunDirectory

if TYPE_CHECKING:
    from fedclaw.server.round_report import Observer

SEARCH = "search"
"""The one word that this command knows."""


def main(arguments: Sequence[str]) -> None:
    """Compress, or search, and print the tables. Raises FedClawError."""
    line = split(arguments)
    if line.words not in {(), (SEARCH,)}:
        raise UsageError(f"unknown command {' '.join(line.words)!r}; there is {SEARCH}, and settings, as key=value")
    settings = compose_settings("compress", line.overrides, CompressSettings)
    if line.words:
        _search(settings)
    else:
        _compress(settings)


def _check(settings: CompressSettings) -> None:
    """What can be wrong without torch."""
    require_paths(inputs=settings.inputs, evaluation=settings.evaluation, labelled=settings.labelled)
    if settings.federation is not None:
        with naming(federation=settings.federation):
            FederationHome.open(settings.federation)
    directory = RunDirectory.open(settings.run, settings.encryption.keyring())
    require_room(directory, settings.overwrite)
    directory.check_encryption()


def _compress(settings: CompressSettings) -> None:
    _check(settings)
    with startup.loading("torch and the pruning library"):
        from fedclaw.compress.stage import compress
    startup.next_step("the run is as it was: give the same command again")
    console = make_console()
    with _observers(console, "federated" in settings.mode) as observers:
        record = compress(settings, observers)
    for table in (before_after(record), compared(record)):
        console.print(table)
    for note in notes(record, settings.run / "compressed"):
        console.print(note, markup=False, soft_wrap=True)


@contextmanager
def _observers(console: Console, at_sites: bool) -> "Iterator[list[Observer]]":
    """Who watches the rounds, where there are any."""
    if not at_sites:
        yield []
        return
    from fedclaw.report.terminal import TerminalProgress

    progress = TerminalProgress(console)
    try:
        yield [progress]
    finally:
        progress.close()


def _search(settings: CompressSettings) -> None:
    require_paths(**{"search.selection": settings.search.selection})
    _check(settings)
    with startup.loading("torch, ONNX and the pruning library"):
        from fedclaw.compress.search import search
        from fedclaw.compress.search_figures import selected, table
        from fedclaw.compress.search_record import DIRECTORY, PLOT, SearchResult
        from fedclaw.export.graph import require_exporter
        from fedclaw.export.quantise import OnnxForms
        from fedclaw.export.staging import in_memory
    require_exporter()
    startup.next_step("candidates that were measured are kept: give the same command again")
    console, place = make_console(), settings.run / DIRECTORY

    def tell(result: SearchResult) -> None:
        console.print(table(result))
        for note in (*selected(result), f"All candidates are in {place}, and the plot of them: {PLOT}."):
            console.print(note, markup=False, soft_wrap=True)

    at_sites = any("federated" in mode for mode in settings.search.modes or ())
    # Exporters write temporary files, and those of an encrypted run's models are never on a disk in the clear.
    scratch = in_memory() if settings.encryption.key is not None else nullcontext()
    with scratch, _observers(console, at_sites) as observers:
        search(settings, lambda teacher: OnnxForms(teacher.workload.schema, settings.seed), observers, tell)
    console.print(f"Written to {settings.run / 'compressed'}.", markup=False, soft_wrap=True)


def before_after(record: Compression) -> Table:
    """Every figure of both models, and their ratio."""
    table = Table(title=f"Compressed model of run {record.run}", title_justify="left")
    table.add_column("")
    for heading in ("before", "after", "after/before"):
        table.add_column(heading, justify="right")
    before, after = record.before, record.after
    _count(table, "parameters", before.parameters, after.parameters)
    _count(table, "multiply-adds per example", before.multiply_adds, after.multiply_adds)
    _count(table, "file size, bytes", before.file_bytes, after.file_bytes)
    for batch, old in before.latency_ms.items():
        new = after.latency_ms[batch]
        table.add_row(f"latency, batch {batch}, ms (1 thread)", f"{old:.3f}", f"{new:.3f}", _ratio(new, old))
    return table


def compared(record: Compression) -> Table:
    """The score of every model with its interval, and how far the compressed model is from it."""
    measure = record.accuracy_measure
    label = measure if measure.startswith("agreement") else f"{record.score} ({measure})"
    title = f"{label}: {record.accuracy_examples} examples"
    table = Table(title=title[0].upper() + title[1:], title_justify="left")
    table.add_column("model", overflow="fold")
    table.add_column(f"{record.score}\n(95% interval)", justify="right", no_wrap=True)
    table.add_column("compressed less it\n(95% interval)", justify="right", no_wrap=True)
    table.add_row("as trained", *_figures(record.accuracy_before, record.before.interval, record.difference))
    table.add_row("pruned, before recovery", *_figures(record.accuracy_pruned, None, None))
    table.add_row("compressed", *_figures(record.accuracy_after, record.after.interval, None))
    if record.controls:
        table.add_section()
    for control in record.controls:
        shown = control.agreement if control.accuracy is None else control.accuracy
        table.add_row(control.name, *_figures(shown, control.interval, control.difference))
    return table


def _figures(score: float | None, interval: Interval | None, difference: Difference | None) -> tuple[str, str]:
    """Two cells; what is not known is left out."""
    first = "not measured" if score is None else f"{score:.3f}"
    second = "" if difference is None else f"{difference.value:+.3f}"
    apart = difference.interval if difference is not None else None
    return (
        first + (f" ({interval.low:.3f} to {interval.high:.3f})" if interval else ""),
        second + (f" ({apart.low:+.3f} to {apart.high:+.3f})" if apart else ""),
    )


def notes(record: Compression, compressed: Path) -> list[str]:
    """Notes below the tables: what was measured and gained, the privacy cost, and where the result is."""
    told = [_measure_note(record), record.verdict, record.controls_note]
    return [note for note in told if note] + [*_cost_notes(record), f"Written to {compressed}."]


def _measure_note(record: Compression) -> str:
    if record.accuracy_measure == "agreement with the teacher":
        return (
            f"No labelled data was given: shown is {_agreement(record)}, on "
            f"{record.accuracy_examples} held-out inputs. {_no_score(record)}; evaluation=FILE gives one."
        )
    where = "on the evaluation file" if record.accuracy_measure == "evaluation file" else "at the sites, on their tests"
    kept = (
        f", {_ratio(record.accuracy_after, record.accuracy_before)} of the teacher's" if record.accuracy_before else ""
    )
    return f"{record.score.capitalize()} {where}: {record.accuracy_examples} examples{kept}."


def _agreement(record: Compression) -> str:
    if record.score == "accuracy":
        return "how often the student says what the teacher says"
    return f"the student's {record.score} with the teacher's answers for targets"


def _no_score(record: Compression) -> str:
    return "It is not an accuracy" if record.score == "accuracy" else f"It is no {record.score} of the data"


def _cost_notes(record: Compression) -> list[str]:
    if not record.recovery:
        return [f"Pruned, and not recovered. {_cost_of_releases(record)}"]
    return [_cost_note(report, record) for report in record.recovery]


def _cost_note(report: RecoveryReport, record: Compression) -> str:
    if isinstance(report, CoordinatorReport):
        return f"Recovered on {report.inputs}, {report.steps} steps. {_cost_of(report, record)}"
    spent = ", ".join(f"{site} {'unbounded' if e is None else f'{e:.2f}'}" for site, e in report.epsilon.items())
    return f"Privacy cost beyond the run, epsilon by site: {spent} ({report.rounds} rounds)."


def _cost_of(report: CoordinatorReport, record: Compression) -> str:
    return _cost_of_releases(record) if report.mode == "synthetic" else "Privacy cost: none (post-processing)."


def _cost_of_releases(record: Compression) -> str:
    """What the statistics cost that some step looked at, of pruning or of recovery."""
    if not record.releases:
        return "Privacy cost: none (post-processing)."
    asked = ", ".join(f"{item.run} (epsilon {item.epsilon:g})" for item in record.releases)
    return f"Privacy cost: that of the statistics {asked}, which the sites were charged for."


def _count(table: Table, label: str, old: int, new: int) -> None:
    table.add_row(label, f"{old:,}", f"{new:,}", _ratio(new, old))


def _ratio(new: float, old: float) -> str:
    return f"{new / old:.1%}" if old else "-"


if __name__ == "__main__":
    run_main("fedclaw.compress", __doc__ or "", main)
