"""Tasks out, replies back, over real sockets: delivery, streaming, timeouts, resumption of sites."""

import time

import numpy as np
import pytest
from flwr.app import Message

from fedclaw.errors import ConnectionRefused, TransportError
from fedclaw.runtime.flower import assign_message_id
from fedclaw.runtime.grpc import Limits


def test_a_reply_comes_back_from_every_site_with_the_same_content(kit):
    grid = kit.grid()
    names = ["site-a", "site-b", "site-c"]
    for name in names:
        kit.link(name, grid.port)
    assert grid.wait_for_sites(3, 20) == tuple(names)
    body = kit.content(1000)
    messages = [kit.message(name, body) for name in names]

    replies = list(grid.send_and_receive(messages, timeout=20))

    assert sorted(grid.site_name(reply.metadata.src_node_id) for reply in replies) == names
    assert {reply.metadata.reply_to_message_id for reply in replies} == {m.metadata.message_id for m in messages}
    for reply in replies:
        np.testing.assert_array_equal(reply.content["arrays"]["w"].numpy(), body["arrays"]["w"].numpy())
        assert reply.content["metrics"]["n"] == 3
        assert reply.content["config"]["a"] == "b"
        assert reply.metadata.group_id == "1"
        assert reply.metadata.run_id == kit.RUN_ID


def test_messages_of_many_chunks_travel_both_ways(kit):
    grid = kit.grid()
    kit.link("site-a", grid.port)
    grid.wait_for_sites(1, 20)
    body = kit.content(2_500_000)

    (reply,) = grid.send_and_receive([kit.message("site-a", body)], timeout=30)

    assert reply.content["arrays"]["w"].data == body["arrays"]["w"].data
