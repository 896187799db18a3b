"""conf/serve.yaml and what a command line makes of it."""

from pathlib import Path

import pytest

from fedclaw.cli import compose_settings
from fedclaw.errors import UsageError
from fedclaw.serve.publish import AdminClient
from fedclaw.serve.routing.plan import BreakerPolicy, Guards
from fedclaw.serve.settings import NodeSettings, ReleaseSettings

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


def test_releases_and_breakers_are_set_by_the_names_of_a_plans_fields():
    settings = compose_settings("serve", ALONE, NodeSettings)
    assert (settings.release, settings.breaker) == (ReleaseSettings(), BreakerPolicy())
    assert settings.release.guards == Guards(disagreement=0.02)
    given = ("release.steps=[0.2,1]", "release.guards={least_keys: 20, disagreement: null}", "breaker.threshold=0.1")
    settings = compose_settings("serve", [*given, *ALONE], NodeSettings)
    assert settings.release.steps == (0.2, 1.0)
    assert settings.release.guards == Guards(least_keys=20)
    assert settings.breaker == BreakerPolicy(threshold=0.1)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("release.steps=[0.5,0.1,1]", "release.steps: shares must rise and end at 1, as [0.05, 0.1"),
        ("release.steps=[0.05,0.5]", "release.steps: shares must rise and end at 1"),
        ("release.steps=[]", "release.steps: Tuple should have at least 1 item"),
        ("release.steps=[0,1]", "release.steps.0: Input should be greater than 0"),
        ("release.steps=[true,1]", "release.steps.0: Input should be a number, not yes"),
        ("release.guards.alpha=0", "release.guards.alpha: Input should be greater than 0"),
        ("release.guards.least_keys=0", "release.guards.least_keys: Input should be greater than or equal to 1"),
        ("release.guards.disagreement=1", "release.guards.disagreement: Input should be less than 1"),
        ("+release.guards.colour=red", "release.guards.colour: Extra inputs are not permitted"),
        ("breaker.threshold=2", "breaker.threshold: Input should be less than or equal to 1"),
        ("breaker.longest_wait=1", "breaker: longest_wait must not be shorter than wait"),
    ],
)
def test_a_release_or_breaker_that_cannot_be_is_refused_in_a_sentence(given: str, words: str):
    with pytest.raises(UsageError) as refused:
        compose_settings("serve", [given, *ALONE], NodeSettings)
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "node", ["127.0.0.1:9443", "https://node", "https://node:port", "https://[node:9443", "ftp://node:9"]
)
def test_an_address_that_is_no_admin_port_is_wrong_use(node):
    with pytest.raises(UsageError, match="give the address of an admin port"):
        AdminClient(node, "token", None)
