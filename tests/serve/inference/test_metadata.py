"""What a node and its models say of themselves."""

import pytest

from fedclaw import __version__
from fedclaw.serve.inference.metadata import model_metadata, not_supported, server_metadata
from tests.serve.inference.descriptions import IMAGES, TABLE, describe


def test_the_server_declares_its_extensions() -> None:
    assert server_metadata() == {
        "name": "fedclaw",
        "version": __version__,
        "extensions": ["binary_tensor_data", "null_data"],
    }


def test_a_model_of_a_table_has_an_input_a_column() -> None:
    found = model_metadata(describe("tabular", TABLE))
    assert found["name"] == "m"
    assert found["versions"] == ["0123456789ab"]
    assert found["inputs"] == [
        {"name": "age", "datatype": "FP32", "shape": [-1, 1]},
        {"name": "year", "datatype": "FP64", "shape": [-1, 1]},
        {"name": "smoker", "datatype": "BYTES", "shape": [-1, 1]},
        {"name": "ward", "datatype": "BYTES", "shape": [-1, 1]},
    ]
    assert found["outputs"] == [
        {"name": "label", "datatype": "BYTES", "shape": [-1, 1]},
        {"name": "probabilities", "datatype": "FP32", "shape": [-1, 2]},
        {"name": "refused", "datatype": "BOOL", "shape": [-1, 1]},
    ]


def test_a_model_of_images_takes_pixels() -> None:
    assert model_metadata(describe("vision", IMAGES))["inputs"] == [
        {"name": "images", "datatype": "UINT8", "shape": [-1, 8, 8, 1]}
    ]


@pytest.mark.parametrize(
    "path",
    [
        "/v2/repository/index",
        "/v2/repository/models/m/load",
        "/v2/repository/models/m/unload",
        "/v2/models/stats",
        "/v2/models/m/stats",
        "/v2/models/m/versions/1/stats",
        "/v2/systemsharedmemory/status",
        "/v2/systemsharedmemory/region/a/register",
        "/v2/cudasharedmemory/unregister",
        "/v2/trace/setting",
        "/v2/models/m/trace/setting",
        "/v2/logging",
        "/v2/models/m/config",
        "/v2/models/m/generate",
        "/v2/models/m/versions/1/generate_stream",
    ],
)
def test_calls_that_there_are_not_are_named(path: str) -> None:
    refusal = not_supported(path)
    assert refusal is not None
    assert refusal.status == 501
    assert "not supported" in str(refusal)


@pytest.mark.parametrize(
    "path", ["/v2", "/v2/models/m", "/v2/models/m/infer", "/v2/models/stats/infer", "/predict", "/v2/repositoryx"]
)
def test_other_paths_are_none_of_its_business(path: str) -> None:
    assert not_supported(path) is None
