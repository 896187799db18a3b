"""docs/bundle.md: its code works on a real bundle, and it names every file and every field."""

import re
import subprocess
import sys
from pathlib import Path

import onnx
import pytest

from fedclaw.compress.record import Compression
from fedclaw.export import layout
from fedclaw.export.statement import PrivacyStatement

PAGE = (Path(__file__).parents[2] / "docs" / "bundle.md").read_text()
LOADER, VERIFIER = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


TOLD_BY_THEIR_NAMES = {
    "run", "model", "teacher_sha256", "fraction", "parameters_before", "parameters_after", "accuracy_before",
    "accuracy_pruned", "accuracy_after", "seed", "created",
}  # fmt: skip


def run(code, *arguments, cwd=None):
    """In a process of its own, which can import installed packages and nothing of the checkout."""
    line = [sys.executable, "-I", "-c", code, *map(str, arguments)]
    return subprocess.run(line, cwd=cwd, capture_output=True, text=True, check=False)


def test_the_loader_of_the_page_answers_from_typed_columns(table_bundle):
    done = run(LOADER, cwd=table_bundle)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] in {"benign", "malignant"}
    assert "fedclaw" not in LOADER


def test_the_verifier_of_the_page_takes_a_bundle_and_refuses_a_changed_one(bundle, home, stranger):
    trusted = home.root / "ca.crt"
    done = run(VERIFIER, bundle, trusted)
    assert done.stdout == "verified: table of test-federation\n", done.stderr
    assert run(VERIFIER, bundle, stranger.root / "ca.crt").returncode != 0
    (bundle / "more.txt").write_text("added")
    assert "more.txt" in run(VERIFIER, bundle, trusted).stderr
    (bundle / "more.txt").unlink()
    content = (bundle / layout.PRIVACY).read_bytes()
    (bundle / layout.PRIVACY).write_bytes(content.replace(b"every site", b"every SITE"))
    assert layout.PRIVACY in run(VERIFIER, bundle, trusted).stderr
    (bundle / layout.PRIVACY).unlink()
    assert layout.PRIVACY in run(VERIFIER, bundle, trusted).stderr
    (bundle / layout.PRIVACY).write_bytes(content)
    assert run(VERIFIER, bundle, trusted).returncode == 0
    (bundle / layout.CARD).unlink()
    (bundle / layout.CARD).symlink_to(bundle / layout.PRIVACY)
    assert "not a flat directory" in run(VERIFIER, bundle, trusted).stderr


def test_a_certificate_that_may_not_sign_is_refused_by_the_verifier_of_the_page(bundle, home):
    server = (home.root / "server.crt").read_bytes()
    (bundle / layout.RELEASE_CERTIFICATE).write_bytes(server)
    assert "not a release certificate" in run(VERIFIER, bundle, home.root / "ca.crt").stderr


def test_every_file_is_in_the_table(table_bundle):
    table = PAGE.partition("## The files")[2].partition("## bundle.json")[0]
    names = {value for key, value in vars(layout).items() if key.isupper() and isinstance(value, str) and "." in value}
    names -= {layout.SIGNATURE_IN_FORMAT_1, layout.FILE_NAME}
    assert [
        name for name in sorted(names | {path.name for path in table_bundle.iterdir()}) if f"`{name}`" not in table
    ] == []


@pytest.mark.parametrize(
    ("section", "fields"),
    [
        ("## bundle.json", set(layout.Manifest.model_fields) - {"quantised"}),
        ("## privacy.json", set(PrivacyStatement.model_fields) - {"format_version"}),
        ("## compression.json", set(Compression.model_fields) - TOLD_BY_THEIR_NAMES),
    ],
)
def test_every_field_is_told(section, fields):
    text = PAGE.partition(section)[2].partition("\n## ")[0]
    assert [field for field in sorted(fields) if f"`{field}`" not in text] == []


@pytest.mark.parametrize("name", [layout.ONNX, layout.QUANTISED, layout.HALF, layout.PIPELINE])
def test_operators_are_of_the_domains_that_the_page_names(table_bundle, name):
    model = onnx.load(table_bundle / name, load_external_data=False)
    allowed = {"", "ai.onnx"} | ({"ai.onnx.ml"} if name == layout.PIPELINE else set())
    assert {node.domain for node in model.graph.node} <= allowed
    assert not model.functions
