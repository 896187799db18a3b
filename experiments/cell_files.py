"""Results of an experiment's cells: one file each, beside the configuration that they are found again by."""

import json
from pathlib import Path
from typing import Any, TypeVar

from fedclaw.files import write_atomic
from fedclaw.protocol.frozen import Frozen

R = TypeVar("R", bound=Frozen)


def read_result(path: Path, kind: type[R]) -> R | None:
    """The result in a file, if it is there and whole; a file of an earlier version may hold nothing beside it."""
    try:
        plain = json.loads(path.read_bytes())
        return kind.model_validate(plain.get("result", plain))
    except (OSError, ValueError, AttributeError):
        return None


def write_result(path: Path, configuration: Any, result: Frozen) -> None:
    """Keep a result beside its configuration; on disk on return."""
    content = {"configuration": configuration, "result": result.model_dump(mode="json")}
    write_atomic(path, json.dumps(content, indent=2).encode())
