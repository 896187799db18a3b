"""docs/policy.md says of every clause what it is by default, and docs/ledger.md names every command."""

import re
from pathlib import Path

import pytest
import yaml
from pydantic_core import PydanticUndefined

from fedclaw import ledger
from fedclaw.site.policy.policy import Combination, DataSetBudget, Policy, StatisticsAllowance

DOCS = Path(__file__).parents[3] / "docs"
ROW = re.compile(
    r"^\| `(?P<clause>\w+)` \| (?P<default>[^|]+) \| (?P<unit>[^|]*) \| (?P<meaning>[^|]+) \|$", re.MULTILINE
)
REQUIRED = "has to be written"


@pytest.fixture(scope="module")
def rows():
    found = list(ROW.finditer((DOCS / "policy.md").read_text()))
    assert len({row["clause"] for row in found}) == len(found), "no clause is there twice"
    return {row["clause"]: row for row in found}


def test_every_clause_is_there_and_no_other(rows):
    assert rows.keys() == Policy.model_fields.keys()
    for clause, row in rows.items():
        assert len(row["meaning"].split()) >= 5, f"{clause} is not explained"


@pytest.mark.parametrize("clause", Policy.model_fields)
def test_the_default_that_is_told_is_the_default(rows, clause):
    default, told = Policy.model_fields[clause].default, rows[clause]["default"]
    if default is PydanticUndefined:
        assert told == REQUIRED
        return
    plain = list(default) if isinstance(default, tuple) else default
    read = float(told) if isinstance(plain, float) else yaml.safe_load(told)
    assert (type(read), read) == (type(plain), plain)


def test_what_belongs_to_a_clause_is_explained_too():
    text = (DOCS / "policy.md").read_text()
    for part in (Combination, DataSetBudget, StatisticsAllowance):
        for name in part.model_fields:
            assert re.search(rf"`{name}`|[{{ ]{name}:", text), f"{part.__name__}.{name}"


def test_the_policy_that_is_shown_is_one():
    shown = re.search(r"```yaml\n(.*?)```", (DOCS / "policy.md").read_text(), re.DOTALL)
    assert Policy.model_validate(yaml.safe_load(shown[1])["policy"]).epsilon == 8.0


def test_every_command_and_key_of_the_ledger_is_there():
    text = (DOCS / "ledger.md").read_text()
    for command in ledger._COMMANDS:
        assert f"python -m fedclaw.ledger {command} site=" in text
    keys = {key for _, takes in ledger._COMMANDS.values() for key in takes} | {"reason"}
    assert {key for key in keys if f"{key}=" not in text} <= {"out"}
