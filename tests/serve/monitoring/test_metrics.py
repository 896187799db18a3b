"""A node's metrics: counted by worker processes, read by another, by Prometheus' own rules."""

import multiprocessing
import os
import shutil
import signal
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families

from fedclaw.serve.monitoring.metrics import (
    DEFINITIONS,
    FeedbackFigures,
    NodeMetrics,
    RoutingFigures,
    WorkerMetrics,
    clear,
)
from fedclaw.serve.monitoring.processes import process_figures, read_gpus
from fedclaw.serve.monitoring.series import SeriesError, SeriesFile, SeriesName, read_series

SPAWN = multiprocessing.get_context("spawn")


def samples(page: bytes) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """By name and labels, without those that are empty: Prometheus does not tell them from labels that miss."""
    return {
        (sample.name, tuple(sorted((name, value) for name, value in sample.labels.items() if value))): sample.value
        for family in text_string_to_metric_families(page.decode())
        for sample in family.samples
    }


def value(page: bytes, name: str, **labels: str) -> float | None:
    return samples(page).get((f"fedclaw_serve_{name}", tuple(sorted(labels.items()))))


def page(directory: Path) -> bytes:
    return NodeMetrics(directory).render()[0]


def count_and_wait(directory: Path, worker: int, requests: int, connection: Any) -> None:
    metrics = WorkerMetrics.open(directory, worker)
    metrics.serves({"heart": ["ab12"]})
    metrics.loaded("heart", "ab12", 0.3, 1000)
    metrics.queue("heart", "ab12", 5)
    for _ in range(requests):
        metrics.request("heart", "ab12", "rest", 200, 0.0003)
    connection.send(os.getpid())
    connection.recv()


@pytest.fixture
def started(tmp_path: Path):
    """A function that starts a worker process, which counts and then waits to be killed; its process id."""
    processes = []

    def start(worker: int, requests: int) -> Any:
        here, there = SPAWN.Pipe()
        process = SPAWN.Process(target=count_and_wait, args=(tmp_path, worker, requests, there), daemon=True)
        process.start()
        processes.append((process, here))
        assert here.poll(60)
        here.recv()
        return process

    yield start
    for process, _ in processes:
        process.kill()
        process.join()


def kill(process: Any) -> None:
    os.kill(process.pid, signal.SIGKILL)
    process.join()


def test_counts_of_workers_add_up_and_outlive_a_killed_one_whose_gauges_end(started, tmp_path: Path):
    first, second = started(0, 3), started(1, 4)
    told = page(tmp_path)
    assert value(told, "requests_total", model="heart", version="ab12", protocol="rest", status="200") == 7
    assert value(told, "models_loaded", model="heart", version="ab12") == 2
    assert value(told, "model_memory_bytes", model="heart", version="ab12") == 2000
    assert value(told, "queue_rows", model="heart", version="ab12") == 10
    assert value(told, "workers") == 2
    assert value(told, "process_resident_memory_bytes", process="worker-1") > 1e6
    kill(second)
    told = page(tmp_path)
    assert value(told, "requests_total", model="heart", version="ab12", protocol="rest", status="200") == 7
    assert value(told, "models_loaded", model="heart", version="ab12") == 1
    assert value(told, "queue_rows", model="heart", version="ab12") == 5
    assert value(told, "workers") == 1
    assert value(told, "worker_pid", worker="0") == first.pid
    assert value(told, "worker_pid", worker="1") is None
    assert value(told, "process_resident_memory_bytes", process="worker-1") is None


def test_a_worker_that_is_started_again_goes_on_counting_in_the_same_file(started, tmp_path: Path):
    for _ in range(3):
        kill(started(0, 2))
    started(0, 2)
    told = page(tmp_path)
    assert value(told, "requests_total", model="heart", version="ab12", protocol="rest", status="200") == 8
    assert value(told, "worker_starts_total", worker="0") == 4
    assert value(told, "models_loaded", model="heart", version="ab12") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["worker-0.lock", "worker-0.series"]
    clear(tmp_path)
    assert value(page(tmp_path), "worker_starts_total", worker="0") is None


def test_a_place_has_one_owner(tmp_path: Path):
    owner = WorkerMetrics.open(tmp_path, 0)
    with pytest.raises(SeriesError, match="another process is worker 0"):
        WorkerMetrics.open(tmp_path, 0)
    owner.close()
    WorkerMetrics.open(tmp_path, 0).close()


def test_files_are_for_their_owner_alone(tmp_path: Path):
    metrics = WorkerMetrics.open(tmp_path / "metrics", 0)
    assert stat.S_IMODE((tmp_path / "metrics").stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "metrics").iterdir()} == {0o600}
    metrics.close()


@pytest.fixture
def metrics(tmp_path: Path):
    found = WorkerMetrics.open(tmp_path, 0)
    found.serves({"heart": ["ab12", "cd34"]})
    yield found
    found.close()


def test_names_that_a_client_makes_up_are_no_labels(metrics: WorkerMetrics, tmp_path: Path):
    for number in range(200):
        metrics.request(f'../{number}"\n', "x", f"protocol {number}", 404, 0.001)
        metrics.request("heart", f"version {number}", "rest", 404, 0.001)
        metrics.refused(f"made up {number}", "not_found")
        metrics.feedback(f"made up {number}", "refused")
        metrics.batch(f"made up {number}", "x", 1, 0.1)
        metrics.queue(f"made up {number}", "x", 1)
    told = page(tmp_path)
    assert value(told, "requests_total", protocol="other", status="404") == 200
    assert value(told, "requests_total", model="heart", protocol="rest", status="404") == 200
    assert value(told, "refusals_total", code="not_found") == 200
    assert b"made up" not in told
    assert b"version 1" not in told
    kept = vars(metrics)
    assert all(len(kept[name]) < 20 for name in ("_requests", "_batches", "_single")), "memory grows with made-up names"


def test_series_of_a_version_that_is_gone_end_and_the_others_stay(metrics: WorkerMetrics, tmp_path: Path):
    for version in ("ab12", "cd34"):
        metrics.request("heart", version, "grpc", 200, 0.001)
    metrics.request("heart", "", "grpc", 401, 0.001)
    metrics.serves({"heart": ["cd34", "ef56"]})
    metrics.request("heart", "cd34", "grpc", 200, 0.001)
    metrics.request("heart", "ef56", "grpc", 200, 0.001)
    metrics.request("heart", "ab12", "grpc", 404, 0.001)
    told = page(tmp_path)
    of_model = {"model": "heart", "protocol": "grpc"}
    assert value(told, "requests_total", version="ab12", status="200", **of_model) is None
    assert value(told, "requests_total", version="cd34", status="200", **of_model) == 2
    assert value(told, "requests_total", version="ef56", status="200", **of_model) == 1
    assert value(told, "requests_total", status="401", **of_model) == 1
    assert value(told, "requests_total", status="404", **of_model) == 1


def test_a_bin_holds_its_upper_end(metrics: WorkerMetrics, tmp_path: Path):
    for seconds in (0.00005, 0.0001, 0.00010001, 0.2, 99.0):
        metrics.request("heart", "ab12", "rest", 200, seconds)
    told = page(tmp_path)

    def below(end: str) -> float | None:
        return value(told, "request_duration_seconds_bucket", model="heart", version="ab12", le=end)

    assert [below(end) for end in ("0.0001", "0.0002", "0.1", "0.2", "10.0", "+Inf")] == [2, 3, 3, 4, 4, 5]
    assert value(told, "request_duration_seconds_count", model="heart", version="ab12") == 5
    total = value(told, "request_duration_seconds_sum", model="heart", version="ab12")
    assert total == pytest.approx(99.20025001)


def test_a_batch_says_its_rows_its_wait_and_its_time(metrics: WorkerMetrics, tmp_path: Path):
    metrics.batch("heart", "ab12", 5, 0.0004, 0.003)
    metrics.batch("heart", "ab12", 1, 0.0, None)
    metrics.rows_refused("heart", "ab12", 2)
    metrics.request("heart", "ab12", "rest", 400, None)
    told, of_version = page(tmp_path), {"model": "heart", "version": "ab12"}
    assert value(told, "rows_total", **of_version) == 6
    assert value(told, "requests_total", protocol="rest", status="400", **of_version) == 1
    assert value(told, "request_duration_seconds_count", **of_version) == 0
    assert value(told, "rows_refused_total", **of_version) == 2
    assert value(told, "batch_rows_sum", **of_version) == 6
    assert value(told, "batch_rows_bucket", le="4.0", **of_version) == 1
    assert value(told, "batch_rows_bucket", le="8.0", **of_version) == 2
    assert value(told, "queue_wait_seconds_sum", **of_version) == pytest.approx(0.0004)
    assert value(told, "inference_duration_seconds_count", **of_version) == 1


def test_every_method_counts_what_it_says(metrics: WorkerMetrics, tmp_path: Path):
    metrics.token(True)
    metrics.token(False)
    metrics.token(True)
    for written in (True, True, False, True):
        metrics.audit_line(written)
    metrics.rate_limited()
    metrics.mirrored("heart", "cd34")
    metrics.tripped("heart", "ab12")
    metrics.refused(None, "unauthenticated")
    metrics.refused("heart", "overloaded")
    metrics.feedback("heart", "credited")
    metrics.ready(True)
    metrics.loaded("heart", "ab12", 0.3, 10)
    metrics.unloaded("heart", "ab12")
    told = page(tmp_path)
    assert value(told, "token_cache_total", result="hit") == 2
    assert value(told, "token_cache_total", result="miss") == 1
    assert value(told, "audit_lines_total") == 3
    assert value(told, "audit_missed_total") == 1
    assert value(told, "rate_limited_total") == 1
    assert value(told, "mirrored_total", model="heart", version="cd34") == 1
    assert value(told, "breaker_trips_total", model="heart", version="ab12") == 1
    assert value(told, "refusals_total", code="unauthenticated") == 1
    assert value(told, "refusals_total", model="heart", code="overloaded") == 1
    assert value(told, "feedback_total", model="heart", result="credited") == 1
    assert value(told, "worker_ready", worker="0") == 1
    assert value(told, "model_memory_bytes", model="heart", version="ab12") == 0
    assert value(told, "model_load_duration_seconds_bucket", model="heart", version="ab12", le="0.5") == 1


def filled(directory: Path) -> NodeMetrics:
    """A node with something of every metric but those of a GPU."""
    metrics = WorkerMetrics.open(directory, 0)
    metrics.serves({"heart": ["ab12", "cd34"]})
    metrics.request("heart", "ab12", "rest", 200, 0.001)
    metrics.batch("heart", "ab12", 5, 0.0004, 0.003)
    metrics.queue("heart", "ab12", 0)
    metrics.rows_refused("heart", "ab12", 1)
    metrics.loaded("heart", "ab12", 0.3, 10)
    metrics.token(True)
    metrics.audit_line()
    metrics.rate_limited()
    metrics.mirrored("heart", "cd34")
    metrics.tripped("heart", "ab12")
    metrics.refused("heart", "overloaded")
    metrics.feedback("heart", "credited")
    metrics.ready(True)
    node = NodeMetrics(directory, workers_wanted=1)
    node.set_routing(
        {"heart": RoutingFigures({"ab12": 0.95, "cd34": 0.05}, {"ab12": "closed", "cd34": "open"}, "cd34")}
    )
    node.set_windows(3600.0, {("heart", "ab12"): FeedbackFigures(9, 0.9, 0.8, 0.7, 0.75, 0.1, 0.6, 0.5)})
    node.set_drift({("heart", "ab12"): {"age": (0.3, 0.2, True), "sex": (0.01, None, False)}})
    node.set_drift_rows({("heart", "ab12"): 1000})
    node.set_audit_valid(True)
    node.decided("heart", "canary_grows")
    node.state_store_failed()
    return node


def test_the_control_process_adds_routing_feedback_and_drift(tmp_path: Path):
    told = filled(tmp_path).render()[0]
    assert value(told, "version_share", model="heart", version="cd34") == 0.05
    assert value(told, "canary_share", model="heart") == 0.05
    states = {
        state: value(told, "breaker_state", model="heart", version="cd34", state=state)
        for state in ("closed", "open", "half_open")
    }
    assert states == {"closed": 0, "open": 1, "half_open": 0}
    assert value(told, "feedback_f1", model="heart", version="ab12") == 0.75
    assert value(told, "drift_alarm", model="heart", version="ab12", feature="age") == 1
    assert value(told, "drift_ks", model="heart", version="ab12", feature="sex") is None
    assert value(told, "decisions_total", model="heart", kind="canary_grows") == 1


def test_what_is_said_anew_replaces_what_was_said(tmp_path: Path):
    node = filled(tmp_path)
    node.set_routing({"heart": RoutingFigures({"cd34": 1.0})})
    told = node.render()[0]
    assert value(told, "version_share", model="heart", version="ab12") is None
    assert value(told, "canary_share", model="heart") == 0
    assert value(told, "breaker_state", model="heart", version="cd34", state="open") is None


def test_every_metric_is_there_and_its_name_follows_the_conventions(tmp_path: Path):
    told, content_type = filled(tmp_path).render()
    assert content_type.startswith("text/plain")
    shown = {family.name for family in text_string_to_metric_families(told.decode())}
    wanted = {one.full_name for one in DEFINITIONS.values() if not one.name.startswith("gpu_")}
    assert {name.removesuffix("_total") for name in wanted} == {name.removesuffix("_total") for name in shown}
    for definition in DEFINITIONS.values():
        assert definition.name.endswith("_total") == (definition.kind == "counter"), definition.name
        assert definition.help.endswith("."), definition.name


def test_promtool_finds_nothing_to_say(tmp_path: Path):
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed")
    told, _ = filled(tmp_path).render()
    done = subprocess.run([promtool, "check", "metrics"], input=told, capture_output=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, b""), done.stderr.decode()


def test_openmetrics_for_who_asks_for_it(tmp_path: Path):
    told, content_type = filled(tmp_path).render("application/openmetrics-text; version=1.0.0")
    assert content_type.startswith("application/openmetrics-text")
    assert {family.name for family in parse_openmetrics(told.decode())} >= {"fedclaw_serve_requests"}


def test_a_damaged_file_costs_its_own_numbers_alone(metrics: WorkerMetrics, tmp_path: Path):
    metrics.request("heart", "ab12", "rest", 200, 0.001)
    good = (tmp_path / "worker-0.series").read_bytes()
    for number, content in enumerate((b"", b"x" * 5000, good[:8] + b"\xff" * 8 + good[16:], good[:600]), start=1):
        (tmp_path / f"worker-{number}.series").write_bytes(content)
        with pytest.raises(SeriesError):
            read_series(tmp_path / f"worker-{number}.series")
    told = page(tmp_path)
    assert value(told, "requests_total", model="heart", version="ab12", protocol="rest", status="200") == 1
    again = WorkerMetrics.open(tmp_path, 1)
    assert value(page(tmp_path), "worker_starts_total", worker="1") == 1
    again.close()


def test_a_full_file_counts_what_it_has_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("fedclaw.serve.monitoring.series.CAPACITY", 1 << 16)
    file = SeriesFile(tmp_path, 0, lambda _: True)
    names = [SeriesName("rows_total", ("heart", f"{number:050}")) for number in range(2000)]
    for name in names:
        cells, place = file.place(name, 1)
        cells[place] += 1.0
    kept = read_series(tmp_path / "worker-0.series")
    assert 100 < len(kept) < 2000
    assert set(kept.values()) == {(1.0,)}
    file.close()


def test_resources_of_a_process_that_is_gone_are_none(tmp_path: Path):
    own = process_figures(os.getpid())
    assert own["process_threads"] >= 1
    assert own["process_open_fds"] >= 3
    assert own["process_cpu_seconds_total"] > 0
    assert process_figures(2**22 + 1) == {}


def test_what_nvidia_smi_says_of_two_gpus():
    found = read_gpus("0, 1024, 143771, 37\n1, [N/A], 143771, [N/A]\nNo devices were found\n")
    assert found == {
        "0": {
            "gpu_memory_used_bytes": 1024 * 2**20,
            "gpu_memory_total_bytes": 143771 * 2**20,
            "gpu_utilisation_ratio": 0.37,
        },
        "1": {"gpu_memory_total_bytes": 143771 * 2**20},
    }
