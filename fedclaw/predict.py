"""Predict with a bundle: verified first, then ONNX Runtime alone.

    python -m fedclaw.predict bundle=DIR input=FILE [ca=ca.crt | federation=federation.json] [output=FILE.csv]

    bundle      a bundle directory
    input       rows or images in the workload's format: a CSV of one or many rows, an .npz, an image, ...
    ca          certificate of the CA that you trust (or federation=…, its descriptor); without it, the bundle's own
    identifiers columns to write beside each prediction, [a,b], with those that the bundle's schema names
    delimiter   and decimal, encoding, title_lines: how the input is written, where it is not as the schema says
    constants   the site's state/preprocessing.json, for a bundle whose schema says standardise: site
    key         what opens a bundle that is encrypted at rest: file:PATH, env:NAME or a PKCS#11 URI; [bundle's,site's]
                where a site's constants are encrypted under another key
    device      cpu, cuda (with onnxruntime-gpu), or auto: cuda where there is one
    precision   float32, the exact model; int8 or float16, where the bundle has it; or the one it has as recommended
    output      writes a CSV with the label and the probability of every class, or the value, instead of a table

A row that cannot be read costs itself its answer, not the others theirs: it comes with the reason in its place.

Examples:
    python -m fedclaw.predict bundle=runs/demo/bundle input=patient.csv ca=ca.crt
    python -m fedclaw.predict bundle=runs/digits/bundle input=seven.png output=answers.csv
"""

if __name__ == "__main__":
    from fedclaw.startup import begin

    begin("fedclaw.predict", __doc__)

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from rich.markup import escape
from rich.table import Table

from fedclaw.cli import make_console, naming, require_paths, run_main, settings_of
from fedclaw.compress.record import Precision
from fedclaw.errors import UsageError
from fedclaw.export.answers import Answers, as_csv
from fedclaw.export.check import TrustSettings, load_trust
from fedclaw.export.predictor import Predictor
from fedclaw.export.runtime import Device
from fedclaw.files import write_atomic
from fedclaw.learning.workload import FileFormat
from fedclaw.protocol.frozen import fields_of

SHOWN_ROWS = 50
DIGITS = 4
"""Of a probability at a terminal."""


class PredictSettings(TrustSettings, FileFormat):
    """conf/predict.yaml: the bundle, whom to trust, the input, and how that is written."""

    bundle: Path
    input: Path
    constants: Path | None
    identifiers: tuple[str, ...]
    device: Device
    precision: Precision | Literal["recommended"]
    output: Path | None


def main(arguments: Sequence[str]) -> None:
    """Predict by the command line."""
    settings = settings_of(arguments, "predict", PredictSettings)
    if settings.output is not None and settings.output.suffix.lower() != ".csv":
        raise UsageError(f"output={settings.output}: predictions are written as CSV, name a file that ends in .csv")
    if settings.output is not None and _same(settings.output, settings.input):
        raise UsageError(f"output={settings.output}: this is the input; name another file")
    require_paths(input=settings.input, constants=settings.constants)
    with naming(bundle=settings.bundle, federation=settings.federation):
        trust = load_trust(settings.ca, settings.federation, settings.crl, settings.expired, settings.key)
        predictor = Predictor.open(settings.bundle, trust, settings.device, settings.precision)
    if settings.constants is not None:
        predictor.use_constants(settings.constants, trust.keys)
    predictor.read_as(FileFormat(**fields_of(settings, FileFormat)))
    rows = predictor.read_rows(settings.input, settings.identifiers)
    given = predictor.predict(rows.inputs[rows.answered])
    answers = Answers.of(predictor.task, len(rows.inputs), rows, given, predictor.threshold)
    console = make_console()
    manifest = predictor.verified.manifest
    console.print(
        f"verified  {manifest.variant} model of run {manifest.run}, federation {manifest.federation}", markup=False
    )
    if not predictor.verified.pinned:
        console.print("note      the CA came with the bundle; ca=… proves who signed it", style="yellow", markup=False)
    if answers.refused:
        reason = next(iter(sorted(answers.refused.items())))[1]
        console.print(
            f"refused   {len(answers.refused)} of {len(answers.places)} rows, the first: {reason}",
            style="yellow",
            markup=False,
            soft_wrap=True,
        )
    if settings.output is not None:
        write_atomic(settings.output, as_csv(answers))
        console.print(f"written   {settings.output}, predictions: {len(answers.given)}", markup=False)
        return
    console.print(as_table(answers))
    if (hidden := len(answers.places) - SHOWN_ROWS) > 0:
        console.print(f"and {hidden} more rows; output=FILE.csv writes all of them", markup=False)


def _same(one: Path, other: Path) -> bool:
    """Whether both are one file; not by the name, for on some systems ROWS.csv is rows.csv."""
    return one.exists() and other.exists() and one.samefile(other)


def as_table(answers: Answers) -> Table:
    """The answer for each row, or why it has none, the first `SHOWN_ROWS` of them."""
    table, shown = Table(), answers.task.columns_shown
    table.add_column("row", justify="right")
    for name in answers.identifiers:
        table.add_column(escape(name))
    for column in answers.task.columns[:shown]:
        table.add_column(escape(column), justify="left" if column == "label" else "right")
    for row, place in enumerate(answers.places[:SHOWN_ROWS].tolist()):
        known = [escape(cells[row]) for cells in answers.identifiers.values()]
        if place < 0:
            refusal = f"refused: {escape(answers.refused[row])}"
            table.add_row(str(row + 1), *known, refusal, *[""] * (shown - 1))
            continue
        table.add_row(str(row + 1), *known, *map(escape, answers.cells(place, DIGITS)[:shown]))
    return table


if __name__ == "__main__":
    run_main("fedclaw.predict", __doc__ or "", main)
