"""A model that lies on a card is exported like any other, and its bundle is served by ONNX Runtime's CUDA provider."""

import json

import numpy as np
import onnxruntime
import pytest
import torch

from fedclaw.compress.models import predict_logits
from fedclaw.errors import UsageError
from fedclaw.export.bundle import Request, export_bundle
from fedclaw.export.predictor import Predictor
from fedclaw.export.source import load_source
from fedclaw.identity.provisioning import initialise
from fedclaw.learning.registry import WORKLOADS, lent, workload_class
from fedclaw.protocol.terms import ModelSpec
from fedclaw.server.run_directory import RunDirectory, SiteReceipt
from tests.samples import receipt, run_record

CUDA = "CUDAExecutionProvider"
pytestmark = pytest.mark.slow
IMAGES = {"shape": [1, 8, 8], "labels": ["zero", "one", "two"], "mean": [0.5], "std": [0.25]}


@pytest.fixture(scope="module")
def exported(device, tmp_path_factory):
    """A bundle of a workload that builds its models on the device, its inputs, and the model's own probabilities."""
    root, kind = tmp_path_factory.mktemp("exported"), workload_class("vision")

    class There(kind):
        def build(self, spec):
            return super().build(spec).to(device)

    with lent({(WORKLOADS, "vision"): There}):
        from fedclaw.learning.registry import schema_class

        schema = schema_class("vision").parse(json.dumps(IMAGES), "test schema")
        spec = ModelSpec(name="cnn", args={"channels": [4, 8]})
        record = run_record(
            run="there", federation="clinic", workload="vision", schema_text=schema.to_json(), model=spec
        )
        directory = RunDirectory.create(root / "run", record)
        torch.manual_seed(0)
        model = There(schema).build(spec)
        assert {parameter.device.type for parameter in model.parameters()} == {device.type}
        directory.write_model({name: value.detach().cpu().numpy() for name, value in model.named_parameters()})
        directory.append_metrics(record.rounds, {"metrics": {"accuracy": 0.5}, "test_examples": 40})
        directory.write_receipts({"north": SiteReceipt(examples=120, receipt=receipt())})
        home = initialise(root / "coordinator", "clinic", "127.0.0.1:9443")
        bundle = root / "bundle"
        export_bundle(load_source(directory), home.signer(), bundle, Request())
    inputs = schema.synthetic_inputs(40, np.random.default_rng(0))
    expected = torch.softmax(predict_logits(model, torch.from_numpy(inputs).to(device)), 1).cpu().numpy()
    return bundle, inputs, expected


def test_a_model_on_a_card_is_exported(exported):
    bundle, inputs, expected = exported
    assert Predictor.open(bundle).predict(inputs) == pytest.approx(expected, abs=2e-3)


def test_the_cuda_provider_answers_like_the_cpu(exported, wanted):
    """Where it is installed; `cuda` is refused where it is not, and `auto` is the CPU then."""
    bundle, inputs, _ = exported
    expected = Predictor.open(bundle).predict(inputs)
    assert Predictor.open(bundle, device="auto").predict(inputs) == pytest.approx(expected, abs=1e-5)
    if CUDA in onnxruntime.get_available_providers() and wanted == "cuda":
        predictor = Predictor.open(bundle, device="cuda")
        assert predictor._session.get_providers()[0] == CUDA
        assert predictor.predict(inputs) == pytest.approx(expected, abs=1e-5)
    else:
        with pytest.raises(UsageError, match="CUDA provider"):
            Predictor.open(bundle, device="cuda")
