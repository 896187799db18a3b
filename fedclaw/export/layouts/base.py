"""What all layouts have in common: the verified bundle that they are made of, their names, and how they are written."""

import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fedclaw.errors import BundleError, Setting, UsageError
from fedclaw.export import layout
from fedclaw.export.check import Trust, Verified, verify_bundle
from fedclaw.files import PUBLIC_MODE, sync_directory, write_atomic

SIGNED, PROVENANCE = "signed", "provenance.json"
DIRECTORY_MODE = 0o755
MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")
"""What every server takes for the name of a model, and every file system for that of a directory."""
_UNSAFE = re.compile(r"[^A-Za-z0-9_-]+")

Graph = Literal["pipeline.onnx", "model.onnx"]


@dataclass(frozen=True)
class Deployable:
    """A verified bundle with the bytes of one graph, and the name under which a server is to offer it."""

    verified: Verified
    graph: Graph
    name: str

    @classmethod
    def open(cls, bundle: Path, trust: Trust, graph: Graph | None = None, name: str | None = None) -> "Deployable":
        """Verify `bundle`. `graph`: None takes pipeline.onnx where there is one; `name`: None makes one of the run's.

        Raises BundleError when the bundle does not verify or has no such graph, UsageError for another name.
        """
        if name is not None and not MODEL_NAME.fullmatch(name):
            raise UsageError(
                f"name={name!r}: letters, digits, '_', '-' and '.', at most 63 and not one of the last three first"
            )
        verified = verify_bundle(bundle, trust, keep=(layout.PIPELINE, layout.ONNX, *_SIGNED))
        manifest = verified.manifest
        chosen = graph or (layout.PIPELINE if manifest.pipeline is not None else layout.ONNX)
        if chosen not in verified.contents:
            why = manifest.no_pipeline or "it is of an earlier version"
            raise BundleError(f"{bundle} has no {chosen}: {why} (", Setting("graph", layout.ONNX), " takes the other)")
        made = _UNSAFE.sub("-", f"{manifest.federation}-{manifest.run}").strip("-_")[:63]
        return cls(verified, "model.onnx" if chosen == layout.ONNX else "pipeline.onnx", name or made or "model")

    @property
    def model(self) -> bytes:
        """The graph, byte for byte as it was verified."""
        return self.verified.contents[self.graph]

    @property
    def provenance(self) -> dict[str, str]:
        """What says, wherever the model is taken, which bundle it came from."""
        manifest = self.verified.manifest
        return {
            "federation": manifest.federation,
            "run": manifest.run,
            "variant": manifest.variant,
            "signed": manifest.created.isoformat(),
            "signed_by_ca_sha256": self.verified.signer.fingerprint,
            "bundle_sha256sums_sha256": hashlib.sha256(self.verified.contents[layout.DIGESTS]).hexdigest(),
            "graph": self.graph,
            "graph_sha256": hashlib.sha256(self.model).hexdigest(),
        }

    def write_provenance(self, directory: Path) -> None:
        """The bundle's signed files but its graphs, and what they are the proof of."""
        for name in _SIGNED:
            if name in self.verified.contents:
                write_atomic(directory / SIGNED / name, self.verified.contents[name])
        write_atomic(directory / PROVENANCE, (json.dumps(self.provenance, indent=2) + "\n").encode())


_SIGNED = (
    *(
        layout.MANIFEST,
        layout.SCHEMA,
        layout.PRIVACY,
        layout.TRAINING,
        layout.COMPRESSION,
        layout.CARD,
        layout.MARGINALS,
    ),
    *(layout.HOW_TO_VERIFY, layout.RELEASE_CERTIFICATE, layout.CA_CERTIFICATE, layout.DIGESTS),
    *(layout.SIGNATURE, layout.SIGNATURE_IN_FORMAT_1, layout.SBOM),
)


@contextmanager
def laid_out(target: Path, overwrite: bool) -> Iterator[Path]:
    """A directory to fill, which becomes `target` as the block ends; if the block fails, `target` is as it was.

    Raises BundleError when `target` is there and may not be replaced, or is no layout of a bundle.
    """
    if target.exists() or target.is_symlink():
        if not overwrite:
            raise BundleError(f"{target} already exists; pass ", Setting("overwrite", "true"), " to replace it")
        if target.is_symlink() or not any(target.glob(f"**/{PROVENANCE}")):
            raise BundleError(f"{target} is no layout of a bundle and is left alone; name another output=")
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    try:
        staging.chmod(DIRECTORY_MODE)
        yield staging
        _open_up(staging)
        old = staging.with_name(f"{staging.name}.old")
        if target.exists():
            target.rename(old)
        staging.rename(target)
        shutil.rmtree(old, ignore_errors=True)
        sync_directory(target.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _open_up(directory: Path) -> None:
    """A server that is another user can read all of it; nothing in it is secret."""
    for path in directory.rglob("*"):
        path.chmod(DIRECTORY_MODE if path.is_dir() else PUBLIC_MODE)
