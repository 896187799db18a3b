"""Which code made a run: told by its sources, by git's own files, and by nothing that names a machine."""

import getpass
import socket
import subprocess
from pathlib import Path

import pytest

from fedclaw.server.run_directory import RunDirectory
from fedclaw.server.software import checkout_revision, software, source_digest
from tests.samples import run_record


def git(root: Path, *words: str) -> str:
    told = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "init.defaultBranch=main", *words]
    return subprocess.run(told, cwd=root, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def checkout(tmp_path):
    root = tmp_path / "checkout"
    root.mkdir()
    git(root, "init", "-q")
    (root / "a.py").write_text("one = 1\n")
    git(root, "add", ".")
    git(root, "commit", "-q", "-m", "one")
    return root


def test_the_revision_is_what_git_says(checkout, tmp_path):
    commit = git(checkout, "rev-parse", "HEAD")
    assert checkout_revision(checkout) == commit
    git(checkout, "worktree", "add", "-q", "-b", "other", str(tmp_path / "tree"))
    assert checkout_revision(tmp_path / "tree") == commit
    git(checkout, "pack-refs", "--all")
    assert not (checkout / ".git/refs/heads/main").exists()
    assert checkout_revision(checkout) == checkout_revision(tmp_path / "tree") == commit
    git(checkout, "checkout", "-q", "--detach")
    assert checkout_revision(checkout) == commit


@pytest.mark.parametrize("head", ["", "ref: refs/heads/nowhere", "ref: ../../../etc/passwd", "<b>", "a" * 39])
def test_no_revision_is_made_up(checkout, head):
    (checkout / ".git/HEAD").write_text(head)
    assert checkout_revision(checkout) is None
    assert checkout_revision(checkout / "nowhere") is None


def test_the_digest_is_of_every_python_file_and_of_its_name(tmp_path):
    def package(**files):
        root = tmp_path / f"p{len(list(tmp_path.iterdir()))}"
        for name, text in files.items():
            path = root / name.replace("__", "/")
            path = path.with_suffix(".py")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return source_digest(root)

    one = package(a="x", b__c="y")
    assert package(a="x", b__c="y") == one
    others = [package(a="y", b__c="x"), package(a="x", c="y"), package(a="x"), package(a="xb/c.py\n1\ny")]
    assert len({one, *others}) == 5


def test_a_run_says_what_it_was_begun_with_and_nothing_of_the_machine(tmp_path):
    record = RunDirectory.create(tmp_path / "run", run_record()).record()
    assert record.software == software()
    assert record.software.packages["numpy"]
    text = record.software.model_dump_json()
    for secret in (socket.gethostname(), str(Path.home()), str(tmp_path), str(Path(__file__).parents[2])):
        assert len(secret) < 4 or secret not in text
    assert f"/{getpass.getuser()}" not in text


def test_a_run_that_goes_on_from_another_record_says_its_own(tmp_path):
    """The recovery after pruning takes its teacher's record over."""
    stale = software().model_copy(update={"fedclaw": "0.0.1"})
    record = RunDirectory.create(tmp_path / "run", run_record(software=stale)).record()
    assert record.software == software()
