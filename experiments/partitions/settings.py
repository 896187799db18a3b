"""Every way of dealing, by its name: what conf/partition/*.yaml is checked against."""

from typing import Annotated

from pydantic import Field

from experiments.partitions.features import FeatureShift
from experiments.partitions.labels import Dirichlet, Shards
from experiments.partitions.natural import Natural
from experiments.partitions.sizes import Iid, Quantity

PartitionSettings = Annotated[Iid | Dirichlet | Shards | Quantity | FeatureShift | Natural, Field(discriminator="name")]
