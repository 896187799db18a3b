"""What a verifier brings along and names: a file of another kind is wrong use, not a fault of the bundle."""

import pytest

from fedclaw.errors import UsageError
from fedclaw.export.trust import load_trust


@pytest.mark.parametrize(
    ("setting", "content", "words"),
    [
        ("ca", b"hello", r"ca=.*notes is not a PEM certificate"),
        ("ca", b"", r"ca=.*notes is not a PEM certificate"),
        ("crl", b"hello", r"crl=.*notes is not a PEM certificate revocation list"),
        ("federation", b"{}", r"federation=.*notes is not a federation descriptor"),
    ],
)
def test_a_file_of_another_kind(tmp_path, setting, content, words):
    (tmp_path / "notes").write_bytes(content)
    asked = {"ca": None, "federation": None, "crl": None, setting: tmp_path / "notes"}
    with pytest.raises(UsageError, match=words):
        load_trust(**asked)


def test_two_certificates_name_no_authority(tmp_path, home):
    pem = (home.root / "ca.crt").read_bytes()
    (tmp_path / "two").write_bytes(pem + pem)
    with pytest.raises(UsageError, match="holds 2 certificates, it should hold one"):
        load_trust(tmp_path / "two", None, None)
    (tmp_path / "one").write_bytes(pem)
    assert load_trust(tmp_path / "one", None, None).authority == pem


def test_a_descriptor_that_was_changed(tmp_path, home):
    text = (home.root / "federation.json").read_text()
    assert "127.0.0.1:9443" in text
    (tmp_path / "federation.json").write_text(text.replace("127.0.0.1:9443", "127.0.0.2:9443"))
    with pytest.raises(UsageError, match=r"federation=.*was changed after the coordinator signed it"):
        load_trust(None, tmp_path, None)
