"""PKCS#11 tokens of SoftHSM2, made for one test session."""

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

MODULES = tuple(
    Path(root) / "softhsm" / "libsofthsm2.so" for root in ("/usr/lib", "/usr/local/lib", "/usr/lib/x86_64-linux-gnu")
)
PIN = "4711-0815"


@dataclass(frozen=True)
class Token:
    """A token, and what a process needs to reach it."""

    label: str
    module: Path
    pin: Path
    environment: dict[str, str]

    def uri(self, name: str, **query: str) -> str:
        """The PKCS#11 URI of the object called `name`."""
        asked = {"module-path": str(self.module), "pin-source": f"file:{self.pin}", **query}
        return f"pkcs11:token={self.label};object={name}?" + "&".join(f"{key}={value}" for key, value in asked.items())


def make_token(directory: Path, label: str = "fedclaw") -> Token:
    """A fresh token in `directory`. Skips the test where SoftHSM2 is not installed."""
    module = next((path for path in MODULES if path.is_file()), None)
    tool = shutil.which("softhsm2-util")
    if module is None or tool is None:
        pytest.skip("SoftHSM2 is not installed (Debian: apt-get install softhsm2)")
    store = directory / "tokens"
    store.mkdir(parents=True)
    configuration = directory / "softhsm2.conf"
    configuration.write_text(f"directories.tokendir = {store}\nobjectstore.backend = file\nlog.level = ERROR\n")
    environment = {"SOFTHSM2_CONF": str(configuration)}
    given = ["--init-token", "--free", "--label", label, "--pin", PIN, "--so-pin", "12345678"]
    subprocess.run([tool, *given], check=True, capture_output=True, env=os.environ | environment)
    pin = directory / "pin"
    pin.touch(0o600)
    pin.write_text(PIN + "\n")
    return Token(label, module, pin, environment)
