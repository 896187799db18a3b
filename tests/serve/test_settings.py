"""conf/serve.yaml and what a command line makes of it."""

from pathlib import Path

from fedclaw.cli import compose_settings
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
