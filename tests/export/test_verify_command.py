import re
import shutil
import subprocess
from pathlib import Path

import pytest

from fedclaw.export import layout


def test_prints_what_is_proved_and_what_is_not(command, bundle, home):
    loose = command("fedclaw.verify", str(bundle))
    assert loose.returncode == 0
    assert loose.stdout.startswith(f"verified  {bundle}")
    assert "proves only that the bundle is whole" in loose.stdout
    assert "signature OpenSSF Model Signing 1.0 (model.sig)\n" in loose.stdout
    pinned = command("fedclaw.verify", str(bundle), f"ca={home.root / 'ca.crt'}")
    assert pinned.returncode == 0
    assert "this is the CA that you gave" in pinned.stdout
    assert "only" not in pinned.stdout


@pytest.mark.parametrize("commit", ["437d1ac", "8eca11f"])
def test_says_of_an_older_bundle_how_it_is_signed(command, commit):
    past = Path(__file__).parents[1] / "past" / commit
    result = command("fedclaw.verify", str(past / "runs/local/bundle"), f"ca={past / 'federation/ca.crt'}")
    assert result.returncode == 0, result.stderr
    assert "signature over SHA256SUMS, as in bundles of format 1 (SHA256SUMS.sig)\n" in result.stdout


@pytest.mark.parametrize("where", ["", "federation.json"])
def test_trusts_the_ca_of_a_descriptor(command, bundle, home, stranger, where):
    assert command("fedclaw.verify", str(bundle), f"federation={home.root / where}").returncode == 0
    refused = command("fedclaw.verify", str(bundle), f"federation={stranger.root / where}")
    assert refused.returncode == 1
    assert "ca.crt is not the CA that you trust" in refused.stderr


def test_what_a_stranger_named_cannot_speak_to_the_terminal(command, tmp_path):
    (tmp_path / "\x1b[2J").mkdir()
    refused = command("fedclaw.verify", str(tmp_path / "\x1b[2J"))
    assert refused.returncode == 1
    assert "?[2J is not a bundle" in refused.stderr


def test_a_changed_file_is_one_line_and_exit_1(command, bundle):
    with (bundle / layout.PRIVACY).open("a") as file:
        file.write(" ")
    result = command("fedclaw.verify", str(bundle))
    assert (result.returncode, result.stdout) == (1, "")
    assert re.fullmatch(r"fedclaw\.verify: privacy\.json .* was changed: .*\n", result.stderr)


def test_checks_a_revocation_list(command, bundle, home):
    assert command("fedclaw.verify", str(bundle), f"crl={home.root / 'revoked.crl'}").returncode == 0


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "name one bundle"),
        (["a", "b"], 2, "name one bundle"),
        (["nowhere"], 2, "nowhere is not a bundle: there is no such directory"),
        (["nowhere", "ca=missing.crt"], 2, "ca=missing.crt cannot be read"),
        (["nowhere", "ca=a", "federation=b"], 2, "not both"),
        (["nowhere", "expired=perhaps"], 2, "expired: Input should be 'accept' or 'refuse'"),
        (["nowhere", "--force"], 2, "unknown option --force"),
    ],
)
def test_mistakes_get_one_clear_line(command, arguments, code, message):
    result = command("fedclaw.verify", *arguments)
    assert result.returncode == code
    assert message in result.stderr.splitlines()[0]
    assert "Traceback" not in result.stderr


def published_commands(bundle):
    text = (bundle / layout.HOW_TO_VERIFY).read_text()
    block = re.search(r"```bash\n(.*?)```", text, re.DOTALL)
    assert block is not None
    return block.group(1)


def run_published(bundle):
    line = [shutil.which("bash"), "-c", published_commands(bundle)]
    return subprocess.run(line, cwd=bundle, capture_output=True, text=True, check=False)


def test_openssl_and_sha256sum_agree_by_the_published_commands(bundle, home, command):
    result = run_published(bundle)
    assert result.returncode == 0, result.stderr
    assert "Verified OK" in result.stdout
    assert result.stdout.count(": OK") == 1 + len({path.name for path in bundle.iterdir()} - layout.UNSIGNED)
    assert "Code Signing" in result.stdout
    assert "URI:fedclaw://test-federation/release" in result.stdout
    fingerprint = command("fedclaw.verify", str(bundle)).stdout.partition("certificate SHA-256 ")[2].split()[0]
    assert f"={fingerprint}" in result.stdout
    assert fingerprint in (bundle / layout.HOW_TO_VERIFY).read_text()


@pytest.mark.parametrize("name", [layout.ONNX, layout.DIGESTS, layout.SIGNATURE, layout.CA_CERTIFICATE])
def test_openssl_and_sha256sum_find_a_changed_byte(bundle, name):
    commands = published_commands(bundle)
    content = bytearray((bundle / name).read_bytes())
    content[len(content) // 2] ^= 1
    (bundle / name).write_bytes(content)
    line = [shutil.which("bash"), "-c", commands]
    assert subprocess.run(line, cwd=bundle, capture_output=True, check=False).returncode != 0
