"""docs/data.md: its examples are read as they stand, and no field of a table's schema is left out."""

import re
from pathlib import Path

from fedclaw.clients.table_definition import TableDefinition
from fedclaw.clients.tabular_schema import TabularSchema
from fedclaw.site.settings import DataFiles
from fedclaw.yaml_text import read_yaml

TEXT = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
SCHEMA, FILES = re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL)


def test_the_schema_is_one() -> None:
    schema = TabularSchema.parse(SCHEMA, "docs/data.md")
    assert schema.describe_inputs()["features"][-2:] == ["ward=001", "ward=other"]
    assert schema.class_weights == (1.0, 10.0)


def test_the_files_are_described_as_a_site_describes_them() -> None:
    written = DataFiles.model_validate(read_yaml(FILES)["data"]).written
    assert (written.delimiter, written.decimal, written.encoding, written.title_lines) == (";", ",", "windows-1252", 2)


def test_every_field_is_said() -> None:
    for name in TableDefinition.model_fields:
        assert f"| `{name}` |" in TEXT
    for name in DataFiles.model_fields.keys() - {"name"}:
        assert f"{name}: " in FILES
