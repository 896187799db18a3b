"""The two files that say of a run how its data was dealt."""

from pathlib import Path

from experiments.partitions.description import Description
from experiments.partitions.plot import draw
from fedclaw.files import write_atomic

RECORD = ("partition.json", "partition.png")


def write_record(description: Description, directory: Path) -> tuple[Path, Path]:
    """Write the files of `RECORD` into `directory` and return their paths."""
    text, picture = (directory / name for name in RECORD)
    write_atomic(text, description.to_json().encode())
    draw(description, picture)
    return text, picture
