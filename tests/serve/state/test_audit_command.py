"""`python -m fedclaw.serve audit`, on a node's directory."""

from pathlib import Path

import pytest

from fedclaw.errors import UsageError
from fedclaw.serve.__main__ import main
from fedclaw.serve.state.audit_log import AuditLog, AuditLogError
from fedclaw.serve.state.store import StateStore


def serve_something(home: Path, *, anchored: bool = True) -> None:
    """What a worker leaves behind."""
    with AuditLog(home / "audit", "node.worker-0") as log:
        for request in ("r1", "r2"):
            log.append(
                principal="ward 7",
                peer="127.0.0.1",
                model="heart",
                version="v",
                request=request,
                rows=1,
                status=200,
            )
        if anchored:
            with StateStore.open(f"sqlite:///{home / 'state.db'}") as store:
                assert log.anchor(store)


def test_a_whole_log_is_shown_and_held_against_its_anchors(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    serve_something(tmp_path)
    main(["audit", f"state={tmp_path}", "last=1"])
    out = capsys.readouterr().out
    assert "r2" in out
    assert "r1" not in out
    assert "node.worker-0: 3 lines, 1 anchors: whole" in out


def test_a_log_whose_end_was_cut_off_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    serve_something(tmp_path)
    file = tmp_path / "audit" / "node.worker-0.000001.jsonl"
    file.write_bytes(b"".join(file.read_bytes().splitlines(keepends=True)[:-1]))
    with pytest.raises(AuditLogError, match="not whole"):
        main(["audit", f"state={tmp_path}"])
    assert "cut off its end" in capsys.readouterr().out


def test_without_a_state_store_that_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    serve_something(tmp_path, anchored=False)
    main(["audit", f"state={tmp_path}"])
    main(["audit", f"state={tmp_path}", f"database=file:{_away(tmp_path)}"])
    assert capsys.readouterr().out.count("not held against anchors: whole") == 2
    assert not (tmp_path / "state.db").exists()


def _away(directory: Path) -> Path:
    """A database that does not answer."""
    place = directory / "database"
    place.touch(0o600)
    place.write_text("postgresql://fedclaw@127.0.0.1:9/none")
    return place


def test_a_directory_that_is_none_is_wrong_use(tmp_path: Path):
    with pytest.raises(UsageError, match="state="):
        main(["audit", f"state={tmp_path / 'none'}"])
    with pytest.raises(AuditLogError, match="no such directory"):
        main(["audit", f"state={tmp_path}"])


def test_a_name_that_the_log_does_not_have_is_wrong_use_for_no_anchor_would_be_found(tmp_path: Path):
    serve_something(tmp_path)
    with pytest.raises(UsageError, match="is of node"):
        main(["audit", f"state={tmp_path}", "name=other"])
