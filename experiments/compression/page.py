"""The measured part of docs/compression.md: every number in it is one of the results."""

from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from experiments.compression.plot import LOWEST
from experiments.compression.results import Model, Results, Row
from experiments.markdown import filled
from fedclaw.files import write_atomic

BEGIN, END = "<!-- made by python -m experiments.compression -->", "<!-- until here -->"
"""What is between them is made anew; what is around them is kept."""

_TITLES = {"plain": "trained without privacy", "private": "trained with differential privacy, by each site's own noise"}
_HEADER = (
    "| recovered by | parameters | accuracy | kept | pruned alone | fine-tuned without teacher | from scratch "
    "| less the better control | |\n"
    "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |"
)


def write(results: Results, path: Path, image: str) -> None:
    """Put the measured part in its place in the document at `path`, or make a document of it."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    before, found, rest = text.partition(BEGIN)
    after = rest.partition(END)[2] if found else ""
    before = before if before.strip() else "# Compression, measured\n\n"
    part = f"{BEGIN}\n\n{render(results, image).strip()}\n\n{END}"
    write_atomic(path, f"{before.rstrip()}\n\n{part}\n{after.lstrip()}".encode())


def render(results: Results, image: str) -> str:
    """The measured part, in Markdown."""
    parts = [
        "## Measured\n\n`python -m experiments.compression` makes this part, number by number. "
        "Each row of a data set is tested once (folds); three sites train the teacher, then what is pruned of it is "
        "recovered, and its controls are trained in its place. No model is chosen by the test rows: rounds at the "
        "sites end where they end, and training at the coordinator keeps the state that does best on inputs that it "
        "held back. But the defaults that both data sets share, such as how pruning is spread, were chosen before by "
        "what they kept on some of these digits. Intervals hold with confidence 0.95: Wilson's of accuracies, Tango's "
        "of differences on the same rows, each line of the table by itself. *Kept* is the accuracy as a share of the "
        "teacher's. With privacy that teacher has spent all of its epsilon; the one that is recovered at the sites "
        "has spent less, and both together stay within it. "
        f"The cells take {results.seconds / 60:.0f} minutes on one thread, beside other work.",
        f"![Accuracy kept against the share of parameters left]({image})",
        "Bars are the intervals of the accuracies; the dotted line of a colour is the better control of that mode; "
        f"what keeps less than {LOWEST:g} % lies below the picture.",
    ]
    for task in dict.fromkeys(row.task for row in results.rows):
        for kind in dict.fromkeys(row.kind for row in results.rows):
            teacher = results.reference(task, kind)
            rows = [row for row in results.rows if (row.task, row.kind) == (task, kind)]
            parts.append(f"### {task.replace('_', ' ').capitalize()}, {_TITLES[kind]}")
            parts.append(
                f"Teacher: {teacher.parameters:,} parameters, accuracy {_figure(teacher)}{_spent(teacher)}. "
                f"{_controls_learnt(rows)}"
            )
            parts.append("\n".join([_HEADER, *(_line(row) for row in rows)]))
    return filled(parts)


def _controls_learnt(rows: Sequence[Row]) -> str:
    """What the controls learnt from, by how the model beside them was recovered."""
    learnt = {row.mode: row.learnt_from for row in rows if row.controls}
    told = "; ".join(f"{mode}: {data}" for mode, data in learnt.items() if data)
    return f"What the controls without a teacher learnt from: {told}." if told else "No controls were trained."


def _line(row: Row) -> str:
    controls = [row.controls.get(name) for name in ("fine-tuned without teacher", "trained from scratch")]
    difference = "-"
    if row.difference is not None and row.difference.interval is not None:
        low, high = 100 * row.difference.interval.low, 100 * row.difference.interval.high
        difference = f"{100 * row.difference.value:+.1f} ({low:+.1f} to {high:+.1f})"
    cells = [
        f"{row.mode}, {100 * row.fraction:g} %",
        f"{row.recovered.parameters:,}",
        f"{_figure(row.recovered)}{_spent(row.recovered)}",
        f"**{100 * row.recovered.kept:.1f}**",
        f"{100 * row.pruned.accuracy:.1f}",
        *("-" if model is None else f"{100 * model.accuracy:.1f}" for model in controls),
        difference,
        row.verdict if row.better_control is None else f"{row.verdict} over {row.better_control}",
    ]
    return f"| {' | '.join(cells)} |"


def _figure(model: Model) -> str:
    return f"{100 * model.accuracy:.1f} % ({100 * model.interval.low:.1f} to {100 * model.interval.high:.1f})"


def _spent(model: Model) -> str:
    return "" if model.epsilon is None else f", epsilon {model.epsilon:.2f}"


def shown(results: Results) -> Table:
    """The same for a terminal, in short."""
    table = Table(title="Accuracy kept, % of the teacher's", title_justify="left")
    for heading in ("data set", "teacher", "mode", "parameters", "kept", "better control", "difference"):
        table.add_column(heading, justify="right" if heading in ("parameters", "kept", "difference") else "left")
    for row in results.rows:
        better = row.controls[row.better_control].kept if row.better_control else None
        table.add_row(
            row.task,
            row.kind,
            row.mode,
            f"{100 * row.fraction:g} %",
            f"{100 * row.recovered.kept:.1f}",
            "-" if better is None else f"{100 * better:.1f} {row.better_control}",
            "-" if row.difference is None else f"{100 * row.difference.value:+.1f} {row.verdict}",
        )
    return table
