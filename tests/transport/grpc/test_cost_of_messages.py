"""What a message costs its receiver, at both ends, for every kind: bounded per byte, whatever its numbers say.

Cost is counted, never timed: calls of functions in the receiving thread, and bytes of memory at the worst moment.
"""

import sys
import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from google.protobuf.message import DecodeError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedclaw.errors import TransportError, UpdateError
from fedclaw.learning.compressors import Stochastic
from fedclaw.privacy.noise import GaussianSource
from fedclaw.protocol.terms import Quantisation
from fedclaw.transport.grpc import frames
from fedclaw.transport.grpc.limits import MAX_FRAME_BYTES
from fedclaw.transport.grpc.message_codec import ALIGNMENT, MAGIC, MAX_ITEMS, MAX_NUMBERS, decode, encode
from fedclaw.transport.grpc.protocol import PROTOCOL_VERSION
from fedclaw.transport.grpc.protocol import link_pb2 as pb

KINDS = [field.name for field in pb.Frame.DESCRIPTOR.fields]
"""Of a frame; each is said to both ends, whether it belongs there or not."""
BYTES_PER_BYTE, CALLS_PER_BYTE = 4, 0.01
FREE_BYTES, FREE_CALLS = 1 << 19, 3000


class Cost:
    """Calls of functions and bytes of memory that a call takes in this thread."""

    def __init__(self, call: Callable[[], object]) -> None:
        self.calls = 0
        self.error: Exception | None = None
        outer = sys.getprofile()
        tracemalloc.start()
        before = tracemalloc.get_traced_memory()[0]
        sys.setprofile(self._count)
        try:
            self.result = call()
        except (TransportError, UpdateError, DecodeError, ValueError) as error:
            # Refused, which is an answer; anything else (a method of another name) is a fault of the test.
            self.error = error
        finally:
            sys.setprofile(outer)
            self.memory = tracemalloc.get_traced_memory()[1] - before
            tracemalloc.stop()

    def _count(self, _frame: object, event: str, _argument: object) -> None:
        self.calls += event in ("call", "c_call")


def held(cost: Cost, size: int, *, calls: float = CALLS_PER_BYTE, memory: float = BYTES_PER_BYTE) -> None:
    assert cost.calls <= FREE_CALLS + calls * size, f"{cost.calls} calls for {size} bytes"
    assert cost.memory <= FREE_BYTES + memory * size, f"{cost.memory} bytes of memory for {size}"


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def field(number: int, payload: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(payload)) + payload


PARTS = st.one_of(
    st.builds(lambda number: varint(number << 3 | 2) + b"\x00", st.integers(1, 12)),
    st.builds(lambda number, value: varint(number << 3) + varint(value), st.integers(1, 12), st.integers(0, 2**64 - 1)),
    st.builds(lambda number: varint(number << 3 | 1) + b"\x00" * 8, st.integers(1, 12)),
    st.builds(field, st.integers(1, 12), st.binary(max_size=40)),
    st.builds(lambda number, size: field(number, b"x" * size), st.integers(1, 12), st.integers(0, 300_000)),
)


def repeated(parts: list[bytes], times: int, last: bytes) -> bytes:
    """`parts` over and over, in what a frame may have, and then `last`."""
    once = b"".join(parts)
    return once * min(times, (MAX_FRAME_BYTES - 64) // max(len(once), 1)) + last


BODIES = st.builds(
    repeated, st.lists(PARTS, max_size=3), st.sampled_from([1, 2, 1000, MAX_FRAME_BYTES]), st.binary(max_size=8)
)


@pytest.fixture(scope="module")
def ends(federation, tmp_path_factory):
    """What handles a frame at each end of a real connection."""
    from tests.transport.grpc.conftest import Kit

    kit = Kit(federation, tmp_path_factory.mktemp("cost"))
    patient = kit.QUICK.model_copy(update={"heartbeat": 60.0})
    grid = kit.grid(patient)
    running = kit.link("site-cost", grid.port, limits=patient)
    grid.wait_for_sites(1, 20)
    kit.until(lambda: running.link.connected, "the site has its welcome")
    (session,) = grid._connections._sessions.values()
    stream = running.link._stream
    # Nothing that is posted here leaves: the test looks at what it costs to take, not at what follows from it.
    yield {
        "server": lambda frame: grid._connections._handle(session, frame),
        "site": lambda frame: running.link.on_frame(stream, frame),
    }
    kit.close()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("end", ["server", "site"])
@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(body=BODIES)
def test_a_frame_costs_no_more_than_in_proportion_to_its_bytes(ends, end, kind, body):
    number = pb.Frame.DESCRIPTOR.fields_by_name[kind].number
    raw = field(number, body)

    def take() -> None:
        if frames.decode_chunk(raw) is None:
            frame = pb.Frame.FromString(raw)
            ends[end](frame)

    held(Cost(take), len(raw))


@pytest.mark.parametrize("filler", [b"\x10\x00", b"\x0a\x00", b"\x12\x00"])
def test_two_mebibytes_of_repeated_fields_are_left_to_protobuf(filler):
    body = filler * (MAX_FRAME_BYTES // 2 - 8)
    raw = field(pb.Frame.CHUNK_FIELD_NUMBER, body)
    cost = Cost(lambda: frames.decode_chunk(raw))
    assert cost.calls < 100
    assert cost.memory < MAX_FRAME_BYTES // 2
    assert cost.result is None


def test_a_chunk_as_we_write_it_is_still_read_without_a_copy():
    data = bytes(range(256)) * 4096
    raw = frames.encode_chunk("an-id", 7, [data])
    cost = Cost(lambda: frames.decode_chunk(raw))
    assert (cost.result.transfer_id, cost.result.offset, bytes(cost.result.data)) == ("an-id", 7, data)
    assert cost.memory < 10_000
    assert frames.decode_chunk(frames.encode_chunk("an-id", 0, [b""])).offset == 0


def message(header: bytes, data: bytes = b"") -> bytes:
    head = MAGIC + len(header).to_bytes(4, "big") + header
    return head + bytes(-len(head) % ALIGNMENT) + data


def nested(*numbers: int, items: bytes) -> bytes:
    """`items`, within the messages that lie in those fields of Content and below."""
    for number in reversed(numbers):
        items = field(number, items)
    return items


RECORDS, ITEMS, ARRAYS, METRICS, CONFIGS, VALUES, LIST = 1, 1, 2, 3, 4, 1, 3
MANY = 1_200_000

SWOLLEN = {
    "records": nested(RECORDS, items=field(ITEMS, b"") * MANY),
    "records with names": nested(RECORDS, items=field(ITEMS, b"\x0a\x06record\x12\x00") * MANY),
    "arrays": nested(RECORDS, ITEMS, ARRAYS, items=field(1, b"") * MANY),
    "metrics": nested(RECORDS, ITEMS, METRICS, items=field(VALUES, b"\x0a\x01a\x12\x02\x10\x02") * MANY),
    "configs": nested(RECORDS, ITEMS, CONFIGS, items=field(VALUES, b"") * MANY),
    "numbers in a list": nested(RECORDS, ITEMS, METRICS, VALUES, LIST, items=field(1, b"\x10\x02") * MANY),
    "unknown fields": nested(RECORDS, items=b"\x78\x0a" * MANY),
    "the same one again": field(RECORDS, b"") * MANY,
    "kinds of one record": nested(RECORDS, ITEMS, items=field(ARRAYS, b"\x0a\x00") * MANY),
}


SLOW = {"unknown fields", "the same one again", "kinds of one record"}
"""To count every call takes a while where every field is a call."""


@pytest.mark.parametrize(
    "what", [pytest.param(what, marks=[pytest.mark.slow] * (what in SLOW), id=what) for what in SWOLLEN]
)
def test_a_header_of_a_million_items_is_refused_before_one_of_them_is_built(what):
    """16.8 MB with 1.2 million items cost 19 s and 500 to 690 MB."""
    raw = message(SWOLLEN[what])
    cost = Cost(lambda: decode(raw))
    assert isinstance(cost.error, TransportError)
    assert "too many parts" in str(cost.error)
    assert cost.memory < 2 * len(raw) + FREE_BYTES
    assert cost.calls < 12 * (MAX_NUMBERS + 4 * MAX_ITEMS)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    path=st.sampled_from(
        [(), (1,), (1, 1), (1, 1, 2), (1, 1, 2, 1), (1, 1, 3), (1, 1, 4, 1), (1, 1, 3, 1, 3), (1, 1, 3, 1, 3, 1), (2,)]
    ),
    body=BODIES,
    data=st.integers(0, 3).map(lambda blocks: bytes(64 * blocks)),
)
def test_a_content_costs_no_more_than_in_proportion_to_its_bytes(path, body, data):
    raw = message(nested(*path, items=body), data)
    cost = Cost(lambda: decode(raw))
    assert cost.error is None or isinstance(cost.error, TransportError)
    # A field of two bytes may be an item, and an item takes a walk over it and, as protobuf builds it, an object.
    held(cost, len(raw), calls=4, memory=64)


def test_as_many_items_as_a_message_may_have_travel_and_one_more_is_refused_by_its_sender():
    named = MAX_ITEMS - 1
    values = {f"v{number}": 1.0 for number in range(named)}
    raw = b"".join(encode(RecordDict({"m": MetricRecord(values)})).parts)
    assert dict(decode(raw)["m"]) == values
    with pytest.raises(TransportError, match="too many parts"):
        encode(RecordDict({"m": MetricRecord({**values, "one more": 1.0})}))


def test_text_full_of_the_byte_that_items_begin_with_is_no_item():
    text = "\n" * (MAX_ITEMS * 4)
    raw = b"".join(encode(RecordDict({"c": ConfigRecord({"text": text, "numbers": [10] * 1000})})).parts)
    assert decode(raw)["c"]["text"] == text


def test_a_hundred_arrays_cost_little_more_than_protobuf_takes():
    arrays = ArrayRecord({f"layer{number}": Array(np.ones(10, np.float32)) for number in range(100)})
    raw = b"".join(encode(RecordDict({"sum": arrays})).parts)
    decode(raw)
    held(Cost(lambda: decode(raw)), len(raw), calls=1, memory=16)


@pytest.mark.parametrize("block", [300_000_000, (1 << 31) - 1])
@pytest.mark.parametrize("bits", [8, 4])
def test_a_block_of_any_size_takes_what_the_model_takes(block, bits):
    """A block of 3e8 took 2.4 GB of a site for a tiny model."""
    assert Quantisation(method="int8", block=block).block == block
    encoder = Stochastic(bits, block)
    arrays = {"w": np.linspace(-1, 1, 50, dtype=np.float32)}
    source = GaussianSource()
    encoder.encode(arrays, source, {})
    cost = Cost(lambda: encoder.decode(encoder.encode(arrays, source, {}).wire, {"w": (50,)}))
    assert cost.error is None
    assert cost.memory < 1 << 20
    whole = Stochastic(bits, None).layout({"w": (50,)})
    assert encoder.layout({"w": (50,)}) == whole
    np.testing.assert_allclose(cost.result["w"], arrays["w"], atol=1 / (127 if bits == 8 else 7))


def test_a_block_beyond_any_model_is_refused_where_it_is_read():
    with pytest.raises(ValueError, match="block"):
        Quantisation(method="int8", block=10**12)


def test_a_server_cannot_make_a_site_beat_faster_than_its_own_least(kit):
    """A heartbeat of a nanosecond was a loop without a pause."""
    grid = kit.grid()
    running = kit.link("site-a", grid.port)
    grid.wait_for_sites(1, 20)
    kit.until(lambda: running.link.connected, "the site has its welcome")
    welcome = pb.Welcome(
        protocol=PROTOCOL_VERSION, federation="clinics", site="site-a", max_message_bytes=1, heartbeat=1e-9
    )
    running.link._welcome(running.link._stream, welcome)
    assert running.link._heartbeat >= 0.05


def test_the_longest_identifier_is_said_back_and_a_longer_one_ends_the_stream(kit):
    frames.check_frame(frames.done("x" * 256))
    for frame in (frames.done("x" * 257), frames.accept("x" * 257, 0), frames.refuse(pb.REASON_BUSY, "no", "x" * 257)):
        with pytest.raises(TransportError, match="identifier"):
            frames.check_frame(frame)
