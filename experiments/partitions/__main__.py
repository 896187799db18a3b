"""What a partition deals to whom, described and plotted, without training.

    python -m experiments.partitions dataset=digits partition=dirichlet partition.alpha=0.1 clients=20
    python -m experiments.partitions dataset=synthetic_images partition=shards clients=10000 output=runs/shards

There are iid, dirichlet, shards, quantity, feature_shift and natural; conf/partition/ says what can be set of each.
With output=DIRECTORY, partition.json and partition.png go there.
"""

if __name__ == "__main__":
    from fedclaw.startup import begin

    begin("experiments.partitions", __doc__)

from collections.abc import Sequence
from pathlib import Path

from pydantic import Field
from rich.console import Console
from rich.table import Table

from experiments.partitions.dealing import deal_out
from experiments.partitions.description import Description, label_distances
from experiments.partitions.record import write_record
from experiments.sources import DatasetSettings
from fedclaw.cli import make_console, run_main, settings_of
from fedclaw.protocol.frozen import Frozen
from fedclaw.simulation.partitions.settings import PartitionSettings

SHOWN = 20
"""Clients that the terminal shows; the file has all."""
_COLUMNS = 12
"""Labels, at most, that get a column."""


class ShowSettings(Frozen):
    """conf/partitions.yaml, checked."""

    dataset: DatasetSettings
    partition: PartitionSettings
    clients: int | None = Field(default=None, ge=1)
    output: Path | None = None


def main(arguments: Sequence[str]) -> None:
    """Deal, show, and write if there is an output."""
    settings = settings_of(arguments, "partitions", ShowSettings)
    description = deal_out(settings.dataset, settings.partition, settings.clients).describe()
    console = make_console()
    show(description, console)
    if settings.output is not None:
        text, picture = write_record(description, settings.output)
        console.print(f"description: {text}\nplot:        {picture}", soft_wrap=True)


def show(description: Description, console: Console) -> None:
    """The figures, then the first clients."""
    console.print(_figures(description))
    console.print(_clients(description))
    if description.clients > SHOWN:
        console.print(f"... and {description.clients - SHOWN:,} more clients", style="dim")


def _figures(description: Description) -> Table:
    title = f"{description.dataset}, dealt by {description.label}, seed {description.seed}"
    table = Table(title=title, title_justify="left", show_header=False)
    sizes, labels, distance = description.sizes, description.labels_per_client, description.total_variation
    table.add_row("clients", f"{description.clients:,}")
    table.add_row("examples", f"{description.examples:,} in all")
    table.add_row("examples of a client", _range(sizes))
    table.add_row("labels of a client", f"{_range(labels)}; there are {len(description.labels)}")
    table.add_row(
        "labels' total variation",
        f"{distance['mean']:.3f} on average, {distance['largest']:.3f} at most; {distance['if_iid']:.3f} by chance",
    )
    if (change := description.inputs) is not None:
        table.add_row(change.unit, f"{min(change.levels):g} to {max(change.levels):g}")
    return table


def _range(quantiles: dict[str, float]) -> str:
    return f"{quantiles['0']:,g} to {quantiles['1']:,g}, median {quantiles['0.5']:,g}, mean {quantiles['mean']:,g}"


def _clients(description: Description) -> Table:
    table = Table()
    columns = len(description.labels) <= _COLUMNS
    for name in ("client", "examples", "variation", *(description.labels if columns else ("labels",))):
        table.add_column(name, justify="right")
    distances = label_distances(description)
    for client, counts in enumerate(description.label_counts[:SHOWN]):
        cells = [str(count) if count else "" for count in counts] if columns else [str(sum(map(bool, counts)))]
        table.add_row(str(client), str(sum(counts)), f"{distances[client]:.2f}", *cells)
    return table


if __name__ == "__main__":
    run_main("experiments.partitions", __doc__ or "", main)
