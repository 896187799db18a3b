"""The before/after table that a person reads."""

from pathlib import Path

from rich.table import Table

from fedclaw.compress.record import Compression, ProxyReport


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
