"""Why a request gets no answer, as the one error that every protocol of a node knows how to say."""

from http import HTTPStatus
from typing import Literal

from fedclaw.errors import FedClawError

Code = Literal[
    "bad_request",
    "unprocessable",
    "unauthenticated",
    "forbidden",
    "not_found",
    "method_not_allowed",
    "conflict",
    "too_large",
    "unsupported_media_type",
    "too_many_requests",
    "overloaded",
    "deadline_exceeded",
    "unavailable",
    "not_supported",
    "internal",
]
"""What a program reads; the message is for people."""

STATUS: dict[Code, HTTPStatus] = {
    "bad_request": HTTPStatus.BAD_REQUEST,
    "unprocessable": HTTPStatus.UNPROCESSABLE_ENTITY,
    "unauthenticated": HTTPStatus.UNAUTHORIZED,
    "forbidden": HTTPStatus.FORBIDDEN,
    "not_found": HTTPStatus.NOT_FOUND,
    "method_not_allowed": HTTPStatus.METHOD_NOT_ALLOWED,
    "conflict": HTTPStatus.CONFLICT,
    "too_large": HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    "unsupported_media_type": HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
    "too_many_requests": HTTPStatus.TOO_MANY_REQUESTS,
    "overloaded": HTTPStatus.SERVICE_UNAVAILABLE,
    "deadline_exceeded": HTTPStatus.SERVICE_UNAVAILABLE,
    "unavailable": HTTPStatus.SERVICE_UNAVAILABLE,
    "not_supported": HTTPStatus.NOT_IMPLEMENTED,
    "internal": HTTPStatus.INTERNAL_SERVER_ERROR,
}
"""The HTTP status of each code."""

CLIENT_CODES: frozenset[Code] = frozenset(
    code for code, status in STATUS.items() if HTTPStatus.BAD_REQUEST <= status < HTTPStatus.INTERNAL_SERVER_ERROR
)
"""The client's own doing: no version is to blame, and no breaker counts it."""


class ServeRefusal(FedClawError):
    """A request that a node does not answer. The message goes to the client: it never holds a path, an input, a secret
    or what another client has."""

    def __init__(
        self, code: Code, message: str, retry_after: float | None = None, challenge: str | None = None
    ) -> None:
        super().__init__(message)
        self.code: Code = code
        self.retry_after = retry_after
        """Seconds after which it is worth trying again; None: trying again does not help."""
        self.noted = False
        """Whether it is counted and in the audit log."""
        self.challenge = challenge
        """The value of the header WWW-Authenticate, which goes with 401 and 403."""

    @property
    def status(self) -> HTTPStatus:
        """The HTTP status."""
        return STATUS[self.code]
