"""One process of the test of plain Flower apps: `server HOME ADDRESS OUT` or `site DIRECTORY ADDRESS STEP EXAMPLES`."""

import sys
import threading
from pathlib import Path

from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

from fedclaw.identity.federation_home import FederationHome
from fedclaw.identity.site_home import SiteKeys
from fedclaw.transport.grpc.apps import ClientAppHandler, load_app, run_server_app
from fedclaw.transport.grpc.grid import GrpcGrid
from fedclaw.transport.grpc.limits import Limits
from fedclaw.transport.grpc.site_connection import SiteConnection

LIMITS = Limits(heartbeat=0.5, backoff_first=0.05, backoff_longest=0.2)


def server(home: str, address: str, out: str) -> None:
    with GrpcGrid(FederationHome.open(Path(home)), address=address, run_id=5, limits=LIMITS) as grid:
        sys.stdout.write(f"{grid.port}\n")
        sys.stdout.flush()
        assert len(grid.wait_for_sites(2, 60)) == 2
        run_server_app(load_app("plain_flower_app:server_app", ServerApp), grid, {"rounds": 2, "out": out})


def site(directory: str, address: str, step: str, examples: str) -> None:
    keys = SiteKeys.open(Path(directory))
    app = load_app("plain_flower_app:client_app", ClientApp)
    handler = ClientAppHandler(app, 1, {"step": float(step), "examples": int(examples)}, {})
    SiteConnection(keys, handler, Path(directory) / "state", LIMITS, address).run(threading.Event())


if __name__ == "__main__":
    {"server": server, "site": site}[sys.argv[1]](*sys.argv[2:])
