"""An error reaches a notebook in its own words, and without the frames that it came through."""

import traceback

import numpy as np
import pytest

import fedclaw
from fedclaw.api.arguments import argument, public
from fedclaw.errors import Reason, Setting, UsageError
from tests.api.conftest import Net, examples


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        (Setting("privacy", "dp"), "fedclaw.LocalPrivacy(...)"),
        (Setting("training.optimizer", "sgd"), "optimizer='sgd'"),
        (Setting("training.epochs"), "local_epochs"),
        (Setting("privacy.max_grad_norm"), "clip"),
        (Setting("partition.shards", 2), "shards=2"),
    ],
)
def test_a_setting_is_called_as_the_caller_writes_it(setting, words):
    assert argument(setting) == words


def test_an_error_is_translated_and_its_kind_kept():
    @public
    def refuses():
        raise UsageError("a strategy ", Reason("cannot do with ", Setting("training.steps", 3), "; 3 {steps}"))

    with pytest.raises(UsageError, match=r"^a strategy cannot do with local_steps=3; 3 \{steps\}$"):
        refuses()


def test_another_exception_passes_as_it_is():
    @public
    def fails():
        raise KeyError("steps")

    with pytest.raises(KeyError) as raised:
        fails()
    assert [frame.name for frame in traceback.extract_tb(raised.tb)][-1] == "fails"


@pytest.mark.parametrize(
    "ask",
    [
        lambda: fedclaw.Federation.from_arrays(np.ones((4, 2)), [0, 1], clients=2),
        lambda: fedclaw.simulate(
            fedclaw.Federation.from_arrays(*examples(), clients=3), Net, rounds=1, learning_rate=1, strategy="fedbuff"
        ),
        lambda: fedclaw.read_run("nowhere"),
        lambda: fedclaw.read_ledger("nowhere"),
        lambda: fedclaw.read_bundle("nowhere"),
    ],
)
def test_a_mistake_shows_one_frame_of_ours_and_no_cause(ask):
    with pytest.raises(fedclaw.FedClawError) as raised:
        ask()
    text = "".join(traceback.format_exception(raised.value))
    assert text.count("/fedclaw/api/") == 1, text
    assert "fedclaw/server" not in text
    assert "During handling" not in text
    assert "direct cause" not in text
