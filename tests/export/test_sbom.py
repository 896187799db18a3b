"""sbom.cdx.json: valid by CycloneDX's own library, and true of the bundle that it lies in."""

import dataclasses
import importlib.metadata
import json
from pathlib import Path

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from fedclaw.compress.record import StepInputs
from fedclaw.export import layout
from fedclaw.export.card_metadata import SPDX_LICENSES
from fedclaw.export.packages import installed_packages
from fedclaw.export.sbom import bill_of_materials
from fedclaw.export.statement import PrivacyStatement
from fedclaw.files import sha256_file
from fedclaw.server.run_directory import Simulated
from tests.samples import compression_record

VALIDATOR = JsonStrictValidator(SchemaVersion.V1_7)


@pytest.fixture(scope="module")
def bill(table_bundle):
    return json.loads((table_bundle / layout.SBOM).read_bytes())


@pytest.fixture(scope="module")
def make(table_bundle, table_source):
    """The bill of the tabular run's bundle, with changes to what it is made of."""
    manifest = layout.Manifest.model_validate_json((table_bundle / layout.MANIFEST).read_bytes())
    statement = PrivacyStatement.model_validate_json((table_bundle / layout.PRIVACY).read_bytes())

    def render(source=table_source, manifest=manifest, statement=statement, limits=("A limit.",), license=None):
        return bill_of_materials(source, manifest, statement, limits, {layout.ONNX: "ab" * 32}, license)

    return render


def errors_of(text):
    """What the library finds wrong; None: nothing."""
    return VALIDATOR.validate_str(text)


def model_of(text):
    return json.loads(text)["metadata"]["component"]


def test_the_library_of_cyclonedx_finds_it_valid(table_bundle):
    assert errors_of((table_bundle / layout.SBOM).read_text()) is None


def test_the_library_of_cyclonedx_finds_a_wrong_field(image_bundle):
    bill = json.loads((image_bundle / layout.SBOM).read_bytes())
    bill["components"] = []  # the check of all packages takes seconds
    assert errors_of(json.dumps(bill)) is None
    bill["metadata"]["component"]["modelCard"]["modelParameters"]["accuracy"] = 1
    assert "accuracy" in str(errors_of(json.dumps(bill)))


def test_it_has_the_digest_of_every_file_but_itself_and_the_signature(table_bundle, bill):
    told = {part["name"]: part["hashes"] for part in bill["metadata"]["component"]["components"]}
    found = {path.name: sha256_file(path) for path in table_bundle.iterdir()}
    expected = {
        name: [{"alg": "SHA-256", "content": digest}]
        for name, digest in found.items()
        if name not in layout.UNSIGNED | {layout.SBOM}
    }
    assert told == expected


def test_the_model_card_says_what_the_model_is_and_what_its_privacy_is(table_bundle, table_source, bill):
    model = bill["metadata"]["component"]
    assert (model["type"], model["group"], model["name"]) == ("machine-learning-model", "test-federation", "table")
    card = model["modelCard"]
    parameters = card["modelParameters"]
    assert (parameters["task"], parameters["architectureFamily"]) == ("classification", "mlp")
    inputs = [item["format"] for item in parameters["inputs"]]
    assert inputs[:2] == ["model.onnx, inputs: float32 (batch, 4)", "pipeline.onnx, age: float32 (batch, 1)"]
    statement = json.loads((table_bundle / layout.PRIVACY).read_bytes())
    said = [item["name"] for item in card["considerations"]["ethicalConsiderations"]]
    assert {statement["summary"], statement["unit"], statement["holds_against"]} <= set(said)
    assert {f"Not covered: {item}" for item in statement["not_covered"]} <= set(said)
    (accuracy,) = [one for one in card["quantitativeAnalysis"]["performanceMetrics"] if one["type"] == "accuracy"]
    assert accuracy["value"] == "0.875"
    assert float(accuracy["confidenceInterval"]["lowerBound"]) < 0.875
    assert "licenses" not in model


def test_data_sets_are_told_by_the_ledger_that_was_charged_and_by_no_digest_of_theirs(bill, samples):
    data = {part["bom-ref"]: part for part in bill["components"] if part["type"] == "data"}
    refs = [item["ref"] for item in bill["metadata"]["component"]["modelCard"]["modelParameters"]["datasets"]]
    assert list(data) == refs
    assert [part["name"] for part in data.values()] == ["north", "south"]
    assert all("hashes" not in part for part in data.values())
    head = samples.private["north"].receipt.ledger_head
    assert data[refs[0]]["properties"] == [{"name": "fedclaw:ledger:head", "value": head}]


def test_packages_are_the_installed_ones_with_what_they_need(bill):
    libraries = {part["name"]: part for part in bill["components"] if part["type"] == "library"}
    assert {"fedclaw", "torch", "onnx", "onnxruntime", "onnxscript", "opacus", "flwr", "torch-pruning"} <= set(
        libraries
    )
    assert "pytest" not in libraries
    for name, part in libraries.items():
        assert part["version"] == importlib.metadata.version(name)
    torch = libraries["torch"]["purl"]
    assert torch == f"pkg:pypi/torch@{importlib.metadata.version('torch').replace('+', '%2B')}"
    needs = {item["ref"]: item["dependsOn"] for item in bill["dependencies"]}
    assert needs["model"] == [libraries["fedclaw"]["purl"]]
    assert torch in needs[libraries["opacus"]["purl"]]
    refs = {part["bom-ref"] for part in bill["components"]}
    assert {ref for ref, below in needs.items() for ref in (ref, *below)} <= refs | {"model"}
    assert libraries["torch"]["licenses"][0]["expression"].startswith("Apache-2.0")
    assert libraries["onnxruntime"]["licenses"] == [{"license": {"name": "MIT License"}}]


def test_a_package_that_nothing_needs_is_not_there():
    assert installed_packages("no-such-distribution") == ()
    assert [package.name for package in installed_packages("packaging", ())] == ["packaging"]
    both = installed_packages("packaging", (), ("Typing_Extensions", "packaging"))
    assert [package.name for package in both] == ["packaging", "typing-extensions"]


def test_the_serial_number_is_of_the_content(make, table_source):
    one, two = make(), make()
    assert one == two
    other = make(limits=("Another limit.",))
    assert json.loads(one)["serialNumber"] != json.loads(other)["serialNumber"]


@pytest.mark.parametrize(
    ("license", "told"),
    [("apache-2.0", {"id": "Apache-2.0"}), ("GPL-3.0-only", {"id": "GPL-3.0-only"}), ("Ask\nus", {"name": "Ask us"})],
)
def test_a_stated_licence_is_in_it_and_valid(make, license, told):
    text = make(license=license)
    assert errors_of(text) is None
    assert model_of(text)["licenses"] == [{"license": told}]


def test_every_licence_that_we_know_is_one_of_spdx(make):
    bill = json.loads(make())
    bill["components"] = [
        {"type": "library", "name": name, "licenses": [{"license": {"id": name}}]} for name in SPDX_LICENSES.values()
    ]
    assert errors_of(json.dumps(bill)) is None
    bill["components"][0]["licenses"] = [{"license": {"id": "Apache-2"}}]
    assert "Apache-2" in str(errors_of(json.dumps(bill)))


def test_a_simulation_and_public_files_are_told_as_such(make, table_source):
    looked = (
        StepInputs(step="calibration", origin="public", description="a.csv", examples=9, sha256="cd" * 32),
        StepInputs(step="recovery", origin="synthetic", description="from the schema"),
    )
    record = table_source.record.model_copy(update={"simulated": Simulated(clients=2)})
    source = dataclasses.replace(table_source, record=record, compression=compression_record(looked_at=looked))
    text = make(source=source)
    assert errors_of(text) is None
    data = [part for part in json.loads(text)["components"] if part["type"] == "data"]
    assert [part["bom-ref"] for part in data] == ["data:simulation", "data:compression:1"]
    assert data[1]["hashes"] == [{"alg": "SHA-256", "content": "cd" * 32}]


@pytest.mark.parametrize("name", ["<b>\u202e", "a\nb", '"}', "x" * 5000])
def test_text_of_others_stays_text(make, table_source, samples, name):
    receipts = dataclasses.replace(table_source.receipts[0], by_site={name: samples.private["north"]})
    text = make(source=dataclasses.replace(table_source, receipts=(receipts,)))
    assert errors_of(text) is None
    assert "\u202e" not in text


def test_nothing_in_a_bundle_names_this_machine(table_bundle, tmp_path):
    """No path in any text of the bundle, and with it no user."""
    texts = b"".join(path.read_bytes() for path in table_bundle.iterdir() if path.suffix in {".json", ".md"})
    for told in (str(table_bundle.parent.parent), str(Path.cwd()), "/tmp", "/home/", "/root"):
        assert told.encode() not in texts
