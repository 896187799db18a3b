"""The JSON Schemas in docs/schemas: they are of today's classes, take real bundles' files, and refuse damaged ones."""

import json
import re
import unicodedata
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator
from pydantic import TypeAdapter, ValidationError

from fedclaw.compress.record import write_compressed
from fedclaw.errors import UsageError
from fedclaw.export import layout, schemas
from fedclaw.export.bundle import Request, export_bundle
from fedclaw.export.source import load_source
from fedclaw.files import sha256_file
from fedclaw.protocol.limits import Name
from fedclaw.protocol.terms import ModelSpec
from fedclaw.server.run_directory import RunDirectory
from tests.samples import compression_record, statistics_release

ROOT = Path(__file__).parents[2]
PAST = ROOT / "tests" / "past"


def validator(name):
    schema = json.loads((schemas.PLACE / schemas.file_of(name)).read_bytes())
    return Draft202012Validator(schema, format_checker=Draft202012Validator.FORMAT_CHECKER)


def errors(name, content):
    return [error.message for error in validator(name).iter_errors(content)]


def test_the_schemas_in_docs_are_those_of_the_classes(tmp_path):
    for made in schemas.write_schemas(tmp_path):
        told = schemas.PLACE / made.name
        assert told.read_text() == made.read_text(), "run python -m fedclaw.export.schemas"
    assert {path.name for path in schemas.PLACE.iterdir()} == {path.name for path in tmp_path.iterdir()}


@pytest.mark.parametrize("name", schemas.MODELS)
def test_each_is_a_schema_of_the_dialect_that_it_names(name):
    schema = json.loads((schemas.PLACE / schemas.file_of(name)).read_bytes())
    Draft202012Validator.check_schema(schema)
    assert (schema["$schema"], schema["$id"]) == (schemas.DIALECT, f"urn:fedclaw:bundle:2:{name}")
    patterns = re.findall(r'"pattern": "(.*)"', json.dumps(schema, indent=0))
    assert not [pattern for pattern in patterns if "\\p" in json.loads(f'"{pattern}"')]


@pytest.fixture(scope="module")
def compressed_bundle(samples, home, tmp_path_factory):
    """The bundle of a compressed model, with marginals."""
    root = tmp_path_factory.mktemp("compressed")
    record = compression_record("agreement with the teacher")
    run = samples.make_run(root / "table", "tabular", samples.table, ModelSpec(name="mlp", args={"hidden": [8, 4]}))
    small = samples.make_run(root / "small", "tabular", samples.table, record.model).read_model()
    write_compressed(run, record.model_copy(update={"teacher_sha256": sha256_file(run.model_path)}), small)
    target = root / "bundle"
    source = load_source(RunDirectory.open(run.root))
    release = statistics_release(source.record, source.schema, samples.rows, bins=4)
    export_bundle(source, home.signer(), target, Request(marginals=release))
    return target


@pytest.mark.parametrize("bundle", ["table_bundle", "image_bundle", "compressed_bundle"])
def test_they_take_the_files_of_a_bundle(request, bundle):
    place = request.getfixturevalue(bundle)
    found = [name for name in schemas.MODELS if (place / name).exists()]
    assert set(found) >= set(schemas.MODELS) - {layout.COMPRESSION, layout.MARGINALS}
    assert (layout.COMPRESSION in found, layout.MARGINALS in found) == (2 * (bundle == "compressed_bundle",))
    for name in found:
        assert errors(name, json.loads((place / name).read_bytes())) == []


@pytest.mark.parametrize(
    "path", sorted(PAST.glob("*/runs/local/**/*.json")), ids=lambda path: str(path.relative_to(PAST))
)
def test_they_take_the_files_of_older_bundles(path):
    if path.name in schemas.MODELS:
        assert errors(path.name, json.loads(path.read_bytes())) == []


def places(value, path=()):
    """Where in a document a value can be damaged: every object's and list's items."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, below in items:
        yield (*path, key)
        yield from places(below, (*path, key))


def damaged(document, path, change):
    copied = json.loads(json.dumps(document))
    holder = copied
    for step in path[:-1]:
        holder = holder[step]
    change(holder, path[-1])
    return copied


def _put(value):
    return lambda holder, key: holder.__setitem__(key, value)


CHANGES = {
    "removed": lambda holder, key: holder.pop(key),
    "an object": _put({"unknown": None}),
    "a negative number": _put(-1),
    "a text": _put("\x1b[2J"),
    "nothing": _put(None),
}


MOMENTS = ("created", "started")
"""Our reader would take a number of seconds too."""


def reasons(model, document):
    """Kinds of what our reader finds wrong; `value_error`: a rule between fields."""
    try:
        model.model_validate_json(json.dumps(document))
    except ValidationError as error:
        return {found["type"] for found in error.errors()}
    return set()


@pytest.mark.parametrize("name", schemas.MODELS)
def test_a_damaged_file_is_refused_by_the_schema_as_by_our_reader(compressed_bundle, name):
    """Each value in turn is damaged. The two disagree on nothing but rules between fields, which our reader knows."""
    document = json.loads((compressed_bundle / name).read_bytes())
    check, model = validator(name), schemas.MODELS[name]
    counted = {"both refuse": 0, "both take": 0, "by a rule between fields": 0}
    for number, path in enumerate(places(document)):
        # All changes to each field at the top, and below it one of them in turn: all of them everywhere take a minute.
        for name in CHANGES if len(path) == 1 else [list(CHANGES)[number % len(CHANGES)]]:
            if name == "a negative number" and path[-1] in MOMENTS:
                continue
            changed = damaged(document, path, CHANGES[name])
            valid, refused = check.is_valid(changed), reasons(model, changed)
            assert not refused or not valid or "value_error" in refused, (path, changed)
            assert valid or refused, (path, list(check.iter_errors(changed)))
            counted["both take" if not refused else "by a rule between fields" if valid else "both refuse"] += 1
    assert counted["both refuse"] > 40
    assert counted["by a rule between fields"] < 20


def test_an_unknown_field_is_refused_at_any_depth(compressed_bundle):
    document = json.loads((compressed_bundle / layout.MANIFEST).read_bytes())
    assert errors(layout.MANIFEST, {**document, "extra": 1})
    document["parity"]["files"]["model.onnx"]["extra"] = 1
    assert errors(layout.MANIFEST, document)


def test_names_are_the_same_to_the_schema_but_for_what_other_planes_hold():
    schema = json.loads((schemas.PLACE / schemas.file_of(layout.MANIFEST)).read_bytes())
    pattern, ours = re.compile(schema["properties"]["run"]["pattern"]), TypeAdapter(Name)
    for number in range(0x10000):
        letter = chr(number)
        if unicodedata.category(letter) in {"Cs", "Cn"}:
            continue
        try:
            ours.validate_python(f"a{letter}b")
        except ValidationError:
            assert not pattern.search(f"a{letter}b"), hex(number)
        else:
            assert pattern.search(f"a{letter}b"), hex(number)


def test_descriptions_are_the_docstrings(compressed_bundle):
    schema = schemas.schemas()[layout.PRIVACY]
    assert schema["properties"]["warnings"]["description"].startswith("Read these first.")
    cost = schema["$defs"]["RunCost"]["properties"]
    assert cost["ledger_losses"]["description"].startswith("How often the ledger")  # a base's field


def test_outside_of_a_checkout_a_directory_has_to_be_named(monkeypatch, tmp_path):
    monkeypatch.setattr(schemas, "PLACE", tmp_path / "nowhere")
    with pytest.raises(UsageError, match="name a directory"):
        schemas._body([])
    schemas._body([str(tmp_path / "there")])
    assert len(list((tmp_path / "there").iterdir())) == len(schemas.MODELS)
