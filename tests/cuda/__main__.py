"""The suite on a card: `make test-cuda`. Where there is none, one line says so, and that is no failure."""

import sys
from pathlib import Path

import pytest
import torch


def main(arguments: list[str]) -> int:
    if not torch.cuda.is_available():
        print(f"No CUDA device that torch {torch.__version__} can use here: nothing to test.")  # noqa: T201
        return 0
    return pytest.main([str(Path(__file__).parent), "--device", "cuda", *arguments])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
