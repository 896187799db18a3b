"""MODEL_CARD.md and VERIFY.md: facts of the run in words, for people.

The order follows Mitchell et al. (2019), "Model Cards for Model Reporting". What a run directory does not hold, such as
the intended use, is marked as missing and never invented. `card_metadata` writes the block at the card's head, for
machines. Text that a site or a coordinator chose goes through `fedclaw.export.markdown`.
"""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from fedclaw.compress.intervals import CONFIDENCE, Difference
from fedclaw.compress.record import Compression
from fedclaw.export.card_metadata import front_matter
from fedclaw.export.evaluation import Figure, accuracy_interval, evaluation_of
from fedclaw.export.graph import allowed
from fedclaw.export.layout import (
    CARD,
    COMPRESSION,
    HOW_TO_VERIFY,
    MANIFEST,
    ONNX,
    PIPELINE,
    SCHEMA,
    FormFigures,
    Forms,
    Manifest,
    TensorSpec,
)
from fedclaw.export.markdown import Markdown, bullets, code, escape, table
from fedclaw.export.signature import VerifiedSigner
from fedclaw.export.source import Source
from fedclaw.export.statement import PrivacyStatement
from fedclaw.learning.preprocessing import TypedColumn
from fedclaw.learning.tasks.base import Task
from fedclaw.server.run_directory import RunRecord

TO_BE_FILLED_IN = (
    "_To be filled in by the coordinator: what the model is for, for whom, and what it must not be used for. "
    "Nothing in the run says so._"
)


def model_card(
    source: Source, manifest: Manifest, statement: PrivacyStatement, signer: VerifiedSigner, license: str | None = None
) -> str:
    """The model card, Markdown. Every figure comes from the run directory; `license` is the coordinator's word."""
    sections = [
        ("Intended use", TO_BE_FILLED_IN),
        ("How to use", _use(manifest)),
        ("Model", _model(source, manifest)),
        ("Data", _data(source, manifest)),
        ("Training", _training(source)),
        ("Metrics", _metrics(source)),
        ("Compression", _compression(source)),
        ("Privacy", _privacy(statement)),
        ("Limits", bullets(limits_of(source.schema.task, manifest, statement))),
        ("Licence", "None was stated." if license is None else escape(license)),
        ("Who signed", _signed(manifest, signer)),
    ]
    parts = [_head(source, manifest, statement), *(f"## {title}\n\n{text}" for title, text in sections)]
    return front_matter(source, statement, license) + "\n" + "\n\n".join(parts) + "\n"


def how_to_verify(federation: str, fingerprint: str, digest: str) -> str:
    """VERIFY.md: the commands, for FedClaw and for public tools alone; `digest` is the hash of the signature."""
    return f"""# How to verify this bundle

With FedClaw (it also refuses links, certificates of the wrong kind and, with crl=, revoked ones):

    python -m fedclaw.verify . ca=/path/to/the/ca.crt/that/you/trust

With the OpenSSF's tool (`pip install model-signing`), without a network:

    model_signing verify certificate . --signature model.sig --certificate_chain /path/to/the/ca.crt/that/you/trust

It accepts any certificate of that CA, a site's too, and looks neither at revocation nor at when the certificate
expired. So look who signed, too: with FedClaw, or by these commands, which need OpenSSL and coreutils alone, in this
directory (bash):

```bash
set -eo pipefail
signed() {{ sed -n 's/.*"payload": *"\\([^"]*\\)".*/\\1/p' model.sig | openssl base64 -d -A; }}
signature() {{ sed -n 's/.*"sig": *"\\([^"]*\\)".*/\\1/p' model.sig | openssl base64 -d -A; }}
encoded() {{ printf 'DSSEv1 28 application/vnd.in-toto+json %d ' "$(signed | wc -c)"; signed; }}
openssl verify -no_check_time -CAfile ca.crt release.crt
encoded | openssl dgst -{digest} -verify <(openssl x509 -in release.crt -pubkey -noout) -signature <(signature)
signed | grep -c "$(sha256sum < SHA256SUMS | cut -c -64)"
sha256sum --strict --check SHA256SUMS
openssl x509 -in release.crt -noout -ext extendedKeyUsage,subjectAltName
openssl x509 -in ca.crt -noout -fingerprint -sha256
```

The certificate must be for Code Signing and named fedclaw://{federation}/release. SHA256SUMS lists every file but
itself and model.sig; a file that it does not list was added by somebody else.

The last line prints the fingerprint of the CA. A bundle can only prove that it is whole; that it comes from the
federation {federation!r} is proved by comparing this fingerprint with one that the coordinator told you in another
way (by telephone, on paper), or by keeping your own copy of ca.crt. When this bundle was made it was

    {fingerprint}

A bundle stays valid after the release certificate has expired, if it was signed before: `created` in bundle.json
says when, by the signer's own clock. `python -m fedclaw.verify . expired=refuse` asks for a certificate valid now.
"""


_SHOWN_COLUMNS = 50
"""A card is for people: of more columns it shows the first."""
_ZERO = {"float32": "np.nan", "float64": "np.nan", "uint8": "0"}
"""What the example fills numbers with: what is not known, or black."""


def _use(manifest: Manifest) -> str:
    parts = [
        f"With FedClaw, which reads rows as {SCHEMA} says:",
        "    python -m fedclaw.predict bundle=. input=rows.csv",
    ]
    if manifest.pipeline is not None:
        parts += [
            f"With ONNX Runtime alone, in this directory, from typed columns. {MANIFEST} says what they mean, and what "
            "has to be done to rows of a file first; a value that is not known is given as such:",
            _python(PIPELINE, [_example(column) for column in manifest.pipeline.columns]),
        ]
    shape = ", ".join(_one(size) for size in manifest.inputs[0].shape)
    parts += [
        f"With ONNX Runtime alone, from inputs that were prepared as `preprocessing` in {MANIFEST} says:",
        _python(ONNX, [(manifest.inputs[0].name, f"np.zeros(({shape}), np.float32)")]),
    ]
    return "\n\n".join(parts)


def _python(file: str, inputs: Sequence[tuple[str, str]]) -> str:
    """A program that answers with `file`, from an expression for each input. Names are quoted as Python and JSON do."""
    lines = "".join(f"    {json.dumps(name)}: {value},\n" for name, value in inputs)
    return f"""```python
import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession({json.dumps(file)})
names = [output.name for output in session.get_outputs()]
inputs = {{
{lines}}}
print(dict(zip(names, session.run(None, inputs))))
```"""


def _example(column: TypedColumn) -> tuple[str, str]:
    """A column of one row, of which nothing is known."""
    shape = ", ".join(_one(size) for size in column.shape)
    if column.dtype == "string":
        return column.name, f"np.full(({shape}), {json.dumps(column.missing or '')}, object)"
    value = "0" if column.missing is None else _ZERO[column.dtype]
    return column.name, f"np.full(({shape}), {value}, np.{column.dtype})"


def _one(size: int | str) -> str:
    """A dimension of a batch of one."""
    return "1" if isinstance(size, str) else str(size)


def _signed(manifest: Manifest, signer: VerifiedSigner) -> str:
    rows = [
        ("Federation", manifest.federation),
        ("Release certificate", signer.name),
        ("Its CA, SHA-256", code(signer.fingerprint)),
    ]
    return (
        f"{table(('', ''), rows)}\n\nThe signature covers this card. {HOW_TO_VERIFY} says how to check it; whoever "
        f"changed {CARD} could have changed the table above too."
    )


def _data(source: Source, manifest: Manifest) -> str:
    sites = source.receipts[0].by_site
    examples = sum(item.examples for item in sites.values())
    simulated = source.record.simulated
    rows = [
        ("Workload", source.record.workload),
        ("Sites" if simulated is None else "Simulated clients", str(len(sites))),
        ("Examples", f"{examples:,} training examples, as the sites count them"),
        ("Protected unit", source.schema.unit),
        ("Schema, SHA-256", code(source.record.schema_digest)),
    ]
    keeps = "The sites keep their data, and their own test data apart from what they train on."
    parts = [keeps if simulated is None else "One machine dealt data that it holds to the clients of a simulation."]
    parts.append(table(("", ""), rows))
    if manifest.pipeline is not None:
        columns = manifest.pipeline.columns
        shown = [(one.column, one.dtype, one.meaning, _missing(one)) for one in columns[:_SHOWN_COLUMNS]]
        parts += ["What an input is made of:", table(("Column", "Type", "Meaning", "Not known"), shown)]
        if len(columns) > _SHOWN_COLUMNS:
            parts.append(f"And {len(columns) - _SHOWN_COLUMNS:,} more; {MANIFEST} has all.")
    return "\n\n".join(parts)


def _missing(column: TypedColumn) -> str:
    """What stands for a value that is not known, quoted where it is a text."""
    if column.missing is None:
        return "never"
    return column.missing if column.dtype != "string" else json.dumps(column.missing, ensure_ascii=False)


def _head(source: Source, manifest: Manifest, statement: PrivacyStatement) -> str:
    warnings = "".join(f"\n\n> **{escape(warning)}**" for warning in statement.warnings)
    return (
        f"# Model card: {escape(source.record.run)}\n\n"
        f"A model of the workload {escape(source.record.workload)}, trained {_where(source.record)}, "
        f"exported {manifest.created:%Y-%m-%d %H:%M} UTC.\n\n"
        f"{escape(statement.summary)}{warnings}"
    )


def _where(record: RunRecord) -> str:
    if record.simulated is None:
        return f"by the federation {escape(record.federation)}"
    return (
        f"in a simulation of {record.simulated.clients} clients, signed by the federation {escape(record.federation)}"
    )


def _model(source: Source, manifest: Manifest) -> str:
    rows = [
        ("Architecture", code(source.spec.model_dump_json())),
        ("Parameters", f"{source.parameters:,}"),
        ("Variant", "compressed after training" if source.compression else "as trained"),
        ("Input", _tensors(manifest.inputs)),
        ("Outputs", _tensors(manifest.outputs)),
        *source.schema.task.facts(),
        ("Preprocessing", "constants in bundle.json, rules in schema.json"),
    ]
    for name, figures in sorted(manifest.parity.files.items()):
        rows.append(
            (
                f"{name} against torch",
                f"differs by at most {figures.max_abs_diff:.2g} on {figures.examples} "
                f"{manifest.compared_on(name)} inputs (allowed: {allowed(figures, manifest.parity.tolerance):g})",
            )
        )
    if manifest.decision is not None:
        rows.append(("Threshold", threshold_in_words(manifest)))
    if manifest.forms is not None:
        rows += _forms(manifest.forms, source.schema.task.score)
    return table(("", ""), rows)


def _tensors(tensors: Sequence[TensorSpec]) -> Markdown:
    return Markdown(", ".join(f"{code(tensor.name)} {tensor.dtype} {_shape(tensor.shape)}" for tensor in tensors))


def _forms(forms: Forms, score: str) -> list[tuple[str, str]]:
    """The figures of each ONNX form, which one is recommended, and what they were calibrated and measured on."""
    rows = [(name, _form(figures, score)) for name, figures in forms.files.items()]
    looked_at = [
        f"{step.step}: {step.examples:,} {step.origin} inputs ({step.description})"
        for step in (forms.calibration, forms.measurement)
    ]
    return [*rows, ("Recommended", f"{forms.chosen}: {forms.why}"), ("Looked at for them", "; ".join(looked_at))]


def _form(figures: FormFigures, score: str) -> str:
    times = ", ".join(f"{took:.3g} ms at batch {batch}" for batch, took in figures.latency_ms.items())
    if figures.agreement is None:
        return f"{figures.file_bytes:,} bytes, {times} (1 thread); values not finite or beyond its range"
    agreement = f"{score} against the exact model {figures.agreement:.4f} (at least {figures.agreement_low:.4f})"
    own = "" if figures.accuracy is None else f", accuracy {figures.accuracy:.4f} on the threshold's examples"
    return f"{figures.file_bytes:,} bytes, {times} (1 thread), {agreement}{own}"


def threshold_in_words(manifest: Manifest) -> str:
    """The decision threshold and the data that it was chosen on; '' without a threshold."""
    decision = manifest.decision
    if decision is None:
        return ""
    return (
        f"{manifest.labels[1]} from a probability of {decision.threshold:.4g} on: F1 {decision.value:.4f} there, "
        f"{decision.value_at_half:.4f} at one half, on {decision.examples:,} examples of {decision.chosen_on}"
        + (", by the coordinator's word no site's" if decision.chosen_on == "public data" else "")
    )


def _training(source: Source) -> str:
    record = source.record
    settings = ", ".join(f"{key} = {value}" for key, value in sorted(record.strategy.settings.items()))
    training = ", ".join(f"{key} = {value}" for key, value in record.training.model_dump(exclude_none=True).items())
    rows = [
        ("Strategy", record.strategy.name + (f" ({settings})" if settings else "")),
        ("Rounds", str(record.rounds)),
        ("Local training", training),
        ("Weighting of sites", record.weighting),
        ("Started", f"{record.created:%Y-%m-%d %H:%M} UTC"),
    ]
    return table(("", ""), rows)


def _metrics(source: Source) -> str:
    parts = [_as_trained(source)]
    own = evaluation_of(source) if source.compression is not None else None
    if own is not None:
        rows = [(figure.metric, f"{figure.value:.4f}", _interval(figure)) for figure in own.figures]
        parts.append(f"Of the model in this bundle, on {escape(own.data)} ({own.examples:,} examples):")
        parts.append(table(("Metric", "Value", "Interval"), rows))
    elif source.compression is not None:
        parts.append("The model in this bundle is a compressed one, and no evaluation of it is on record.")
    return "\n\n".join(parts)


def _as_trained(source: Source) -> str:
    """The last evaluation during training: together, over the sites, by class."""
    line = source.metrics[-1] if source.metrics else {}
    values: Mapping[str, Any] = line.get("metrics") or {}
    if not values:
        return "No evaluation is on record for this run."
    examples = line.get("test_examples")
    parts = [
        f"Of the model as trained, after round {line.get('round')}, on the "
        f"{'sites' if source.record.simulated is None else 'simulated clients'}' own test data "
        f"({'?' if examples is None else examples} examples):"
    ]
    over_sites: Mapping[str, Any] = line.get("over_sites") or {}
    rows = []
    for name, value in sorted(values.items()):
        own = over_sites.get(name)
        rows.append((name, f"{value:.4f}", f"{own['mean']:.4f}, {own['spread']:.4f}" if own else ""))
        if name == "accuracy" and (majority := line.get("majority")):
            rows.append((f"accuracy of always {majority['label']!r}", f"{majority['accuracy']:.4f}", ""))
    head = ("Metric", "Of all test examples together", "Mean over the sites, spread")
    parts.append(table(head, rows) if over_sites else table(head[:2], [row[:2] for row in rows]))
    if area := line.get("auroc"):
        low, high = area["interval"]
        parts.append(f"The AUROC is made of histograms: it lies in [{low:.4f}, {high:.4f}].")
    if interval := accuracy_interval(values.get("accuracy", math.nan), examples or 0):
        parts.append(
            f"The accuracy's {CONFIDENCE:.0%} interval is {interval} (Wilson score): what other test examples of the "
            "same kind would move, and nothing else."
        )
    if by_class := line.get("by_class"):
        names = ("precision", "recall", "f1")
        classes = [(label, *(_figure(own.get(name)) for name in names)) for label, own in by_class.items()]
        parts.append(table(("Class", *names), classes))
    if warning := source.schema.task.nothing_learned(line):
        parts.append(f"**{escape(warning[0].upper() + warning[1:])}.**")
    return "\n\n".join(parts)


def _interval(figure: Figure) -> str:
    return "" if figure.interval is None else "{:.4f} to {:.4f}".format(*figure.interval)


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _compression(source: Source) -> str:
    record = source.compression
    if record is None:
        return "None: these are the parameters as trained."
    rows = [
        ("Parameters", f"{record.before.parameters:,}", f"{record.after.parameters:,}"),
        ("Multiply-adds", f"{record.before.multiply_adds:,}", f"{record.after.multiply_adds:,}"),
        (_measure(record), f"{record.accuracy_before:.4f}", f"{record.accuracy_after:.4f}"),
    ]
    modes = ", then ".join(report.mode for report in record.recovery)
    done = f"Pruned, then recovered by distillation ({modes})." if modes else "Pruned, and not recovered."
    parts = [f"{done} {COMPRESSION} has all figures.", table(("", "before", "after"), rows)]
    if record.difference is not None:
        parts.append(
            f"After less before, on the same {record.accuracy_examples:,} examples: {_apart(record.difference)}."
        )
    if record.looked_at:
        looked = [(one.step, one.origin, one.description, f"{one.examples:,}") for one in record.looked_at]
        parts += ["What each step looked at:", table(("Step", "Origin", "Inputs", "Examples"), looked)]
    return "\n\n".join([*parts, *_controls(record)])


def _measure(record: Compression) -> str:
    if record.accuracy_measure == "agreement with the teacher":
        return "Agreement with the teacher"
    score = record.score.upper() if record.score == "r2" else record.score.capitalize()
    return f"{score} ({record.accuracy_measure})"


def _controls(record: Compression) -> list[str]:
    """What the same shapes reach in other ways; without that nobody knows what the recovery is worth."""
    if not record.controls:
        return ["No controls were trained: nothing says what a model of the same size reaches in another way."]
    rows = [
        (
            one.name,
            one.data,
            _figure(one.accuracy if one.accuracy is not None else one.agreement),
            _apart(one.difference),
        )
        for one in record.controls
    ]
    head = ("Control", "Trained on", _measure(record), f"Compressed less it ({CONFIDENCE:.0%} interval)")
    said = [escape(text) for text in (record.verdict, record.controls_note) if text]
    return ["Models of the same size, trained in other ways:", table(head, rows), *said]


def _apart(difference: Difference | None) -> str:
    if difference is None:
        return ""
    value, interval = difference.value, difference.interval
    return f"{value:+.4f}" + (f" ({interval.low:+.4f} to {interval.high:+.4f})" if interval else "")


def _privacy(statement: PrivacyStatement) -> str:
    parts: list[str] = [escape(statement.summary)]
    parts += [f"**{escape(warning)}**" for warning in statement.warnings]
    rows = [
        (
            site.site,
            cost.run,
            f"{cost.examples:,}",
            _number(cost.epsilon),
            _number(cost.epsilon_lifetime),
            f"{cost.delta:.3g}",
            cost.mechanism,
            cost.accountant,
            f"{cost.noise_multiplier:.3g}",
            str(cost.rounds),
        )
        for site in statement.sites
        for cost in site.runs
    ]
    head = (
        "Site",
        "Run",
        "Examples",
        "Epsilon",
        "Epsilon, all runs",
        "Delta",
        "Mechanism",
        "Accountant",
        "Noise",
        "Rounds",
    )
    if rows:
        parts.append(table(head, rows))
    parts += [escape(statement.unit), escape(statement.holds_against), f"Compression: {escape(statement.compression)}"]
    parts += [f"Not covered:\n\n{bullets(statement.not_covered)}", escape(statement.source)]
    return "\n\n".join(parts)


def limits_of(task: Task, manifest: Manifest, statement: PrivacyStatement) -> tuple[str, ...]:
    """What the model is not, a sentence each."""
    items = [
        *task.limits(),
        "The metrics are of the sites' test data taken together; a single site, or a group of people, can fare worse. "
        "No figures by group are on record.",
        f"{ONNX} takes inputs that were prepared exactly as {MANIFEST} says; with others its answers mean nothing.",
    ]
    if manifest.parity.inputs == "synthetic":
        items.append("The exported files were compared with the torch model on synthetic inputs only.")
    if statement.guarantee != "every site":
        items.append("No differential privacy for every site: treat the model file as sensitive as the data.")
    return tuple(items)


def _number(value: float | None) -> str:
    return "unbounded" if value is None else f"{value:.4g}"


def _shape(shape: Sequence[int | str]) -> str:
    return "(" + ", ".join(str(size) for size in shape) + ")"
