"""A site whose every frame is the test's."""

from fedclaw.identity.seal import SEGMENT, Binding
from fedclaw.identity.site_home import SiteKeys
from fedclaw.identity.stream import TAG
from fedclaw.transport.grpc import frames
from fedclaw.transport.grpc.protocol import link_pb2 as pb
from tests.transport.grpc.conftest import RawSite


class Uploader:
    """A site that answers with `size` bytes, well sealed, piece by piece when a test says so."""

    def __init__(self, raw: RawSite, keys: SiteKeys) -> None:
        self.name, self.keys, self.raw = keys.site_name, keys, raw
        self.stamp = b"stamp"
        self.raw.enter()

    def offer(self, size: int, *, content: bytes | None = None, header: bytes | None = None) -> None:
        """Take the task and offer a reply to it."""
        self.reply(self.raw.hear("offer").offer, size, content=content, header=header)

    def reply(self, task: pb.Offer, size: int, *, content: bytes | None = None, header: bytes | None = None) -> None:
        """Offer a reply to `task`: `content`, or `size` bytes of nothing; `header` in the place of the true one."""
        self.task = task
        self.raw.say(frames.done(self.task.transfer_id))
        asked = self.task.envelope
        binding = Binding(
            self.keys.descriptor.name, asked.run_id, asked.group_id, asked.message_id, self.keys.site_name
        )
        self.sealed = self.keys.sealer().seal([bytes(size) if content is None else content], binding)
        envelope = pb.Envelope()
        envelope.CopyFrom(asked)
        envelope.reply_to_message_id = asked.message_id
        self.made = pb.Offer(
            transfer_id=self.task.transfer_id,
            envelope=envelope,
            size=self.sealed.size - len(self.sealed.header),
            plain_size=self.sealed.plain_size,
            stamp=self.stamp,
            seal_header=self.sealed.header if header is None else header,
        )
        self.raw.say(pb.Frame(offer=self.made))

    def accepted(self) -> int:
        return self.raw.hear("accept").accept.offset

    def send(self, first: int, count: int) -> None:
        for number in range(first, first + count):
            self.raw.say(
                frames.encode_chunk(self.task.transfer_id, number * (SEGMENT + TAG), [self.sealed.segment(number)])
            )

    def refusal(self) -> pb.Refuse:
        for frame in self.raw.responses:
            if frame.WhichOneof("body") == "refuse" and frame.refuse.reason != pb.REASON_RECALLED:
                return frame.refuse
        raise AssertionError("no refusal")
