"""The images: their recipe, what of this repository goes into them, and, where a builder is installed, the images."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.ports import free_port

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "deploy" / "docker" / "Dockerfile"
TARGETS = ("coordinator", "site", "node")
UID = 10001


def stages() -> dict[str, list[str]]:
    """The instructions of each stage, continued lines joined, comments left out."""
    text = re.sub(r"^#.*\n", "", DOCKERFILE.read_text(), flags=re.M).replace("\\\n", " ")
    found: dict[str, list[str]] = {}
    for line in filter(None, map(str.strip, text.splitlines())):
        if begun := re.match(r"FROM \S+ AS (\S+)$", line):
            found[begun[1]] = []
        if found:
            found[list(found)[-1]].append(line)
    return found


def _lint(path: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [Path(sys.executable).parent / "hadolint", "--strict-labels", "--failure-threshold", "style", path],
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_hadolint_has_nothing_to_say():
    done = _lint(DOCKERFILE)
    assert (done.returncode, done.stdout) == (0, "")


def test_hadolint_would(tmp_path: Path):
    (tmp_path / "Dockerfile").write_text(DOCKERFILE.read_text().replace("--no-index --wheel-dir", "&& cd / && ls"))
    assert "DL3003" in _lint(tmp_path / "Dockerfile").stdout


@pytest.mark.parametrize("target", TARGETS)
def test_the_last_stage_installs_nothing_and_is_nobody(target: str):
    lines = stages()[target]
    assert not [line for line in lines if line.startswith(("RUN", "ADD"))]
    assert f"USER {UID}:{UID}" in lines
    assert any(line.startswith("HEALTHCHECK") for line in lines)
    assert any(line.startswith('ENTRYPOINT ["') for line in lines)


def test_the_base_is_the_builders_to_name_by_digest():
    text = DOCKERFILE.read_text()
    bases = set(re.findall(r"^FROM (\S+)", text, re.M))
    assert bases == {"${PYTHON}", "build", "runtime"}
    assert "latest" not in text


def test_no_secret_is_an_argument_or_a_variable():
    """What an ARG or an ENV holds is in the image's history; credentials of a mirror are mounted while a step runs."""
    names = re.findall(r"^(?:ARG|ENV) (\w+)|^    (\w+)=", DOCKERFILE.read_text(), re.M)
    assert not [one for pair in names for one in pair if re.search(r"TOKEN|PASSWORD|SECRET|KEY", one)]
    steps = [line for lines in stages().values() for line in lines if line.startswith("RUN")]
    fetching = [line for line in steps if re.search(r"pip (install|wheel)|pip --python \S+ install", line)]
    assert fetching
    assert all("--mount=type=secret" in line or "--no-index" in line for line in fetching)


def _taken(path: str) -> bool:
    """Whether .dockerignore lets a path through; the last rule that fits decides (the rules used here alone)."""
    taken = True
    for rule in (ROOT / ".dockerignore").read_text().splitlines():
        if not rule or rule.startswith("#"):
            continue
        name = rule.removeprefix("!")
        pattern = re.escape(name).replace(r"\*\*/", "(.*/)?").replace(r"\*", "[^/]*")
        if re.fullmatch(rf"{pattern}(/.*)?", path):
            taken = rule.startswith("!")
    return taken


def test_nothing_goes_to_the_builder_but_what_it_copies():
    copied = {
        word.rstrip("/")
        for lines in stages().values()
        for line in lines
        if line.startswith("COPY") and "--from" not in line
        for word in line.split()[1:-1]
        if not word.startswith("--")
    }
    assert all(_taken(one) and (ROOT / one).exists() for one in copied)
    for secret in (
        ".git/config",
        "runs/demo/model.npz",
        "federation/keys/ca.key",
        "node/state.sqlite",
        "tests/conftest.py",
    ):
        assert not _taken(secret), secret
    assert not _taken("fedclaw/serve/__pycache__/app.cpython-312.pyc")


HEALTHY = ROOT / "deploy" / "docker" / "healthy.py"


def _asked(url: str) -> subprocess.CompletedProcess[str]:
    environment = {"FEDCLAW_HEALTH": url, "PATH": os.environ["PATH"]}
    words = [sys.executable, "-I", HEALTHY]
    return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=30)


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    """A web server of one file, `live`."""
    (tmp_path / "live").write_text("yes")
    port = free_port()
    words = [sys.executable, "-m", "http.server", "--bind", "127.0.0.1", "--directory", tmp_path, str(port)]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(200):
            if _asked(f"tcp://127.0.0.1:{port}").returncode == 0:
                break
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def test_a_service_that_answers_is_healthy(web: str):
    assert _asked(f"{web}/live").returncode == 0
    assert _asked(web.replace("http:", "tcp:")).returncode == 0


def test_one_that_does_not_is_not(web: str):
    assert _asked(f"{web}/gone").returncode == 1
    assert _asked(f"tcp://127.0.0.1:{free_port()}").returncode == 1
    assert _asked(f"https{web.removeprefix('http')}/live").returncode == 1


@pytest.mark.parametrize("url", ["https://192.0.2.1:8443/", "ftp://127.0.0.1:21/", "", "https://example.org/"])
def test_only_the_service_itself_is_asked(url: str):
    done = _asked(url)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
