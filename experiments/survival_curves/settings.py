"""conf/survival_curves.yaml, checked, and the cells that it describes."""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import Field

from fedclaw.protocol.frozen import Frozen
from fedclaw.protocol.statistics import MAX_SURVIVAL_BINS
from fedclaw.protocol.terms import SecureRequest

StudyName = Literal["brca", "gbsg2"]
Placement = Literal["own", "shares"]
"""Who adds the noise: each site all that it needs by itself, in the open; or all sites together, in a secure sum."""


class StudySettings(Frozen):
    """How a study is asked about; all of it public."""

    bins: int = Field(ge=1, le=MAX_SURVIVAL_BINS)
    width: float = Field(gt=0)
    """Days of a bin."""

    @property
    def ends(self) -> tuple[float, ...]:
        """(K,) days."""
        return tuple(self.width * (number + 1) for number in range(self.bins))


class CurveSettings(Frozen):
    """conf/survival_curves.yaml."""

    data: Path | None
    """The directory of TCGA-BRCA's two files; null: without it."""
    gbsg2: Path | None
    """The file of GBSG2; null: that of an installed lifelines or scikit-survival."""
    output: Path
    """Where survival_curves.json, survival_curves.md and survival_curves.png go."""
    workers: int = Field(ge=1)
    epsilons: tuple[float, ...] = Field(min_length=1)
    delta: float = Field(gt=0, lt=1)
    draws: int = Field(ge=2)
    """For the coverage of bands, and for the spread of distances and p-values."""
    seed: int = Field(ge=0)
    """Of the deal and of draws; not of the sites' noise, which nobody seeds."""
    smallest: float = Field(ge=0)
    sites: int = Field(ge=2, le=64)
    """Among which GBSG2 is dealt."""
    secure: SecureRequest
    studies: dict[StudyName, StudySettings]


class Cell(Frozen):
    """One row of the table."""

    study: StudyName
    placement: Placement
    epsilon: float

    @property
    def label(self) -> str:
        """In a few words."""
        return f"{self.study}, {self.placement}, epsilon {self.epsilon:g}"


def cells(settings: CurveSettings, studies: tuple[StudyName, ...]) -> Iterator[Cell]:
    """The rows, top to bottom, of the studies whose data is there."""
    for study in studies:
        for placement in ("own", "shares"):
            for epsilon in settings.epsilons:
                yield Cell(study=study, placement=placement, epsilon=epsilon)
