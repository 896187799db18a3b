"""The node's image, built from its Dockerfile by buildah on Debian and this Python, and run as it is meant to be.

No registry is needed, but the places that packages of Debian and of Python come from.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from fedclaw.identity.federation_home import FederationHome

ROOT = Path(__file__).parents[2]
UID = 10001
BASE = "localhost/python"
LIBRARIES = (
    "ca-certificates",
    "libssl3",
    "libffi8",
    "libsqlite3-0",
    "zlib1g",
    "libbz2-1.0",
    "liblzma5",
    "libreadline8",
)
PATH = "/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin"
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(
        os.geteuid() != 0 or not all(map(shutil.which, ("buildah", "debootstrap", "unshare", "setpriv"))),
        reason="buildah and debootstrap are not installed, or this is not root",
    ),
    pytest.mark.skipif(
        Path(sys.base_prefix) == Path("/usr"),
        reason="the base image takes this Python's own directory, and a distribution's is spread over /usr",
    ),
]

_INSIDE = """
set -eu
root=$1; shift
mount --bind "$root" "$root"
mount -o remount,bind,ro "$root"
mount -t proc proc "$root/proc"
mount --bind /dev "$root/dev"
mount -t tmpfs -o mode=1777,nosuid,nodev tmpfs "$root/tmp"
mount -t tmpfs -o uid=10001,gid=10001,mode=0700 tmpfs "$root/var/lib/fedclaw"
cp -r "$MOUNTED"/. "$root/var/lib/fedclaw/"
chown -R 10001:10001 "$root/var/lib/fedclaw"
exec chroot "$root" setpriv --reuid 10001 --regid 10001 --clear-groups --no-new-privs --bounding-set=-all \
    --inh-caps=-all /usr/bin/env -i --chdir=/var/lib/fedclaw $VARIABLES "$@"
"""
"""Runs a command as an engine does with --read-only, --cap-drop=ALL and --security-opt=no-new-privileges."""


@dataclass(frozen=True)
class Image:
    """An image, and its files mounted."""

    root: Path
    config: dict[str, object]

    def run(self, *words: str, mounted: Path, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        """A command in it, its root file system read-only, with a copy of `mounted` as its state."""
        variables = " ".join(one for one in self.config["Env"])  # type: ignore[attr-defined]
        return subprocess.run(
            ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-c", _INSIDE, "inside", self.root, *words],
            env={"PATH": os.environ["PATH"], "MOUNTED": str(mounted), "VARIABLES": variables},
            capture_output=True,
            text=True,
            timeout=timeout,
        )


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("images")


def _buildah(place: Path, *words: str | Path) -> str:
    storage: Sequence[str | Path] = (
        "--root",
        place / "root",
        "--runroot",
        place / "run",
        "--storage-driver",
        "overlay",
    )
    done = subprocess.run(["buildah", *storage, *words], capture_output=True, text=True, cwd=ROOT, timeout=1500)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout.strip()


@pytest.fixture(scope="module")
def base(place: Path) -> str:
    """What python:slim is: a small Debian with a Python in /usr/local."""
    root = place / "debian"
    subprocess.run(
        ["debootstrap", "--variant=minbase", f"--include={','.join(LIBRARIES)}", "bookworm", root],
        check=True,
        capture_output=True,
        timeout=900,
    )
    for part in ("bin", "lib"):
        left_out = shutil.ignore_patterns(
            "__pycache__", "test", "site-packages", "config-*", "*.a", *(["pip*"] if part == "bin" else [])
        )
        target = root / "usr/local" / part
        shutil.copytree(Path(sys.base_prefix) / part, target, symlinks=True, ignore=left_out, dirs_exist_ok=True)
    subprocess.run(["chroot", root, "/sbin/ldconfig"], check=True)
    python = f"/usr/local/bin/python{sys.version_info.major}.{sys.version_info.minor}"
    subprocess.run(["chroot", root, python, "-m", "ensurepip"], check=True, capture_output=True, timeout=300)
    shutil.copy(CERTIFICATES, root / CERTIFICATES.relative_to("/"))
    container = _buildah(place, "from", "scratch")
    _buildah(place, "copy", "--quiet", container, root, "/")
    _buildah(place, "config", "--env", f"PATH={PATH}", container)
    _buildah(place, "commit", "--quiet", container, BASE)
    _buildah(place, "rm", container)
    return BASE


@pytest.fixture(scope="module")
def node_image(place: Path, base: str) -> Iterator[Image]:
    secret = place / "pip.conf"
    index = os.environ.get("PIP_INDEX_URL")
    secret.write_text(f"[global]\ncert = {CERTIFICATES}\n" + (f"index-url = {index}\n" if index else ""))
    words = ["build", "--isolation", "chroot", "--format", "docker", "--build-arg", f"PYTHON={base}"]
    words += ["--secret", f"id=pip,src={secret}", "--file", "deploy/docker/Dockerfile", "--target", "node"]
    _buildah(place, *words, "--tag", "localhost/fedclaw-node", ".")
    container = _buildah(place, "from", "localhost/fedclaw-node")
    found = json.loads(_buildah(place, "inspect", "--type", "image", "localhost/fedclaw-node"))
    yield Image(Path(_buildah(place, "mount", container)), found["Docker"]["config"])
    _buildah(place, "umount", container)


def test_it_says_how_it_is_to_be_run(node_image: Image):
    config = node_image.config
    assert config["User"] == f"{UID}:{UID}"
    assert config["Entrypoint"] == ["python", "-m", "fedclaw.serve"]
    assert config["Healthcheck"]["Test"][0] == "CMD"  # type: ignore[index]
    assert list(config["Volumes"]) == ["/var/lib/fedclaw"]  # type: ignore[call-overload]


def test_nothing_in_it_builds_and_nothing_gains_rights(node_image: Image):
    tools = ("gcc", "cc", "g++", "make", "ld", "pip", "pip3", "git")
    assert [one for one in tools for place in PATH.split(":") if (node_image.root / place[1:] / one).exists()] == []
    words = ["find", str(node_image.root), "-xdev", "-type", "f", "-perm", "/6000"]
    found = subprocess.run(words, capture_output=True, text=True)
    assert found.stdout == ""


def test_no_credential_of_the_build_is_in_it(node_image: Image):
    configured = node_image.root / "etc/pip.conf"
    assert not configured.exists() or configured.read_text() == ""
    assert "PIP" not in " ".join(node_image.config["Env"])  # type: ignore[arg-type]


_LOOK = """
import importlib, json, os
from pathlib import Path
def there(name):
    try:
        importlib.import_module(name)
    except ImportError:
        return False
    return True
def writes(path):
    try:
        Path(path, "tried").write_text("")
    except OSError:
        return False
    return True
modules = ("torch", "flwr", "opacus", "mlflow", "pip", "setuptools", "onnxruntime", "uvicorn", "grpc", "psycopg", "jwt")
places = ("/", "/opt/fedclaw", "/usr/local", "/etc", "/var/lib/fedclaw", "/tmp")
found = {"there": [m for m in modules if there(m)], "writes": [p for p in places if writes(p)]}
print(json.dumps({"uid": os.getuid(), **found}))
"""


def test_it_runs_as_nobody_and_writes_to_its_state_alone(node_image: Image, tmp_path: Path):
    done = node_image.run("python", "-c", _LOOK, mounted=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "uid": UID,
        "there": ["onnxruntime", "uvicorn", "grpc", "psycopg", "jwt"],
        "writes": ["/var/lib/fedclaw", "/tmp"],
    }


def test_it_is_small(node_image: Image):
    """Without PyTorch and what comes with it: 320 MB, not 2 GB."""
    files = [one.lstat().st_size for one in (node_image.root / "opt/fedclaw").rglob("*") if one.is_file()]
    assert sum(files) < 400 << 20


@pytest.fixture
def state(table_bundle: Path, home: FederationHome, tmp_path: Path) -> Path:
    """A bundle, the certificate of its CA, and a patient."""
    shutil.copytree(table_bundle, tmp_path / "bundle")
    shutil.copy(home.root / "ca.crt", tmp_path)
    (tmp_path / "patient.csv").write_text("age,smoker,ward\n63,yes,surgery\n")
    return tmp_path


def test_it_answers_from_a_signed_bundle(node_image: Image, state: Path):
    """Verified and answered with nothing but the image's own files."""
    words = ("python", "-m", "fedclaw.predict", "bundle=bundle", "ca=ca.crt", "input=patient.csv")
    done = node_image.run(*words, mounted=state)
    assert done.returncode == 0, done.stderr
    assert "benign" in done.stdout or "malignant" in done.stdout
