"""Generates link_pb2.py and link_pb2.pyi from link.proto.

    python -m fedclaw.transport.grpc.protocol.generate [DIRECTORY]

Needs grpcio-tools (a development dependency) in the version below: the same compiler gives the same bytes.
"""

if __name__ == "__main__":
    from fedclaw.startup import begin

    begin("fedclaw.transport.grpc.protocol.generate", __doc__)

import importlib.metadata
import sys
from collections.abc import Sequence
from pathlib import Path

from fedclaw.cli import run_main
from fedclaw.errors import UsageError

TOOLS_VERSION = "1.81.1"
HERE = Path(__file__).resolve().parent


def generate(directory: Path = HERE) -> list[Path]:
    """Write the generated files to `directory` and return their paths. Raises UsageError."""
    return compile_proto(HERE / "link.proto", directory)


def compile_proto(proto: Path, directory: Path) -> list[Path]:
    """Write the messages of `proto` and their types to `directory`, and return the paths. Raises UsageError."""
    try:
        version = importlib.metadata.version("grpcio-tools")
    except importlib.metadata.PackageNotFoundError as error:
        raise UsageError("grpcio-tools is not installed; install the `dev` extra") from error
    if version != TOOLS_VERSION:
        raise UsageError(f"the protocol is generated with grpcio-tools {TOOLS_VERSION}, found {version}")
    from grpc_tools import protoc

    outputs = [f"--python_out={directory}", f"--pyi_out={directory}"]
    if protoc.main(["protoc", f"--proto_path={proto.parent}", *outputs, proto.name]) != 0:
        raise UsageError(f"protoc refused {proto.name}; its message is above")
    return [directory / f"{proto.stem}_pb2{suffix}" for suffix in (".py", ".pyi")]


def _body(arguments: Sequence[str]) -> None:
    generate(Path(arguments[0]) if arguments else HERE)


if __name__ == "__main__":
    run_main("fedclaw.transport.grpc.protocol.generate", __doc__ or "", _body)
    sys.exit(0)
