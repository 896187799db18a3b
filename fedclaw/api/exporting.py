"""A notebook's model as a signed bundle: a graph and a schema that any installation serves without its code."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from fedclaw.api.module import Model, around
from fedclaw.api.reading import Bundle, verified_bundle
from fedclaw.export.bundle import Request, export_bundle
from fedclaw.export.check import load_trust
from fedclaw.export.source import load_source, signing_home
from fedclaw.identity.federation_home import CA_CERTIFICATE
from fedclaw.learning.registry import WORKLOADS, lent
from fedclaw.server.run_directory import RunDirectory


def export_run(
    directory: RunDirectory, model: Model | None, federation: Path, target: Path, request: Request
) -> Bundle:
    """Export the run in `directory` to `target`, signed by `federation`; see `Run.export`."""
    record = directory.record()
    home = signing_home(record, federation)
    workload = record.workload
    with nullcontext() if model is None else lent({(WORKLOADS, workload): around(model, workload)}):
        source = load_source(directory, "auto" if model is None else "final")
    export_bundle(source.signed_by(home.name), home.signer(), target, request)
    return verified_bundle(target, replace(load_trust(home.root / CA_CERTIFICATE, None, None), keys=request.keys))
