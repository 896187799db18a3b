"""Export a run's model as a signed bundle that serves without torch.

    python -m fedclaw.export run=runs/NAME federation=DIR [key=value ...]

    run         run directory of a finished run
    federation  the coordinator's federation directory; its release key signs
    inputs      file with real inputs (the workload's format) for comparing the exported model with the torch model;
                without it, inputs made from the schema
    threshold_data  labelled file of public data (no site's): the decision threshold of a model of two classes is the
                one with the largest F1 on it, and goes into the bundle
    threshold_statistics  instead, a statistics.json of python -m fedclaw.statistics scores=runs/NAME, which was
                charged to the sites' ledgers: the threshold then comes from their training rows
    marginals   a statistics.json of the training rows' columns: their noised distributions go into the bundle, for
                whoever watches a server for drift; without it, that which the run was standardised by, if still there
    key         encrypts the bundle: file:PATH, env:NAME or a PKCS#11 URI; verify and predict take the same
    encryption.key  the key of a run that is encrypted at rest; plaintext=true writes its bundle in the clear
    model       auto | final | compressed   (auto: the compressed one if there is one)
    tolerance   largest difference allowed (1e-4); for outputs above 10, at least 1e-5 of the largest, float32's limit
    floor       least score of the task (accuracy; R2 of a value) that the model has to have reached: as trained, in the
                run's last federated evaluation; compressed, where its compression measured it
    ledgers     [DIR,…]: directories or printed ledgers of the sites that are at hand, to hold their receipts against
    output      where the bundle goes (runs/NAME/bundle); overwrite=true replaces a bundle there
    quantise    true adds an 8-bit and a 16-bit ONNX model, measures all three, and says which one is recommended;
                without it, if a search chose the model in 8 or 16 bits
    quantise_loss   how much agreement with the exact model the recommended one may lack (0.01)
    calibration file of public inputs (no site's) to quantise and measure on; without it, inputs made from the schema
    license     the model's licence, for its card: an SPDX identifier (Apache-2.0) or another name

Examples:
    python -m fedclaw.export run=runs/demo federation=demo/coordinator
    python -m fedclaw.export run=runs/demo federation=demo/coordinator inputs=public.csv model=final output=bundles/a
"""

if __name__ == "__main__":
    from fedclaw.startup import begin

    begin("fedclaw.export", __doc__)

import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field
from rich.console import Console

from fedclaw import startup
from fedclaw.cli import make_console, naming, require_paths, run_main, settings_of
from fedclaw.compress.record import read_compressed
from fedclaw.errors import UsageError
from fedclaw.export.source import Source, load_source, signing_home
from fedclaw.files import sha256_file
from fedclaw.identity.data_keys import EncryptionSettings, Keyring, KeySetting, load_keyring
from fedclaw.identity.federation_home import CA_CERTIFICATE
from fedclaw.protocol.frozen import Frozen
from fedclaw.protocol.limits import Name
from fedclaw.report.late import late_notes
from fedclaw.server.run_directory import RunDirectory

_PLAIN_PATH = re.compile(r"[A-Za-z0-9_./-]*/[A-Za-z0-9_./-]*")
"""Paths that need no quotes, neither for Hydra nor for a shell."""


class ExportSettings(Frozen):
    """conf/export.yaml."""

    run: Path
    federation: Path
    inputs: Path | None
    threshold_data: Path | None
    threshold_statistics: Path | None
    marginals: Path | None = None
    model: Literal["auto", "final", "compressed"]
    tolerance: float = Field(gt=0)
    output: Path | None
    quantise: bool | None
    quantise_loss: float = Field(gt=0, lt=1)
    calibration: Path | None
    license: Name | None
    overwrite: bool
    seed: int
    key: KeySetting | None = None
    plaintext: bool = False
    encryption: EncryptionSettings = EncryptionSettings()
    floor: float | None = Field(default=None, le=1)
    ledgers: tuple[Path, ...] = ()


def main(arguments: Sequence[str]) -> None:
    """Export as the command line says."""
    export(settings_of(arguments, "export", ExportSettings), make_console())


def export(settings: ExportSettings, console: Console) -> None:
    """Export with checked settings and print each step on `console`."""
    directory = RunDirectory.open(settings.run, settings.encryption.keyring())
    keys = _bundle_keys(settings)
    directory.check_encryption()
    with naming(federation=settings.federation):
        home = signing_home(directory.record(), settings.federation)
    require_paths(
        inputs=settings.inputs,
        calibration=settings.calibration,
        threshold_data=settings.threshold_data,
        threshold_statistics=settings.threshold_statistics,
        marginals=settings.marginals,
    )
    for path in settings.ledgers:
        require_paths(ledgers=path)
    if settings.threshold_data is not None and settings.threshold_statistics is not None:
        raise UsageError("threshold_data= and threshold_statistics= are two ways of choosing; give one")
    if settings.calibration is not None and not settings.quantise:
        raise UsageError("calibration= is for quantise=true")
    if _same_content(settings.calibration, settings.threshold_data):
        raise UsageError(
            "calibration= and threshold_data= have the same content: the accuracies of the forms would be of rows that "
            "they were calibrated and chosen on; give rows of their own to each"
        )
    directory.require_whole()
    if settings.model == "compressed":
        read_compressed(directory)
    with startup.loading("torch and ONNX"):
        from fedclaw.export.bundle import Request, export_bundle, typed_inputs
        from fedclaw.export.card import threshold_in_words
        from fedclaw.export.graph import allowed
        from fedclaw.export.marginals import release_at_hand
        from fedclaw.privacy.mechanisms.choice import mechanism_of
        from fedclaw.server.statistics_release import read_release
    startup.next_step("no bundle was written, or it is as it was: give the same command again")
    scores = None if settings.threshold_statistics is None else read_release(settings.threshold_statistics)
    source = load_source(directory, settings.model).signed_by(home.name)
    marginals = None if settings.marginals is None else read_release(settings.marginals)
    marginals = marginals or release_at_hand(directory, source.schema)
    inputs = None if settings.inputs is None else source.schema.read_inputs(settings.inputs)
    typed = None if settings.inputs is None else typed_inputs(source.schema, settings.inputs)
    public = None
    if settings.threshold_data is not None:
        if source.schema.data_dependent:
            raise UsageError(
                "threshold_data= needs inputs that are the same everywhere, and the schema standardises by site"
            )
        public = source.schema.read_examples(settings.threshold_data)
    request = Request(
        tolerance=settings.tolerance,
        inputs=inputs,
        quantised=quantised(source, settings.quantise),
        loss=settings.quantise_loss,
        calibration=settings.calibration,
        overwrite=settings.overwrite,
        seed=settings.seed,
        public=public,
        scores=scores,
        license=settings.license,
        floor=settings.floor,
        ledgers=settings.ledgers,
        typed=typed,
        marginals=marginals,
        keys=keys,
    )
    target = settings.output or settings.run / "bundle"
    with console.status("exporting") as status:
        verified = export_bundle(
            source, home.signer(), target, request, lambda step: status.update(f"exporting: {step}")
        )
    manifest = verified.manifest
    console.print(f"bundle    {target} ({source.variant} model, {manifest.parameters:,} parameters)", markup=False)
    console.print(f"files     {', '.join(verified.files)}", markup=False, soft_wrap=True)
    for name, figures in sorted(manifest.parity.files.items()):
        console.print(
            f"parity    {name} differs from torch by {figures.max_abs_diff:.2g} on {figures.examples} "
            f"{manifest.compared_on(name)} inputs (allowed {allowed(figures, manifest.parity.tolerance):g})",
            markup=False,
        )
    if manifest.no_pipeline is not None:
        console.print(f"pipeline  none: {manifest.no_pipeline}", markup=False, soft_wrap=True)
    if manifest.forms is not None:
        console.print(f"forms     {manifest.forms.chosen} is recommended: {manifest.forms.why}", markup=False)
    if manifest.decision is not None:
        console.print(f"threshold {threshold_in_words(manifest)}", markup=False)
    for note in late_notes(source.metrics) if mechanism_of(source.record).claims_privacy else ():
        console.print(f"note      {note}", style="yellow", markup=False, soft_wrap=True)
    if keys is not None:
        console.print(f"encrypted under the key {keys.id.hex()}; who serves it needs that key", markup=False)
    console.print(f"signed    by {verified.signer.name}, CA SHA-256 {verified.signer.fingerprint}", markup=False)
    console.print(f"next      {verify_command(target, home.root / CA_CERTIFICATE)}", markup=False, soft_wrap=True)


def _same_content(first: Path | None, second: Path | None) -> bool:
    """Whether both are files, and the same."""
    if first is None or second is None or not (first.is_file() and second.is_file()):
        return False
    return sha256_file(first) == sha256_file(second)


def _bundle_keys(settings: ExportSettings) -> Keyring | None:
    """The keys of the bundle. Raises UsageError where a model that is encrypted would be written in the clear."""
    if settings.key is not None:
        return load_keyring(settings.key)
    if settings.encryption.key is not None and not settings.plaintext:
        raise UsageError(
            "the run is encrypted: name the bundle's key with key=…, or write its model in the clear: plaintext=true"
        )
    return None


def quantised(source: Source, asked: bool | None) -> bool:
    """Whether to add 8-bit and 16-bit forms: as `asked`, else if a search chose the model in such a precision."""
    if asked is not None:
        return asked
    search = None if source.compression is None else source.compression.search
    return search is not None and search.precision != "float32"


def verify_command(bundle: Path, ca: Path) -> str:
    """The shell command that verifies `bundle` against the CA certificate `ca`, quoted where a name needs it."""
    word = str(bundle)
    bare = "=" not in word and not word.startswith(("-", "~"))
    return f"python -m fedclaw.verify {shlex.quote(word) if bare else _setting('bundle', bundle)} {_setting('ca', ca)}"


def _setting(name: str, path: Path) -> str:
    """key=value, quoted for Hydra and again for the shell where the path needs it."""
    if _PLAIN_PATH.fullmatch(str(path)):
        return f"{name}={path}"
    text = str(path).replace('"', '\\"')
    return shlex.quote(f'{name}="{text}"')


if __name__ == "__main__":
    run_main("fedclaw.export", __doc__ or "", main)
