"""A run in MLflow: a real SQLite store, a real tracking server, and a run that is taken up again."""

import logging
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from mlflow import MlflowClient

from fedclaw.errors import CheckpointError, TransportError
from fedclaw.report import tracking
from fedclaw.report.tracking import MlflowTracker, TrackingSettings, make_tracker
from fedclaw.server.round_report import Outcome, RoundReport
from fedclaw.server.run_directory import RunDirectory, SiteReceipt
from tests.ports import free_port
from tests.samples import receipt, run_record

RECEIPT = receipt(epsilon_run=1.5)


def report(number):
    return RoundReport(
        round=number,
        rounds=2,
        answered=("north",),
        declined=(),
        silent=(),
        update_norm=0.5,
        train_seconds=1.0,
        evaluate_seconds=0.1,
        metrics={"accuracy": 0.25 * number},
        test_examples=9,
        receipts={"north": SiteReceipt(examples=9, receipt=RECEIPT)},
        bytes_up=120,
        bytes_down=240,
    )


@pytest.fixture
def run(tmp_path):
    record = run_record(run="first")
    directory = RunDirectory.create(tmp_path / "runs" / "first", record)
    directory.write_model({"w": np.zeros(2, np.float32)})
    directory.write_receipts({"north": SiteReceipt(examples=9, receipt=RECEIPT)})
    return SimpleNamespace(runs=tmp_path / "runs", directory=directory, record=record)


def track(run, settings):
    """A server that dies after round 1, and the one that resumes it."""
    first = MlflowTracker(settings, run.directory)
    first.started(run.record, 1)
    first.finished_round(report(1))
    first.failed()
    second = MlflowTracker(settings, run.directory)
    second.started(run.record, 2)
    second.finished_round(report(2))
    second.finished(Outcome(run.directory, {}))


def check(client, experiment_name="fedclaw"):
    experiment = client.get_experiment_by_name(experiment_name)
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.status == "FINISHED"
    assert found.info.run_name == "first"
    assert found.data.params["privacy.epsilon"] == "2.0"
    assert found.data.params["training.batch_size"] == "8"
    assert found.data.metrics["epsilon/north"] == 1.5
    assert (found.data.metrics["bytes_up"], found.data.metrics["bytes_down"]) == (120, 240)
    history = client.get_metric_history(found.info.run_id, "accuracy")
    assert [(point.step, point.value) for point in history] == [(1, 0.25), (2, 0.5)]
    assert {a.path for a in client.list_artifacts(found.info.run_id)} == {"model.npz", "run.json", "receipts.json"}


def test_a_resumed_run_goes_on_in_the_same_mlflow_run(run):
    track(run, TrackingSettings())
    check(MlflowClient(f"sqlite:///{run.runs / 'mlflow.db'}"))


def test_rounds_that_the_store_lacks_are_noted_when_the_run_goes_on(run):
    """A process may end between a round's line in metrics.jsonl and MLflow; or nobody tracked at first."""
    for number in (1, 2):
        run.directory.append_metrics(number, report(number).as_line())
    first = MlflowTracker(TrackingSettings(), run.directory)
    first.started(run.record, 1)
    first.finished_round(report(1))
    parent = {"mlflow.parentRunId": "above"}
    for _ in range(2):
        MlflowTracker(TrackingSettings(), run.directory, parent).catch_up(Outcome(run.directory, {}))
    client = MlflowClient(f"sqlite:///{run.runs / 'mlflow.db'}")
    check(client)
    (found,) = client.search_runs([client.get_experiment_by_name("fedclaw").experiment_id])
    assert found.data.tags["mlflow.parentRunId"] == "above"
    assert found.data.metrics["sites"] == 1


@pytest.mark.parametrize(("seconds", "calls"), [(0.01, [1, 4, 7, 8]), (0.3, [1, 8])])
def test_a_store_that_takes_long_is_told_less_often_and_of_everything(run, monkeypatch, seconds, calls):
    """Rounds of a second: a store that is told quickly hears of them every 2 s, one that takes 0.3 s every 10 s.

    Of everything in each round, but for the figures by class: those of the last round that it is told of.
    """
    clock, heard = SimpleNamespace(now=1000.0), []
    monkeypatch.setattr(tracking, "time", SimpleNamespace(monotonic=lambda: clock.now, time=time.time))
    tracker = MlflowTracker(TrackingSettings(), run.directory)
    tracker.started(run.record, 1)
    log_batch = tracker._store.client.log_batch

    def slow(run_id, metrics):
        clock.now += seconds
        heard.append(max(metric.step for metric in metrics))
        log_batch(run_id, metrics=metrics)

    monkeypatch.setattr(tracker._store.client, "log_batch", slow)
    for number in range(1, 9):
        beside = {"by_class": {"ill": {"recall": number / 10}}}
        tracker.finished_round(replace(report(number), rounds=100, beside=beside))
        clock.now += 0.99
    tracker.failed()
    assert heard == calls
    client = MlflowClient(f"sqlite:///{run.runs / 'mlflow.db'}")
    history = client.get_metric_history(tracker._run_id, "accuracy")
    assert [point.step for point in history] == list(range(1, 9))
    recalls = client.get_metric_history(tracker._run_id, "class/ill/recall")
    assert [(point.step, point.value) for point in recalls] == [(step, step / 10) for step in calls]


@contextmanager
def tracking_server(root, port):
    command = ["server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    stores = ["--backend-store-uri", f"sqlite:///{root / 'server.db'}", "--artifacts-destination", str(root / "files")]
    server = subprocess.Popen(
        [sys.executable, "-m", "mlflow", *command, *stores],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        wait_for_port(port)
        yield server
    finally:
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)


@pytest.mark.timeout(300)
def test_a_tracking_server_by_its_uri(run, tmp_path):
    port = free_port()
    with tracking_server(tmp_path, port):
        settings = TrackingSettings(uri=f"http://127.0.0.1:{port}", experiment="over-http")
        track(run, settings)
        check(MlflowClient(settings.uri), "over-http")


@pytest.fixture
def warnings(caplog):
    """The tracker's own warnings."""
    logger = logging.getLogger("fedclaw")
    propagated, logger.propagate = logger.propagate, True
    yield lambda: [record.getMessage() for record in caplog.records if record.name == "fedclaw.report.tracking"]
    logger.propagate = propagated


@pytest.mark.timeout(300)
def test_a_tracking_server_that_dies_stops_nothing(run, tmp_path, warnings):
    """Killed after round 1: the rounds after it go on, one warning says so and one what is missing."""
    port = free_port()
    with tracking_server(tmp_path, port) as server:
        tracker = MlflowTracker(TrackingSettings(uri=f"http://127.0.0.1:{port}"), run.directory)
        tracker.started(run.record, 1)
        tracker.finished_round(report(1))
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
        assert not warnings()
        for number in (2, 3):
            tracker.finished_round(report(number))
            assert len(warnings()) == 1
        tracker.finished(Outcome(run.directory, {}))
    (failed, lost) = warnings()
    assert "goes on without it" in failed
    assert "3 of 5" in lost


def test_a_store_that_breaks_does_not_hide_why_the_run_failed(run, warnings):
    tracker = MlflowTracker(TrackingSettings(), run.directory)
    tracker.started(run.record, 1)
    store = run.runs / "mlflow.db"
    store.write_bytes(b"this is no database" * 1000)
    tracker.finished_round(report(1))
    tracker.failed()
    assert len(warnings()) == 2


def test_a_run_that_could_not_begin_in_mlflow_begins_with_a_later_round(run, warnings):
    tracker = MlflowTracker(TrackingSettings(), run.directory)
    store = run.runs / "mlflow.db"
    healthy = store.read_bytes()
    store.write_bytes(b"this is no database" * 1000)
    tracker.started(run.record, 1)
    assert len(warnings()) == 1
    store.write_bytes(healthy)
    tracker.finished_round(report(1))
    tracker.finished_round(report(2))
    tracker.finished(Outcome(run.directory, {}))
    check(MlflowClient(f"sqlite:///{store}"))


@pytest.mark.parametrize("content", ["", "[]", '{"run_id": 3}', "{", '{"run": "x"}'])
def test_a_damaged_mlflow_json_is_named(run, content):
    (run.directory.root / "mlflow.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"mlflow\.json is damaged"):
        MlflowTracker(TrackingSettings(), run.directory)


def test_a_password_in_the_uri_is_not_shown(run):
    with pytest.raises(TransportError) as caught:
        MlflowTracker(TrackingSettings(uri=f"http://nurse:hunter2@127.0.0.1:{free_port()}"), run.directory)
    assert "hunter2" not in str(caught.value)
    assert "tracking.uri=http://...@127.0.0.1" in str(caught.value)


def wait_for_port(port):
    end = time.monotonic() + 150
    while time.monotonic() < end:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    pytest.fail("the tracking server did not come up")


def test_no_tracking(run):
    assert make_tracker(TrackingSettings(uri="none"), run.directory) is None


def test_a_store_that_cannot_be_used_is_one_line(run):
    with pytest.raises(TransportError, match=r"tracking\.uri=nonsense://x"):
        make_tracker(TrackingSettings(uri="nonsense://x"), run.directory)


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("http://", "names no host"),
        ("http://127.0.0.1:port", "not a usable address"),
        ("http://[", "not a usable address"),
        ("http://no.such.host.invalid", "cannot be reached"),
        ("postgresql://nurse:hunter2@127.0.0.1:9/mlflow", "cannot be reached: Connection refused"),
        ("localhost:5000", "cannot be used"),
        ("sqlite:////proc/x/y.db", "No such file"),
    ],
)
def test_a_wrong_uri_is_one_line_at_once(run, uri, message):
    with pytest.raises(TransportError) as caught:
        make_tracker(TrackingSettings(uri=uri), run.directory)
    assert message in str(caught.value)
    assert "tracking.uri=" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "hunter2" not in str(caught.value)


def test_a_server_that_takes_connections_and_says_nothing_is_given_up(run, monkeypatch):
    """The port is open, so only MLflow's own request finds it out; its patience is left as it was."""
    monkeypatch.setitem(tracking.FIRST_PATIENCE, "MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    for name in tracking._PATIENCE:
        monkeypatch.delenv(name, raising=False)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        with pytest.raises(TransportError, match="cannot be used"):
            make_tracker(TrackingSettings(uri=f"http://127.0.0.1:{mute.getsockname()[1]}"), run.directory)
        mute.settimeout(0)
        asked = 0
        with suppress(BlockingIOError):
            while True:
                mute.accept()[0].close()
                asked += 1
    assert asked == 2, "the probe and one request"
    assert not set(tracking._PATIENCE) & set(os.environ)


def test_the_store_is_tried_before_there_is_a_run(tmp_path):
    directory = RunDirectory(tmp_path / "runs" / "first")
    assert make_tracker(TrackingSettings(), directory)
    assert not directory.root.exists()
