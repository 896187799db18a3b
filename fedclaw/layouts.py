"""Lay a bundle out for a standard server: Triton, KServe, MLflow, OpenVINO.

    python -m fedclaw.layouts triton|kserve|mlflow|openvino BUNDLE output=DIR [key=value ...]

    ca, federation, crl, expired   whom to trust, as python -m fedclaw.verify takes them
    key         opens a bundle that is encrypted at rest; plaintext=true writes its model in the clear, for the server
    output      where the layout goes; overwrite=true replaces one that is there
    name        what the server is to call the model; by default the federation and the run
    graph       pipeline.onnx (typed columns, the default where there is one) or model.onnx (prepared inputs);
                OpenVINO takes model.onnx, MLflow pipeline.onnx
    storage     kserve: the URI where the cluster will find what is in repository/
    register_as mlflow: also register it under this name, as the next version ...
    alias       ... to which this alias points from now on
    registry    ... in the registry there: sqlite:///mlflow.db, http://…

The bundle is verified first, and what is written are the bytes that were verified; signed/ beside them proves it.

Examples:
    python -m fedclaw.layouts triton runs/demo/bundle output=models ca=ca.crt
    python -m fedclaw.layouts mlflow runs/demo/bundle output=heart register_as=heart alias=champion \\
        registry=sqlite:///mlflow.db
"""

if __name__ == "__main__":
    from fedclaw.startup import begin

    begin("fedclaw.layouts", __doc__)

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from fedclaw import startup
from fedclaw.cli import compose_settings, make_console, naming, require_paths, run_main, split
from fedclaw.errors import UsageError
from fedclaw.export.check import TrustSettings, load_trust
from fedclaw.export.layouts.base import Deployable, Graph, laid_out
from fedclaw.export.layouts.kserve import write_kserve
from fedclaw.export.layouts.triton import write_triton
from fedclaw.report.tracking import check_address

SERVERS = ("triton", "kserve", "mlflow", "openvino")


class LayoutSettings(TrustSettings):
    """conf/layouts.yaml."""

    output: Path | None
    name: str | None
    graph: Graph | None
    overwrite: bool
    storage: str | None
    register_as: str | None
    alias: str | None
    registry: str | None
    plaintext: bool = False


def main(arguments: Sequence[str]) -> None:
    """Lay out by the command line."""
    command = split(arguments)
    settings = compose_settings("layouts", command.overrides, LayoutSettings)
    if len(command.words) != 2 or command.words[0] not in SERVERS:
        raise UsageError(
            f"say for what and which bundle: python -m fedclaw.layouts {'|'.join(SERVERS)} BUNDLE output=DIR"
        )
    server, bundle = command.words[0], Path(command.words[1])
    output = _consistent(server, settings)
    if settings.key is not None and not settings.plaintext:
        raise UsageError(
            "a server reads its model in the clear: plaintext=true has it written so from an encrypted bundle"
        )
    require_paths(bundle=bundle)
    if settings.registry is not None:
        check_address(settings.registry, "registry")
    with naming(bundle=bundle, federation=settings.federation):
        trust = load_trust(settings.ca, settings.federation, settings.crl, settings.expired, settings.key)
        graph: Graph | None = "model.onnx" if server == "openvino" else settings.graph
        deployable = Deployable.open(bundle, trust, graph, settings.name)
    console = make_console()
    _load(server)
    with laid_out(output, settings.overwrite) as directory:
        _write(server, deployable, directory, settings)
    _report(server, deployable, output, settings, console)


def _consistent(server: str, settings: LayoutSettings) -> Path:
    """The output. Raises UsageError for settings of another server."""
    if settings.output is None:
        raise UsageError("output=DIR is missing: where the layout goes")
    if settings.storage is not None and server != "kserve":
        raise UsageError(f"storage= is for kserve, not for {server}")
    given = {name: getattr(settings, name) for name in ("register_as", "alias", "registry")}
    if server != "mlflow" and any(value is not None for value in given.values()):
        raise UsageError(f"register_as=, alias= and registry= are for mlflow, not for {server}")
    if (settings.register_as is None) != (settings.registry is None):
        raise UsageError("register_as=NAME and registry=URI belong together: the name, and the registry that takes it")
    if settings.alias is not None and settings.register_as is None:
        raise UsageError("alias= needs register_as=NAME, whose new version it points to")
    if server == "openvino" and settings.graph == "pipeline.onnx":
        raise UsageError("OpenVINO has no operators for text and takes prepared inputs: leave graph= out")
    return settings.output


def _load(server: str) -> None:
    """Import what takes seconds, while there is no directory yet that a signal would leave behind."""
    if server == "openvino":
        from fedclaw.export.layouts.openvino import import_openvino

        with startup.loading("OpenVINO"):
            import_openvino()
    elif server == "mlflow":
        with startup.loading("MLflow"):
            from fedclaw.export.layouts.mlflow_model import import_mlflow

            import_mlflow()


def _write(server: str, deployable: Deployable, directory: Path, settings: LayoutSettings) -> None:
    if server == "triton":
        write_triton(deployable, directory)
    elif server == "kserve":
        write_kserve(deployable, directory, settings.storage)
    elif server == "openvino":
        from fedclaw.export.layouts.openvino import write_openvino

        write_openvino(deployable, directory)
    else:
        from fedclaw.export.layouts.mlflow_model import write_mlflow

        write_mlflow(deployable, directory)


def _report(server: str, deployable: Deployable, output: Path, settings: LayoutSettings, console: Console) -> None:
    manifest = deployable.verified.manifest
    console.print(
        f"verified  {manifest.variant} model of run {manifest.run}, federation {manifest.federation}", markup=False
    )
    if not deployable.verified.pinned:
        console.print("note      the CA came with the bundle; ca=… proves who signed it", style="yellow", markup=False)
    console.print(f"{server:9} {output} ({deployable.graph} as model {deployable.name})", markup=False, soft_wrap=True)
    if settings.register_as is not None and settings.registry is not None:
        from fedclaw.export.layouts.mlflow_model import register

        version = register(output, settings.register_as, settings.alias, settings.registry, deployable.provenance)
        alias = "" if settings.alias is None else f", alias {settings.alias}"
        console.print(f"register  {settings.register_as}, version {version}{alias}", markup=False)
    console.print(
        f"next      {_NEXT[server].format(output=output, name=deployable.name)}", markup=False, soft_wrap=True
    )


_NEXT = {
    "triton": "tritonserver --model-repository={output}",
    "kserve": "copy {output}/repository to the storage, then: kubectl apply -f {output}/inferenceservice.yaml",
    "mlflow": "mlflow models serve --env-manager local --model-uri {output}",
    "openvino": "ovms --model_name {name} --model_path {output}/{name} --port 9000",
}


if __name__ == "__main__":
    run_main("fedclaw.layouts", __doc__ or "", main)
