"""Clients of a node that note what became of each request: for what wrk does not tell, which is who saw an error when.

Each client is a thread with a connection of its own; it asks one thing after the other at a steady pace, each with a
key of its own, and opens a new connection when the old one breaks. It never asks for the same thing twice.
"""

import http.client
import itertools
import json
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

from experiments.serving.requests import Rows, json_request

TIMEOUT = 20.0
"""Seconds after which a client gives a request up."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one request. Times by `time.monotonic`."""

    began: float
    ended: float
    status: int
    """0: no answer, the connection broke."""
    key: str
    identity: str
    """The request's id, which the audit log has."""
    version: str = ""
    receipt: str = ""
    label: str = ""
    """Of the first row."""

    @property
    def good(self) -> bool:
        """Whether it was answered."""
        return self.status == HTTPStatus.OK

    @property
    def failed(self) -> bool:
        """Whether the service is to blame."""
        return self.status == 0 or self.status >= HTTPStatus.INTERNAL_SERVER_ERROR


class Client:
    """One connection to a service at `url`, http://HOST:PORT; at https:// its certificate is one of `authority`. It
    comes from the address `source`, if that is given."""

    def __init__(self, url: str, token: str, authority: Path | None = None, source: str | None = None) -> None:
        self._address, secure = urlsplit(url).netloc, urlsplit(url).scheme == "https"
        self._trust = ssl.create_default_context(cafile=authority) if secure else None
        self._headers = {"authorization": f"Bearer {token}", "content-type": "application/json"}
        self._source = None if source is None else (source, 0)
        self._connection: http.client.HTTPConnection | None = None

    def post(self, path: str, body: bytes, headers: dict[str, str] | None = None) -> tuple[int, dict[str, str], bytes]:
        """(status, headers in lower case, body); status 0 if there was no answer."""
        if self._connection is None:
            self._connection = self._connect()
        try:
            self._connection.request("POST", path, body, {**self._headers, **(headers or {})})
            answer = self._connection.getresponse()
            content = answer.read()
        except (OSError, http.client.HTTPException):
            self.close()
            return 0, {}, b""
        if answer.will_close:
            self.close()
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}, content

    def _connect(self) -> http.client.HTTPConnection:
        if self._trust is None:
            return http.client.HTTPConnection(self._address, timeout=TIMEOUT, source_address=self._source)
        return http.client.HTTPSConnection(
            self._address, timeout=TIMEOUT, source_address=self._source, context=self._trust
        )

    def ask(self, model: str, rows: Rows, key: str, identity: str) -> Outcome:
        """One inference."""
        body = json_request(rows, id=identity)
        began = time.monotonic()
        status, headers, content = self.post(f"/v2/models/{model}/infer", body, {"fedclaw-key": key})
        ended = time.monotonic()
        label = _label(content) if status == HTTPStatus.OK else ""
        version, receipt = headers.get("fedclaw-version", ""), headers.get("fedclaw-prediction", "")
        return Outcome(began, ended, status, key, identity, version, receipt, label)

    def close(self) -> None:
        """Give the connection up."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def _label(content: bytes) -> str:
    for output in json.loads(content)["outputs"]:
        if output["name"] == "label":
            return str(output["data"][0])
    return ""


@dataclass
class Crowd:
    """Clients that ask one model of one service until the context ends. Each token is another principal's."""

    url: str
    tokens: Sequence[str]
    model: str
    rows: Callable[[int], Rows]
    """What the n-th request asks."""
    clients: int = 4
    pause: float = 0.005
    """Seconds from an answer to the client's next request."""
    prefix: str = ""
    """Of keys and ids: two crowds that ask one model need different ones."""
    feedback: Callable[[Outcome], bytes | None] | None = None
    """What is told of a good answer, at /feedback; None: nothing."""
    authority: Path | None = None
    """Whose certificate a service at https:// has."""
    outcomes: list[Outcome] = field(default_factory=list)
    acknowledged: list[tuple[str, bytes]] = field(default_factory=list)
    """Feedback that was taken: by whose token, and its body."""

    def __post_init__(self) -> None:
        self._numbers: Iterator[int] = itertools.count()
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._ask, args=(self.tokens[place % len(self.tokens)],), daemon=True)
            for place in range(self.clients)
        ]

    def _ask(self, token: str) -> None:
        client = Client(self.url, token, self.authority)
        while not self._stop.is_set():
            number = next(self._numbers)
            name = f"{self.prefix}{number}"
            outcome = client.ask(self.model, self.rows(number), f"key-{name}", f"id-{name}")
            self.outcomes.append(outcome)
            if self.feedback is not None and outcome.good and (told := self.feedback(outcome)) is not None:
                status, _, _ = client.post("/feedback", told)
                if status == HTTPStatus.OK:
                    self.acknowledged.append((token, told))
            self._stop.wait(self.pause)
        client.close()

    def wait_for(self, condition: Callable[[Sequence[Outcome]], bool], seconds: float) -> bool:
        """Whether the outcomes so far meet `condition` within so many seconds."""
        end = time.monotonic() + seconds
        while not (met := condition(list(self.outcomes))) and time.monotonic() < end:
            time.sleep(0.01)
        return met

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(TIMEOUT + 5)


def since(outcomes: Sequence[Outcome], moment: float) -> list[Outcome]:
    """Those that ended after `moment`."""
    return [outcome for outcome in outcomes if outcome.ended >= moment]


def next_success(outcomes: Sequence[Outcome], moment: float) -> float | None:
    """Seconds from `moment` to the end of the first request that began after it and was answered; None: none was."""
    ends = [outcome.ended for outcome in outcomes if outcome.good and outcome.began >= moment]
    return min(ends) - moment if ends else None
