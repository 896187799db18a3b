"""Counts of several workers in a real state store, and what a control process makes of them."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from fedclaw.errors import BundleError
from fedclaw.export.check import Trust, verify_bundle
from fedclaw.export.layout import MARGINALS, SCHEMA
from fedclaw.export.predictor import schema_of
from fedclaw.serve.monitoring.drift_watch import KEPT_WINDOWS, DriftMonitor, InputWatch, VersionInputs
from fedclaw.serve.settings import DriftSettings
from fedclaw.serve.state.store import StateStore
from tests.bundles import training_rows

HOUR = 3600
SETTINGS = DriftSettings(share=1.0, first_rows=400)


class Clock:
    """Says what it is set to."""

    def __init__(self) -> None:
        self.now = 1_000 * HOUR + 60.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def store(tmp_path: Path):
    with StateStore.open(f"sqlite:///{tmp_path / 'state.db'}") as found:
        yield found


def inputs_of(bundle: Path, home) -> VersionInputs:
    verified = verify_bundle(bundle, Trust(home.signer().ca_pem), [SCHEMA, MARGINALS])
    return VersionInputs.of(schema_of(verified), verified.manifest.pipeline.columns, verified.contents)


@pytest.fixture(scope="module")
def charged(marginals_bundle, home):
    return inputs_of(marginals_bundle, home)


@pytest.fixture(scope="module")
def bare(table_bundle, home):
    return inputs_of(table_bundle, home)


def ask(watch: InputWatch, count: int, seed: int = 0, version: str = "ab12", older: float = 0.0) -> None:
    """So many requests of a row each, of the training rows' population, `older` by as many years."""
    rows, random = training_rows().columns, np.random.default_rng(seed)
    for row in random.integers(0, 3000, count):
        age, smoker, ward = (rows[name][row] for name in ("age", "smoker", "ward"))
        columns = {
            "age": np.array([[min(age + older, 120.0)]], np.float32),
            "smoker": np.array([["yes" if smoker else "no"]], object),
            "ward": np.array([[("surgery", "medicine")[int(ward)]]], object),
        }
        watch.saw("heart", version, columns, 1)


def opened(store, clock, inputs, writer="node/0", settings=SETTINGS, version="ab12") -> InputWatch:
    watch = InputWatch(store, writer, settings, clock)
    watch.serves("heart", version, inputs.features)
    return watch


def test_rows_of_all_workers_are_held_against_the_charged_question(store, clock, charged):
    watches = [opened(store, clock, charged, f"node/{number}") for number in range(3)]
    monitor = DriftMonitor(store, SETTINGS, clock)
    for number, watch in enumerate(watches):
        ask(watch, 200, number)
        watch.push()
    assert monitor.check("heart", {"ab12": charged})["ab12"].state == "too few rows"  # the window is not over
    clock.now += HOUR
    found = monitor.check("heart", {"ab12": charged})["ab12"]
    assert (found.state, found.rows, found.window) == ("compared", 600, (1_000 * HOUR, 1_001 * HOUR))
    assert found.baseline == "the charged question release"
    assert found.report.alarms == ()
    assert set(found.report.features) == {"age", "smoker", "ward"}
    for number, watch in enumerate(watches):
        ask(watch, 200, number, older=20.0)
        watch.push()
    clock.now += HOUR
    found = monitor.check("heart", {"ab12": charged})["ab12"]
    assert (found.rows, found.report.alarms) == (600, ("age",))
    assert json.loads(json.dumps(found.to_document(), allow_nan=False))["alarms"] == ["age"]


def test_without_a_charged_question_the_first_rows_are_the_baseline_and_stay_it(store, clock, bare):
    watch, monitor = opened(store, clock, bare), DriftMonitor(store, SETTINGS, clock)
    ask(watch, 300)
    watch.push()
    clock.now += HOUR
    found = monitor.check("heart", {"ab12": bare})["ab12"]
    assert (found.state, found.rows) == ("no baseline yet", 300)
    ask(watch, 300, 1)
    watch.push()
    clock.now += HOUR
    assert monitor.check("heart", {"ab12": bare})["ab12"].state == "too few rows"
    for older in (20.0, 20.0):
        ask(watch, 300, 2, older=older)
        watch.push()
        clock.now += HOUR
        found = DriftMonitor(store, SETTINGS, clock).check("heart", {"ab12": bare})["ab12"]
        assert found.baseline == "the first 600 sampled rows served"
        assert found.report.alarms == ("age",)


def test_a_new_version_every_hour_keeps_the_models_first_rows(store, clock, bare):
    watch, monitor = opened(store, clock, bare), DriftMonitor(store, SETTINGS, clock)
    ask(watch, 500)
    watch.push()
    clock.now += HOUR
    monitor.check("heart", {"ab12": bare})
    watch.forget("heart", "ab12")
    watch.serves("heart", "cd34", bare.features)
    ask(watch, 500, 1, "cd34", older=20.0)
    ask(watch, 500, 1, "ab12", older=-20.0)  # not served any more
    watch.push()
    clock.now += HOUR
    found = monitor.check("heart", {"cd34": bare})["cd34"]
    assert (found.rows, found.report.alarms) == (500, ("age",))
    assert monitor.begin_anew("heart", bare.features)
    assert monitor.check("heart", {"cd34": bare})["cd34"].state == "no baseline yet"
    clock.now += HOUR
    ask(watch, 500, 2, "cd34", older=20.0)
    watch.push()
    clock.now += HOUR
    assert monitor.check("heart", {"cd34": bare})["cd34"].baseline == "the first 500 sampled rows served"


def test_windows_with_few_rows_are_compared_together(store, clock, charged):
    watch, monitor = opened(store, clock, charged), DriftMonitor(store, SETTINGS, clock)
    for number in range(5):
        ask(watch, 60, number)
        watch.push()
        clock.now += HOUR
    found = monitor.check("heart", {"ab12": charged})["ab12"]
    assert (found.rows, found.window) == (240, (1_001 * HOUR, 1_005 * HOUR))
    clock.now += 40 * HOUR
    assert monitor.check("heart", {"ab12": charged})["ab12"].state == "too few rows"


def test_a_worker_that_is_started_again_goes_on_and_old_windows_go(store, clock, charged):
    for number in range(KEPT_WINDOWS + 3):
        watch = opened(store, clock, charged)  # a new process in the same place
        ask(watch, 10, number)
        watch.push()
        ask(watch, 10, number)
        watch.push()
        clock.now += HOUR
    (name,) = store.names("drift/heart/")
    windows = store.read(name)[1]["windows"]
    assert len(windows) == KEPT_WINDOWS
    assert {window["rows"] for window in windows.values()} == {20}


def test_two_that_write_at_once_lose_nothing(store, clock, charged):
    """As two processes of one place, of which the older one is on its way out."""
    watches = [opened(store, clock, charged) for _ in range(4)]
    for number, watch in enumerate(watches):
        ask(watch, 50, number)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda watch: watch.push(), watches))
    for watch in watches:
        watch.push()  # what another one was faster with
    (name,) = store.names("drift/heart/")
    (window,) = store.read(name)[1]["windows"].values()
    assert window["rows"] == 200


def test_counts_wait_for_a_store_that_is_away(tmp_path, clock, charged):
    class Away:
        def read(self, name):
            raise ConnectionError

        swap = names = read

    watch = opened(Away(), clock, charged)
    ask(watch, 30)
    with pytest.raises(ConnectionError):
        watch.push()
    ask(watch, 30, 1)
    with StateStore.open(f"sqlite:///{tmp_path / 'other.db'}") as store:
        watch._store = store
        watch.push()
        (name,) = store.names("drift/heart/")
        (window,) = store.read(name)[1]["windows"].values()
    assert window["rows"] == 60


def test_the_configuration_says_which_baseline(store, clock, charged, bare):
    first = SETTINGS.model_copy(update={"baseline": "first_rows"})
    only = SETTINGS.model_copy(update={"baseline": "charged"})
    assert DriftMonitor(store, only, clock).check("heart", {"ab12": bare})["ab12"].state == "no baseline yet"
    assert DriftMonitor(store, first, clock).check("heart", {"ab12": charged})["ab12"].state == "no baseline yet"
    assert DriftMonitor(store, only, clock).check("heart", {"ab12": charged})["ab12"].state == "too few rows"


def test_nothing_but_counts_is_stored(store, clock, charged):
    watch = opened(store, clock, charged)
    ask(watch, 1, older=0.1234)
    watch.push()
    (name,) = store.names()
    window = store.read(name)[1]["windows"][str(1_000 * HOUR)]
    assert window["rows"] == 1
    assert {number for cells in window["features"].values() for number in cells.values()} == {1}


def test_marginals_that_are_not_understood_are_an_error(table_bundle, home):
    verified = verify_bundle(table_bundle, Trust(home.signer().ca_pem), [SCHEMA])
    contents = {**verified.contents, MARGINALS: b"{}"}
    with pytest.raises(BundleError, match=r"marginals\.json is signed but not understood"):
        VersionInputs.of(schema_of(verified), verified.manifest.pipeline.columns, contents)
