"""The OpenAPI document: valid, and its examples are answered."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from openapi_spec_validator import OpenAPIV31SpecValidator

from fedclaw.serve.inference.description import ModelDescription
from fedclaw.serve.inference.openapi import openapi_document
from fedclaw.serve.inference.rest import Asker, RequestReader
from fedclaw.serve.inference.tables import SentTable, predict_table
from fedclaw.serve.requests import Caller
from tests.serve.inference.descriptions import IMAGES, TABLE, describe
from tests.serve.inference.small_node import PEOPLE, TOKEN, SmallNode

ALICE = PEOPLE[TOKEN.encode()]
NUMBER = {**TABLE, "target": {"name": "dose", "kind": "numeric", "range": [0, 40]}, "unseen": "other"}
LARGE = {**IMAGES, "shape": [3, 64, 64], "mean": None, "std": None}


def content(document: Any, path: str, kind: str = "application/json") -> Any:
    return document["paths"][path]["post"]["requestBody"]["content"][kind]


def test_a_node_without_models_has_a_document() -> None:
    document = openapi_document([])
    OpenAPIV31SpecValidator(document).validate()
    assert not any("predict" in path for path in document["paths"])


@pytest.mark.parametrize(
    "model",
    [describe("tabular", TABLE), describe("tabular", NUMBER), describe("vision", IMAGES), describe("vision", LARGE)],
)
def test_the_document_is_valid_and_its_examples_are_as_it_says(model: ModelDescription) -> None:
    document = json.loads(json.dumps(openapi_document([model])))
    OpenAPIV31SpecValidator(document).validate()
    tensors = content(document, "/v2/models/m/infer")
    if model.schema.input_shape == (3, 64, 64):
        assert "example" not in tensors
        return
    Draft202012Validator(tensors["schema"]).validate(tensors["example"])
    asked, _ = RequestReader(model).read(json.dumps(tensors["example"]).encode(), None, Asker("alice"))
    assert not model.schema.preprocessing().prepare(asked.columns)[1].any()
    if model.schema.modality == "table":
        rows = content(document, "/predict/m")
        Draft202012Validator(rows["schema"]).validate(rows["example"])


def test_columns_have_their_levels_and_ranges() -> None:
    document = openapi_document([describe("tabular", TABLE)])
    row = content(document, "/predict/m")["schema"]["anyOf"][0]["properties"]["rows"]["items"]
    assert row["required"] == ["age", "year", "smoker", "ward"]
    told = row["properties"]
    assert (told["age"]["minimum"], told["age"]["maximum"]) == (0, 120)
    assert told["ward"]["enum"] == ["surgery", "médecine", None]
    assert told["smoker"]["type"] == ["boolean", "null"]
    answer = document["paths"]["/predict/m"]["post"]["responses"]["200"]["content"]["application/json"]["schema"]
    assert answer["properties"]["rows"]["items"]["properties"]["label"]["enum"] == ["benign", "malignant"]


def test_content_is_what_the_model_takes() -> None:
    document = openapi_document([describe("vision", IMAGES)])
    assert set(document["paths"]["/predict/m"]["post"]["requestBody"]["content"]) == {
        "image/png",
        "image/jpeg",
        "application/x-npz",
    }


def test_the_examples_are_answered_by_the_bundle(table_bundle: Path) -> None:
    node = SmallNode({"table": table_bundle})
    document = openapi_document([node.reader(ALICE, "table").model])
    sent = SentTable(json.dumps(content(document, "/predict/table")["example"]).encode(), "application/json")
    (row,) = json.loads(
        asyncio.run(predict_table(node, Caller(ALICE, "127.0.0.1", "predict"), "table", sent, Asker("alice"))).body
    )["rows"]
    assert row["label"] in {"benign", "malignant"}
