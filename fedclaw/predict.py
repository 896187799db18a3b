"""Predict with a bundle: verified first, then ONNX Runtime alone.

    python -m fedclaw.predict bundle=DIR input=FILE [ca=ca.crt | federation=federation.json] [output=FILE.csv]

    bundle      a bundle directory
    input       rows or images in the workload's format: a CSV of one or many rows, an .npz, an image, ...
    ca          certificate of the CA that you trust (or federation=…, its descriptor); without it, the bundle's own
    constants   the site's state/preprocessing.json, for a bundle whose schema says standardise: site
    output      writes a CSV with the label and the probability of every class instead of printing a table

Examples:
    python -m fedclaw.predict bundle=runs/demo/bundle input=patient.csv ca=ca.crt
    python -m fedclaw.predict bundle=runs/digits/bundle input=seven.png output=answers.csv
"""

if __name__ == "__main__":
    from fedclaw.startup import begin

    begin("fedclaw.predict", __doc__)

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from rich.markup import escape
from rich.table import Table

from fedclaw.cli import compose_settings, run_main, split
from fedclaw.errors import UsageError
from fedclaw.export.predictor import Predictor
from fedclaw.export.trust import load_trust
from fedclaw.files import write_atomic
from fedclaw.frozen import Frozen
from fedclaw.report.console import make_console
from fedclaw.workload import Floats

SHOWN_ROWS = 50


class Settings(Frozen):
    """conf/predict.yaml."""

    bundle: Path
    input: Path
    ca: Path | None
    federation: Path | None
    crl: Path | None
    expired: Literal["accept", "refuse"]
    constants: Path | None
    output: Path | None


def main(arguments: Sequence[str]) -> None:
    """Predict by the command line."""
    command = split(arguments)
    if command.words:
        raise UsageError(f"unexpected argument {command.words[0]!r}; everything is written key=value")
    settings = compose_settings("predict", command.overrides, Settings)
    if settings.output is not None and settings.output.suffix != ".csv":
        raise UsageError(f"output={settings.output}: predictions are written as CSV, name a file that ends in .csv")
    trust = load_trust(settings.ca, settings.federation, settings.crl, settings.expired)
    predictor = Predictor.open(settings.bundle, trust)
    if settings.constants is not None:
        predictor.use_constants(settings.constants)
    probabilities = predictor.predict(predictor.read(settings.input))
    console = make_console()
    manifest = predictor.verified.manifest
    console.print(
        f"verified  {manifest.variant} model of run {manifest.run}, federation {manifest.federation}", markup=False
    )
    if not predictor.verified.pinned:
        console.print("note      the CA came with the bundle; ca=… proves who signed it", style="yellow", markup=False)
    if settings.output is not None:
        write_atomic(settings.output, as_csv(predictor.labels, probabilities))
        console.print(f"written   {settings.output}, predictions: {len(probabilities)}", markup=False)
        return
    console.print(as_table(predictor.labels, probabilities))
    if len(probabilities) > SHOWN_ROWS:
        hidden = len(probabilities) - SHOWN_ROWS
        console.print(f"and {hidden} more rows; output=FILE.csv writes all of them", markup=False)


def as_table(labels: Sequence[str], probabilities: Floats) -> Table:
    """Label and probability of each row, the first `SHOWN_ROWS` of them."""
    table = Table()
    table.add_column("row", justify="right")
    table.add_column("label")
    table.add_column("probability", justify="right")
    for number, row in enumerate(probabilities[:SHOWN_ROWS], start=1):
        best = int(row.argmax())
        table.add_row(str(number), escape(labels[best]), f"{row[best]:.4f}")
    return table


def as_csv(labels: Sequence[str], probabilities: Floats) -> bytes:
    """CSV: row (1-based), label, probability, then one column a class."""
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["row", "label", "probability", *(f"p({label})" for label in labels)])
    for number, row in enumerate(probabilities, start=1):
        best = int(row.argmax())
        writer.writerow([number, labels[best], f"{row[best]:.6f}", *(f"{value:.6f}" for value in row)])
    return buffer.getvalue().encode("utf-8")


if __name__ == "__main__":
    run_main("fedclaw.predict", __doc__ or "", main)
