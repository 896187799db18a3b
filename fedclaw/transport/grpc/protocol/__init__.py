"""The versioned wire protocol: link.proto and what protoc makes of it (checked in, reproducible)."""

PROTOCOL_VERSION = 2
"""Raised when a peer of the older version could not be understood any more, frames or what they carry (plans)."""

SERVICE = "fedclaw.runtime.v1.Federation"
METHOD = "Connect"
