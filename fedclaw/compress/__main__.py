"""Prune a run's model to a fraction of its parameters and recover it by distillation from the run's own model.

python -m fedclaw.compress run=runs/NAME [key=value ...]

  run=DIR              the finished run; the result goes to DIR/compressed
  overwrite=true       replace an earlier result there, once the new one is whole
  fraction=0.3         largest share of the parameters that may be left
  mode=proxy           recover at the coordinator on public or synthetic inputs: costs no privacy
  mode=federated       recover at the sites, on their ledgers; needs federation=DIR
  inputs=FILE          proxy: public unlabelled inputs; without it, synthetic ones are made from the schema
  evaluation=FILE      labelled public data for the accuracies
  controls=true        proxy: also train the same net from scratch, and without a teacher (labelled=FILE)
  encryption.key=...   the key of a run that is encrypted at rest (docs/encryption.md)

Examples:
  python -m fedclaw.compress run=runs/demo
  python -m fedclaw.compress run=runs/demo fraction=0.1 inputs=public.csv evaluation=test.csv controls=true
  python -m fedclaw.compress run=runs/demo mode=federated federation=DIR sites.rounds=5 sites.epsilon=1

All settings are in conf/compress.yaml.
"""

if __name__ == "__main__":
    from fedclaw.startup import begin

    begin("fedclaw.compress", __doc__)

from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from fedclaw import startup
from fedclaw.cli import make_console, naming, require_paths, run_main, settings_of
from fedclaw.compress.record import Compression, CompressSettings, ProxyReport, require_room
from fedclaw.identity.federation_home import FederationHome
from fedclaw.server.run_directory import RunDirectory


def main(arguments: Sequence[str]) -> None:
    """Compress and print the table. Raises FedClawError."""
    settings = settings_of(arguments, "compress", CompressSettings)
    require_paths(inputs=settings.inputs, evaluation=settings.evaluation, labelled=settings.labelled)
    if settings.federation is not None:
        with naming(federation=settings.federation):
            FederationHome.open(settings.federation)
    directory = RunDirectory.open(settings.run, settings.encryption.keyring())
    require_room(directory, settings.overwrite)
    directory.check_encryption()
    with startup.loading("torch and the pruning library"):
        from fedclaw.compress.stage import compress
    startup.next_step("the run is as it was: give the same command again")
    console = make_console()
    if settings.mode == "federated":
        from fedclaw.report.terminal import TerminalProgress

        progress = TerminalProgress(console)
        try:
            record = compress(settings, [progress])
        finally:
            progress.close()
    else:
        record = compress(settings)
    console.print(before_after(record))
    for note in notes(record, settings.run / "compressed"):
        console.print(note, markup=False, soft_wrap=True)


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
    table.add_section()
    measure = record.accuracy_measure
    label = measure if measure.startswith("agreement") else f"{record.score} ({measure})"
    old, new = record.accuracy_before, record.accuracy_after
    table.add_row(label, f"{old:.4f}", f"{new:.4f}", _ratio(new, old))
    table.add_row("  pruned, before recovery", "", f"{record.accuracy_pruned:.4f}", _ratio(record.accuracy_pruned, old))
    if isinstance(record.recovery, ProxyReport):
        for control in record.recovery.controls:
            shown = control.agreement if control.accuracy is None else control.accuracy
            table.add_row(f"  control: {control.name}", "", f"{shown:.4f}", _ratio(shown, old))
    return table


def notes(record: Compression, compressed: Path) -> list[str]:
    """Notes below the table: what was measured on which data, the privacy cost, and where the result is."""
    return [_measure_note(record), _cost_note(record), f"Written to {compressed}."]


def _measure_note(record: Compression) -> str:
    if record.accuracy_measure == "agreement with the teacher":
        return (
            f"No labelled data was given: shown is {_agreement(record)}, on "
            f"{record.accuracy_examples} held-out inputs. {_no_score(record)}; evaluation=FILE gives one."
        )
    where = "on the evaluation file" if record.accuracy_measure == "evaluation file" else "at the sites, on their tests"
    return f"{record.score.capitalize()} {where}: {record.accuracy_examples} examples."


def _agreement(record: Compression) -> str:
    if record.score == "accuracy":
        return "how often the student says what the teacher says"
    return f"the student's {record.score} with the teacher's answers for targets"


def _no_score(record: Compression) -> str:
    return "It is not an accuracy" if record.score == "accuracy" else f"It is no {record.score} of the data"


def _cost_note(record: Compression) -> str:
    report = record.recovery
    if isinstance(report, ProxyReport):
        return f"Privacy cost: none (post-processing). Recovered on {report.inputs}, {report.steps} steps."
    spent = ", ".join(f"{site} {'unbounded' if e is None else f'{e:.2f}'}" for site, e in report.epsilon.items())
    return f"Privacy cost beyond the run, epsilon by site: {spent} ({report.rounds} rounds)."


def _count(table: Table, label: str, old: int, new: int) -> None:
    table.add_row(label, f"{old:,}", f"{new:,}", _ratio(new, old))


def _ratio(new: float, old: float) -> str:
    return f"{new / old:.1%}" if old else "-"


if __name__ == "__main__":
    run_main("fedclaw.compress", __doc__ or "", main)
