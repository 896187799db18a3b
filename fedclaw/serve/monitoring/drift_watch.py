"""Counts of inputs from all workers of all nodes, and what a control process makes of them.

Each worker has a document of its own in the state store for each model and set of features:

    drift/MODEL/FEATURES/WRITER    counts by window; the last ones are kept
    drift-baseline/MODEL/FEATURES  the first rows served, and until when; written once

so workers never wait for each other, and what a dead one counted stays. A model's versions of one schema are asked the
same questions, so their counts add up; each is compared with its own baseline. The first rows are a model's, not a
version's: a fresh version every hour does not begin a new baseline, which would follow any drift that is slow.

Windows that are over are compared, each once: the newest one, and as many before it as it takes to have enough rows.
"""

import hashlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol

from pydantic import ValidationError

from fedclaw.errors import BundleError
from fedclaw.export.layout import MARGINALS
from fedclaw.export.marginals import Marginals
from fedclaw.learning.preprocessing import Columns, TypedColumn
from fedclaw.learning.workload import Schema
from fedclaw.protocol.frozen import explain
from fedclaw.serve.monitoring.drift import DriftBaseline, DriftReport, DriftRule, compare, fits
from fedclaw.serve.monitoring.input_counts import InputCounts, InputFeatures, InputSample
from fedclaw.serve.settings import DriftSettings

log = logging.getLogger(__name__)

KEPT_WINDOWS = 24
_TRIES = 3

Windows = dict[int, InputCounts]
"""By when they begin, in Unix seconds."""


class DocumentStore(Protocol):
    """What of the state store (`fedclaw.serve.state.store.StateStore`) is used here."""

    def read(self, name: str, /) -> tuple[int, dict[str, Any]] | None:
        """Revision and content."""

    def swap(self, name: str, revision: int | None, document: Mapping[str, Any], /) -> bool:
        """Replace the document, if its revision is still that."""

    def names(self, prefix: str, /) -> list[str]:
        """Of the documents."""


@dataclass(frozen=True)
class VersionInputs:
    """What drift of a version is told by."""

    features: InputFeatures
    charged: DriftBaseline | None
    """From marginals.json; None: the bundle has none that fits."""

    @classmethod
    def of(cls, schema: Schema, columns: Sequence[TypedColumn], contents: Mapping[str, bytes]) -> "VersionInputs":
        """Of a verified bundle, of which marginals.json was kept if it has one.

        Raises BundleError for a marginals.json that is not understood.
        """
        marginals = _marginals(contents)
        if marginals is None:
            return cls(InputFeatures.of(schema, columns), None)
        bins = {name: len(one.shares) for name, one in marginals.columns.items() if one.edges}
        features = InputFeatures.of(schema, columns, bins)
        known = {one.name: one for one in features.features}
        fitting = {name: one for name, one in marginals.columns.items() if name in known and fits(known[name], one)}
        charged = DriftBaseline.charged(marginals.model_copy(update={"columns": fitting}))
        return cls(features, charged if charged.features else None)


class InputWatch:
    """A worker's counts of what its models are asked."""

    def __init__(
        self, store: DocumentStore, writer: str, settings: DriftSettings, clock: Callable[[], float] = time.time
    ) -> None:
        """`writer` names the worker among all of the store's: its node and its number."""
        self._store, self._writer, self._settings, self._clock = store, writer, settings, clock
        self._samples: dict[tuple[str, str], InputSample] = {}
        self._by_version: dict[tuple[str, str], InputSample] = {}
        self._counted: dict[tuple[str, str], Windows] = {}
        """What is not in the store yet."""

    def serves(self, model: str, version: str, features: InputFeatures) -> None:
        """A version was loaded. Its rows are counted together with those of the model's others of the same schema."""
        key = (model, features.digest)
        if key not in self._samples:
            self._samples[key] = InputSample(features, self._settings.share)
        self._by_version[model, version] = self._samples[key]

    def forget(self, model: str, version: str) -> None:
        """A version is gone."""
        self._by_version.pop((model, version), None)

    def saw(self, model: str, version: str, columns: Columns, rows: int) -> None:
        """A request whose columns fit the version. On the hot path."""
        sample = self._by_version.get((model, version))
        if sample is not None:
            sample.offer(columns, rows)

    def push(self) -> None:
        """Count what was sampled, and write it. For another thread, every few seconds.

        Raises what the store raises; nothing is lost by it.
        """
        window = int(self._clock()) // self._settings.window_seconds * self._settings.window_seconds
        for key, sample in list(self._samples.items()):
            taken = sample.take()
            if taken.rows:
                self._counted.setdefault(key, {}).setdefault(window, InputCounts()).add(taken)
        for key in list(self._counted):
            if self._write(*key, self._counted[key]):
                del self._counted[key]

    def _write(self, model: str, digest: str, fresh: Windows) -> bool:
        features = self._samples[model, digest].features
        name = _document_name(model, digest, self._writer)
        for _ in range(_TRIES):
            found = self._store.read(name)
            windows = {} if found is None else _windows_of(found[1], features)
            for begin, counts in fresh.items():
                windows.setdefault(begin, InputCounts()).add(counts)
            kept = dict(sorted(windows.items())[-KEPT_WINDOWS:])
            document = {"writer": self._writer, "windows": {str(at): one.to_document() for at, one in kept.items()}}
            if self._store.swap(name, None if found is None else found[0], document):
                return True
        return False


@dataclass(frozen=True)
class VersionDrift:
    """What is known of a version's inputs now."""

    state: Literal["compared", "too few rows", "no baseline yet", "no features"]
    baseline: str | None
    """Which one it is, in words."""
    rows: int
    """In the window; of the baseline that is being collected, where there is none yet."""
    window: tuple[int, int] | None = None
    """From when until when, in Unix seconds."""
    report: DriftReport | None = None

    def to_document(self) -> dict[str, Any]:
        """For the admin endpoint."""
        return {**asdict(self), "alarms": [] if self.report is None else list(self.report.alarms)}


class DriftMonitor:
    """Compares, in a control process. Any node's may: nothing but the baseline is written, and that once."""

    def __init__(self, store: DocumentStore, settings: DriftSettings, clock: Callable[[], float] = time.time) -> None:
        self._store, self._settings, self._clock = store, settings, clock
        self._rule = DriftRule(settings.alpha, settings.least_rows, settings.psi, settings.ks, settings.change)

    def check(self, model: str, versions: Mapping[str, VersionInputs]) -> dict[str, VersionDrift]:
        """How the inputs of a model's versions compare. Raises what the store raises."""
        found = {}
        by_features: dict[str, Windows] = {}
        for version, inputs in versions.items():
            if inputs.features.digest not in by_features:
                by_features[inputs.features.digest] = self._windows(model, inputs.features)
            found[version] = self._check(model, inputs, by_features[inputs.features.digest])
        return found

    def is_by_first_rows(self, inputs: VersionInputs) -> bool:
        """Whether a version's baseline is the model's first rows, and no charged question."""
        return self._settings.baseline == "first_rows" or (self._settings.baseline == "auto" and inputs.charged is None)

    def begin_anew(self, model: str, features: InputFeatures) -> bool:
        """Forget the model's first rows, the next ones are its baseline: for an operator who knows why inputs moved.

        False: somebody else wrote each time.
        """
        name = _baseline_name(model, features.digest)
        for _ in range(_TRIES):
            found = self._store.read(name)
            if self._store.swap(name, None if found is None else found[0], {"since": int(self._clock())}):
                return True
        return False

    def _check(self, model: str, inputs: VersionInputs, windows: Windows) -> VersionDrift:
        if not inputs.features.features:
            return VersionDrift("no features", None, 0)
        if not self.is_by_first_rows(inputs):
            if inputs.charged is None:
                return VersionDrift("no baseline yet", None, 0)
            return self._compare(inputs.features, inputs.charged, windows, 0)
        first, until, rows = self._first_rows(model, inputs.features, windows)
        if first is None:
            return VersionDrift("no baseline yet", None, rows)
        return self._compare(inputs.features, first, windows, until)

    def _compare(self, features: InputFeatures, baseline: DriftBaseline, windows: Windows, since: int) -> VersionDrift:
        """Compare the newest windows that are over and began at `since` or later."""
        length, now = self._settings.window_seconds, self._clock()
        over = [begin for begin in sorted(windows, reverse=True) if begin + length <= now and begin >= since]
        total, begins = InputCounts(), list[int]()
        for begin in over:
            if begin < now - (KEPT_WINDOWS + 1) * length:
                break
            total.add(windows[begin])
            begins.append(begin)
            if total.rows >= self._rule.least_rows:
                break
        report = compare(features, baseline, total, self._rule)
        if report is None:
            return VersionDrift("too few rows", baseline.source, total.rows)
        return VersionDrift("compared", baseline.source, total.rows, (begins[-1], begins[0] + length), report)

    def _first_rows(
        self, model: str, features: InputFeatures, windows: Windows
    ) -> tuple[DriftBaseline | None, int, int]:
        """The baseline of the model's first rows, from when on windows are compared with it, and how many rows there
        are yet."""
        name = _baseline_name(model, features.digest)
        found = self._store.read(name)
        if found is not None and "counts" in found[1]:
            counts = InputCounts.from_document(found[1]["counts"], features.features)
            return DriftBaseline.first_rows(counts), int(found[1]["until"]), counts.rows
        since = int(found[1]["since"]) if found is not None else 0
        total, until = InputCounts(), since
        for begin in sorted(begin for begin in windows if begin >= since):
            if begin + self._settings.window_seconds > self._clock():
                break
            total.add(windows[begin])
            until = begin + self._settings.window_seconds
            if total.rows >= self._settings.first_rows:
                document = {"counts": total.to_document(), "until": until}
                self._store.swap(name, None if found is None else found[0], document)
                return DriftBaseline.first_rows(total), until, total.rows
        return None, until, total.rows

    def _windows(self, model: str, features: InputFeatures) -> Windows:
        """The counts of all workers."""
        total: Windows = {}
        for name in self._store.names(_prefix(model, features.digest)):
            found = self._store.read(name)
            if found is None:
                continue
            for begin, counts in _windows_of(found[1], features).items():
                total.setdefault(begin, InputCounts()).add(counts)
        return total


def _windows_of(document: Mapping[str, Any], features: InputFeatures) -> Windows:
    return {
        int(begin): InputCounts.from_document(counts, features.features)
        for begin, counts in document["windows"].items()
    }


def prefixes_of(model: str) -> tuple[str, str]:
    """What the names of all of a model's documents begin with: of counts, and of baselines."""
    return f"drift/{model}/", f"drift-baseline/{model}/"


def _prefix(model: str, digest: str) -> str:
    return f"{prefixes_of(model)[0]}{digest}/"


def _document_name(model: str, digest: str, writer: str) -> str:
    return _prefix(model, digest) + hashlib.sha256(writer.encode()).hexdigest()[:16]


def _baseline_name(model: str, digest: str) -> str:
    return f"{prefixes_of(model)[1]}{digest}"


def _marginals(contents: Mapping[str, bytes]) -> Marginals | None:
    if MARGINALS not in contents:
        return None
    try:
        return Marginals.model_validate_json(contents[MARGINALS])
    except ValidationError as error:
        raise BundleError(f"{MARGINALS} is signed but not understood by this version: {explain(error)}") from error
