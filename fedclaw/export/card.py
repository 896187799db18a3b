"""MODEL_CARD.md and VERIFY.md: facts of the run in words, for people.

The order follows Mitchell et al. (2019), "Model Cards for Model Reporting". What a run directory does not hold, such as
the intended use, is marked as missing and never invented.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fedclaw.export.graph import allowed
from fedclaw.export.layout import Manifest, QuantisedFigures
from fedclaw.export.source import Source
from fedclaw.export.statement import PrivacyStatement
from fedclaw.learning.tasks.base import Task
from fedclaw.server.run_directory import RunRecord

TO_BE_FILLED_IN = (
    "_To be filled in by the coordinator: what the model is for, for whom, and what it must not be used for. "
    "Nothing in the run says so._"
)


def model_card(source: Source, manifest: Manifest, statement: PrivacyStatement) -> str:
    """The model card, Markdown. Every figure comes from the run directory."""
    sections = [
        _head(source, manifest, statement),
        ("Intended use", TO_BE_FILLED_IN),
        ("Model", _model(source, manifest)),
        ("Training", _training(source)),
        ("Metrics", _metrics(source)),
        ("Compression", _compression(source)),
        ("Privacy", _privacy(statement)),
        ("Limits", _limits(source.schema.task, manifest, statement)),
        ("Is this file genuine?", "See VERIFY.md. This card is covered by the signature of the bundle."),
    ]
    return "\n\n".join(part if isinstance(part, str) else f"## {part[0]}\n\n{part[1]}" for part in sections) + "\n"


def how_to_verify(federation: str, fingerprint: str) -> str:
    """VERIFY.md: the commands, for FedClaw and for public tools alone."""
    return f"""# How to verify this bundle

With FedClaw (it also refuses extra files, links and certificates of the wrong kind):

    python -m fedclaw.verify . ca=/path/to/the/ca.crt/that/you/trust

With OpenSSL and coreutils alone, in this directory (bash):

```bash
set -e
openssl verify -no_check_time -CAfile ca.crt release.crt
openssl dgst -sha384 -verify <(openssl x509 -in release.crt -pubkey -noout) -signature SHA256SUMS.sig SHA256SUMS
sha256sum --strict --check SHA256SUMS
openssl x509 -in ca.crt -noout -fingerprint -sha256
```

The last line prints the fingerprint of the CA. A bundle can only prove that it is whole; that it comes from the
federation {federation!r} is proved by comparing this fingerprint with one that the coordinator told you in another
way (by telephone, on paper), or by keeping your own copy of ca.crt. When this bundle was made it was

    {fingerprint}

A bundle stays valid after the release certificate has expired, if it was signed before: `created` in bundle.json
says when, by the signer's own clock. `python -m fedclaw.verify . expired=refuse` asks for a certificate valid now.
"""


def _head(source: Source, manifest: Manifest, statement: PrivacyStatement) -> str:
    warnings = "".join(f"\n\n> **{_cell(warning)}**" for warning in statement.warnings)
    return (
        f"# Model card: {_cell(source.record.run)}\n\n"
        f"A model of the workload {_cell(source.record.workload)}, trained {_where(source.record)}, "
        f"exported {manifest.created:%Y-%m-%d %H:%M} UTC.\n\n"
        f"{statement.summary}{warnings}"
    )


def _where(record: RunRecord) -> str:
    if record.simulated is None:
        return f"by the federation {_cell(record.federation)}"
    return f"in a simulation of {record.simulated.clients} clients, signed by the federation {_cell(record.federation)}"


def _model(source: Source, manifest: Manifest) -> str:
    rows = [
        ("Architecture", f"`{source.spec.model_dump_json()}`"),
        ("Parameters", f"{source.parameters:,}"),
        ("Variant", "compressed after training" if source.compression else "as trained"),
        ("Input", ", ".join(f"`{t.name}` {t.dtype} {_shape(t.shape)}" for t in manifest.inputs)),
        ("Outputs", ", ".join(f"`{t.name}` {t.dtype} {_shape(t.shape)}" for t in manifest.outputs)),
        *source.schema.task.facts(),
        ("Preprocessing", "constants in bundle.json, rules in schema.json"),
    ]
    for name, figures in sorted(manifest.parity.files.items()):
        rows.append(
            (
                f"{name} against torch",
                f"differs by at most {figures.max_abs_diff:.2g} on {figures.examples} "
                f"{manifest.parity.inputs} inputs (allowed: {allowed(figures, manifest.parity.tolerance):g})",
            )
        )
    if manifest.decision is not None:
        rows.append(("Threshold", threshold_in_words(manifest)))
    if manifest.quantised is not None:
        rows.append(
            (
                "8-bit model",
                _quantised(manifest.quantised),
            )
        )
    return _table(("", ""), rows)


def _quantised(figures: QuantisedFigures) -> str:
    if figures.same_label is None:
        return f"its values differ by at most {figures.max_abs_diff_value:.4g} on {figures.examples} inputs"
    return f"same label on {figures.same_label:.1%} of {figures.examples} inputs"


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
    sites = source.receipts[0].by_site
    settings = ", ".join(f"{key} = {value}" for key, value in sorted(record.strategy.settings.items()))
    training = ", ".join(f"{key} = {value}" for key, value in record.training.model_dump(exclude_none=True).items())
    rows = [
        ("Strategy", record.strategy.name + (f" ({settings})" if settings else "")),
        ("Rounds", str(record.rounds)),
        ("Sites", f"{len(sites)}, with {sum(item.examples for item in sites.values()):,} training examples"),
        ("Local training", training),
        ("Weighting of sites", record.weighting),
        ("Started", f"{record.created:%Y-%m-%d %H:%M} UTC"),
    ]
    return _table(("", ""), rows)


def _metrics(source: Source) -> str:
    line = source.metrics[-1] if source.metrics else {}
    values: Mapping[str, Any] = line.get("metrics") or {}
    if not values:
        return "No evaluation is on record for this run."
    text = (
        f"Of the model as trained, after round {line.get('round')}, on the sites' own test data "
        f"({line.get('test_examples', '?')} examples):\n\n"
    )
    over_sites: Mapping[str, Any] = line.get("over_sites") or {}
    rows = []
    for name, value in sorted(values.items()):
        own = over_sites.get(name)
        rows.append((name, f"{value:.4f}", f"{own['mean']:.4f}, {own['spread']:.4f}" if own else ""))
        if name == "accuracy" and (majority := line.get("majority")):
            rows.append((f"accuracy of always {majority['label']!r}", f"{majority['accuracy']:.4f}", ""))
    head = ("Metric", "Of all test examples together", "Mean over the sites, spread")
    parts = [text + _table(head, rows) if over_sites else text + _table(head[:2], [row[:2] for row in rows])]
    if area := line.get("auroc"):
        low, high = area["interval"]
        parts.append(f"The AUROC is made of histograms: it lies in [{low:.4f}, {high:.4f}].")
    if by_class := line.get("by_class"):
        names = ("precision", "recall", "f1")
        table = [(label, *(_figure(own.get(name)) for name in names)) for label, own in by_class.items()]
        parts.append(_table(("Class", *names), table))
    if warning := source.schema.task.nothing_learned(line):
        parts.append(f"**{_cell(warning[0].upper() + warning[1:])}.**")
    return "\n\n".join(parts)


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _compression(source: Source) -> str:
    record = source.compression
    if record is None:
        return "None: these are the parameters as trained."
    agreement = record.accuracy_measure == "agreement with the teacher"
    score = record.score.upper() if record.score == "r2" else record.score.capitalize()
    measure = "Agreement with the teacher" if agreement else f"{score} ({record.accuracy_measure})"
    rows = [
        ("Parameters", f"{record.before.parameters:,}", f"{record.after.parameters:,}"),
        ("Multiply-adds", f"{record.before.multiply_adds:,}", f"{record.after.multiply_adds:,}"),
        (measure, f"{record.accuracy_before:.4f}", f"{record.accuracy_after:.4f}"),
    ]
    return f"Pruned, then recovered by distillation ({record.recovery.mode}).\n\n" + _table(
        ("", "before", "after"), rows
    )


def _privacy(statement: PrivacyStatement) -> str:
    parts = [statement.summary]
    parts += [f"**{_cell(warning)}**" for warning in statement.warnings]
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
        parts.append(_table(head, rows))
    parts += [statement.unit, statement.holds_against, f"Compression: {statement.compression}"]
    parts += ["Not covered:\n\n" + "\n".join(f"- {item}" for item in statement.not_covered), statement.source]
    return "\n\n".join(parts)


def _limits(task: Task, manifest: Manifest, statement: PrivacyStatement) -> str:
    items = [
        *task.limits(),
        "The metrics are of the sites' test data taken together; a single site, or a group of people, can fare worse. "
        "No figures by group are on record.",
        "Inputs must be prepared exactly as schema.json says.",
    ]
    if manifest.parity.inputs == "synthetic":
        items.append("The exported files were compared with the torch model on synthetic inputs only.")
    if statement.guarantee != "every site":
        items.append("No differential privacy for every site: treat the model file as sensitive as the data.")
    return "\n".join(f"- {item}" for item in items)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(_cell(value) for value in line) + " |" for line in lines)


def _cell(value: str) -> str:
    """`value` on one line, escaped so that it can neither end a table cell nor start markup."""
    return " ".join(value.split()).replace("|", "\\|").replace("<", "&lt;")


def _number(value: float | None) -> str:
    return "unbounded" if value is None else f"{value:.4g}"


def _shape(shape: Sequence[int | str]) -> str:
    return "(" + ", ".join(str(size) for size in shape) + ")"
