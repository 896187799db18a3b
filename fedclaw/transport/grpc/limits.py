"""The numbers that bound what a peer can cost: bytes, seconds, counts."""

from pydantic import Field

from fedclaw.protocol.frozen import Frozen

MIB = 1 << 20

MAX_FRAME_BYTES = 2 * MIB
"""Hard limit of gRPC on one frame; a frame above it never reaches this code."""

MAX_METADATA_BYTES = 16 * 1024
"""Hard limit on the HTTP/2 headers of a connection."""

WINDOW_BYTES = MIB
"""What gRPC takes from a peer before this code has asked for it: of each site that is sending, so that many small ones
add up to less than a few large ones. A line of 50 ms there and back carries 20 MB/s with it."""

CHUNK_BYTES = MIB // 4
"""Bytes of a task that travel in one frame; of a reply it is one segment of the seal, 1 MiB and its tag."""

INLINE_BYTES = MIB // 8
"""A message up to this size travels within its offer: two round trips fewer."""


class Limits(Frozen):
    """What a server or a site lets its peers cost it. Times in seconds, sizes in bytes."""

    max_message_bytes: int = Field(default=1024 * MIB, gt=0)
    """The largest content of one message, in either direction."""
    inbound_bytes: int = Field(default=64 * MIB, gt=0)
    """Memory for replies that the server receives or holds for their reader, charged as bytes arrive; what comes beyond
    it goes to disk, sealed as it is. A reply larger than this is read from there by itself."""
    spool_bytes: int = Field(default=65536 * MIB, ge=0)
    """Disk that the server takes for them. Without any, replies wait for memory, one after the other."""
    intake_bytes: int = Field(default=2048 * MIB, gt=0)
    """Tasks that a site receives at one time. A single one larger than this comes alone."""
    max_sites: int = Field(default=256, gt=0)
    """Connections that the server serves at one time."""
    heartbeat: float = Field(default=10.0, gt=0)
    """Time between two heartbeats, and between two checks of a connected site's certificate."""
    missed_heartbeats: int = Field(default=3, ge=2)
    """A peer that was silent for this many heartbeats is given up."""
    handshake: float = Field(default=10.0, gt=0)
    """Time for TLS, and again for the first frame."""
    stall: float = Field(default=60.0, gt=0)
    """Seconds over which the rate of a reply is measured against `least_rate`."""
    least_rate: float = Field(default=4096.0, ge=0)
    """Bytes per second: a reply that comes more slowly is given up, and its site not asked again in the run."""
    gone: float = Field(default=120.0, gt=0)
    """Only without a timeout: a site away for so long is no longer waited for. A reply that nobody reads is kept for so
    long at least."""
    backoff_first: float = Field(default=0.5, gt=0)
    """Mean wait of a site before its first attempt to reconnect; doubles with each one that fails."""
    backoff_longest: float = Field(default=10.0, gt=0)
    """No wait is longer: a site is there within seconds of its server's return."""
    queued_tasks: int = Field(default=8, gt=0)
    """Tasks that a site lets wait behind the one it works on."""
    outbox_replies: int = Field(default=4, gt=0)
    """Replies of one run that a site's outbox keeps."""
    outbox_bytes: int = Field(default=4096 * MIB, gt=0)
    outbox_age: float = Field(default=7 * 24 * 3600.0, gt=0)
    """Replies of other runs are kept for so long."""

    @property
    def silence(self) -> float:
        """Seconds without a frame after which a peer is given up."""
        return self.heartbeat * self.missed_heartbeats
