"""A site's client that notes each frame it sends, for test_public_examples.py: a process of its own.

    python recorded_site.py DIRECTORY PORT ROWS FRAMES

The client is the real one. Its noise comes under a fixed key, and no row after the first ROWS is ever sampled. Each
frame is added to the file FRAMES, after its length (4 bytes, big endian).
"""

import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from fedclaw.identity.site_home import SiteKeys
from fedclaw.site.directory import only_client, open_service
from fedclaw.site.settings import load_site_settings
from fedclaw.transport.grpc import site_connection
from fedclaw.transport.grpc.sender import Sender
from tests.site.test_public_examples import Aligned


def serve(root: Path, port: str, rows: str, frames: Path) -> None:
    class Noting(Sender):
        """Writes what is sent."""

        def frames(self) -> Iterator[bytes]:
            for raw in super().frames():
                with frames.open("ab") as file:
                    file.write(len(raw).to_bytes(4, "big") + raw)
                yield raw

    site_connection.Sender = Noting
    keys = SiteKeys.open(root)
    with only_client(root):
        service = open_service(root, load_site_settings(root), keys.descriptor.name, keys=keys)
        service.source = Aligned(int(rows))
        connection = site_connection.SiteConnection(keys, service, root / "state", address=f"127.0.0.1:{port}")
        connection.run(threading.Event())


if __name__ == "__main__":
    serve(Path(sys.argv[1]), sys.argv[2], sys.argv[3], Path(sys.argv[4]))
