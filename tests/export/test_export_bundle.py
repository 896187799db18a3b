import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from fedclaw.export import layout
from fedclaw.export.source import Source


def test_holds_exactly_the_promised_files(table_bundle: Path) -> None:
    names = {path.name for path in table_bundle.iterdir()}
    assert names == layout.REQUIRED | layout.UNSIGNED | {layout.QUANTISED}


def test_leaves_nothing_beside_it(table_bundle: Path) -> None:
    assert not [path for path in table_bundle.parent.iterdir() if path.name.startswith(".")]
