"""The YAML block at the head of MODEL_CARD.md, by the Hugging Face hub's conventions for model cards.

Tools read it without our code: library, task, tags, licence, and the evaluation as a model-index. What is not known is
left out. Text of others is on one line and in ASCII, quoted and escaped: it can neither end the block nor add a field
to it, nor is it markup to a reader that takes the block for Markdown.
"""

import re
from collections.abc import Mapping
from typing import Any

import yaml

from fedclaw.export.evaluation import Evaluation, evaluation_of
from fedclaw.export.markdown import plain
from fedclaw.export.source import Source
from fedclaw.export.statement import PrivacyStatement

_SPDX = """
    AFL-3.0 AGPL-3.0-only AGPL-3.0-or-later Apache-2.0 Artistic-2.0 BSD-2-Clause BSD-3-Clause BSD-3-Clause-Clear
    BSL-1.0 CC-BY-2.0 CC-BY-2.5 CC-BY-3.0 CC-BY-4.0 CC-BY-NC-2.0 CC-BY-NC-3.0 CC-BY-NC-4.0 CC-BY-NC-ND-3.0
    CC-BY-NC-ND-4.0 CC-BY-NC-SA-2.0 CC-BY-NC-SA-3.0 CC-BY-NC-SA-4.0 CC-BY-ND-4.0 CC-BY-SA-3.0 CC-BY-SA-4.0 CC0-1.0
    CDLA-Permissive-1.0 CDLA-Permissive-2.0 CDLA-Sharing-1.0 ECL-2.0 EPL-1.0 EPL-2.0 EUPL-1.1 EUPL-1.2 GPL-2.0-only
    GPL-2.0-or-later GPL-3.0-only GPL-3.0-or-later ISC LGPL-2.1-only LGPL-2.1-or-later LGPL-3.0-only LGPL-3.0-or-later
    LPPL-1.3c MIT MPL-2.0 MS-PL NCSA OFL-1.1 OSL-3.0 PostgreSQL Unlicense WTFPL Zlib etalab-2.0
"""
SPDX_LICENSES: Mapping[str, str] = {name.lower(): name for name in _SPDX.split()}
"""SPDX identifiers of licences that the hub knows, by the same in lower case."""
_VERSION_SUFFIX = re.compile(r"-(only|or-later)$")

_HUB_METRICS: Mapping[str, str] = {"auroc": "roc_auc", "r2": "r_squared"}
"""The hub's names for metrics, where they are not ours."""
_TASKS: Mapping[tuple[str | None, str], str] = {
    ("table", "classification"): "tabular-classification",
    ("table", "regression"): "tabular-regression",
    ("image", "classification"): "image-classification",
}
"""The hub's task by the schema's modality and our task; the hub has no other for what we make."""


def front_matter(source: Source, statement: PrivacyStatement, license: str | None) -> str:
    """The block, with its lines of dashes. `license` is an SPDX identifier or any name; None: none was stated."""
    task = hub_task(source)
    evaluation = evaluation_of(source)
    fields: dict[str, Any] = {
        **_license(license),
        "library_name": "onnx",
        **({} if task is None else {"pipeline_tag": task}),
        "tags": _tags(source, statement),
        **({} if evaluation is None else _index(source, evaluation)),
    }
    block = yaml.dump(fields, Dumper=_Quoting, sort_keys=False, allow_unicode=False, width=float("inf"))
    return f"---\n{block.translate(_ESCAPES)}---\n"


_ESCAPES = {ord(letter): f"\\x{ord(letter):02X}" for letter in "<>&`[]*|~!$"}
"""What is markup to a reader of Markdown who does not know that the block is none."""


class _Quoting(yaml.SafeDumper):
    """Puts text with such a letter in double quotes, where YAML knows escapes."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    quoted = not set(map(ord, text)).isdisjoint(_ESCAPES)
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if quoted else None)


_Quoting.add_representer(str, _represent_text)


def hub_task(source: Source) -> str | None:
    """What the hub calls the task, or None where it has no name for it."""
    return _TASKS.get((source.schema.modality, source.schema.task.name))


def _license(license: str | None) -> dict[str, str]:
    if license is None:
        return {}
    if known := SPDX_LICENSES.get(license.lower()):
        return {"license": _VERSION_SUFFIX.sub("", known).lower()}
    return {"license": "other", "license_name": plain(license)}


def _tags(source: Source, statement: PrivacyStatement) -> list[str]:
    tags = ["fedclaw", "federated-learning", source.schema.task.name]
    if statement.guarantee == "every site":
        tags.append("differential-privacy")
    if source.compression is not None:
        tags.append("compressed")
    if source.record.simulated is not None:
        tags.append("simulated")
    return [plain(tag) for tag in tags]


def _index(source: Source, evaluation: Evaluation) -> dict[str, Any]:
    """The model-index: one model, its one evaluation."""
    metrics = []
    for figure in evaluation.figures:
        entry: dict[str, Any] = {
            "type": plain(_HUB_METRICS.get(figure.metric, figure.metric)),
            "name": plain(figure.metric),
            "value": figure.value,
        }
        if figure.interval is not None:
            low, high = figure.interval
            entry["args"] = {"low": low, "high": high, "interval": figure.interval_is}
        metrics.append(entry)
    result = {
        "task": {"type": hub_task(source) or plain(source.schema.task.name)},
        "dataset": {
            "name": plain(evaluation.data),
            "type": evaluation.origin,
            "args": {"examples": evaluation.examples},
        },
        "metrics": metrics,
    }
    return {"model-index": [{"name": plain(source.record.run), "results": [result]}]}
