"""A model repository for OpenVINO: NAME/1/model.xml and model.bin, as OpenVINO Model Server reads it too.

OpenVINO has no operators for text, so it takes prepared inputs: bundle.json says of model.onnx what they are.
"""

import sys
from pathlib import Path
from typing import Any

from fedclaw.errors import BundleError, UsageError
from fedclaw.export.layouts.base import Deployable

VERSION = "1"
FILE = "model.xml"


def import_openvino() -> Any:
    """The `openvino` package, which as it is imported reports that to its makers and writes into the user's home.

    It does neither where its package for that is not to be had, as here from now on. Raises UsageError when OpenVINO is
    not installed.
    """
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    try:
        import openvino
    except ImportError as error:
        raise UsageError("OpenVINO is not installed; install it with: pip install 'fedclaw[openvino]'") from error
    return openvino


def write_openvino(deployable: Deployable, directory: Path) -> None:
    """Fill `directory`, a model repository.

    Raises UsageError when OpenVINO is not installed, BundleError if it lacks an operator.
    """
    openvino = import_openvino()
    place = directory / deployable.name / VERSION
    place.mkdir(parents=True)
    try:
        model = openvino.Core().read_model(deployable.model)
        # Weights as they are: half precision would be another model than the one that was compared and signed.
        openvino.save_model(model, place / FILE, compress_to_fp16=False)
    except Exception as error:  # OpenVINO raises RuntimeError and its own kinds
        raise BundleError(f"OpenVINO cannot read the model: {' '.join(str(error).split())[:300]}") from error
    deployable.write_provenance(directory / deployable.name)
