"""Layouts for standard servers, each loaded by the real thing; and the same answers from all of them."""

import csv
import hashlib
import importlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import yaml
from torch import nn

import fedclaw.layouts as layouts_command
from fedclaw import startup
from fedclaw.api.module import OWN, around
from fedclaw.errors import BundleError, FedClawError, UsageError
from fedclaw.export.bundle import Request, export_bundle
from fedclaw.export.check import Trust
from fedclaw.export.layouts.base import Deployable, laid_out
from fedclaw.export.layouts.kserve import inference_service
from fedclaw.export.layouts.triton import model_config
from fedclaw.export.predictor import Predictor
from fedclaw.export.source import load_source
from fedclaw.learning.registry import WORKLOADS, lent
from fedclaw.protocol.terms import ModelSpec

ROWS = [
    ["61", "yes", "surgery"],
    ["44.5", "no", "medicine"],
    ["", "", ""],
    ["NA", "yes", "medicine"],
    ["0", "no", "?"],
    ["33", "no", "cellar"],
    ["120", "true", "surgery"],
]
REFUSED = 5
"""The row whose ward is none that there is."""


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["age", "smoker", "ward"], *ROWS])
    return path


@pytest.fixture
def trust(home):
    return Trust(authority=home.signer().ca_pem)


@pytest.fixture
def lay_out(home, tmp_path, monkeypatch):
    """lay_out(server, bundle, **settings) -> the directory that the command wrote."""

    def go(server, bundle, **settings):
        target = tmp_path / server
        given = [f"{name}={value}" for name, value in ({"ca": home.root / "ca.crt"} | settings).items()]
        layouts_command.main([server, str(bundle), f"output={target}", *given])
        return target

    return go


def answers_of(bundle, trust, rows):
    """By our predictor: probabilities (N, C), NaN for a refused row."""
    predictor = Predictor.open(bundle, trust)
    read = predictor.read_rows(rows)
    answers = np.full((len(read.inputs), len(predictor.labels)), np.nan, np.float32)
    answers[read.answered] = predictor.predict(read.inputs[read.answered])
    return predictor, read, answers


def same(found, expected):
    np.testing.assert_allclose(found, expected, atol=1e-5, equal_nan=True)


def test_the_same_rows_have_the_same_answers_everywhere(table_bundle, trust, rows, lay_out):
    """Our predictor, ONNX Runtime from typed columns, MLflow, and OpenVINO from prepared inputs."""
    predictor, read, expected = answers_of(table_bundle, trust, rows)
    assert list(read.refused) == [REFUSED]
    assert np.isfinite(np.delete(expected, REFUSED, axis=0)).all()
    typed = predictor.read_columns(rows)
    repository = lay_out("triton", table_bundle)
    (model,) = repository.glob("*/1/model.onnx")
    session = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    label, probabilities, refused = session.run(["label", "probabilities", "refused"], dict(typed.columns))
    same(probabilities, expected)
    assert refused[:, 0].tolist() == [row == REFUSED for row in range(len(ROWS))]
    names = [predictor.labels[place] for place in np.delete(expected, REFUSED, axis=0).argmax(1)]
    assert np.delete(label[:, 0], REFUSED).tolist() == names

    openvino = pytest.importorskip("fedclaw.export.layouts.openvino").import_openvino()
    (graph,) = lay_out("openvino", table_bundle).glob("*/1/model.xml")
    compiled = openvino.Core().compile_model(str(graph), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    given = compiled({"inputs": read.inputs[read.answered]})["probabilities"]
    same(given, expected[read.answered])

    mlflow, pandas = pytest.importorskip("mlflow"), pytest.importorskip("pandas")
    directory = lay_out("mlflow", table_bundle)
    frame = pandas.DataFrame({name: values[:, 0] for name, values in typed.columns.items()})
    found = mlflow.pyfunc.load_model(str(directory)).predict(frame)
    same(found[[f"probability of {name}" for name in predictor.labels]].to_numpy(), expected)
    assert found["refused"].tolist() == [row == REFUSED for row in range(len(ROWS))]
    assert np.delete(found["label"].to_numpy(), REFUSED).tolist() == names


@pytest.mark.parametrize("graph", ["pipeline.onnx", "model.onnx"])
@pytest.mark.parametrize("kind", ["table", "images"])
def test_triton_reads_the_configuration_and_it_is_of_this_graph(kind, graph, table_bundle, image_bundle, lay_out):
    config_pb2 = pytest.importorskip("tritonclient.grpc.model_config_pb2")
    from google.protobuf import text_format

    repository = lay_out("triton", table_bundle if kind == "table" else image_bundle, graph=graph, name="heart")
    config = text_format.Parse((repository / "heart" / "config.pbtxt").read_text(), config_pb2.ModelConfig())
    assert (config.name, config.backend) == ("heart", "onnxruntime")
    assert config.max_batch_size > 1
    session = onnxruntime.InferenceSession(str(repository / "heart" / "1" / "model.onnx"))
    types = {"tensor(float)": "FP32", "tensor(double)": "FP64", "tensor(string)": "STRING", "tensor(uint8)": "UINT8"}
    types["tensor(bool)"] = "BOOL"
    for told, there in ((config.input, session.get_inputs()), (config.output, session.get_outputs())):
        assert [item.name for item in told] == [item.name for item in there]
        for item, real in zip(told, there, strict=True):
            assert config_pb2.DataType.Name(item.data_type) == f"TYPE_{types[real.type]}"
            assert list(item.dims) == [size if isinstance(size, int) else -1 for size in real.shape[1:]]


@pytest.fixture(scope="module")
def hostile_bundle(samples, home, tmp_path_factory):
    """A column and a label of hostile names."""
    table = {
        "columns": [
            {"name": "age: {x}", "kind": "numeric", "center": 50, "scale": 20},
            {"name": 'ward" } input { name: "x', "kind": "categorical", "levels": ["a", "b"]},
        ],
        "target": {"name": "outcome", "labels": ["../../etc", "'; drop: {y}"]},
    }
    root = tmp_path_factory.mktemp("hostile") / "run"
    run = samples.make_run(root, "tabular", table, ModelSpec(name="mlp", args={"hidden": [4]}))
    target = root / "bundle"
    export_bundle(load_source(run), home.signer(), target, Request())
    return target


def test_names_stay_names(hostile_bundle, trust, lay_out):
    config_pb2 = pytest.importorskip("tritonclient.grpc.model_config_pb2")
    from google.protobuf import text_format

    deployable = Deployable.open(hostile_bundle, trust)
    config = text_format.Parse(model_config(deployable), config_pb2.ModelConfig())
    assert [item.name for item in config.input] == ["age: {x}", 'ward" } input { name: "x']
    with pytest.raises(UsageError, match="name="):
        Deployable.open(hostile_bundle, trust, name="../../up")
    mlflow, pandas = pytest.importorskip("mlflow"), pytest.importorskip("pandas")
    frame = pandas.DataFrame({"age: {x}": [50.0, np.nan], 'ward" } input { name: "x': ["a", "b"]})
    found = mlflow.pyfunc.load_model(str(lay_out("mlflow", hostile_bundle))).predict(frame)
    assert set(found["label"]) <= {"../../etc", "'; drop: {y}"}


def test_the_model_is_the_one_that_was_signed(table_bundle, lay_out, tmp_path):
    repository = lay_out("triton", table_bundle, name="heart") / "heart"
    told = json.loads((repository / "provenance.json").read_text())
    digests = dict(
        reversed(line.split("  ")) for line in (repository / "signed" / "SHA256SUMS").read_text().splitlines()
    )
    model = (repository / "1" / "model.onnx").read_bytes()
    assert told["graph_sha256"] == digests[told["graph"]] == hashlib.sha256(model).hexdigest()
    assert model == (table_bundle / "pipeline.onnx").read_bytes()
    for name in digests:
        if not name.endswith((".onnx", ".pt2")):
            assert (repository / "signed" / name).read_bytes() == (table_bundle / name).read_bytes()
    assert (repository / "signed" / "model.sig").is_file()


def test_a_bundle_that_was_changed_is_not_laid_out(bundle, lay_out, tmp_path):
    content = bytearray((bundle / "pipeline.onnx").read_bytes())
    content[len(content) // 2] ^= 1
    (bundle / "pipeline.onnx").write_bytes(content)
    with pytest.raises(BundleError, match="pipeline"):
        lay_out("triton", bundle)
    assert not (tmp_path / "triton").exists()


def test_a_bundle_of_an_earlier_version_has_no_mlflow_layout_and_is_told_why(lay_out):
    earlier = Path(__file__).parents[1] / "past" / "8eca11f"
    with pytest.raises(BundleError, match="and the bundle has none: it is of an earlier version; export its run again"):
        lay_out("mlflow", earlier / "runs" / "local" / "bundle", ca=earlier / "federation" / "ca.crt")


def test_what_is_there_is_replaced_on_request_alone_and_only_by_a_layout(table_bundle, lay_out, tmp_path):
    first = lay_out("triton", table_bundle, name="one")
    with pytest.raises(BundleError, match="already exists"):
        lay_out("triton", table_bundle, name="two")
    assert (first / "one").is_dir()
    lay_out("triton", table_bundle, name="two", overwrite="true")
    assert sorted(path.name for path in first.iterdir()) == ["two"]
    (tmp_path / "kserve").mkdir()
    (tmp_path / "kserve" / "precious").touch()
    with pytest.raises(BundleError, match="left alone"):
        lay_out("kserve", table_bundle, overwrite="true", storage="s3://bucket/heart")
    assert [path.name for path in (tmp_path / "kserve").iterdir()] == ["precious"]


def test_mlflow_takes_an_array_of_numbers_as_one_tensor(samples, home, lay_out, tmp_path):
    mlflow = pytest.importorskip("mlflow")
    definition = {"input_shape": [5], "labels": ["benign", "malignant"]}
    with lent({(WORKLOADS, "arrays"): around(nn.Linear(5, 2), "arrays")}):
        source = load_source(samples.make_run(tmp_path / "run", "arrays", definition, ModelSpec(name=OWN)))
    export_bundle(source, home.signer(), tmp_path / "bundle", Request())
    inputs = np.random.default_rng(0).normal(size=(4, 5)).astype(np.float32)
    expected = Predictor.open(tmp_path / "bundle", Trust(authority=home.signer().ca_pem)).predict(inputs)
    found = mlflow.pyfunc.load_model(str(lay_out("mlflow", tmp_path / "bundle"))).predict(inputs)
    same(found["probabilities"], expected)


@pytest.mark.parametrize("server", ["mlflow", "openvino"])
def test_a_signal_while_a_layout_is_written_does_not_end_the_process_at_once(
    server, table_bundle, lay_out, monkeypatch, tmp_path
):
    """It would leave the half-written directory; where libraries are loaded there is none yet."""
    pytest.importorskip(server)
    monkeypatch.setattr(startup._command, "at_once", False)
    module = importlib.import_module(f"fedclaw.export.layouts.{'mlflow_model' if server == 'mlflow' else server}")

    def interrupted(*_):
        assert not startup._command.at_once
        raise startup.Stopped(2)

    monkeypatch.setattr(module, f"write_{server}", interrupted)
    with pytest.raises(startup.Stopped):
        lay_out(server, table_bundle)
    assert list(tmp_path.iterdir()) == []


def test_a_failure_leaves_nothing(tmp_path):
    def fail(kind):
        with laid_out(tmp_path / "there", overwrite=False) as directory:
            (directory / "half").touch()
            raise kind("broken")

    for kind in (BundleError, KeyboardInterrupt):
        with pytest.raises(kind):
            fail(kind)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trition", "{bundle}", "output={out}"], "triton|kserve|mlflow|openvino BUNDLE"),
        (["triton", "output={out}"], "triton|kserve|mlflow|openvino BUNDLE"),
        (["triton", "{bundle}"], "output=DIR is missing"),
        (["triton", "{bundle}", "output={out}", "storage=s3://x"], "storage= is for kserve"),
        (["kserve", "{bundle}", "output={out}"], "kserve needs storage=URI"),
        (["kserve", "{bundle}", "output={out}", "storage=heart"], "kserve needs storage=URI"),
        (["triton", "{bundle}", "output={out}", "alias=best"], "are for mlflow"),
        (["mlflow", "{bundle}", "output={out}", "register_as=heart"], "belong together"),
        (["mlflow", "{bundle}", "output={out}", "alias=best"], "alias= needs register_as=NAME"),
        (["mlflow", "{bundle}", "output={out}", "graph=model.onnx"], "takes typed columns"),
        (["openvino", "{bundle}", "output={out}", "graph=pipeline.onnx"], "no operators for text"),
    ],
)
def test_a_mistake_is_one_clear_error(words, message, table_bundle, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(FedClawError) as caught:
        layouts_command.main([word.format(bundle=table_bundle, out=out) for word in words])
    assert message in str(caught.value)
    assert not out.exists()


INFERENCE_SERVICE = {
    "type": "object",
    "additionalProperties": False,
    "required": ["apiVersion", "kind", "metadata", "spec"],
    "properties": {
        "apiVersion": {"const": "serving.kserve.io/v1beta1"},
        "kind": {"const": "InferenceService"},
        "metadata": {
            "type": "object",
            "required": ["name"],
            "properties": {
                "name": {"type": "string", "pattern": "^[a-z]([-a-z0-9]*[a-z0-9])?$", "maxLength": 63},
                "annotations": {"type": "object", "additionalProperties": {"type": "string"}},
            },
        },
        "spec": {
            "type": "object",
            "additionalProperties": False,
            "required": ["predictor"],
            "properties": {
                "predictor": {
                    "type": "object",
                    "required": ["model"],
                    "properties": {
                        "automountServiceAccountToken": {"type": "boolean"},
                        "securityContext": {"type": "object"},
                        "model": {
                            "type": "object",
                            "additionalProperties": False,
                            "required": ["modelFormat"],
                            "properties": {
                                "modelFormat": {
                                    "type": "object",
                                    "required": ["name"],
                                    "additionalProperties": False,
                                    "properties": {"name": {"type": "string"}, "version": {"type": "string"}},
                                },
                                "protocolVersion": {"enum": ["v1", "v2", "grpc-v1", "grpc-v2"]},
                                "storageUri": {"type": "string"},
                                "runtime": {"type": "string"},
                                "runtimeVersion": {"type": "string"},
                                "resources": {"type": "object"},
                                "securityContext": {"type": "object"},
                                "env": {"type": "array"},
                                "args": {"type": "array"},
                            },
                        },
                    },
                }
            },
        },
    },
}
"""The documented fields of serving.kserve.io/v1beta1 that are used; what is a pod's is checked by Kubernetes' own."""


def test_the_inference_service_has_its_form_and_kubernetes_takes_its_parts(
    hostile_bundle, table_bundle, trust, lay_out
):
    jsonschema = pytest.importorskip("jsonschema")
    validate = pytest.importorskip("kubernetes_validate")
    directory = lay_out("kserve", table_bundle, storage="s3://bucket/heart")
    written = yaml.safe_load((directory / "inferenceservice.yaml").read_text())
    assert written["spec"]["predictor"]["model"]["storageUri"] == "s3://bucket/heart"
    assert (directory / "repository").is_dir()
    for name in (None, "9.Heart_Of.Gold-", "A" * 63):
        service = inference_service(Deployable.open(table_bundle, trust, name=name), "s3://bucket/heart")
        jsonschema.validate(service, INFERENCE_SERVICE)
    predictor = written["spec"]["predictor"]
    container = {key: predictor["model"][key] for key in ("resources", "securityContext")}
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": written["metadata"],
        "spec": {
            "securityContext": predictor["securityContext"],
            "automountServiceAccountToken": predictor["automountServiceAccountToken"],
            "containers": [{"name": "model", "image": "x", **container}],
        },
    }
    validate.validate(pod, "1.30", strict=True)
    pod["spec"]["containers"][0]["securityContext"]["allowPrivilegeEscalation"] = "no"
    with pytest.raises(validate.ValidationError):
        validate.validate(pod, "1.30", strict=True)


def test_mlflow_registers_versions_and_moves_the_alias(table_bundle, lay_out, tmp_path, capsys):
    mlflow = pytest.importorskip("mlflow")
    registry = f"sqlite:///{tmp_path / 'mlflow.db'}"
    how = {"register_as": "heart", "alias": "champion", "registry": registry}
    lay_out("mlflow", table_bundle, **how)
    lay_out("mlflow", table_bundle, overwrite="true", **how)
    assert "heart, version 2, alias champion" in capsys.readouterr().out
    client = mlflow.MlflowClient(tracking_uri=registry, registry_uri=registry)
    assert client.get_model_version_by_alias("heart", "champion").version == 2
    assert client.get_model_version("heart", "1").tags["run"] == "table"


@pytest.mark.parametrize(
    ("registry", "message"),
    [
        ("foo://me:SECRET@host", "registry at foo://...@host refuses"),
        ("postgresql://me:SECRET@127.0.0.1:1/db", "registry=postgresql://...@127.0.0.1:1/db cannot be reached"),
        ("http://me:SECRET@127.0.0.1:1/", "registry=http://...@127.0.0.1:1/ cannot be reached"),
        ("oracle+nothing://me:SECRET@127.0.0.1/db", "registry at oracle+nothing://...@127.0.0.1/db refuses"),
    ],
)
def test_a_registry_that_fails_is_one_error_without_its_password(registry, message, table_bundle, lay_out):
    pytest.importorskip("mlflow")
    with pytest.raises(FedClawError) as caught:
        lay_out("mlflow", table_bundle, register_as="heart", registry=registry)
    told = str(caught.value)
    assert message in told
    assert "SECRET" not in told
    assert "\n" not in told


def test_a_registered_name_may_hold_a_quote(table_bundle, lay_out, tmp_path):
    mlflow = pytest.importorskip("mlflow")
    registry = f"sqlite:///{tmp_path / 'mlflow.db'}"
    lay_out("mlflow", table_bundle, register_as='"king\'s"', registry=registry)
    assert mlflow.MlflowClient(tracking_uri=registry, registry_uri=registry).get_model_version("king's", "1")


def test_mlflow_says_nothing_of_its_own_while_a_layout_is_written(table_bundle, lay_out, recwarn):
    pytest.importorskip("mlflow")
    lay_out("mlflow", table_bundle)
    assert [str(item.message) for item in recwarn if item.category is UserWarning] == []


def test_what_a_data_frame_may_hold_is_answered_as_the_reader_answers_it(table_bundle, lay_out):
    mlflow, pandas = pytest.importorskip("mlflow"), pytest.importorskip("pandas")
    model = mlflow.pyfunc.load_model(str(lay_out("mlflow", table_bundle)))

    def asked(smoker, ward=("surgery", "medicine")):
        frame = pandas.DataFrame({"age": [61.0, 44.0]}).assign(smoker=smoker, ward=ward)
        return model.predict(frame)["probability of benign"].tolist()

    expected = asked(["yes", ""])
    for same_cells in (
        pandas.array(["yes", pandas.NA], "string"),
        pandas.Series([True, None], dtype=object),
        pandas.Series([" YES\t", np.nan], dtype=object),
        pandas.Series([1, None], dtype=object),
    ):
        assert asked(same_cells) == expected
    assert asked(["yes", ""], ["surgery ", " medicine"]) == expected
    moments = pandas.Series([pandas.Timestamp("2024-01-31"), None], dtype=object)
    with pytest.raises(TypeError, match="'smoker' takes text, and holds a Timestamp"):
        asked(moments)


def test_the_mlflow_model_holds_no_pickle_and_nothing_of_this_machine(table_bundle, lay_out):
    directory = lay_out("mlflow", table_bundle)
    names = {path.name for path in directory.rglob("*")}
    assert not [name for name in names if name.endswith((".pkl", ".pickle", ".cloudpickle"))]
    for path in directory.rglob("*"):
        if path.is_file() and path.suffix not in (".onnx", ".pyc"):
            for ours in (directory.parent, Path(layouts_command.__file__).parent, Path.home(), sys.prefix):
                assert f"{ours}/" not in path.read_text(errors="replace"), path


def test_openvino_reports_to_nobody(table_bundle, home, tmp_path):
    pytest.importorskip("openvino")
    ours, out = tmp_path / "home", tmp_path / "out"
    ours.mkdir()
    line = [sys.executable, "-m", "fedclaw.layouts", "openvino", str(table_bundle), f"output={out}"]
    done = subprocess.run(
        line, env={**os.environ, "HOME": str(ours)}, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert [path for path in ours.rglob("*") if "intel" in str(path).lower() or "openvino" in str(path).lower()] == []


PLAIN = """
import json, sys
import numpy, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1])
given = json.load(sys.stdin)
kinds = {"tensor(float)": numpy.float32, "tensor(string)": object}
columns = {i.name: numpy.array(given[i.name], kinds[i.type]).reshape(-1, 1) for i in session.get_inputs()}
label, probabilities = session.run(["label", "probabilities"], columns)
print(json.dumps({"label": label.tolist(), "probabilities": probabilities.tolist()}))
assert "fedclaw" not in sys.modules
"""


def columns_as_json(predictor, rows):
    return json.dumps({name: values[:, 0].tolist() for name, values in predictor.read_columns(rows).columns.items()})


def test_plain_onnx_runtime_needs_nothing_of_ours(table_bundle, trust, rows):
    predictor, _, expected = answers_of(table_bundle, trust, rows)
    done = subprocess.run(
        [sys.executable, "-I", "-c", PLAIN, str(table_bundle / "pipeline.onnx")],
        input=columns_as_json(predictor, rows),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    same(np.array(json.loads(done.stdout)["probabilities"], np.float32), expected)


NODE = """
const ort = require('onnxruntime-node');
const columns = JSON.parse(require('fs').readFileSync(0, 'utf8'));
(async () => {
  const session = await ort.InferenceSession.create(process.argv[2]);
  const feeds = {};
  for (const [name, [kind, values]] of Object.entries(columns)) {
    const data = kind === 'string' ? values : Float32Array.from(values, Number);
    feeds[name] = new ort.Tensor(kind, data, [values.length, 1]);
  }
  const answers = await session.run(feeds);
  console.log(JSON.stringify({
    label: Array.from(answers.label.data), probabilities: Array.from(answers.probabilities.data, String),
  }));
})();
"""


@pytest.fixture(scope="module")
def node_modules(tmp_path_factory):
    """Where onnxruntime-node is; installed for the test where that can be."""
    if shutil.which("node") is None:
        pytest.skip("node is not installed")
    named = os.environ.get("NODE_PATH")
    if named and (Path(named) / "onnxruntime-node").is_dir():
        return named
    if shutil.which("npm") is None:
        pytest.skip("npm is not installed, and NODE_PATH names no onnxruntime-node")
    root = tmp_path_factory.mktemp("node")
    # Its install script fetches CUDA's files, which nobody needs here.
    line = ["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", "--prefix", str(root), "onnxruntime-node"]
    done = subprocess.run(line, capture_output=True, timeout=200, check=False)
    if done.returncode:
        pytest.skip("npm could not install onnxruntime-node")
    return str(root / "node_modules")


@pytest.mark.slow
def test_node_gives_the_same_answers(table_bundle, trust, rows, node_modules, tmp_path):
    predictor, _, expected = answers_of(table_bundle, trust, rows)
    script = tmp_path / "predict.js"
    script.write_text(NODE)
    columns = predictor.read_columns(rows).columns
    kinds = {True: "string", False: "float32"}
    # JSON has neither NaN nor infinity, and JavaScript reads both from text.
    words = {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}
    given = {
        name: (kinds[values.dtype == object], [words.get(str(value), str(value)) for value in values[:, 0]])
        for name, values in columns.items()
    }
    done = subprocess.run(
        ["node", str(script), str(table_bundle / "pipeline.onnx")],
        input=json.dumps(given),
        env={**os.environ, "NODE_PATH": node_modules},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)["probabilities"]
    found = np.array(told, np.float32).reshape(expected.shape)
    same(found, expected)


@pytest.mark.slow
def test_mlflow_serves_it(table_bundle, trust, rows, lay_out, tmp_path):
    pytest.importorskip("mlflow")
    predictor, _, expected = answers_of(table_bundle, trust, rows)
    directory = lay_out("mlflow", table_bundle)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    line = [sys.executable, "-m", "mlflow", "models", "serve", "--env-manager", "local", "--host", "127.0.0.1"]
    with (tmp_path / "server.log").open("w") as log:
        server = subprocess.Popen(
            [*line, "--port", str(port), "--model-uri", str(directory)],
            env={
                **os.environ,
                "MLFLOW_DISABLE_TELEMETRY": "true",
                "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
            },
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        columns = predictor.read_columns(rows).columns
        records = [
            {name: None if values[row, 0] != values[row, 0] else values[row, 0] for name, values in columns.items()}
            for row in range(len(ROWS))
        ]
        body = json.dumps({"dataframe_records": records}, default=float).encode()
        told = _asked(f"http://127.0.0.1:{port}/invocations", body, server)
    finally:
        os.killpg(server.pid, 15)
        server.wait(20)
    names = [f"probability of {name}" for name in predictor.labels]
    found = np.array([[np.nan if answer[name] is None else answer[name] for name in names] for answer in told])
    same(found, expected)


def _asked(url, body, server):
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    for _ in range(240):
        assert server.poll() is None, "the server ended"
        try:
            with urllib.request.urlopen(request, timeout=30) as reply:
                return json.loads(reply.read())["predictions"]
        except (ConnectionError, urllib.error.URLError):
            time.sleep(0.5)
    raise AssertionError("the server did not answer")
