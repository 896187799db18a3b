"""A message names settings as values: commands read them as they write them, others in their own words."""

import pickle

import pytest
from pydantic import ValidationError

from fedclaw.errors import Reason, Setting, UsageError
from fedclaw.protocol.frozen import explain
from fedclaw.protocol.terms import LocalTraining


def test_a_reason_is_text_in_the_commands_words():
    reason = Reason("needs more sites: set ", Setting("sites.minimum"), " or take ", Setting("privacy", "dp"))
    assert reason == "needs more sites: set sites.minimum or take privacy=dp"
    assert reason.said(lambda setting: f"<{setting.path}>") == "needs more sites: set <sites.minimum> or take <privacy>"


def test_an_error_made_of_reasons_keeps_their_settings():
    error = UsageError("strategy 'a' ", Reason("sends {x}; take ", Setting("secure", "none")))
    assert str(error) == "strategy 'a' sends {x}; take secure=none"
    assert error.said(lambda setting: setting.path.upper()) == "strategy 'a' sends {x}; take SECURE"
    sent = pickle.loads(pickle.dumps(error))
    assert (type(sent), str(sent), sent.said(str)) == (UsageError, str(error), str(error))


def wrong(**fields):
    with pytest.raises(ValidationError) as raised:
        LocalTraining(batch_size=8, learning_rate=1, **{"epochs": 1, **fields})
    return raised.value


def test_a_wrong_field_is_named_in_the_words_asked_for():
    assert explain(wrong(momentum=2), words=lambda setting: f"<{setting.path}>").startswith("<momentum>: ")
    both = wrong(steps=1)
    assert explain(both) == "set exactly one of epochs and steps"
    assert explain(both, words=lambda setting: f"<{setting.path}>") == "set exactly one of <epochs> and <steps>"
