"""The benchmark of serving, on real servers for a moment: that every row is there, and what the JSON says."""

import json
import shutil

import pytest

from experiments.benchmarks import serving
from fedclaw.errors import UsageError

TOOLS = pytest.mark.skipif(
    shutil.which("wrk") is None or shutil.which("h2load") is None, reason="wrk or h2load is not installed"
)


@pytest.mark.slow
@TOOLS
@pytest.mark.timeout(600)
def test_a_quick_run_measures_every_row(capsys, tmp_path):
    serving.main(["quick=true", f"bundles={tmp_path}"])
    output = capsys.readouterr().out
    figures = json.loads(output.splitlines()[-1])
    own = {"node", "node, TLS", "node, binary", "node, gRPC"}
    for model in ("cnn", "mlp"):
        assert set(figures[f"{model} requests per second"]) == {*own, "mlflow"}
        assert min(figures[f"{model} requests per second"].values()) > 0
        assert min(figures[f"{model} processor ms"].values()) > 0
        assert set(figures[f"{model} errors"].values()) == {0}
        assert figures[f"{model} p50 ms"]["node"] <= figures[f"{model} p99 ms"]["node"]
        rates = figures[f"{model} requests per second"]
        # Rates are told to a tenth of a request.
        assert figures[f"{model} to mlflow"] == pytest.approx(rates["node"] / rates["mlflow"], rel=2e-3)
        raw = figures[f"{model} raw rows per second"]["batch 32"]
        assert figures[f"{model} to raw batch 32"] == pytest.approx(rates["node"] / raw, abs=2e-3)
        assert f"{model} idle difference ms" in figures
    assert "cnn to MLServer" not in figures
    assert "MLServer is left out: mlserver=PATH names a Python that has it" in output
    held = figures["connections held"]
    assert figures["connections ratio"] == pytest.approx(held["batching on"] / held["batching off"], abs=1e-3)
    assert figures["processor saving"] < 1
    assert min(figures["ready s"].values()) > 0
    assert set(figures["first answer ms"]) == {"preloaded", "on demand"}


def test_what_is_not_there_is_said_before_anything_is_measured(monkeypatch, tmp_path):
    with pytest.raises(UsageError, match="no such file"):
        serving.main([f"mlserver={tmp_path / 'python'}"])
    with pytest.raises(UsageError, match="parts"):
        serving.main(["parts=[nonsense]"])
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UsageError, match="wrk is not installed; on Debian: apt-get install wrk"):
        serving.main([])


def test_connections_are_found_to_within_a_factor(monkeypatch, tmp_path):
    """The most connections whose p99 is under the limit, however the p99 grows."""

    class Asked:
        def __init__(self, most):
            self.most, self.counts = most, []

    def measure(contender, connections, seconds, core):
        contender.counts.append(connections)
        p99 = 199.0 if connections <= contender.most else 200.0
        return serving.Measured(serving.Load(1.0, 1.0, p99, 1, 0), 1.0)

    monkeypatch.setattr(serving, "measure", measure)
    benchmark = serving.Benchmark.__new__(serving.Benchmark)
    settings = {"limit": 200.0, "seconds": 1.0, "quick": False}
    benchmark.settings, benchmark.cores = type("Settings", (), settings)(), (None, None)
    for most in (1, 17, 120, 380, 1500):
        asked = Asked(most)
        found = benchmark._held(asked)
        assert found <= most < found * serving.LADDER + 1
        assert len(asked.counts) < 20
