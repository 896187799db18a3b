"""conf/serve.yaml and what a command line makes of it."""

from pathlib import Path

import pytest

from fedclaw.cli import compose_settings
from fedclaw.errors import UsageError
from fedclaw.serve.publish import AdminClient
from fedclaw.serve.settings import NodeSettings

ALONE = ("tls.disabled=true", "tokens.disabled=true")


def test_several_models_are_given_on_the_command_line():
    given = "models={heart: {versions: [{bundle: /a, name: old}, {bundle: /b}]}, ecg: {bundle: /c, pinned: false}}"
    settings = compose_settings("serve", [given, *ALONE], NodeSettings)
    assert [(one.bundle, one.name) for one in settings.models["heart"].listed] == [
        (Path("/a"), "old"),
        (Path("/b"), None),
    ]
    assert [one.bundle for one in settings.models["ecg"].listed] == [Path("/c")]
    assert not settings.models["ecg"].pinned
    assert compose_settings("serve", ALONE, NodeSettings).models == {}


@pytest.mark.parametrize(
    "given",
    [
        ("port=18001", "grpc_port=18001"),
        ("port=18001", "admin.port=18001"),
        ("grpc_port=18001", "admin.port=18001", "admin.host=0.0.0.0"),
    ],
)
def test_a_port_that_two_services_would_share_is_refused(given):
    tokens = ("tls.certificate=a", "tls.private_key=b", "tokens.jwks=c", "tokens.issuer=d", "tokens.audience=e")
    with pytest.raises(UsageError, match="are both 18001"):
        compose_settings("serve", [*given, *tokens], NodeSettings)


def test_free_ports_and_addresses_of_their_own_are_no_conflict():
    given = ("port=0", "grpc_port=0", "admin.port=0")
    assert compose_settings("serve", [*given, *ALONE], NodeSettings).port == 0
    given = ("port=18001", "admin.port=18001", "admin.host=::1")
    assert compose_settings("serve", [*given, *ALONE], NodeSettings).admin.port == 18001


@pytest.mark.parametrize(
    "node", ["127.0.0.1:9443", "https://node", "https://node:port", "https://[node:9443", "ftp://node:9"]
)
def test_an_address_that_is_no_admin_port_is_wrong_use(node):
    with pytest.raises(UsageError, match="give the address of an admin port"):
        AdminClient(node, "token", None)
