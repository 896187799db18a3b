"""What a node's control process tells Prometheus and people beside its workers' counts.

Every few seconds it reads the state store and sets the gauges of `NodeMetrics`: shares, canaries and breakers from the
routing plans, figures of the feedback windows, drift of inputs. Once an hour it verifies the audit log. While the store
is away the last figures stay, and the failed calls are counted.
"""

import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fedclaw.errors import FedClawError
from fedclaw.export.check import Trust
from fedclaw.export.layout import MARGINALS, SCHEMA
from fedclaw.export.predictor import schema_of
from fedclaw.serve.models.bundle_store import BundleStore
from fedclaw.serve.models.served_model import ModelInterface
from fedclaw.serve.monitoring.drift_watch import DriftMonitor, VersionDrift, VersionInputs
from fedclaw.serve.monitoring.metrics import FeedbackFigures, NodeMetrics, RoutingFigures
from fedclaw.serve.refusals import ServeRefusal
from fedclaw.serve.repeated_work import RepeatedWork
from fedclaw.serve.routing.plan import RoutingPlan, read_plan
from fedclaw.serve.settings import NodeSettings
from fedclaw.serve.state.audit_verification import of_node, verify
from fedclaw.serve.state.store import StateStore, StateUnavailable
from fedclaw.serve.state.windows import VersionFigures, windows
from fedclaw.serve.version_catalogue import VersionCatalogue

log = logging.getLogger("fedclaw.serve")

PERIOD = 5.0
WINDOW = 3600.0
"""Seconds of feedback that the figures are of."""
AUDIT_EVERY = 3600.0
MOST_EVENTS = 1000
REFUSED_ROWS = "refused rows"
"""In place of a feature's name."""


class NodeObserver:
    """One control process'."""

    def __init__(
        self,
        settings: NodeSettings,
        store: StateStore,
        bundles: BundleStore,
        trust: Trust,
        audit: Path,
        metrics: NodeMetrics,
    ) -> None:
        self._settings, self._store, self._bundles, self._trust = settings, store, bundles, trust
        self._audit, self._metrics = audit, metrics
        self._catalogue = VersionCatalogue(store)
        self._drift = DriftMonitor(store, settings.drift)
        self._inputs: dict[str, VersionInputs | None] = {}
        """By digest; None: the bundle is not here, or not understood."""
        self._labels: dict[str, tuple[str, ...]] = {}
        self._quality: Mapping[str, dict[str, Any]] = {}
        self._audit_at = 0.0
        self._last_event: int | None = None
        metrics.set_process("supervisor", os.getppid())

    def run(self, ended: threading.Event) -> None:
        """Observe until `ended`, in a thread of its own."""
        work = RepeatedWork(log, "figures stay as they are for now")
        while True:
            with work.attempt():
                self._counted_step()
            if ended.wait(PERIOD):
                return

    def _counted_step(self) -> None:
        try:
            self.step()
        except StateUnavailable:
            self._metrics.state_store_failed()
            raise

    def step(self) -> None:
        """One look. Raises what the store raises."""
        routing: dict[str, RoutingFigures] = {}
        figures: dict[tuple[str, str], FeedbackFigures] = {}
        drift: dict[tuple[str, str], VersionDrift] = {}
        quality: dict[str, dict[str, Any]] = {}
        for model, entry in self._catalogue.all().items():
            found = read_plan(self._store, model)
            if found is None:
                continue
            routing[model] = routing_figures(found.plan)
            inputs = {
                version: own
                for version in found.plan.versions
                if version in entry.versions and (own := self._inputs_of(entry.versions[version].digest)) is not None
            }
            labels = (
                self._labels.get(entry.versions[found.plan.stable].digest, ()) if found.plan.stable in inputs else ()
            )
            said = windows(self._store, model, seconds=WINDOW, labels=labels)
            figures |= {(model, version): one.metrics() for version, one in said.items()}
            compared = self._drift.check(model, inputs) if self._settings.drift.share > 0 else {}
            drift |= {(model, version): one for version, one in compared.items()}
            quality[model] = _described(said, compared)
        self._quality = quality
        self._metrics.set_routing(routing)
        self._metrics.set_windows(WINDOW, figures)
        self._metrics.set_drift({key: _shown(one) for key, one in drift.items() if one.report is not None})
        self._metrics.set_drift_rows({key: one.rows for key, one in drift.items()})
        self._count_events()
        self._verify_audit()

    def quality(self, model: str) -> dict[str, Any] | None:
        """For the admin port: what feedback and inputs say of each version of a model; None: nothing is known of it."""
        return self._quality.get(model)

    def begin_baseline(self, model: str, by: str) -> None:
        """From now on compare the inputs of a model with the next rows that it is asked, for the person `by` who knows
        why they moved. Raises ServeRefusal, BundleError and what the store raises."""
        entry, found = self._catalogue.read(model), read_plan(self._store, model)
        if entry is None or found is None:
            raise ServeRefusal("not_found", "there is no such model")
        if self._settings.drift.share == 0:
            raise ServeRefusal("conflict", "drift.share is 0: this node does not look at what it is asked")
        digests = {entry.versions[version].digest for version in found.plan.versions if version in entry.versions}
        inputs = [inputs_of(self._bundles, digest, self._trust)[0] for digest in digests]
        features = {one.features.digest: one.features for one in inputs if self._drift.is_by_first_rows(one)}
        if not features:
            raise ServeRefusal(
                "conflict",
                "its inputs are compared with a charged question's answer in the bundle, which no node can replace: "
                "drift.baseline=first_rows compares with the first rows",
            )
        if not all(self._drift.begin_anew(model, one) for one in features.values()):
            raise ServeRefusal("unavailable", "the baseline is being written: try again", 1.0)
        self._store.append_event("new_baseline", model, {"by": by})

    def _inputs_of(self, digest: str) -> VersionInputs | None:
        if digest not in self._inputs:
            try:
                self._inputs[digest], self._labels[digest] = inputs_of(self._bundles, digest, self._trust)
            except FedClawError as error:
                log.warning("drift is not looked for in %.12s: %s", digest, error)
                self._inputs[digest] = None
        return self._inputs[digest]

    def _count_events(self) -> None:
        """Count the decisions that were written since the last look, whoever took them."""
        if self._last_event is None:
            self._last_event = max((event.number for event in self._store.events(limit=1)), default=0)
            return
        for event in self._store.events(limit=MOST_EVENTS, after=self._last_event):
            self._metrics.decided(event.model, event.kind)
            self._last_event = event.number

    def _verify_audit(self, clock: Callable[[], float] = time.monotonic) -> None:
        if not self._audit.is_dir() or (self._audit_at and clock() - self._audit_at < AUDIT_EVERY):
            return
        reports = verify(self._audit, of_node(self._store, self._settings.name), archived=True)
        for report in reports:
            for fault in report.faults:
                log.error("the audit log is not whole: %s", fault)
        self._metrics.set_audit_valid(not any(report.faults for report in reports))
        self._audit_at = clock()


def inputs_of(bundles: BundleStore, digest: str, trust: Trust) -> tuple[VersionInputs, tuple[str, ...]]:
    """What drift of a bundle in the store is told by, and its labels. Raises BundleError."""
    verified = bundles.open(digest, trust, (SCHEMA, MARGINALS))
    schema = schema_of(verified)
    columns = ModelInterface.of(verified.manifest, schema).columns
    return VersionInputs.of(schema, columns, verified.contents), schema.labels


def routing_figures(plan: RoutingPlan) -> RoutingFigures:
    """What a plan says of who answers whom; a version whose breaker is open answers nobody."""
    if plan.mode == "ab":
        shares = dict(zip(plan.arms, plan.propensities, strict=True))
    else:
        shares = {plan.stable: 1.0 - plan.share}
        if plan.candidate is not None:
            shares[plan.candidate] = plan.share
    states = {version: plan.breakers[version].state if version in plan.breakers else "closed" for version in shares}
    return RoutingFigures(shares, states, plan.candidate if plan.mode == "canary" else None)


def _shown(drift: VersionDrift) -> dict[str, tuple[float | None, float | None, bool]]:
    """By feature the PSI, the KS distance and whether it is an alarm."""
    assert drift.report is not None
    found: dict[str, tuple[float | None, float | None, bool]] = {
        name: (one.psi, one.ks, one.alarm) for name, one in drift.report.features.items()
    }
    return {**found, REFUSED_ROWS: (None, None, drift.report.refused_alarm)}


def _described(said: Mapping[str, VersionFigures], compared: Mapping[str, VersionDrift]) -> dict[str, Any]:
    return {
        "window_seconds": WINDOW,
        "feedback": {version: one.document() for version, one in said.items()},
        "drift": {version: one.to_document() for version, one in compared.items()},
    }
