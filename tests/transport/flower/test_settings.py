"""What a run's configuration says, and what it may not say."""

import pytest

from fedclaw.errors import UsageError
from fedclaw.protocol.terms import LocalTraining
from fedclaw.transport.flower.server import read_settings

LEAST = {"federation": "clinic", "runs": "/srv/fed claw/runs"}


def test_each_key_is_a_setting_and_the_rest_a_command_line():
    settings = read_settings(
        {
            **LEAST,
            "rounds": 7,
            "strategy": "fedprox",
            "training.learning_rate": 0.25,
            "workload.schema_file": '/srv/a "b" $c/schema.yaml',
            "run": "",
            "resume": "",
            "settings": "strategy.mu=0.5 privacy=none 'training.steps=3' training.epochs=null sites.minimum=4",
        }
    )
    assert (settings.federation, str(settings.runs), settings.rounds) == ("clinic", "/srv/fed claw/runs", 7)
    assert str(settings.workload.schema_file) == '/srv/a "b" $c/schema.yaml'
    assert settings.strategy["name"] == "fedprox"
    assert settings.strategy["mu"] == 0.5
    assert settings.privacy is None
    assert isinstance(settings.training, LocalTraining)
    assert (settings.training.steps, settings.training.learning_rate) == (3, 0.25)
    assert settings.sites.minimum == 4
    assert settings.run is None
    assert settings.resume is None


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"runs": "runs"}, "runs=runs is not absolute"),
        ({"resume": "runs/one"}, "resume=runs/one is not absolute"),
        ({"workload.schema_file": "schema.yaml"}, "workload.schema_file=schema.yaml is not absolute"),
        ({"federation": ""}, "federation= is missing"),
        ({"no_such_setting": 3}, "no_such_setting"),
        ({"settings": "rounds=0"}, "rounds"),
        ({"settings": "name='unfinished"}, "cannot be read as a command line"),
    ],
)
def test_what_is_wrong_is_said(changes, problem):
    with pytest.raises(UsageError, match=problem):
        read_settings({**LEAST, **changes})
