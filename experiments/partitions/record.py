"""The two files that say of a run how its data was dealt."""

from pathlib import Path

from experiments.partitions.description import Description
from experiments.partitions.plot import draw
from fedclaw.files import write_atomic

DESCRIPTION_FILE = "partition.json"
PLOT_FILE = "partition.png"


def write_record(description: Description, directory: Path) -> tuple[Path, Path]:
    """Write partition.json and partition.png into `directory` and return their paths."""
    text, picture = directory / DESCRIPTION_FILE, directory / PLOT_FILE
    write_atomic(text, description.to_json().encode())
    draw(description, picture)
    return text, picture
