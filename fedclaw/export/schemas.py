"""JSON Schemas (2020-12) of a bundle's own JSON files, made from the classes that read and write them.

    python -m fedclaw.export.schemas [DIRECTORY]

Writes docs/schemas of the checkout, or to DIRECTORY. What a schema cannot say, as two fields that must agree, is in
docs/bundle.md. Descriptions are the classes' own docstrings.
"""

if __name__ == "__main__":
    from fedclaw.startup import begin

    begin("fedclaw.export.schemas", __doc__)

import ast
import inspect
import json
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema

from fedclaw.cli import run_main
from fedclaw.compress.record import Compression
from fedclaw.errors import UsageError
from fedclaw.export.layout import COMPRESSION, MANIFEST, MARGINALS, PRIVACY, TRAINING, Manifest
from fedclaw.export.marginals import Marginals
from fedclaw.export.statement import PrivacyStatement
from fedclaw.export.training_record import TrainingRecord
from fedclaw.files import write_atomic

FORMAT = 2
"""The newest format of a bundle; its schemas take files of format 1 as well."""
DIALECT = "https://json-schema.org/draft/2020-12/schema"
MODELS: Mapping[str, type[BaseModel]] = {
    MANIFEST: Manifest,
    PRIVACY: PrivacyStatement,
    TRAINING: TrainingRecord,
    COMPRESSION: Compression,
    MARGINALS: Marginals,
}
PLACE = Path(__file__).resolve().parents[2] / "docs" / "schemas"

_NO_CONTROL_CHARACTERS = r"^[^\p{C}]+$"
_PORTABLE = (
    "^[^\\u0000-\\u001f\\u007f-\\u009f\\u00ad\\u0600-\\u0605\\u061c\\u06dd\\u070f\\u0890\\u0891\\u08e2\\u180e\\u200b-\\u200f"
    "\\u202a-\\u202e\\u2060-\\u206f\\ue000-\\uf8ff\\ufeff\\ufff9-\\ufffb]+$"
)
"""The same without a Unicode property, which not every implementation of JSON Schema has: control, format and private
letters of the basic plane. Ours refuses those of the other planes too, and letters that Unicode has not assigned."""


def schemas() -> dict[str, dict[str, Any]]:
    """The schema of each file, by the file's name."""
    return {name: _schema(name, model) for name, model in MODELS.items()}


def identifier(name: str) -> str:
    """The `$id` of a file's schema."""
    return f"urn:fedclaw:bundle:{FORMAT}:{name}"


def file_of(name: str) -> str:
    """Where the schema of a bundle's file is, in a directory of schemas."""
    return name.removesuffix(".json") + ".schema.json"


def _schema(name: str, model: type[BaseModel]) -> dict[str, Any]:
    made = model.model_json_schema(schema_generator=_Documented)
    return {"$schema": DIALECT, "$id": identifier(name), **_portable({**made, "title": name})}


def _portable(value: Any) -> Any:
    """`value` with patterns that every implementation understands."""
    if isinstance(value, dict):
        return {
            key: _PORTABLE if (key, below) == ("pattern", _NO_CONTROL_CHARACTERS) else _portable(below)
            for key, below in value.items()
        }
    return [_portable(below) for below in value] if isinstance(value, list) else value


class _Documented(GenerateJsonSchema):
    """Describes each field by the docstring under it; a title that only repeats its name is left out."""

    def tagged_union_schema(self, schema: Any) -> dict[str, Any]:
        """The field that says which of several classes it is has to be there, whatever its default."""
        made = super().tagged_union_schema(schema)
        return {**made, "required": [made["discriminator"]["propertyName"]]}

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False

    def model_schema(self, schema: Any) -> dict[str, Any]:
        made = super().model_schema(schema)
        for name, text in _field_docstrings(schema["cls"]).items():
            if name in made.get("properties", {}):
                made["properties"][name].setdefault("description", text)
        return made


@cache
def _field_docstrings(model: type) -> dict[str, str]:
    """The docstring under each field of `model` and of its bases; where both have one, the class's own."""
    found: dict[str, str] = {}
    for base in reversed(model.__mro__):
        if issubclass(base, BaseModel) and base is not BaseModel:
            found |= dict(_docstrings_in(textwrap.dedent(inspect.getsource(base))))
    return found


def _docstrings_in(source: str) -> Iterator[tuple[str, str]]:
    (definition,) = ast.parse(source).body
    assert isinstance(definition, ast.ClassDef)
    names: list[str] = []
    for statement in definition.body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            names.append(statement.target.id)
        elif isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant) and names:
            yield names[-1], " ".join(str(statement.value.value).split())


def write_schemas(directory: Path) -> list[Path]:
    """Write the schema files to `directory` and return their paths."""
    directory.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, schema in schemas().items():
        paths.append(directory / file_of(name))
        write_atomic(paths[-1], (json.dumps(schema, indent=2) + "\n").encode())
    return paths


def _body(arguments: Sequence[str]) -> None:
    if not arguments and not PLACE.is_dir():
        raise UsageError("there is no docs/schemas here; name a directory: python -m fedclaw.export.schemas DIRECTORY")
    write_schemas(Path(arguments[0]) if arguments else PLACE)


if __name__ == "__main__":
    run_main("fedclaw.export.schemas", __doc__ or "", _body)
