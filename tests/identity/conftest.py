"""A real federation of one site, made once a test."""

import datetime as dt
from collections.abc import Callable
from pathlib import Path

import pytest

from fedclaw.identity import pki
from fedclaw.identity.federation_home import FederationHome
from fedclaw.identity.provisioning import accept, approve, initialise, request_site


@pytest.fixture
def home(tmp_path: Path) -> FederationHome:
    return initialise(tmp_path / "federation", "heart", "127.0.0.1:9443")


@pytest.fixture
def site(home: FederationHome, tmp_path: Path) -> Path:
    """The directory of hospital-a, a full member."""
    root = tmp_path / "hospital-a"
    accept(root, approve(home.root, request_site(root, home.root / "federation.json", "hospital-a")))
    return root


@pytest.fixture
def days_pass(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Move the present of `fedclaw.identity` forward by so many days."""
    present = pki.now

    def move(days: float) -> None:
        monkeypatch.setattr(pki, "now", lambda: present() + dt.timedelta(days=days))

    return move
