"""sbom.cdx.json: a bundle's bill of materials with a model card for machines (CycloneDX 1.7, ECMA-424).

The model is the component that the document is about, and the bundle's files are its parts, each with its SHA-256.
Beside it stand the packages that it was made with and the data sets that went into it: those of the sites by the head
of the ledger that was charged for them, for no digest of a data set leaves a site; public files by their own.

The document is the same for the same bundle: its serial number is made from its content.
"""

import hashlib
import json
import uuid
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC
from typing import Any, Literal

from fedclaw.export.card_metadata import SPDX_LICENSES
from fedclaw.export.evaluation import Evaluation, evaluation_of
from fedclaw.export.layout import ONNX, PIPELINE, Manifest, TensorSpec
from fedclaw.export.markdown import plain
from fedclaw.export.packages import ROOT, Package, installed_packages
from fedclaw.export.source import Source
from fedclaw.export.statement import PrivacyStatement
from fedclaw.server.software import plugin_distributions, software

SPEC_VERSION = "1.7"
MODEL = "model"
"""The reference of the model's component."""
_NAMESPACE = uuid.UUID("3d2f3f6a-6f3c-4f0e-9a55-5a0f6d1f8c11")
"""Of our serial numbers."""
_TYPES = {"json": "application/json", "md": "text/markdown", "crt": "application/x-pem-file"}

Json = dict[str, Any]


def bill_of_materials(
    source: Source,
    manifest: Manifest,
    statement: PrivacyStatement,
    limits: Iterable[str],
    files: Mapping[str, str],
    license: str | None = None,
) -> str:
    """The document, for `files`: SHA-256 by name. `limits` are the card's sentences about what the model is not."""
    packages = installed_packages(more=plugin_distributions())
    data = list(_data(source, manifest))
    bom: Json = {
        "$schema": f"http://cyclonedx.org/schema/bom-{SPEC_VERSION}.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": SPEC_VERSION,
        "version": 1,
        "metadata": {
            "timestamp": manifest.created.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "lifecycles": [{"phase": "build"}],
            "tools": {"components": [_tool()]},
            "component": {
                "type": "machine-learning-model",
                "bom-ref": MODEL,
                "group": plain(manifest.federation),
                "name": plain(manifest.run),
                "version": manifest.variant,
                "description": plain(statement.summary),
                **_license(license),
                "components": [_file(name, digest) for name, digest in sorted(files.items())],
                "modelCard": _model_card(source, manifest, statement, limits, data),
            },
        },
        "components": [*(_library(package) for package in packages), *data],
        "dependencies": list(_dependencies(packages)),
    }
    content = json.dumps(bom, sort_keys=True, ensure_ascii=True)
    serial = uuid.uuid5(_NAMESPACE, hashlib.sha256(content.encode()).hexdigest())
    return json.dumps({**bom, "serialNumber": f"urn:uuid:{serial}"}, indent=2, ensure_ascii=False) + "\n"


def _tool() -> Json:
    used = software()
    version = {} if used.fedclaw is None else {"version": used.fedclaw}
    hashes = [{"alg": "SHA-256", "content": used.source_sha256}]
    return {"type": "application", "name": ROOT, **version, "hashes": hashes}


def _file(name: str, digest: str) -> Json:
    media = _TYPES.get(name.rpartition(".")[2], "application/octet-stream")
    hashes = [{"alg": "SHA-256", "content": digest}]
    return {"type": "file", "bom-ref": f"file:{name}", "mime-type": media, "name": name, "hashes": hashes}


def _library(package: Package) -> Json:
    """A package, in no way part of what runs later: any ONNX runtime will do."""
    licenses: Json = {}
    if package.license is not None:
        text = plain(package.license)
        licenses = {"licenses": [{"expression": text} if package.is_expression else {"license": {"name": text}}]}
    return {
        "type": "library",
        "bom-ref": package.purl,
        "name": package.name,
        "version": package.version,
        "scope": "excluded",
        **licenses,
        "purl": package.purl,
    }


def _dependencies(packages: Iterable[Package]) -> Iterator[Json]:
    by_name = {package.name: package for package in packages}
    if ROOT in by_name:
        yield {"ref": MODEL, "dependsOn": [by_name[ROOT].purl]}
    for package in by_name.values():
        yield {"ref": package.purl, "dependsOn": [by_name[name].purl for name in package.needs]}


def _license(license: str | None) -> Json:
    if license is None:
        return {}
    known = SPDX_LICENSES.get(license.lower())
    return {"licenses": [{"license": {"name": plain(license)} if known is None else {"id": known}}]}


def _data(source: Source, manifest: Manifest) -> Iterator[Json]:
    """Components for what the model was made from. The sites' come first, in the order of their names."""
    if source.record.simulated is not None:
        yield _set("data:simulation", "simulated clients", "Data that one machine dealt to simulated clients.")
    else:
        for number, (name, entry) in enumerate(sorted(source.receipts[0].by_site.items()), 1):
            about = f"{entry.examples:,} training examples, which the site keeps."
            head = {"fedclaw:ledger:head": entry.receipt.ledger_head}
            yield _set(f"data:site:{number}", name, about, properties=head)
    if manifest.decision is not None and manifest.decision.content is not None:
        about = "Public examples on which the decision threshold was chosen."
        yield _set("data:threshold", "threshold data", about, digest=manifest.decision.content)
    looked = () if source.compression is None else source.compression.looked_at
    for number, one in enumerate(looked, 1):
        if one.sha256 is not None:
            about = f"Looked at in compression, for {one.step}: {one.description}"
            yield _set(f"data:compression:{number}", one.origin, about, digest=one.sha256)


def _set(
    reference: str, name: str, about: str, digest: str | None = None, properties: Mapping[str, str] | None = None
) -> Json:
    found: Json = {"type": "data", "bom-ref": reference, "name": plain(name), "description": plain(about)}
    if digest is not None:
        found["hashes"] = [{"alg": "SHA-256", "content": digest}]
    found["data"] = [{"type": "dataset", "name": plain(name)}]
    return found | _properties(properties or {})


def _properties(values: Mapping[str, object]) -> Json:
    told = [{"name": name, "value": plain(str(value))} for name, value in values.items()]
    return {"properties": told} if told else {}


def _model_card(
    source: Source, manifest: Manifest, statement: PrivacyStatement, limits: Iterable[str], data: Iterable[Json]
) -> Json:
    evaluation = evaluation_of(source)
    return {
        "modelParameters": {
            "approach": {"type": "supervised"},
            "task": manifest.task,
            "architectureFamily": manifest.model.name,
            "modelArchitecture": plain(manifest.model.model_dump_json()),
            "datasets": [{"ref": component["bom-ref"]} for component in data],
            "inputs": list(_formats(manifest, manifest.inputs, "columns")),
            "outputs": list(_formats(manifest, manifest.outputs, "outputs")),
        },
        **({} if evaluation is None else {"quantitativeAnalysis": {"performanceMetrics": list(_measured(evaluation))}}),
        "considerations": {
            "technicalLimitations": [plain(item) for item in limits],
            "ethicalConsiderations": [{"name": plain(item)} for item in _privacy(statement)],
        },
        **_properties({"fedclaw:parameters": manifest.parameters, "fedclaw:privacy:guarantee": statement.guarantee}),
    }


def _formats(manifest: Manifest, exact: Iterable[TensorSpec], field: Literal["columns", "outputs"]) -> Iterator[Json]:
    """The tensors of model.onnx, then those of pipeline.onnx where there is one."""
    typed = () if manifest.pipeline is None else getattr(manifest.pipeline, field)
    for name, tensors in ((ONNX, exact), (PIPELINE, typed)):
        for tensor in tensors:
            shape = ", ".join(str(size) for size in tensor.shape)
            yield {"format": plain(f"{name}, {tensor.name}: {tensor.dtype} ({shape})")}


def _measured(evaluation: Evaluation) -> Iterator[Json]:
    for figure in evaluation.figures:
        found: Json = {
            "type": plain(figure.metric),
            "value": repr(figure.value),
            "slice": f"{evaluation.data}, {evaluation.examples} examples",
        }
        if figure.interval is not None and figure.confidence is not None:
            low, high = figure.interval
            found["confidenceInterval"] = {"lowerBound": repr(low), "upperBound": repr(high)}
        yield found


def _privacy(statement: PrivacyStatement) -> tuple[str, ...]:
    """The statement's own sentences, what is wrong with it first."""
    uncovered = (f"Not covered: {item}" for item in statement.not_covered)
    told = (statement.summary, statement.unit, statement.holds_against)
    return (*statement.warnings, *told, *uncovered, statement.source)
