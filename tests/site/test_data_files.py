"""A site's files may be written as its own tools write them; what was agreed on, and every digest, stay the same."""

import csv

import numpy as np
import pytest
import yaml

from fedclaw.errors import DataError, UsageError
from fedclaw.site.directory import open_service
from fedclaw.site.settings import load_site_settings


def rewrite(root) -> None:
    """Write the site's files with semicolons, decimal commas and a title."""
    for name in ("train.csv", "test.csv"):
        path = root / "data" / name
        rows = list(csv.reader(path.read_text().splitlines()))
        lines = [";".join(cell.replace(".", ",") for cell in row) for row in rows[1:]]
        path.write_bytes("\r\n".join(["Bericht für März", ";".join(rows[0]), *lines]).encode("latin-1"))


def say(root, **form) -> None:
    """Say in site.yaml how the files are written."""
    file = root / "site.yaml"
    site = yaml.safe_load(file.read_text())
    site["data"].update(form)
    file.write_text(yaml.safe_dump(site))


FORM = {"delimiter": ";", "decimal": ",", "encoding": "latin-1", "title_lines": 1}


def opened(root):
    return open_service(root, load_site_settings(root), "clinic", durable=False)


def test_a_site_with_files_of_another_form_is_the_same_site(root):
    before = opened(root)
    rewrite(root)
    say(root, **FORM)
    after = opened(root)
    np.testing.assert_array_equal(after.data.train.inputs, before.data.train.inputs)
    np.testing.assert_array_equal(after.data.test.targets, before.data.test.targets)
    assert after.schema_digest == before.schema_digest


def test_a_form_that_was_not_said_is_named(root):
    rewrite(root)
    with pytest.raises(DataError, match="not UTF-8 text"):
        opened(root)
    say(root, encoding="latin-1", decimal=",")
    with pytest.raises(DataError, match=r'say title_lines: 1, delimiter: ";" under data in site.yaml'):
        opened(root)


def test_a_form_that_does_not_exist_is_a_wrong_setting(root):
    say(root, decimal="'")
    with pytest.raises(UsageError, match=r"data.decimal: Input should be '.' or ','"):
        load_site_settings(root)
