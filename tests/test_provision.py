"""`python -m fedclaw.provision` as people use it: real processes, their output, exit codes and files."""

import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from fedclaw.errors import FedClawError, ProvisionError, UsageError
from fedclaw.identity.federation_home import FederationHome
from fedclaw.identity.pki import host_names, parse_certificate
from fedclaw.identity.provisioning import accept, approve, initialise, request_site
from fedclaw.identity.site_home import SiteKeys
from fedclaw.provision import main
from tests import warm

INIT = ("init", "federation=heart", "name=heart", "address=127.0.0.1:9443")
REQUEST = ("request", "site=a", "name=hospital-a", "descriptor=heart/federation.json")
APPROVE = ("approve", "federation=heart", "request=a/keys/site.csr")
INSTALL = ("install", "site=a", "certificate=heart/sites/hospital-a.crt")


def run(*arguments: str) -> str:
    """Run one command in this process; what it printed."""
    console = Console(width=100, soft_wrap=True, highlight=False, force_terminal=False)
    with console.capture() as capture:
        main(arguments, console)
    return capture.get()


def process(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    words = ["-m", "fedclaw.provision", *arguments]
    return warm.run(words, cwd=directory, env={**os.environ, "FEDCLAW_LOG": "DEBUG"}, timeout=60)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A federation in heart/ whose only site is in a/."""
    root = tmp_path_factory.mktemp("template")
    home = initialise(root / "heart", "heart", "127.0.0.1:9443")
    accept(root / "a", approve(home.root, request_site(root / "a", home.root / "federation.json", "hospital-a")))
    return root


@pytest.fixture
def member(place: Path, template: Path) -> Path:
    """A copy of the template in the current directory."""
    shutil.copytree(template, place, dirs_exist_ok=True)
    return place


def test_from_nothing_to_a_member_in_real_processes(tmp_path: Path) -> None:
    output = ""
    for command in (INIT, REQUEST, APPROVE, INSTALL, ("show", "federation=heart"), ("show", "site=a")):
        done = process(tmp_path, *command)
        assert done.returncode == 0, done.stderr
        output += done.stdout + done.stderr
    assert SiteKeys.open(tmp_path / "a").site_name == "hospital-a"
    assert "Traceback" not in output
    secrets = list(tmp_path.rglob("*.key"))
    assert len(secrets) == 5
    public = [path for path in tmp_path.rglob("*") if path.is_file() and path not in secrets]
    for path in secrets:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        for secret in secret_lines(path):
            assert secret not in output
            assert all(secret not in item.read_text() for item in public)


def secret_lines(path: Path) -> list[str]:
    if path.name == "seal.key":
        return [json.loads(path.read_text())["private_key"]]
    return [line for line in path.read_text().splitlines() if not line.startswith("-----")]


@pytest.mark.parametrize(
    ("arguments", "code", "line"),
    [
        ((), 2, "give one command of init, request"),
        (("init", "--force"), 2, "unknown option --force"),
        (("init", "federation=heart"), 2, "init needs address=... name=..."),
        (("approve", "federation=nothing", "request=x"), 2, "is not a federation directory"),
    ],
)
def test_a_mistake_is_one_line_and_a_code(tmp_path: Path, arguments: tuple[str, ...], code: int, line: str) -> None:
    done = process(tmp_path, *arguments)
    assert done.returncode == code
    assert line in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == code
    assert list(tmp_path.iterdir()) == []


def test_help_shows_every_command(tmp_path: Path) -> None:
    done = process(tmp_path, "--help")
    assert done.returncode == 0
    for word in ("init", "request", "approve", "install", "renew", "revoke", "show"):
        assert f"fedclaw.provision {word} " in done.stdout


def test_killed_init_leaves_no_half_federation(tmp_path: Path) -> None:
    """Killed without warning while it writes: the directory is absent, and the next init succeeds."""
    script = (
        "import os, pathlib\n"
        "from fedclaw.identity import provisioning\n"
        "provisioning.save_seal_key = lambda *_: os.kill(os.getpid(), 9)\n"
        "provisioning.initialise(pathlib.Path('heart'), 'heart', '127.0.0.1:1')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "heart").exists()
    for left in tmp_path.iterdir():
        assert left.name.startswith(".heart.")
        assert stat.S_IMODE(left.stat().st_mode) == 0o700
    assert process(tmp_path, *INIT).returncode == 0
    FederationHome.open(tmp_path / "heart").opener()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("init", "federation=h", "name=Heart", "address=a:1"), "'Heart' cannot be used"),
        (("init", "federation=h", "name=../h", "address=a:1"), "cannot be used"),
        (("init", "federation=h", "name=h", "address=a"), "is not HOST:PORT"),
        (("init", "federation=h", "name=h", "address=0.0.0.0:1"), "where to listen"),
        (("init", "federation=h", "name=h", "address=a:1", "seal=rsa"), "seal: Input should be 'x25519'"),
        (("init", "federation=h", "name=h", "address=a:1", "days=0"), "days: Input should be greater"),
        (("init", "federation=h", "name=h", "address=a:1", "days=4000"), "days: Input should be less"),
        (("init", "federation=h", "name=h", "address=a:1", "color=red"), "color"),
        (("init", "federation=h", "name=h", "address=a:1", "rotate=true"), "init does not take rotate"),
        (("init", "federation=h", "name=null", "address=a:1"), "null"),
        (("show",), "show needs exactly one of"),
        (("show", "federation=heart", "site=a"), "show needs exactly one of"),
        (("renew", "federation=heart", "site=a"), "renew needs exactly one of"),
        (("renew", "federation=heart", "rotate=true"), "rotate=true is for sites"),
        (("revoke", "federation=heart", "site=b"), "no site called 'b'"),
        (("revoke", "federation=heart", "site=../b"), "cannot be used"),
        (("request", "site=b", "name=a/b", "descriptor=heart/federation.json"), "cannot be used"),
        (("destroy", "federation=heart"), "give one command"),
        (("show", "init", "federation=heart"), "give one command"),
    ],
)
def test_wrong_use(member: Path, arguments: tuple[str, ...], message: str) -> None:
    before = sorted(member.rglob("*"))
    with pytest.raises(UsageError, match=re.escape(message)):
        run(*arguments)
    assert sorted(member.rglob("*")) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (INIT, "never overwritten"),
        (REQUEST, "has a certificate already"),
        (("request", "site=b", "name=b", "descriptor=nothing.json"), "nothing.json is missing"),
        (("request", "site=b", "name=b", "descriptor=heart/ca.crt"), "is not a federation descriptor"),
        (("approve", "federation=heart", "request=nothing.csr"), "nothing.csr is missing"),
        (("approve", "federation=heart", "request=heart/ca.crt"), "is not a certificate request"),
        (("approve", "federation=heart", "request=a/keys/site.csr", "fingerprint=ab-cd"), "do not approve it"),
        (("install", "site=a", "certificate=heart/server.crt"), "is not a site certificate"),
        (("install", "site=a", "certificate=a/keys/site.csr"), "is not a PEM certificate"),
        (("install", "site=a", "certificate=heart"), "Is a directory"),
        (("show", "site=nothing"), "is missing"),
        (("renew", "site=nothing"), "is missing"),
    ],
)
def test_failures(member: Path, arguments: tuple[str, ...], message: str) -> None:
    before = sorted(member.rglob("*"))
    with pytest.raises(ProvisionError, match=re.escape(message)) as caught:
        run(*arguments)
    assert "\n" not in str(caught.value)
    assert sorted(member.rglob("*")) == before


def test_each_step_names_the_next(place: Path) -> None:
    assert "hand heart/federation.json to the sites" in run(*INIT)
    requested = run(*REQUEST)
    assert "send a/keys/site.csr to the coordinator" in requested
    assert "install site=a certificate=FILE" in requested
    approved = run(*APPROVE)
    assert "send heart/sites/hospital-a.crt to the site" in approved
    fingerprints = [re.findall(r"Key fingerprint: (\S+)", text) for text in (requested, approved)]
    assert fingerprints[0] == fingerprints[1] != []
    assert "python -m fedclaw.client site=a" in run(*INSTALL)


def test_both_sides_show_the_same_ca_fingerprint(member: Path) -> None:
    shown = [run("show", "federation=heart"), run("show", "site=a")]
    found = {re.search(r"CA fingerprint: (\S+)", text).group(1) for text in shown}  # type: ignore[union-attr]
    assert len(found) == 1


def test_fingerprints_guard_both_ways(place: Path) -> None:
    ca = re.search(r"CA fingerprint: (\S+)", run(*INIT)).group(1)  # type: ignore[union-attr]
    key = re.search(r"Key fingerprint: (\S+)", run(*REQUEST, f"fingerprint={ca}")).group(1)  # type: ignore[union-attr]
    assert "If it differs" not in run(*APPROVE, f"fingerprint={key}")


def test_show(member: Path) -> None:
    text = run("show", "federation=heart")
    for word in ("heart federation CA", "127.0.0.1", "heart release", "hospital-a", "valid", "x25519"):
        assert word in text
    assert "expire" not in text.replace("expires", "", 1)
    run("renew", "federation=heart", "days=5")
    text = run("show", "federation=heart")
    assert "expires soon" in text
    assert "expires in 5 days: python -m fedclaw.provision renew federation=heart" in text
    run("revoke", "federation=heart", "site=hospital-a")
    assert "revoked" in run("show", "federation=heart")


def test_show_fits_a_narrow_terminal(member: Path) -> None:
    """A fingerprint that is cut short is worse than none."""
    fingerprint = run("show", "site=a")
    console = Console(width=80, force_terminal=False, highlight=False)
    with console.capture() as capture:
        main(("show", "federation=heart"), console)
    parts = re.findall(r"(?:[0-9a-f]{4}-){7}[0-9a-f]{4}", fingerprint)
    assert all(part in capture.get() for part in parts[-2:])


def test_show_of_a_waiting_site(place: Path) -> None:
    run(*INIT)
    run(*REQUEST)
    text = run("show", "site=a")
    assert "waiting" in text
    assert "send a/keys/site.csr to the coordinator" in text


@pytest.mark.parametrize("rotate", ["false", "true"])
def test_renewal_by_command(member: Path, rotate: str) -> None:
    before = SiteKeys.open(member / "a")
    assert "goes on with its present certificate" in run("renew", "site=a", f"rotate={rotate}")
    run(*APPROVE, "days=30")
    run(*INSTALL)
    after = SiteKeys.open(member / "a")
    assert after.certificate.serial_number != before.certificate.serial_number
    assert (after.tls().key == before.tls().key) == (rotate == "false")


def test_revocation_by_command(member: Path) -> None:
    serial = SiteKeys.open(member / "a").certificate.serial_number
    assert "Revoked hospital-a (1 certificate)" in run("revoke", "federation=heart", "site=hospital-a")
    assert FederationHome.open(member / "heart").is_revoked(serial)
    assert "nothing changed" in run("revoke", "federation=heart", "site=hospital-a")


def test_the_hybrid_suite_by_command(place: Path) -> None:
    run(*INIT, "seal=mlkem768-x25519")
    home = FederationHome.open(place / "heart")
    assert home.descriptor.seal_suite == "mlkem768-x25519"
    home.opener()


def test_copied_descriptor_is_all_a_site_needs(place: Path) -> None:
    """The site never sees the federation's directory."""
    run(*INIT)
    (place / "mail").mkdir()
    shutil.copy("heart/federation.json", "mail")
    run("request", "site=a", "name=hospital-a", "descriptor=mail/federation.json")
    shutil.copy("a/keys/site.csr", "mail")
    run("approve", "federation=heart", "request=mail/site.csr")
    shutil.copy("heart/sites/hospital-a.crt", "mail")
    (place / "heart").rename("elsewhere")
    run("install", "site=a", "certificate=mail/hospital-a.crt")
    SiteKeys.open(place / "a")


def test_errors_are_fedclaw_errors(member: Path) -> None:
    """An operating-system error becomes one line too."""
    (member / "b").write_text("a file where a directory should be")
    with pytest.raises(FedClawError, match="b"):
        run("request", "site=b", "name=b", "descriptor=heart/federation.json")


def test_the_servers_further_addresses_are_given_and_kept(place: Path) -> None:
    run(*INIT, "addresses=[10.0.0.5,server.internal]")
    run("renew", "federation=heart")
    names = host_names(parse_certificate((place / "heart" / "server.crt").read_bytes(), "it"))
    assert {"127.0.0.1", "10.0.0.5", "server.internal"} <= set(names)
    with pytest.raises(UsageError, match="renew federation=DIR takes them"):
        run("renew", "site=a", "addresses=[x]")
    with pytest.raises(UsageError, match="approve does not take addresses"):
        run(*APPROVE, "addresses=[x]")
