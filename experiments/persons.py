"""Persons with several rows each, made by grouping the rows of a data set whose rows stand by themselves."""

from typing import Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from fedclaw.protocol.frozen import Frozen
from fedclaw.protocol.terms import DataUnit


class GroupedRows(Frozen):
    """How rows are grouped into persons. The groups do not depend on the seed of the deal."""

    least: int = Field(default=1, ge=1)
    most: int = Field(default=20, ge=1, le=1000)
    """A person's number of rows is any from `least` to `most`, all as likely; the last person has what is left."""
    seed: int = Field(default=0, ge=0)
    """Of the grouping."""
    unit: DataUnit = "person"
    """What a guarantee protects. `person`: the files say whose a row is, and the schema names that column. `example`:
    the same rows at the same sites, and nobody says that some belong together."""

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.least > self.most:
            raise ValueError(f"least is {self.least} rows of a person, more than most, {self.most}")
        return self

    def owners(self, rows: int) -> NDArray[np.int64]:
        """Whose each of so many rows is, (rows,), persons numbered from 0: all rows, each of one person."""
        generator = np.random.default_rng(self.seed)
        sizes = generator.integers(self.least, self.most, size=rows // self.least + 1, endpoint=True)
        in_order = np.repeat(np.arange(len(sizes)), sizes)[:rows]
        owners = np.empty(rows, np.int64)
        owners[generator.permutation(rows)] = in_order
        return owners
