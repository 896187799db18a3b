"""Who publishes and waits is told what the release waits for."""

import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import pytest

from fedclaw.errors import FedClawError
from fedclaw.serve import publish
from fedclaw.serve.publish import AdminClient

STANDS_STILL = {
    "state": "canary",
    "says": "v2 answers 5% of the keys",
    "stable": "v1",
    "waits_for": {"says": "keys: errors has seen 7 of the 100 that it needs"},
}


class Answering(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(STANDS_STILL).encode())


@pytest.fixture
def node() -> Iterator[AdminClient]:
    with HTTPServer(("127.0.0.1", 0), Answering) as server:
        thread = Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield AdminClient(f"http://127.0.0.1:{server.server_address[1]}", "token", None)
        server.shutdown()
        thread.join()


def test_who_waits_is_reminded_of_what_is_waited_for_and_told_at_the_end(node, monkeypatch):
    monkeypatch.setattr(publish, "_EVERY", 0.01)
    monkeypatch.setattr(publish, "_REMIND_EVERY", 0.0)
    told: list[str] = []
    waits = "it waits for keys: errors has seen 7 of the 100 that it needs"
    with pytest.raises(FedClawError, match=f"v2 answers 5% of the keys; {waits}; it goes on"):
        publish._wait(node, "/admin/models/m", "v2", 0.5, told.append)
    assert told[:2] == ["v2 answers 5% of the keys", waits]
