"""Every way of dealing, by its name: what conf/partition/*.yaml is checked against."""

from typing import Annotated

from pydantic import Field

from fedclaw.simulation.partitions.features import FeatureShift
from fedclaw.simulation.partitions.labels import Dirichlet, Shards
from fedclaw.simulation.partitions.natural import Natural
from fedclaw.simulation.partitions.sizes import Iid, Quantity

PartitionSettings = Annotated[Iid | Dirichlet | Shards | Quantity | FeatureShift | Natural, Field(discriminator="name")]
