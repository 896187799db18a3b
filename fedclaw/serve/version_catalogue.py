"""Which versions a model has: the document `catalogue/MODEL` in the state store.

The catalogue says what there is, the routing plan says what answers. A version's name means one bundle for ever: a name
that is there cannot be given to another.
"""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Annotated, Literal

from pydantic import Field, ValidationError

from fedclaw.compress.record import Precision
from fedclaw.protocol.frozen import Frozen, explain
from fedclaw.serve.models.bundle_store import short_name
from fedclaw.serve.names import VersionName
from fedclaw.serve.refusals import ServeRefusal
from fedclaw.serve.state.store import StateStore, StateStoreError

PREFIX = "catalogue/"
MOST_VERSIONS = 1000
"""Of one model; the oldest that nothing is routed to make room."""

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class VersionEntry(Frozen):
    """One version."""

    digest: Digest
    """SHA-256 of the bundle's SHA256SUMS."""
    added: datetime
    added_by: str
    """The principal that published it; `configuration`: the node was started with it."""
    run: str
    """The run that its manifest names."""


class ModelEntry(Frozen):
    """One model."""

    versions: dict[VersionName, VersionEntry]
    precision: Precision | Literal["recommended"] = "float32"
    pinned: bool = True
    staged: tuple[VersionName, ...] = ()
    """Versions that workers load although nothing is routed to them yet."""


def in_memory(model: str, version: str, digest: str) -> str:
    """How a worker tells that it can answer from a version (`WorkerBeat.ready`).

    The digest alone would not say it: the bundle may be another version's too, and a worker learns of each by itself.
    """
    return f"{model}/{version}/{digest}"


class VersionCatalogue:
    """The models of a node, or of several that share a store. Every method raises StateUnavailable."""

    def __init__(self, store: StateStore) -> None:
        self._store = store

    def models(self) -> list[str]:
        """Names, sorted."""
        return [name.removeprefix(PREFIX) for name in self._store.names(PREFIX)]

    def read(self, model: str) -> ModelEntry | None:
        """A model. Raises StateStoreError for a document that this version does not understand."""
        found = self._store.read(PREFIX + model)
        return None if found is None else _parse(model, found[1])

    def all(self) -> Mapping[str, ModelEntry]:
        """Every model."""
        return {name: entry for name in self.models() if (entry := self.read(name)) is not None}

    def add(
        self,
        model: str,
        version: str | None,
        digest: str,
        run: str,
        by: str,
        settings: ModelEntry | None = None,
    ) -> str:
        """Add a version, and with `settings` set how the model is served; the version's name.

        Adding what is there under the same name does nothing. Raises ServeRefusal `conflict` if that name is another
        bundle's.
        """
        name = version or short_name(digest)
        while True:
            found = self._store.read(PREFIX + model)
            entry = ModelEntry(versions={}) if found is None else _parse(model, found[1])
            known = entry.versions.get(name)
            if known is not None and known.digest != digest:
                raise ServeRefusal("conflict", f"version {name} of {model} is another bundle: give it another name")
            made = known or VersionEntry(digest=digest, added=datetime.now(UTC), added_by=by, run=run)
            # The last one added comes last.
            versions = {**{old: held for old, held in entry.versions.items() if old != name}, name: made}
            if len(versions) > MOST_VERSIONS:
                raise ServeRefusal("conflict", f"{model} has {MOST_VERSIONS} versions: remove some first")
            document = (settings or entry).model_copy(update={"versions": versions}).model_dump(mode="json")
            if found is not None and document == found[1]:
                return name
            if self._store.swap(PREFIX + model, None if found is None else found[0], document):
                return name

    def stage(self, model: str, versions: Sequence[str]) -> None:
        """From now on workers load these, and no others that nothing is routed to."""
        while (found := self._store.read(PREFIX + model)) is not None:
            entry = _parse(model, found[1])
            if entry.staged == tuple(versions):
                return
            document = entry.model_copy(update={"staged": tuple(versions)}).model_dump(mode="json")
            if self._store.swap(PREFIX + model, found[0], document):
                return

    def remove(self, model: str, version: str) -> None:
        """Take a version away. Raises ServeRefusal `not_found`. Whether something is routed to it is the caller's to
        look at."""
        while True:
            found = self._store.read(PREFIX + model)
            entry = None if found is None else _parse(model, found[1])
            if found is None or entry is None or version not in entry.versions:
                raise ServeRefusal("not_found", f"there is no version {version} of {model}")
            left = {name: held for name, held in entry.versions.items() if name != version}
            document = entry.model_copy(update={"versions": left}).model_dump(mode="json")
            if self._store.swap(PREFIX + model, found[0], document):
                return


def _parse(model: str, document: Mapping[str, object]) -> ModelEntry:
    try:
        return ModelEntry.model_validate(document)
    except ValidationError as error:
        raise StateStoreError(f"the state store's {PREFIX}{model} is not understood: {explain(error)}") from error
