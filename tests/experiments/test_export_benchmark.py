"""The export benchmark: the sizes that it says, the best of its times, and the ratios that are promised."""

import json

import pytest

from experiments.benchmarks import export
from fedclaw.errors import UsageError
from fedclaw.export.source import load_source
from fedclaw.server.run_directory import RunDirectory


def test_the_small_run_is_one_of_ten_million_parameters(tmp_path):
    export.write_run(tmp_path / "run", 10)
    assert load_source(RunDirectory.open(tmp_path / "run")).parameters == pytest.approx(10_000_000, rel=0.05)
    inputs, sizes = export.COLUMNS, 0
    for width in (*export.WIDTHS[100], export.LABELS):
        sizes, inputs = sizes + (inputs + 1) * width, width
    assert sizes == pytest.approx(100_000_000, rel=0.05)


def test_the_best_times_and_the_growth_of_the_peak_are_compared(monkeypatch, capsys):
    seconds = {("whole", "run-10"): [9.0, 6.0], ("alone", "run-10"): [3.0, 4.0]}

    def measured(way, run):
        found = seconds.get((way, run.name), [50.0])
        large = run.name == "run-100"
        peak = (1000 if way == "whole" else 2000) if large else 100
        weights = 400e6 if large else 40e6
        return {"seconds": found.pop(0), "processors": 2.0 if way == "whole" else 1.0, "peak": peak * 1e6} | {
            "weights": weights
        }

    monkeypatch.setattr(export, "measure", measured)
    monkeypatch.setattr(export, "write_run", lambda *_: None)
    export.main(["2"])
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["time ratio"] == 2
    assert figures["processor time ratio"] == 2
    assert figures["memory ratio"] == 2.5
    assert figures["memory ratio of torch.onnx.export alone"] == pytest.approx(1900 / 360, abs=1e-3)
    with pytest.raises(UsageError, match="number of repeats"):
        export.main(["0"])
