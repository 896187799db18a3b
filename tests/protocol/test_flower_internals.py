"""Fails when Flower changes something that fedclaw/protocol/message_identity.py, or array_record in
fedclaw/protocol/records.py, relies on: look at those files then."""

import inspect

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Error, Message, RecordDict
from flwr.app.metadata import Metadata
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from fedclaw.protocol import message_identity
from fedclaw.protocol.records import array_record
from fedclaw.protocol.refusal import RefusalCode

ENVELOPE = message_identity.Envelope(
    run_id=3,
    message_id="m",
    reply_to_message_id="r",
    src_node_id=1,
    dst_node_id=2,
    group_id="g",
    message_type="train",
    created_at=12.5,
    ttl=60.0,
)


def test_the_identity_that_messages_read_is_settable():
    message_identity.assume_server_identity(41)
    assert (TaskIdentity.run_id, TaskIdentity.node_id) == (41, message_identity.SERVER_NODE_ID)
    message = Message(RecordDict(), dst_node_id=5, message_type="train")
    assert message.metadata.run_id == 41
    assert message.metadata.src_node_id == message_identity.SERVER_NODE_ID
    assert message.metadata.message_id == ""


def test_metadata_has_exactly_the_fields_that_an_envelope_carries():
    parameters = set(inspect.signature(Metadata.__init__).parameters) - {"self", "src_task_id", "dst_task_id"}
    assert parameters == set(message_identity.Envelope.__dataclass_fields__)


@pytest.mark.parametrize("content", [RecordDict(), Error(4, "no")])
def test_a_message_survives_the_wire(content):
    message = message_identity.rebuild(ENVELOPE, content)
    assert message_identity.envelope_of(message) == ENVELOPE
    assert message.has_error() == isinstance(content, Error)
    assert (message.error if message.has_error() else message.content) == content
    assert message.metadata.delivered_at == ""


def test_a_message_id_can_be_assigned():
    message_identity.assume_server_identity(1)
    message = Message(RecordDict(), dst_node_id=5, message_type="train")
    assert message_identity.assign_message_id(message, "fixed") == "fixed"
    assert message.metadata.message_id == "fixed"
    assert message_identity.assign_message_id(message) == "fixed"
    other = Message(RecordDict(), dst_node_id=5, message_type="train")
    assert len(message_identity.assign_message_id(other)) == 32


def test_a_reply_refers_to_its_message():
    message = message_identity.rebuild(ENVELOPE, RecordDict())
    reply = Message(RecordDict(), reply_to=message)
    assert reply.metadata.reply_to_message_id == "m"
    assert (reply.metadata.src_node_id, reply.metadata.dst_node_id) == (2, 1)
    assert reply.metadata.group_id == "g"
    assert reply.metadata.run_id == 3


def test_expiry_follows_creation_and_ttl():
    message = message_identity.rebuild(ENVELOPE, RecordDict())
    assert message_identity.expires_at(message) == 72.5


def test_an_empty_run_can_be_made():
    run = message_identity.empty_run(9)
    assert isinstance(run, Run)
    assert run.run_id == 9


def test_the_grid_has_the_methods_that_are_implemented():
    assert Grid.__abstractmethods__ == {
        "create_message",
        "get_node_ids",
        "pull_messages",
        "push_messages",
        "run",
        "send_and_receive",
        "set_run",
    }


def test_a_record_made_at_once_is_the_one_that_flower_makes():
    arrays = {"a": Array(np.arange(3.0)), "b": Array(np.ones((2, 2), np.float32))}
    assert array_record(arrays) == ArrayRecord(arrays)


def test_numbers_of_names_are_stable_and_positive():
    assert message_identity.number_of("site-a") == message_identity.number_of("site-a")
    assert 0 < message_identity.number_of("site-a") < 2**63
    assert message_identity.number_of("site-a") != message_identity.number_of("site-b")


def test_the_errors_that_flower_answers_in_place_of_a_node():
    assert {ErrorCode.MESSAGE_UNAVAILABLE, ErrorCode.REPLY_MESSAGE_UNAVAILABLE, ErrorCode.NODE_UNAVAILABLE} == {3, 4, 5}
    assert sorted(message_identity.SILENT) == [3, 4, 5]
    assert min(RefusalCode) > max(vars(ErrorCode)[name] for name in vars(ErrorCode) if name.isupper())
