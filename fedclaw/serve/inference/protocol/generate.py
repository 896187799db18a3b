"""Generates open_inference_pb2.py and open_inference_pb2.pyi from open_inference.proto.

    python -m fedclaw.serve.inference.protocol.generate [DIRECTORY]

Needs grpcio-tools (a development dependency) in the version that the project's other protocol is generated with.
"""

if __name__ == "__main__":
    from fedclaw.startup import begin

    begin("fedclaw.serve.inference.protocol.generate", __doc__)

import sys
from collections.abc import Sequence
from pathlib import Path

from fedclaw.cli import run_main
from fedclaw.transport.grpc.protocol.generate import compile_proto

HERE = Path(__file__).resolve().parent
PROTO = HERE / "open_inference.proto"
SHARED_POOL, OWN_POOL = "_descriptor_pool.Default()", "_descriptor_pool.DescriptorPool()"


def generate(directory: Path = HERE) -> list[Path]:
    """Write the generated files to `directory` and return their paths. Raises UsageError."""
    made = compile_proto(PROTO, directory)
    for path in made:
        path.write_text(path.read_text("utf-8").replace(SHARED_POOL, OWN_POOL), "utf-8")
    return made


def _body(arguments: Sequence[str]) -> None:
    generate(Path(arguments[0]) if arguments else HERE)


if __name__ == "__main__":
    run_main("fedclaw.serve.inference.protocol.generate", __doc__ or "", _body)
    sys.exit(0)
