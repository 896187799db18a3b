"""Where a bundle's model comes from: from the artefact back to compression, runs, rounds, sites and their ledgers.

A walk says of each link one of

    verified      it was held against something at hand that it cannot agree with by chance: a signature, a digest, an
                  entry of a hash chain, a figure worked out again
    told          the bundle says so, under its signature, and nothing at hand speaks for or against it
    not at hand   what it could be held against is not here
    contradicts   what is at hand says something else

What a bundle says is believed no further than its signature reaches: who signed vouches for it. The walk tells which of
it others can vouch for as well, the sites by their ledgers above all.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import ValidationError

from fedclaw.compress.record import MODEL, RECORD, Compression
from fedclaw.errors import BundleError, CheckpointError, EncryptionError, FedClawError, LedgerError, PluginError
from fedclaw.export import layout
from fedclaw.export.check import Trust, Verified, verify_bundle
from fedclaw.export.ledgers import Claimed, HeldLedger
from fedclaw.export.source import SourceRun
from fedclaw.export.statement import PrivacyStatement, Receipts, RunCost, cost_of
from fedclaw.export.training_record import (
    LedgerHead,
    Purpose,
    RunTraining,
    TrainingRecord,
    configuration_of,
    rounds_of,
)
from fedclaw.files import sha256_file
from fedclaw.identity.data_keys import Keyring
from fedclaw.identity.federation_home import load_record
from fedclaw.privacy.mechanisms.receipts import impossible
from fedclaw.protocol.frozen import Frozen, S, explain
from fedclaw.protocol.receipt import NO_LEDGER
from fedclaw.report.late import late_notes
from fedclaw.server import checkpoint
from fedclaw.server.run_directory import ReleaseUse, RunDirectory, RunRecord, SiteReceipt

State = Literal["verified", "told", "not at hand", "contradicts"]
LONGEST = 400
"""Characters of a sentence that repeats what others named."""
MOST_NAMED = 5
_EXACT = 1e-9
_BLOCK = 1 << 20
_SHOWN = 12
"""Hexadecimal digits of a digest that people are shown."""


class Link(Frozen):
    """One link of the chain, and those that it rests on."""

    what: str
    state: State
    detail: str = ""
    below: tuple["Link", ...] = ()

    @classmethod
    def of(cls, what: str, state: State, detail: str = "", below: Iterable["Link"] = ()) -> "Link":
        """A link whose words, which may be a stranger's, are on one line and short."""
        return cls(what=_line(what), state=state, detail=_line(detail), below=tuple(below))

    def count(self) -> Counter[State]:
        """How many links there are of each state, this one included."""
        return sum((link.count() for link in self.below), Counter([self.state]))


@dataclass(frozen=True)
class AtHand:
    """What a bundle is held against, each named by whoever asks."""

    run: Path | None = None
    """The run's directory; None: that which the bundle lies in, if it is one."""
    federation: Path | None = None
    """The coordinator's directory, with the records of its sites."""
    ledgers: tuple[Path, ...] = ()
    """Sites' directories, ledger files, or printed ledgers."""
    keys: Keyring | None = None
    """Of a run that is encrypted at rest."""


def lineage(bundle: Path, trust: Trust, at_hand: AtHand) -> Link:
    """The lineage of the model in `bundle`. A bundle that does not verify is not walked further."""
    name = f"bundle {bundle.name}"
    try:
        verified = verify_bundle(bundle, trust, (layout.PRIVACY, layout.TRAINING, layout.COMPRESSION, layout.SCHEMA))
        walk = _Walk.of(verified, at_hand)
    except BundleError as error:
        return Link.of(name, "contradicts", f"{error}; nothing that it says is believed")
    return Link.of(name, "verified", _signed(verified), walk.links())


def _signed(verified: Verified) -> str:
    trusted = "the CA that was given" if verified.pinned else "a CA that came with it, which anybody can make (ca=…)"
    expired = ", whose certificate has expired since" if verified.expired else ""
    return (
        f"{len(verified.files)} files, none changed, signed by {verified.signer.name}{expired} under {trusted}, "
        f"{verified.manifest.created:%Y-%m-%d %H:%M} UTC by its own clock"
    )


@dataclass(frozen=True)
class _Told:
    """What a bundle says of one of its runs."""

    run: str
    purpose: Purpose
    record: RunTraining | None
    """None: the bundle has no training record."""
    costs: Mapping[str, RunCost]
    """By site."""
    federation: str

    @property
    def simulated(self) -> bool:
        return self.record is not None and self.record.simulated is not None

    def answers(self, site: str) -> int | None:
        """Rounds that the site's answers are in; None: not told."""
        rounds = () if self.record is None else self.record.rounds
        if not rounds or any(line.sites is None for line in rounds):
            return None
        return sum(site in (line.sites or ()) for line in rounds)


@dataclass(frozen=True)
class _Walk:
    """A verified bundle, read, and what is at hand of its origin."""

    verified: Verified
    statement: PrivacyStatement
    training: TrainingRecord | None
    compression: Compression | None
    at_hand: AtHand
    directory: RunDirectory | None
    ledgers: tuple[HeldLedger, ...]
    unread: tuple[Link, ...] = field(default=())
    """Ledgers that cannot be read, and why."""

    @classmethod
    def of(cls, verified: Verified, at_hand: AtHand) -> "_Walk":
        ledgers, unread = [], []
        for path in at_hand.ledgers:
            try:
                ledgers.append(HeldLedger.read(path))
            except LedgerError as error:
                unread.append(Link.of(f"ledger {path.name}", "contradicts", str(error)))
        return cls(
            verified=verified,
            statement=_parsed(verified, layout.PRIVACY, PrivacyStatement),
            training=_parsed_if_there(verified, layout.TRAINING, TrainingRecord),
            compression=_parsed_if_there(verified, layout.COMPRESSION, Compression),
            at_hand=at_hand,
            directory=_directory(verified, at_hand),
            ledgers=tuple(ledgers),
            unread=tuple(unread),
        )

    def links(self) -> Iterator[Link]:
        yield self._stated()
        yield from self._scored()
        yield from self._compressed()
        for told in self._runs():
            yield self._run(told)
        yield from self._releases()
        yield from self.unread
        yield from self._strangers()

    # What the bundle says of the model as a whole

    def _stated(self) -> Link:
        """Whether the statement's bound is what its sites' figures come to (basic composition)."""
        wrong, told = [], self.statement.overall
        for site in self.statement.sites:
            bounded = [cost.epsilon for cost in site.runs if cost.epsilon is not None]
            if site.epsilon is not None and (len(bounded) < len(site.runs) or not _equal(site.epsilon, sum(bounded))):
                wrong.append(f"{site.site}'s runs do not come to its epsilon")
            if not _equal(site.delta, sum(cost.delta for cost in site.runs)):
                wrong.append(f"{site.site}'s runs do not come to its delta")
        if told is not None:
            releases = dict.fromkeys(use for use, _ in self._used())
            epsilons = [site.epsilon for site in self.statement.sites]
            known = [epsilon for epsilon in epsilons if epsilon is not None]
            epsilon = max(known, default=0.0) + sum(use.epsilon for use in releases)
            delta = max((site.delta for site in self.statement.sites), default=0.0) + sum(use.delta for use in releases)
            if len(known) < len(epsilons) or not _equal(told.epsilon, epsilon) or not _equal(told.delta, delta):
                wrong.append("its bound is not what the sites' figures come to")
        return Link.of(
            "privacy statement", "contradicts" if wrong else "verified", "; ".join([self.statement.summary, *wrong])
        )

    def _scored(self) -> Iterator[Link]:
        """The floor that the model had to reach at export."""
        if self.training is None or (reached := self.training.acceptance) is None:
            return
        words = f"{reached.metric} {reached.value:.4f}, floor {reached.floor:g}, {reached.measured}"
        rounds = self.training.runs[0].rounds
        last = rounds[-1].metrics.get(reached.metric) if rounds else None
        of_rounds = self.verified.manifest.variant == "final"
        wrong = reached.value < reached.floor or (of_rounds and last != reached.value)
        yield Link.of("score", "contradicts" if wrong else "verified" if of_rounds else "told", words)

    # The runs, and what the bundle says of them

    def _runs(self) -> list[_Told]:
        federation = self.verified.manifest.federation
        if self.training is not None:
            return [
                _Told(run.run, run.purpose, run, self._costs(run.run, run.purpose), run.federation)
                for run in self.training.runs
            ]
        named = dict.fromkeys((cost.run, cost.purpose) for site in self.statement.sites for cost in site.runs)
        named = named or {(self.verified.manifest.run, "training"): None}
        return [_Told(run, purpose, None, self._costs(run, purpose), federation) for run, purpose in named]

    def _costs(self, run: str, purpose: Purpose) -> dict[str, RunCost]:
        return {
            site.site: cost
            for site in self.statement.sites
            for cost in site.runs
            if (cost.run, cost.purpose) == (run, purpose)
        }

    def _run(self, told: _Told) -> Link:
        """One run: its directory, configuration, code, rounds and sites."""
        what = f"run {told.run} ({told.purpose})"
        directory = self._directory_of(told)
        if directory is None:
            below = [*self._described(told), *self._sites(told, {})]
            return Link.of(what, "not at hand", "its directory: run=DIR at the coordinator's", below)
        try:
            closed = _closed(directory)
            own, receipts = SourceRun.read(directory, model=closed is None), directory.read_receipts()
        except CheckpointError as error:
            return Link.of(what, "contradicts", str(error), [*self._described(told), *self._sites(told, {})])
        wrong = [*_other_run(told, own.record), *self._other_model(told, own.record)]
        notes = () if told.simulated else late_notes(own.metrics)
        below = [
            *_files(told, own, closed),
            *self._described(told, own.record),
            self._schema(own.record),
            _rounds(told, own, directory, closed),
            *self._sites(told, receipts),
            *(Link.of("note", "told", note) for note in notes),
        ]
        if wrong:
            return Link.of(what, "contradicts", "; ".join(wrong), below)
        return Link.of(what, "verified" if told.record else "told", "its directory is at hand", below)

    def _directory_of(self, told: _Told) -> RunDirectory | None:
        if self.directory is None or told.purpose == "training":
            return self.directory
        return recovery_of(self.directory, told.run)

    def _other_model(self, told: _Told, record: RunRecord) -> Iterator[str]:
        manifest = self.verified.manifest
        if told.purpose != "training":
            return
        if (record.workload, record.task) != (manifest.workload, manifest.task):
            yield f"the bundle is of workload {manifest.workload} and task {manifest.task}, and the run of another"
        if manifest.variant == "final" and record.model != manifest.model:
            yield "the bundle's model is another than the run's"

    # Configuration and code

    def _described(self, told: _Told, record: RunRecord | None = None) -> Iterator[Link]:
        if told.record is None:
            yield Link.of("configuration", "not at hand", "a bundle of this age has no training record")
            return
        asked, software = told.record.configuration, told.record.software
        words = (
            f"strategy {asked.strategy.name}, {asked.rounds} rounds, model {asked.model.name}, "
            f"{_protection(told.record)}, schema {asked.schema_sha256[:_SHOWN]}…"
        )
        same = record is None or configuration_of(record) == asked
        state: State = "told" if record is None else "verified" if same else "contradicts"
        yield Link.of("configuration", state, words if same else f"{words}: run.json says something else")
        if software is None:
            yield Link.of("code", "not at hand", "the run began before its code was noted")
            return
        at = f", commit {software.revision[:_SHOWN]}" if software.revision else ""
        words = (
            f"FedClaw {software.fedclaw or 'not installed'}{at}, sources {software.source_sha256[:_SHOWN]}…, "
            f"{software.python}, {software.platform}, {len(software.packages)} packages"
        )
        same = record is None or record.software == software
        state = "told" if record is None else "verified" if same else "contradicts"
        yield Link.of("code", state, words if same else f"{words}: run.json says something else")

    def _schema(self, record: RunRecord) -> Link:
        try:
            text = record.make_schema().to_json()
        except PluginError as error:
            return Link.of("schema", "not at hand", str(error))
        except FedClawError as error:
            return Link.of("schema", "contradicts", str(error))
        same = text.encode() == self.verified.contents[layout.SCHEMA]
        words = (
            "the run's, with its constants" if same else "the bundle's schema.json is not what the run's record makes"
        )
        return Link.of("schema", "verified" if same else "contradicts", words)

    # Sites and ledgers

    def _sites(self, told: _Told, receipts: Mapping[str, SiteReceipt]) -> Iterator[Link]:
        if told.simulated or _of_simulation(told.costs):
            yield Link.of("sites", "told", f"{len(told.costs)} simulated clients, which keep no ledgers")
            return
        if not told.costs:
            yield Link.of("sites", "not at hand", "the privacy statement holds no receipt of this run")
        heads = {} if told.record is None else {head.site: head for head in told.record.ledger_heads}
        for name in sorted({*told.costs, *heads, *receipts}):
            yield self._site(told, name, receipts.get(name), heads.get(name))

    def _site(self, told: _Told, name: str, entry: SiteReceipt | None, head: LedgerHead | None) -> Link:
        cost = told.costs.get(name)
        if cost is None:
            return Link.of(
                f"site {name}", "contradicts", "it has a receipt, and the privacy statement does not name it"
            )
        wrong = list(_contradictions(cost, entry, head, told))
        below = [*self._certified(name), self._ledger(told, name, cost)]
        spent = "without bound" if cost.epsilon is None else f"{cost.epsilon:.4g}"
        words = f"{cost.examples:,} {cost.unit}s, {cost.rounds} charges, epsilon {spent} at delta {cost.delta:g}"
        state: State = "contradicts" if wrong else "told" if entry is None else "verified"
        return Link.of(f"site {name}", state, "; ".join([words, *wrong]), below)

    def _certified(self, name: str) -> Iterator[Link]:
        if self.at_hand.federation is None or not (self.at_hand.federation / "sites").is_dir():
            return
        try:
            record = load_record(self.at_hand.federation / "sites", name)
        except (FedClawError, ValueError) as error:  # ValueError: no site can have that name
            yield Link.of("certificate", "contradicts", str(error))
            return
        if record is None:
            yield Link.of("certificate", "contradicts", "the coordinator's directory has no record of such a site")
            return
        revoked = ", revoked since" if record.revoked else ""
        yield Link.of("certificate", "verified", f"serial {record.current.serial}{revoked}")

    def _ledger(self, told: _Told, name: str, cost: RunCost) -> Link:
        what = f"ledger head {cost.ledger_head[:_SHOWN]}…"
        claimed = Claimed(
            site=name,
            federation=told.federation,
            run=told.run,
            head=cost.ledger_head,
            charges=cost.rounds,
            epsilon=cost.epsilon,
            delta=cost.delta,
            unit=cost.unit,
            answers=told.answers(name),
        )
        held = [ledger for ledger in self.ledgers if ledger.site == name or ledger.has(cost.ledger_head)]
        if not held:
            there = f"python -m fedclaw.ledger verify head={cost.ledger_head}"
            return Link.of(what, "not at hand", f"its ledger: sites=[…], or at the site: {there}")
        try:
            (found, *_) = [ledger.find(claimed) for ledger in held]
        except LedgerError as error:
            return Link.of(what, "contradicts", str(error))
        if over := next((over for ledger in held if (over := ledger.over_budget(told.federation, told.run))), None):
            return Link.of(what, "contradicts", f"over its budget: {over}")
        contents = {0: "not noted", 1: "the same in all"}.get(len(found.fingerprints), "not the same in all")
        waiting = f"; {found.open} of them never left and count as spent" if found.open else ""
        return Link.of(
            what,
            "verified",
            f"entry {found.sequence} of {held[0].index.sequence}, {found.time}: {found.charges} charges come to what "
            f"the receipt says{waiting}; content of the data set: {contents}",
        )

    def _strangers(self) -> Iterator[Link]:
        """Ledgers at hand that none of the sites' receipts leads to."""
        costs = [(site.site, cost.ledger_head) for site in self.statement.sites for cost in site.runs]
        for ledger in self.ledgers:
            if not any(ledger.site == name or ledger.has(head) for name, head in costs):
                yield Link.of(f"ledger {ledger.path.name}", "contradicts", "it is the ledger of none of these sites")

    # What else the model was made with

    def _used(self) -> Iterator[tuple[ReleaseUse, str]]:
        """The releases of statistics that the model was made with, and what of it came from each."""
        told = self.statement
        named = [(told.statistics, "constants"), (told.threshold, "threshold")]
        named += [(use, "compression") for use in told.compression_statistics]
        named += [(told.marginals, "marginals")]
        yield from ((use, what) for use, what in named if use is not None)

    def _releases(self) -> Iterator[Link]:
        for use, what in self._used():
            words = f"{what}, at epsilon {use.epsilon:g}, delta {use.delta:g} for each site"
            charged = sum(any(run == use.run for _, _, run in ledger.index.runs) for ledger in self.ledgers)
            if charged:
                words += f"; charged on {charged} of {len(self.ledgers)} ledgers at hand"
            yield Link.of(f"release {use.run}", "verified" if charged else "told", words)

    # Compression

    def _compressed(self) -> Iterator[Link]:
        manifest = self.verified.manifest
        if manifest.variant == "final":
            return
        wrong = list(self._wrong_compression())
        record, path = self.compression, None
        if self.directory is not None and (self.directory.compressed / RECORD).is_file():
            path = self.directory.compressed
            try:
                own = Compression.model_validate_json((path / RECORD).read_bytes())
            except ValidationError as error:
                yield Link.of("compression", "contradicts", f"compression.json is damaged: {explain(error)}")
                return
            wrong += self._other_compression(own, record, path)
            record = record or own
        words = "" if record is None else _compression_words(record)
        below = [] if record is None else [_looked_at(record)]
        state: State = "contradicts" if wrong else "not at hand" if path is None else "verified"
        yield Link.of("compression", state, "; ".join(filter(None, [words, *wrong])), below)

    def _wrong_compression(self) -> Iterator[str]:
        """What the bundle contradicts itself in."""
        if self.compression is not None and self.compression.model != self.verified.manifest.model:
            yield "compression.json describes another model than bundle.json"
        if self.training is None:
            return
        files = self.training.compression
        if files is None:
            yield "the training record knows of no compression"
        elif files.teacher != self.training.runs[0].files.model:
            yield "it was not made from the model of the run that the training record names"
        elif self.compression is not None and self.compression.teacher_sha256 != files.teacher:
            yield "compression.json and training.json name different teachers"

    def _other_compression(self, own: Compression, told: Compression | None, path: Path) -> Iterator[str]:
        """What the compression in the run's directory contradicts the bundle in."""
        assert self.directory is not None
        if told is not None and told != own:
            yield "the run's compression.json says something else"
        if own.model != self.verified.manifest.model:
            yield "the run was compressed to another model"
        readable = _closed(self.directory) is None
        if readable and own.teacher_sha256 != self._sha256(self.directory.model_path):
            yield "it was not made from this run's model.npz"
        files = None if self.training is None else self.training.compression
        if files is None:
            return
        if files.record != sha256_file(path / RECORD):
            yield f"the run's {RECORD} has another digest than at export"
        if readable and files.model != self._sha256(self.directory.compressed_model):
            yield f"the run's compressed {MODEL} has another digest than at export"

    def _sha256(self, path: Path) -> str | None:
        assert self.directory is not None
        return self.directory.sha256_of(path) if path.is_file() else None


def recovery_of(directory: RunDirectory, run: str) -> RunDirectory | None:
    """The recovery at the sites of that name that a run's compressed model depends on; None if there was none, or its
    directory is not in the run's."""
    try:
        record = Compression.model_validate_json((directory.compressed / RECORD).read_bytes())
    except (OSError, ValidationError):
        return None
    recovery = next((report for report in record.runs_at_sites if report.run == run), None)
    if recovery is None:
        return None
    own = directory.root.resolve()
    root = (own / recovery.directory).resolve()
    found = RunDirectory(root, directory.keys)
    return found if own in root.parents and found.record_path.is_file() else None


def _directory(verified: Verified, at_hand: AtHand) -> RunDirectory | None:
    """The run's, where it is named or the bundle lies in it."""
    if at_hand.run is not None:
        return RunDirectory.open(at_hand.run, at_hand.keys)
    found = RunDirectory(verified.path.resolve().parent, at_hand.keys)
    try:
        own = found.record_path.is_file() and found.record().run == verified.manifest.run
    except CheckpointError:
        own = True
    return found if own else None


def _parsed_if_there(verified: Verified, name: str, kind: type[S]) -> S | None:
    return _parsed(verified, name, kind) if name in verified.contents else None


def _parsed(verified: Verified, name: str, kind: type[S]) -> S:
    """A signed file of the bundle. Raises BundleError."""
    try:
        return kind.model_validate_json(verified.contents[name])
    except ValidationError as error:
        raise BundleError(f"{name} is signed but not understood by this version: {explain(error)}") from error


_Closed = tuple[State, str]


def _closed(directory: RunDirectory) -> _Closed | None:
    """Why what holds parameters in the run's directory does not open; None: it does.

    Without a key it is not at hand. What a key that was given does not open is damaged, or another's.
    """
    try:
        for path, name in directory.parameter_files():
            with directory.store.open(path, name) as file:
                while directory.keys is not None and file.read(_BLOCK):
                    pass
    except EncryptionError as error:
        return "not at hand" if directory.keys is None else "contradicts", str(error)
    return None


def _files(told: _Told, own: SourceRun, closed: _Closed | None) -> Iterator[Link]:
    """The run's files, by digest. `closed`: why the model does not open."""
    if told.record is None:
        return
    expected, found = told.record.files.model_dump(), own.files.model_dump()
    names = {"record": "run.json", "model": "model.npz", "metrics": "metrics.jsonl", "receipts": "receipts.json"}
    for key, name in names.items():
        if expected[key] is None:
            continue
        if found[key] is None:
            gone: _Closed = ("not at hand", "it is not in the run's directory any more")
            yield Link.of(name, *((closed if key == "model" else None) or gone))
        elif found[key] == expected[key]:
            yield Link.of(name, "verified", f"SHA-256 {expected[key][:_SHOWN]}… as at export")
        else:
            words = f"SHA-256 {found[key][:_SHOWN]}…, and at export it was {expected[key][:_SHOWN]}…"
            yield Link.of(name, "contradicts", words)


def _rounds(told: _Told, own: SourceRun, directory: RunDirectory, closed: _Closed | None) -> Link:
    """The rounds that counted, and whether the last checkpoint holds the model that came of them."""
    rounds = rounds_of(own.record, own.metrics)
    words = f"{len(rounds)} of {own.record.rounds} counted"
    if told.record is not None and told.record.rounds != rounds:
        return Link.of("rounds", "contradicts", f"{words}: metrics.jsonl does not say what the training record does")
    last = Link.of("last checkpoint", *closed) if closed else _checkpoint(directory, own.record)
    return Link.of("rounds", "verified" if told.record is not None else "told", words, [last])


def _checkpoint(directory: RunDirectory, record: RunRecord) -> Link:
    try:
        saved = checkpoint.newest(directory.root, directory.store)
        if saved is None:
            return Link.of("last checkpoint", "not at hand")
        if saved.round != record.rounds:
            words = f"the newest is that of round {saved.round} of {record.rounds}"
            return Link.of("last checkpoint", "contradicts", words)
        model = directory.read_model()
    except CheckpointError as error:
        return Link.of("last checkpoint", "contradicts", str(error))
    same = saved.parameters.keys() == model.keys() and all(
        np.array_equal(array, model[name]) for name, array in saved.parameters.items()
    )
    words = f"round {saved.round}: its parameters are those of model.npz" if same else "model.npz holds others"
    return Link.of("last checkpoint", "verified" if same else "contradicts", words)


def _other_run(told: _Told, record: RunRecord) -> Iterator[str]:
    if record.run != told.run:
        yield f"the directory is that of run {record.run}"
    if told.record is not None and record.federation != told.federation:
        yield f"it ran in federation {record.federation}, not {told.federation}"


def _contradictions(cost: RunCost, entry: SiteReceipt | None, head: LedgerHead | None, told: _Told) -> Iterator[str]:
    """What the statement's figures of a site contradict: its receipt in the run, or the training record."""
    if head is not None and (head.head, head.charges) != (cost.ledger_head, cost.rounds):
        yield "training.json names another ledger head than privacy.json"
    if entry is None:
        return
    own = cost_of(Receipts(told.run, told.purpose, {}), entry)
    differ = [name for name in RunCost.model_fields if getattr(own, name) != getattr(cost, name)]
    if differ:
        yield f"receipts.json says something else of {', '.join(differ[:MOST_NAMED])}"
    if not told.simulated and (reason := impossible(entry.receipt)):
        yield f"its receipt cannot be true: {reason}"


def _of_simulation(costs: Mapping[str, RunCost]) -> bool:
    return bool(costs) and all(cost.ledger_head == NO_LEDGER for cost in costs.values())


def _protection(run: RunTraining) -> str:
    asked = run.configuration
    if asked.privacy is not None:
        return f"epsilon {asked.privacy.epsilon:g} at delta {asked.privacy.delta:g} asked of each site"
    if asked.central is not None:
        return f"noise on the sum, epsilon {asked.central.epsilon:g} at delta {asked.central.delta:g}"
    return "no differential privacy asked for"


def _compression_words(record: Compression) -> str:
    return (
        f"{record.parameters_before:,} to {record.parameters_after:,} parameters, {record.score} "
        f"{record.accuracy_before:.4f} to {record.accuracy_after:.4f} ({record.accuracy_measure})"
    )


def _looked_at(record: Compression) -> Link:
    steps = ", ".join(f"{step.step}: {step.origin}" for step in record.looked_at)
    return Link.of("what its steps looked at", "told" if steps else "not at hand", steps or "it was not noted then")


def _equal(told: float, found: float) -> bool:
    return math.isclose(told, found, rel_tol=_EXACT)


def _line(text: str) -> str:
    """On one line, without what a terminal would take for a command, and cut."""
    plain = " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
    return plain if len(plain) <= LONGEST else plain[: LONGEST - 1] + "…"
