"""A notebook's model as a signed bundle: a graph and a schema that any installation serves without its code."""

from contextlib import nullcontext
from pathlib import Path

from fedclaw.api.module import Model, around
from fedclaw.api.reading import Bundle, read_bundle
from fedclaw.export.bundle import Request, export_bundle
from fedclaw.export.source import load_source, signing_home
from fedclaw.identity.federation_home import CA_CERTIFICATE
from fedclaw.learning.registry import WORKLOADS, lent
from fedclaw.server.run_directory import RunDirectory


def export_run(path: Path, model: Model | None, federation: Path, target: Path, request: Request) -> Bundle:
    """Export the run in the directory `path` to `target`, signed by `federation`; see `Run.export`."""
    directory = RunDirectory.open(path)
    record = directory.record()
    home = signing_home(record, federation)
    workload = record.workload
    with nullcontext() if model is None else lent({(WORKLOADS, workload): around(model, workload)}):
        source = load_source(directory, "auto" if model is None else "final")
    export_bundle(source.signed_by(home.name), home.signer(), target, request)
    return read_bundle(target, ca=home.root / CA_CERTIFICATE)
