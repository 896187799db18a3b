"""What leaves a federation, read and checked: a bundle, a site's ledger."""

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedclaw.api.arguments import place, public
from fedclaw.api.frames import is_frame, named
from fedclaw.clients.arrays import inputs_of
from fedclaw.clients.tabular_schema import TabularSchema
from fedclaw.errors import DataError
from fedclaw.export.check import Trust, Verified, load_trust, verify_bundle
from fedclaw.export.layout import CARD, ONNX, PRIVACY, SCHEMA, Manifest
from fedclaw.export.markdown import without_front_matter
from fedclaw.export.predictor import Predictor
from fedclaw.learning.workload import FileFormat, Floats
from fedclaw.site.journal.reconciliation import check_journal, open_journal
from fedclaw.site.journal.spending import Spending

Pathlike = str | os.PathLike[str]
_FROM_FILE = "give the path of a file for rows that are not prepared yet"


@dataclass(frozen=True)
class Bundle:
    """A model that a federation signed, whole and verified: what is here are the bytes that were checked."""

    path: Path
    manifest: Manifest
    """Where the model comes from, its tensors and its labels."""
    trusted: bool
    """Whether a CA that the caller brought stands behind it; False: the bundle's own, which proves no identity."""
    privacy: Mapping[str, Any]
    """What training cost each site, and what that does and does not promise: privacy.json."""
    card: str
    """The model card, Markdown; the file has fields for machines before it."""
    _verified: Verified = field(repr=False, compare=False)

    def __repr__(self) -> str:
        about = self.manifest
        kind = f"{about.workload} model of {about.parameters:,} parameters"
        return f"Bundle({str(self.path)!r}, {kind}, signed by {about.federation}, trusted={self.trusted})"

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the classes, in the order of `predict`; none where the target is a number."""
        return self.manifest.labels

    @public
    def predict(self, inputs: ArrayLike | Pathlike) -> NDArray[np.float32]:
        """(N, classes) probabilities, or (N, 1) values where the target is a number.

        Of model inputs (N, *D), or of the rows of a file in the workload's format. Of a model of table rows also of a
        data frame with the columns of such a file, whose cells mean what they would in it.

        Raises DataError for inputs that are not right, UsageError where ONNX Runtime is missing.
        """
        predictor = Predictor.of(self._verified)
        if is_frame(inputs) and isinstance(predictor.schema, TabularSchema):
            return predictor.predict(_read_frame(predictor, inputs))
        if isinstance(inputs, str | os.PathLike):
            return predictor.predict(predictor.read(Path(inputs)))
        numbers = inputs_of(inputs, "inputs", _FROM_FILE)
        if numbers.shape[1:] != predictor.schema.input_shape:
            raise DataError(
                f"an input has the shape {numbers.shape[1:]}, and the model takes {predictor.schema.input_shape}; "
                f"{_FROM_FILE}"
            )
        return predictor.predict(numbers)


def _read_frame(predictor: Predictor, frame: Any) -> Floats:
    """A data frame as model inputs (N, *D), by the schema's own reader: as the file that it would be."""
    predictor.read_as(FileFormat(delimiter=","))
    with tempfile.TemporaryDirectory(prefix="fedclaw-frame-") as directory:
        path = Path(directory) / "frame.csv"
        named(frame).to_csv(path, index=False)
        try:
            return predictor.read(path)
        except DataError as error:
            raise DataError(str(error).replace(str(path), "the frame, as a CSV file")) from error


@public
def read_bundle(
    path: Pathlike,
    *,
    ca: Pathlike | None = None,
    federation: Pathlike | None = None,
    crl: Pathlike | None = None,
    key: str | None = None,
) -> Bundle:
    """Verify the bundle in a directory, and read it.

    `ca` is the certificate of the CA to trust, or `federation` a federation.json that holds it, got in another way than
    the bundle; `crl` that CA's revocation list; `key` says where the key of an encrypted bundle is: file:PATH,
    env:NAME or a PKCS#11 URI. Raises BundleError naming what is changed, missing or signed by somebody else,
    EncryptionError for what does not open.
    """
    authority, descriptor, revoked = (
        None if value is None else place(value, name)
        for name, value in (("ca", ca), ("federation", federation), ("crl", crl))
    )
    return verified_bundle(place(path, "path"), load_trust(authority, descriptor, revoked, key=key))


def verified_bundle(root: Path, trust: Trust) -> Bundle:
    """The bundle in `root`, verified. Raises what `read_bundle` does."""
    verified = verify_bundle(root, trust, keep=(ONNX, SCHEMA, PRIVACY, CARD))
    privacy = json.loads(verified.contents[PRIVACY])
    card = without_front_matter(verified.contents[CARD].decode("utf-8"))
    return Bundle(root, verified.manifest, verified.pinned, privacy, card, verified)


@public
def read_ledger(site: Pathlike) -> Spending:
    """What the ledger in a site's directory says was spent, on which data set, by which run, and what is left.

    The whole chain is walked and compared with what left the site. Raises UsageError if there is no such site,
    LedgerError naming the first entry that is wrong. Nothing is written, and a client may be running.
    """
    journal = open_journal(place(site, "site"))
    check_journal(journal)
    return journal.spending()
