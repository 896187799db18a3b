"""The benchmark on nets small enough for a test: what it compares, and how it reports."""

import json

import pytest
import torch
from torch import nn

from experiments.benchmarks import latency
from experiments.benchmarks.latency import FRACTION, LATENCY_BATCHES, Case, cases, count, main
from fedclaw.clients.tabular import Mlp
from fedclaw.errors import UsageError

FORMS = [f"{which} {precision}" for which in ("whole", "pruned") for precision in ("float32", "int8", "float16")]


def test_the_nets_have_about_ten_million_parameters():
    found = cases()
    assert {name: abs(count(case.model) - 10_000_000) < 200_000 for name, case in found.items()} == {
        "mlp": True,
        "cnn": True,
    }
    for case in found.values():
        assert case.model(torch.zeros(1, *case.shape)).shape == (1, 10)


def test_every_form_of_both_models_is_timed_by_the_whole_one(monkeypatch, capsys):
    torch.manual_seed(0)
    small = Case(Mlp(20, (256, 256), 10).eval(), (20,))
    monkeypatch.setattr(latency, "cases", lambda: {"mlp": small})
    timed = []

    def milliseconds(files, inputs, rounds):
        timed.append({name: len(content) for name, content in files.items()})
        assert rounds == 3
        return {size: {name: 8.0 if name == "whole float32" else 2.0 for name in files} for size in LATENCY_BATCHES}

    monkeypatch.setattr(latency, "measure", milliseconds)
    main(["3"])
    output = capsys.readouterr().out
    figures = json.loads(output.splitlines()[-1])
    (sizes,) = timed
    assert list(sizes) == FORMS
    assert figures["mlp pruned parameters"] <= FRACTION * figures["mlp parameters"]
    assert sizes["pruned int8"] < sizes["pruned float16"] < sizes["pruned float32"] < 0.2 * sizes["whole float32"]
    assert figures["mlp pruned float32 times faster"] == {"1": 4.0, "32": 4.0}
    assert figures["least times faster"] == 4.0
    assert "reach: 3" in output


def test_the_files_are_run_and_timed_at_both_batch_sizes(tmp_path):
    torch.manual_seed(0)
    inputs = torch.randn(32, 6).numpy()
    files = latency.write_forms(
        nn.Sequential(nn.Linear(6, 64), nn.ReLU(), nn.Linear(64, 10)), (6,), inputs, tmp_path / "a"
    )
    found = latency.measure(files, inputs, 2)
    assert set(found) == {1, 32}
    assert all(set(took) == set(files) and min(took.values()) > 0 for took in found.values())


def test_no_rounds_are_refused():
    with pytest.raises(UsageError, match="number of rounds"):
        main(["0"])
