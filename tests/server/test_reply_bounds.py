"""What a question says that its answer has at most: every real answer is within it, and nothing much larger is."""

import pytest
from flwr.app import Message

from fedclaw.protocol.messages import HEADER_BYTES
from fedclaw.protocol.records import MessageRecords
from fedclaw.server.coordinator import run_rounds
from fedclaw.server.run_directory import RunDirectory
from fedclaw.server.session import initial_parameters
from fedclaw.transport.grpc.message_codec import encode
from fedclaw.transport.in_process import LocalGrid
from tests.learning.test_compressed_runs import METHODS, SECURE, directories, record, sites, with_

__all__ = ["directories", "record", "sites"]
MODEL_BYTES = 4 * (30 * 24 + 24 + 24 + 1)


class Measuring(LocalGrid):
    """Holds each answer against its question's bound."""

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)  # type: ignore[arg-type]
        self.seen: list[tuple[str, int, int]] = []

    def _answer(self, message: Message) -> Message:
        reply = super()._answer(message)
        assert isinstance(message.content, MessageRecords)
        assert message.content.reply_bytes is not None
        if reply.has_content():
            size = encode(reply.content).size
            self.seen.append((message.metadata.message_type, size, message.content.reply_bytes))
        return reply


def measured(tmp_path, record, sites) -> Measuring:
    grid = Measuring(sites, 5)
    run_rounds(grid, RunDirectory.create(tmp_path / record.run, record), initial_parameters(record))
    return grid


def hold(grid: Measuring, kind: str = "train") -> None:
    trained = [(size, most) for what, size, most in grid.seen if what == kind]
    assert trained
    for size, most in trained:
        assert size <= most <= HEADER_BYTES + 6 * MODEL_BYTES + 64 * 1024


@pytest.mark.parametrize("method", METHODS)
def test_a_compressed_answer_is_within_its_bound(tmp_path, record, sites, method):
    hold(measured(tmp_path, with_(record, compression=METHODS[method]), sites))


@pytest.mark.parametrize("strategy", ["fedavg", "scaffold", "qfedavg", "fednova", "feddyn", "fedper"])
def test_what_a_strategy_adds_is_within_its_bound(tmp_path, record, sites, strategy):
    personal = ("head.bias", "head.weight") if strategy == "fedper" else ()
    asked = with_(record, strategy={"name": strategy, "settings": {}}, personal=personal)
    hold(measured(tmp_path, asked, sites))


def test_all_messages_of_a_secure_sum_are_within_theirs(tmp_path, record, sites):
    grid = measured(tmp_path, with_(record, secure=SECURE), sites)
    kinds = {what for what, _, _ in grid.seen}
    assert len(kinds) >= 5
    assert all(size <= most <= HEADER_BYTES + 2 * MODEL_BYTES for what, size, most in grid.seen if what != "evaluate")
