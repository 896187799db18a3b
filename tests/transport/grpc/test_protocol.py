"""The checked-in protocol code is what the compiler makes of link.proto."""

from pathlib import Path

import pytest

from fedclaw.errors import UsageError
from fedclaw.transport.grpc.protocol import generate


def test_generating_again_gives_the_same_bytes(tmp_path: Path):
    for made in generate.generate(tmp_path):
        assert made.read_bytes() == (generate.HERE / made.name).read_bytes(), f"{made.name} is not from link.proto"


def test_another_compiler_version_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(generate, "TOOLS_VERSION", "0.0.1")
    with pytest.raises(UsageError, match=r"generated with grpcio-tools 0\.0\.1"):
        generate.generate(tmp_path)
