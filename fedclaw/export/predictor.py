"""A verified bundle, ready to predict with ONNX Runtime alone.

Legend: N examples, C classes, D input shape without the batch.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fedclaw.compress.record import Precision
from fedclaw.errors import BundleError, DataError
from fedclaw.export.check import Trust, Verified, verify_bundle
from fedclaw.export.layout import FORMS, MANIFEST, ONNX, SCHEMA, Manifest
from fedclaw.export.runtime import Device, open_session, run_session
from fedclaw.identity.at_rest import PLAIN, FileStore, is_encrypted
from fedclaw.identity.data_keys import Keyring
from fedclaw.learning.preprocessing import TypedRows
from fedclaw.learning.registry import schema_class
from fedclaw.learning.tasks.base import Task
from fedclaw.learning.tasks.classification import decide
from fedclaw.learning.workload import FileFormat, Floats, Labels, Rows, Schema

BATCH = 256
SHOWN_REASONS = 3


class Predictor:
    """Reads raw inputs as the bundle's schema says and predicts. Never imports torch."""

    def __init__(self, verified: Verified, schema: Schema, session: Any) -> None:
        self.verified = verified
        self.schema = schema
        self._session = session
        names, wanted = [output.name for output in session.get_outputs()], schema.task.head
        if tuple(names) != wanted:
            raise BundleError(
                f"{ONNX} has the outputs {', '.join(map(repr, names))}; a {schema.task.name} task has "
                f"{' and '.join(map(repr, wanted))}"
            )
        self._output = names.index(wanted[1])

    @classmethod
    def open(
        cls,
        bundle: Path,
        trust: Trust | None = None,
        device: Device = "cpu",
        precision: Precision | Literal["recommended"] = "float32",
    ) -> "Predictor":
        """Verify `bundle`, then load the very bytes that were verified.

        Raises BundleError when it does not verify, its files contradict each other, or it lacks the `precision`,
        PluginError when its workload is not installed here, UsageError when ONNX Runtime is missing, or cannot compute
        on `device`.
        """
        graphs = FORMS.values() if precision == "recommended" else (FORMS[precision],)
        return cls.of(verify_bundle(bundle, trust, keep=(*graphs, SCHEMA)), device, precision)

    @classmethod
    def of(
        cls, verified: Verified, device: Device = "cpu", precision: Precision | Literal["recommended"] = "float32"
    ) -> "Predictor":
        """Load a verified bundle whose graph and schema were kept. Raises what `open` does."""
        manifest, schema = verified.manifest, schema_of(verified)
        name = graph_of(manifest, precision)
        if name not in verified.contents:
            raise BundleError(f"{verified.path} has no {name}: precision={precision} needs it")
        return cls(verified, schema, open_session(verified.contents[name], name, "predict", device))

    def use_constants(self, path: Path, keys: Keyring | None = None) -> None:
        """Standardise inputs with a site's own constants (its state/preprocessing.json), encrypted or not.

        Raises DataError, or EncryptionError for a file that `keys` do not open.
        """
        try:
            store = FileStore(keys) if is_encrypted(path) else PLAIN
            text = store.read(path, "state/preprocessing.json").decode("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path}: the constants cannot be read: {error}") from error
        self.schema = self.schema.with_constants(text, str(path))

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the C classes, in the order of the probabilities; none where the task has no classes."""
        return self.schema.labels

    @property
    def task(self) -> Task:
        """What is predicted."""
        return self.schema.task

    @property
    def threshold(self) -> float | None:
        """The probability from which the second of two classes is the answer; None: the likeliest class is."""
        decision = self.verified.manifest.decision
        return None if decision is None else decision.threshold

    def read_as(self, written: FileFormat) -> None:
        """Read files in that format from now on. Raises DataError for a workload without such formats."""
        self.schema = self.schema.written_as(written)

    def read_rows(self, path: Path, identifiers: Sequence[str] = ()) -> Rows:
        """Raw inputs from a file; each unusable row is refused by itself. Raises DataError if no row is usable."""
        if not path.exists():
            raise DataError(f"{path}: no such file")
        rows = self.schema.read_rows(path, identifiers)
        if len(rows.inputs) == 0:
            raise DataError(f"{path} holds no rows to predict")
        if not len(rows.answered):
            first = "; ".join(list(rows.refused.values())[:SHOWN_REASONS])
            more = len(rows.refused) - SHOWN_REASONS
            raise DataError(f"{path}: no row can be answered: {first}" + (f"; and {more} more" if more > 0 else ""))
        return rows

    def read_columns(self, path: Path, identifiers: Sequence[str] = ()) -> TypedRows:
        """A file's rows as what pipeline.onnx takes, for a server that has no reader of ours.

        Raises DataError, and NotInGraph with the reason where the bundle has no pipeline.onnx.
        """
        if not path.exists():
            raise DataError(f"{path}: no such file")
        return self.schema.preprocessing().read(path, identifiers)

    def decide(self, probabilities: Floats) -> Labels:
        """The class of each row, (N,): by the bundle's threshold if it has one, else the likeliest."""
        return decide(probabilities, self.threshold)

    def read(self, path: Path) -> Floats:
        """Raw inputs from a file, as (N, *D). Raises DataError naming file, row and column."""
        if not path.exists():
            raise DataError(f"{path}: no such file")
        inputs = self.schema.read_inputs(path)
        if len(inputs) == 0:
            raise DataError(f"{path} holds no rows to predict")
        return inputs

    def predict(self, inputs: Floats) -> Floats:
        """Inputs (N, *D) to predictions (N, K): probabilities, or values in the target's unit."""
        parts = [
            run_session(self._session, inputs[start : start + BATCH])[self._output]
            for start in range(0, len(inputs), BATCH)
        ]
        return np.concatenate(parts).astype(np.float32, copy=False)


def schema_of(verified: Verified) -> Schema:
    """The schema of a verified bundle whose schema.json was kept.

    Raises BundleError where it and the manifest contradict each other, PluginError when its workload is not installed.
    """
    manifest, origin = verified.manifest, f"{verified.path}/{SCHEMA}"
    schema = schema_class(manifest.workload).parse(verified.contents[SCHEMA].decode("utf-8"), origin)
    if schema.labels != manifest.labels or schema.input_shape != manifest.inputs[0].shape[1:]:
        raise BundleError(f"{SCHEMA} and {MANIFEST} disagree about labels or input shape")
    task, told = schema.task, tuple(output.name for output in manifest.outputs)
    if (task.name, task.describe()) != (manifest.task, manifest.target) or told != task.head:
        raise BundleError(f"{SCHEMA} and {MANIFEST} disagree about the task: {task.name} and {manifest.task}")
    return schema


def graph_of(manifest: Manifest, precision: Precision | Literal["recommended"]) -> str:
    """The ONNX file of `precision`; a bundle that recommends none has the exact one alone to recommend."""
    if precision != "recommended":
        return FORMS[precision]
    return ONNX if manifest.forms is None else manifest.forms.chosen
