"""Assemble and sign a bundle: write it to a temporary directory, verify it as a recipient would, then rename it."""

import gc
import importlib.metadata
import json
import platform
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fedclaw.compress.record import RecoveryReport, SitesReport
from fedclaw.errors import BundleError, NotInGraph, Setting
from fedclaw.export import graph, layout, quantise, signature
from fedclaw.export.acceptance import accept
from fedclaw.export.card import how_to_verify, limits_of, model_card
from fedclaw.export.check import Trust, Verified, verify_bundle
from fedclaw.export.marginals import Marginals, marginals_of
from fedclaw.export.model_signature import sign_digests
from fedclaw.export.runtime import open_session, run_session
from fedclaw.export.sbom import bill_of_materials
from fedclaw.export.source import Source
from fedclaw.export.staging import assembling, beside, encrypt_bundle
from fedclaw.export.statement import PrivacyStatement, state
from fedclaw.export.threshold import choose_threshold, threshold_of_release
from fedclaw.export.training_record import TrainingRecord
from fedclaw.files import PUBLIC_MODE, sha256_file, sync_directory, write_atomic
from fedclaw.identity.data_keys import Keyring
from fedclaw.identity.federation_home import ReleaseSigner
from fedclaw.learning.preprocessing import TypedRows
from fedclaw.learning.tasks.classification import Classification
from fedclaw.learning.workload import Floats, Schema, Table
from fedclaw.server.statistics_release import Release

if TYPE_CHECKING:
    from fedclaw.export.onnx_model import OnnxModel

SYNTHETIC_EXAMPLES = 256
VERSIONED = ("fedclaw", "torch", "onnx", "onnxscript", "onnxruntime", "opacus", "flwr", "numpy")
THRESHOLD_BATCH = 256


@dataclass(frozen=True)
class Request:
    """Options of an export. `inputs` (N, *D) are real ones for the parity check; None: synthetic ones."""

    tolerance: float = 1e-4
    inputs: Floats | None = None
    quantised: bool = False
    """Add an 8-bit and a 16-bit form, measure all three, and recommend one."""
    loss: float = 0.01
    """How much agreement with the exact model a recommended form may lack."""
    calibration: Path | None = None
    """A file of public inputs to calibrate and measure those forms on; None: inputs made from the schema. Never
    `inputs`: their extremes would stand in the file."""
    overwrite: bool = False
    seed: int = 0
    public: Table | None = None
    """Labelled examples that no site holds: the threshold of a model of two classes is chosen on them."""
    scores: Release | None = None
    """Instead of those, statistics of the model's scores on the sites' training rows."""
    license: str | None = None
    """An SPDX identifier or another name; None: the card says that none was stated."""
    floor: float | None = None
    """The least score of the task that the model has to have reached."""
    ledgers: tuple[Path, ...] = ()
    """Sites' ledgers that are at hand, to hold their receipts against."""
    marginals: Release | None = None
    """Statistics of the sites' training rows, for marginals.json."""
    typed: TypedRows | None = None
    """The real inputs as typed columns, for the parity check of pipeline.onnx; None: made from the schema."""
    keys: Keyring | None = None
    """The bundle's files are encrypted at rest under these; None: they are as they are."""


def export_bundle(
    source: Source,
    signer: ReleaseSigner,
    target: Path,
    request: Request,
    progress: Callable[[str], None] = lambda _: None,
) -> Verified:
    """Export `source` to a signed bundle at `target` and return it, verified against the signer's CA.

    `progress` is called with a few words before each step. Raises BundleError when the source is not to be accepted
    (`fedclaw.export.acceptance`), when an exported model differs from the torch model by more than the tolerance, or
    when `target` exists and may not be overwritten; nothing is left behind then. Raises UsageError when the export
    extra is not installed.
    """
    graph.require_exporter()
    _check_target(target, request.overwrite)
    source = replace(source, acceptance=accept(source, request.floor, request.ledgers))
    if request.marginals is not None:
        marginals_of(request.marginals, source.record, source.schema)
    if (request.public is not None or request.scores is not None) and len(source.schema.labels) != 2:
        raise BundleError(f"a threshold is for two classes, and the schema has {len(source.schema.labels)}")
    with assembling(target, request.keys) as staging:
        _fill(staging, source, signer, request, progress)
        progress("signing")
        _sign(staging, signer, target.name)
        if request.keys is None:
            verified = verify_bundle(staging, Trust(authority=signer.ca_pem))
            _publish(staging, target)
        else:
            progress("encrypting")
            with beside(target) as encrypted:
                encrypt_bundle(staging, encrypted, request.keys)
                verified = verify_bundle(encrypted, Trust(signer.ca_pem, keys=request.keys))
                _publish(encrypted, target)
    return Verified(**{**vars(verified), "path": target})


def typed_inputs(schema: Schema, path: Path) -> TypedRows | None:
    """Real inputs as typed columns; None for a schema whose preprocessing is in no graph. Raises DataError."""
    try:
        return schema.preprocessing().read(path)
    except NotInGraph:
        return None


def _fill(
    staging: Path, source: Source, signer: ReleaseSigner, request: Request, progress: Callable[[str], None]
) -> None:
    inputs, kind = _parity_inputs(source, request)
    samples = _samples(source, request) if request.quantised else None
    shape = source.schema.input_shape
    progress("tracing the model")
    task = source.schema.task
    program = graph.trace(source.model, task, shape)
    graph.save_program(program, staging / layout.PROGRAM)
    progress("writing ONNX")
    model = graph.to_onnx(program, task, shape)
    model.write(staging / layout.ONNX)
    progress(f"comparing with the torch model on {kind} inputs")
    figures = _compare(staging, source, inputs, request.tolerance)
    decision = None if request.public is None else _decision(staging, request.public)
    if request.scores is not None:
        decision = threshold_of_release(request.scores, graph.parameters_of(source.model))
    progress("writing the pipeline")
    threshold = None if decision is None else decision.threshold
    spec, no_pipeline = _pipeline(staging, source, model, threshold, request, figures)
    forms = None
    if samples is not None:
        progress("making and measuring the 8-bit and 16-bit forms")
        forms = quantise.add_forms(staging, task, samples, request.loss, threshold, request.public)
    manifest = layout.Manifest(
        federation=source.record.federation,
        run=source.record.run,
        workload=source.record.workload,
        task=task.name,
        variant=source.variant,
        model=source.spec,
        parameters=source.parameters,
        created=datetime.now(UTC).replace(microsecond=0),
        versions=_versions(),
        inputs=(layout.TensorSpec(name=layout.INPUT, shape=(layout.BATCH, *shape)),),
        outputs=tuple(layout.TensorSpec(name=name, shape=(layout.BATCH, task.outputs)) for name in task.head),
        labels=source.schema.labels,
        target=task.describe(),
        preprocessing=dict(source.schema.describe_inputs()),
        graphs=_graphs(request.quantised, spec),
        pipeline=spec,
        no_pipeline=no_pipeline,
        parity=layout.Parity(inputs=kind, tolerance=request.tolerance, files=figures),
        forms=forms,
        decision=decision,
    )
    _write_texts(staging, source, manifest, signer, request)


def _pipeline(
    staging: Path,
    source: Source,
    model: "OnnxModel",
    threshold: float | None,
    request: Request,
    figures: dict[str, layout.ParityFigures],
) -> tuple[layout.PipelineSpec | None, str | None]:
    """Write pipeline.onnx and put its parity into `figures`; or say why there is none.

    Raises BundleError when it answers otherwise than the schema's reader and the torch model together.
    """
    task = source.schema.task
    try:
        preprocessing = source.schema.preprocessing()
    except NotInGraph as error:
        return None, str(error)
    from fedclaw.export import pipeline  # onnx, which `graph.require_exporter` has looked for

    kind: layout.InputKind = "synthetic" if request.typed is None else "real"
    if request.typed is None:
        columns = preprocessing.synthetic(SYNTHETIC_EXAMPLES, np.random.default_rng(request.seed))
    else:
        columns = {name: values[: graph.MAX_EXAMPLES] for name, values in request.typed.columns.items()}
    path = staging / layout.PIPELINE
    pipeline.compose_pipeline(model, preprocessing, task, threshold).write(path)
    figures[path.name] = pipeline.compare(path, source.model, preprocessing, columns, task, threshold)
    graph.require_parity(figures[path.name], request.tolerance, path.name)
    return pipeline.describe(preprocessing, task, kind), None


def _graphs(quantised: bool, spec: layout.PipelineSpec | None) -> dict[str, layout.Takes]:
    prepared = (layout.ONNX, layout.PROGRAM, *((layout.QUANTISED, layout.HALF) if quantised else ()))
    found: dict[str, layout.Takes] = dict.fromkeys(prepared, "prepared inputs")
    return found if spec is None else {**found, layout.PIPELINE: "typed columns"}


def _decision(staging: Path, public: Table) -> layout.Decision:
    session = open_session(staging / layout.ONNX, layout.ONNX, "export")
    batches = range(0, len(public), THRESHOLD_BATCH)
    parts = [run_session(session, public.inputs[start : start + THRESHOLD_BATCH])[1][:, 1] for start in batches]
    return choose_threshold(np.concatenate(parts), public)


def _samples(source: Source, request: Request) -> quantise.Samples:
    if request.calibration is None:
        return quantise.synthetic_samples(source.schema, request.seed)
    return quantise.public_samples(source.schema, request.calibration, request.seed)


def _parity_inputs(source: Source, request: Request) -> tuple[Floats, layout.InputKind]:
    if request.inputs is None:
        generator = np.random.default_rng(request.seed)
        return source.schema.synthetic_inputs(SYNTHETIC_EXAMPLES, generator), "synthetic"
    if request.inputs.shape[1:] != source.schema.input_shape:
        raise BundleError(
            f"the inputs for the parity check have shape {request.inputs.shape}, "
            f"the schema says (N, {', '.join(map(str, source.schema.input_shape))})"
        )
    return request.inputs, "real"


def _compare(staging: Path, source: Source, inputs: Floats, tolerance: float) -> dict[str, layout.ParityFigures]:
    """Load both exported models back from their files, one after the other, and compare them with the torch model."""
    reference = graph.Linked(source.model, source.schema.task).eval()
    loaders: Mapping[str, Callable[[], graph.Forward]] = {
        layout.PROGRAM: lambda: _program(staging / layout.PROGRAM),
        layout.ONNX: lambda: _session(staging / layout.ONNX),
    }
    figures = {}
    for name, load in loaders.items():
        figures[name] = graph.compare(lambda batch: graph.torch_outputs(reference, batch), load(), inputs)
        graph.require_parity(figures[name], tolerance, name)
        gc.collect()  # a program that was read back holds its weights in circles
    return figures


def _program(path: Path) -> graph.Forward:
    program = graph.load_program(path)
    return lambda batch: graph.torch_outputs(program, batch)


def _session(path: Path) -> graph.Forward:
    session = open_session(path, path.name, "export")
    return lambda batch: run_session(session, batch)


def _write_texts(
    staging: Path, source: Source, manifest: layout.Manifest, signer: ReleaseSigner, request: Request
) -> None:
    statement = state(
        source.receipts,
        source.record.privacy,
        _compression_cost(source),
        source.schema.data_dependent,
        source.record.central,
        source.record.statistics,
        request.scores.use if request.scores else None,
        source.record.simulated,
        source.schema.unit,
        source.compression.releases if source.compression else (),
        request.marginals.use if request.marginals else None,
    )
    who = _signed_by(signer)
    release = signature.parse_certificate(signer.certificate_pem, layout.RELEASE_CERTIFICATE)
    texts = {
        layout.MANIFEST: _pretty(manifest),
        layout.SCHEMA: source.schema.to_json(),
        layout.PRIVACY: _pretty(statement),
        layout.TRAINING: _pretty(source.training()),
        layout.CARD: model_card(source, manifest, statement, who, request.license),
        layout.HOW_TO_VERIFY: how_to_verify(manifest.federation, who.fingerprint, signature.hash_name(release)),
    }
    for name, text in texts.items():
        (staging / name).write_text(text, encoding="utf-8")
    if source.compression is not None:
        (staging / layout.COMPRESSION).write_bytes(source.report)
    if request.marginals is not None:
        marginals = marginals_of(request.marginals, source.record, source.schema)
        (staging / layout.MARGINALS).write_text(_pretty(marginals), encoding="utf-8")
    (staging / layout.RELEASE_CERTIFICATE).write_bytes(signer.certificate_pem)
    (staging / layout.CA_CERTIFICATE).write_bytes(signer.ca_pem)
    _write_sbom(staging, source, manifest, statement, request.license)


def _write_sbom(
    staging: Path, source: Source, manifest: layout.Manifest, statement: PrivacyStatement, license: str | None
) -> None:
    """The last file before the signature: it has the digest of every other one."""
    files = {path.name: sha256_file(path) for path in staging.iterdir()}
    limits = limits_of(source.schema.task, manifest, statement)
    text = bill_of_materials(source, manifest, statement, limits, files, license)
    (staging / layout.SBOM).write_text(text, encoding="utf-8")


def _signed_by(signer: ReleaseSigner) -> signature.VerifiedSigner:
    """Who the bundle's own certificates say that it is."""
    release = signature.parse_certificate(signer.certificate_pem, "the federation's release certificate")
    authority = signature.parse_certificate(signer.ca_pem, "the federation's CA certificate")
    return signature.check_chain(release, authority)


def _compression_cost(source: Source) -> str:
    if source.compression is None:
        return "none was done."
    done = [_recovery_cost(report) for report in source.compression.recovery]
    releases = [
        f"{release.run} (epsilon {release.epsilon:g}, delta {release.delta:g} at each site)"
        for release in source.compression.releases
    ]
    cost = [f"it looked at the charged statistics {', '.join(releases)}, which the bound includes"] if releases else []
    others = source.compression.search.at_sites if source.compression.search else ()
    if others:
        cost.append(
            f"chosen by a search among candidates, {len(others)} more of which were recovered at the sites: what each "
            "cost is in their runs, and part of each site's epsilon"
        )
    if not done and not cost:
        return "pruned at the coordinator, which looked at no site's data and cost nothing."
    return "; ".join(["pruned at the coordinator", *done, *cost]) + "."


def _recovery_cost(report: RecoveryReport) -> str:
    if isinstance(report, SitesReport):
        return (
            f"then trained for {report.rounds} more rounds at the sites, whose cost is the run 'recovery after "
            "pruning' of each site, and part of its epsilon"
        )
    if report.mode == "synthetic":
        return f"recovered at the coordinator on {report.inputs}, which is post-processing and cost nothing more"
    return (
        f"recovered at the coordinator on inputs that it declares to be no site's training data ({report.inputs}); "
        "under that condition it is post-processing and cost nothing"
    )


def _sign(staging: Path, signer: ReleaseSigner, name: str) -> None:
    """Write SHA256SUMS over all files and model.sig over all files and it; `name` is the bundle's directory."""
    names = sorted(path.name for path in staging.iterdir())
    for file in names:
        (staging / file).chmod(PUBLIC_MODE)
    digests = {file: sha256_file(staging / file) for file in names}
    content = "".join(f"{digest}  {file}\n" for file, digest in digests.items()).encode("ascii")
    write_atomic(staging / layout.DIGESTS, content)
    digests[layout.DIGESTS] = sha256_file(staging / layout.DIGESTS)
    write_atomic(staging / layout.SIGNATURE, sign_digests(digests, name or "bundle", signer))


def _check_target(target: Path, overwrite: bool) -> None:
    if not target.exists() and not target.is_symlink():
        return
    if not overwrite:
        raise BundleError(
            f"{target} already exists; pass ",
            Setting("overwrite", "true"),
            " to replace it, or ",
            Setting("output", "…"),
            " for another place",
        )
    if target.is_symlink() or not (target / layout.DIGESTS).is_file():
        raise BundleError(
            f"{target} is not a bundle and is left alone; pass ", Setting("output", "…"), " for another place"
        )


def _publish(staging: Path, target: Path) -> None:
    """Rename `staging` to `target`. A bundle that was there is removed last, once the new one is in place."""
    old = staging.with_name(staging.name + ".old")
    if target.exists():
        target.rename(old)
    staging.rename(target)
    shutil.rmtree(old, ignore_errors=True)
    sync_directory(target.parent)


def _pretty(model: layout.Manifest | PrivacyStatement | TrainingRecord | Marginals) -> str:
    plain = model.model_dump(mode="json")
    for later in ("threshold", "marginals"):
        if plain.get(later, ...) is None:
            del plain[later]
    if plain.get("compression_statistics", ...) == []:
        del plain["compression_statistics"]
    if isinstance(model, layout.Manifest):
        # Leave out fields without a value: older readers do not know them.
        if plain["task"] == Classification.name:
            del plain["task"]
        for fields, name in [
            (plain, "decision"),
            (plain, "target"),
            (plain, "quantised"),
            (plain, "forms"),
            *((figures, "scale") for figures in plain["parity"]["files"].values()),
        ]:
            if fields[name] is None:
                del fields[name]
    return json.dumps(plain, indent=2, ensure_ascii=False) + "\n"


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in VERSIONED:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
