"""Limits on what a peer can cost: bytes, seconds, counts."""

from pydantic import Field

from fedclaw.protocol.frozen import Frozen

MIB = 1 << 20

MAX_FRAME_BYTES = 2 * MIB
"""gRPC's limit on one frame. A larger frame never reaches this code."""

MAX_METADATA_BYTES = 16 * 1024
"""Hard limit on the HTTP/2 headers of a connection."""

WINDOW_BYTES = MIB
"""Bytes that gRPC reads ahead from each peer. With it, a line with a round trip of 50 ms carries 20 MB/s."""

CHUNK_BYTES = MIB // 4
"""Bytes of a task in one frame. A frame of a reply holds one segment of the seal instead: 1 MiB and its tag."""

INLINE_BYTES = MIB // 8
"""A message up to this size travels inside its offer, which saves a round trip."""


class Limits(Frozen):
    """What a server or a site lets its peers cost. Times are in seconds, sizes in bytes."""

    max_message_bytes: int = Field(default=1024 * MIB, gt=0)
    """The largest content of one message, in either direction."""
    inbound_bytes: int = Field(default=64 * MIB, gt=0)
    """Memory for replies that arrive or wait to be read, charged as bytes arrive. What exceeds it goes to disk, sealed.
    A reply larger than this is read from there alone."""
    spool_bytes: int = Field(default=65536 * MIB, ge=0)
    """Disk for replies that exceed `inbound_bytes`. With 0 they wait for memory, one after the other."""
    intake_bytes: int = Field(default=2048 * MIB, gt=0)
    """Bytes of tasks that a site receives at one time. A larger task is received alone."""
    max_sites: int = Field(default=256, gt=0)
    """Sites that the server serves at one time."""
    heartbeat: float = Field(default=10.0, gt=0)
    """Time between two heartbeats, and between two checks of a connected site's certificate."""
    missed_heartbeats: int = Field(default=3, ge=2)
    """A peer that is silent for this many heartbeats is disconnected."""
    handshake: float = Field(default=10.0, gt=0)
    """Time for the TLS handshake, and again for the first frame."""
    stall: float = Field(default=60.0, gt=0)
    """Seconds over which the rate of a reply is measured against `least_rate`."""
    least_rate: float = Field(default=4096.0, ge=0)
    """Bytes per second. A slower reply is given up, and its site not asked again in the run."""
    gone: float = Field(default=120.0, gt=0)
    """Without a timeout, a site that is away for longer is no longer waited for. An unread reply is kept at least this
    long."""
    backoff_first: float = Field(default=0.5, gt=0)
    """Mean wait of a site before it first tries to reconnect. Doubles with each failed attempt."""
    backoff_longest: float = Field(default=10.0, gt=0)
    """The longest wait between two attempts to reconnect."""
    queued_tasks: int = Field(default=8, gt=0)
    """Tasks that a site queues behind the one it works on."""
    outbox_replies: int = Field(default=4, gt=0)
    """Replies of one run that a site keeps in its outbox."""
    outbox_bytes: int = Field(default=4096 * MIB, gt=0)
    outbox_age: float = Field(default=7 * 24 * 3600.0, gt=0)
    """How long replies of other runs are kept."""

    @property
    def silence(self) -> float:
        """Seconds without a frame after which a peer is disconnected."""
        return self.heartbeat * self.missed_heartbeats
