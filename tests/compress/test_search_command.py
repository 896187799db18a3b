"""python -m fedclaw.compress … search, with the files that an export would write, run in ONNX Runtime."""

import json

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from fedclaw import encryption
from fedclaw.compress.__main__ import main
from fedclaw.compress.record import read_compressed
from fedclaw.compress.search_record import CANDIDATES, DIRECTORY, PLOT, RESULT, SearchResult
from fedclaw.errors import CompressionError, FedClawError, UsageError
from fedclaw.export import quantise
from fedclaw.export.quantise import OnnxForms
from fedclaw.server.run_directory import RunDirectory


@pytest.fixture
def run(make_run, trained):
    return make_run(*trained)


def searching(run, *more):
    quick = ["recovery.steps=200", "recovery.learning_rate=0.01", "controls=false", "latency_repeats=1"]
    main([f"run={run.root}", "search", "search.fractions=[0.5]", "search.modes=[proxy]", *quick, *more])


def test_the_command_prints_the_front_and_writes_the_smallest(run, digits, capsys):
    searching(run, f"inputs={digits.public}", "search.loss=0.1", "search.precisions=[float32,int8]")
    out = capsys.readouterr().out
    result = SearchResult.model_validate_json((run.root / DIRECTORY / RESULT).read_bytes())
    assert [point.form.precision for point in result.points] == ["float32", "int8"]
    sizes = [point.form.file_bytes for point in result.points]
    assert sizes[0] > sizes[1]
    assert result.chosen.form.file_bytes == min(sizes)
    assert all(set(point.form.latency_ms) == {"1", "32"} for point in result.points)
    assert "the Pareto front" in out
    assert f"{result.chosen.form.file_bytes:,}" in out
    assert f"Chosen: fraction 0.5, proxy, {result.chosen.form.precision}" in out
    assert (run.root / DIRECTORY / PLOT).read_bytes().startswith(b"\x89PNG")
    record, _ = read_compressed(run)
    assert record.search.precision == result.chosen.form.precision
    with pytest.raises(UsageError, match="already holds a result; pass overwrite=true"):
        searching(run, f"inputs={digits.public}", "search.loss=0.1")


def test_without_a_candidate_within_the_loss_the_front_is_printed_all_the_same(run, digits, capsys):
    with pytest.raises(CompressionError, match=r"no candidate is within search\.loss=0\.0001"):
        searching(
            run,
            f"inputs={digits.public}",
            "search.fractions=[0.05]",
            "search.modes=[none]",
            "search.loss=0.0001",
            "search.precisions=[float32]",
        )
    out = capsys.readouterr().out
    assert "the Pareto front" in out
    assert "Chosen: fraction" not in out
    assert "Chosen by" not in out
    assert not run.compressed.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["search", "now"], "unknown command 'search now'; there is search"),
        (["search", "search.loss=2"], "search.loss: Input should be less than 1"),
        (["search", "search.fractions=[1.5]"], "search.fractions.0: Input should be less than 1"),
        (["search", "search.modes=[magic]"], "search.modes.0.0: Input should be"),
        (["search", "search.selection=/no/such.csv"], "search.selection=/no/such.csv: no such file or directory"),
        (["search", "search.precisions=[int4]"], "search.precisions.0: Input should be"),
        (["search", "search.modes=5"], "search.modes: Input should be a valid tuple"),
        (["search", "search.modes=[[]]"], "mode=[] names no recovery"),
        (["search", "search.modes=[[none,proxy]]"], "mode=none is no recovery at all, and stands alone"),
        (["search", "search.modes=[[proxy,proxy]]"], "names one kind of recovery twice"),
        (["search", "pruning.multiply_adds=0.5"], "pruning.multiply_adds= is the target of one compression"),
        (["search", "search.modes=[federated]"], "search.modes names federated, which needs federation=DIR"),
    ],
)
def test_one_line_for_a_mistake(run, arguments, message):
    with pytest.raises(FedClawError) as caught:
        main([f"run={run.root}", *arguments])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (run.root / DIRECTORY).exists()


# The forms


def test_forms_are_the_files_of_an_export(trained):
    workload, model = trained
    runtime = OnnxForms(workload.schema, 0)
    files = runtime.forms(model, ("float32", "int8", "float16"))
    inputs = workload.schema.synthetic_inputs(300, np.random.default_rng(5))
    with torch.no_grad():
        expected = model(torch.from_numpy(inputs)).numpy()
    np.testing.assert_allclose(runtime.outputs(files["float32"], inputs), expected, atol=1e-4)
    for precision in ("int8", "float16"):
        given = runtime.outputs(files[precision], inputs)
        assert 0.9 < (given.argmax(1) == expected.argmax(1)).mean() <= 1
        assert not np.array_equal(given, expected)
    operators = {node.op_type for node in onnx.load_model_from_string(files["int8"]).graph.node}
    assert {"QuantizeLinear", "DequantizeLinear"} <= operators
    assert list(runtime.forms(model, ("float32",))) == ["float32"]
    assert runtime.calibration.origin == "synthetic"


def test_a_model_that_float16_cannot_hold_has_no_such_form(trained):
    workload, _ = trained
    large = nn.Linear(64, 10)
    with torch.no_grad():
        large.weight.fill_(1e5)
    files = OnnxForms(workload.schema, 0).forms(large, ("float32", "float16"))
    assert list(files) == ["float32"]


def test_models_of_an_encrypted_run_are_in_memory_alone(run, digits, tmp_path, monkeypatch):
    key = f"file:{tmp_path / 'key'}"
    encryption.main(["new-key", f"key={key}"])
    encryption.main(["seal", str(run.root), f"key={key}"])
    places, real = [], quantise.save_onnx

    def seen(program, task, shape, path):
        places.append(path)
        return real(program, task, shape, path)

    monkeypatch.setattr(quantise, "save_onnx", seen)
    searching(run, f"inputs={digits.public}", "search.loss=0.1", f"encryption.key={key}", "search.precisions=[float32]")
    assert places
    assert all(path.is_relative_to("/dev/shm") for path in places)
    assert not any(path.parent.exists() for path in places)
    kept = RunDirectory.open(run.root)
    assert not kept.compressed.joinpath("model.npz").read_bytes().startswith(b"PK")
    figures = [json.loads(line) for line in (run.root / DIRECTORY / CANDIDATES).read_text().splitlines()]
    assert [candidate["fraction"] for candidate in figures] == [0.5]
