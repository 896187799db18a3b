"""Attacks through a site's training data."""

from dataclasses import replace
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from experiments.attacks.base import Attack, Round, Vector
from fedclaw.learning.workload import Floats, Table


class LabelFlip(Attack):
    """Each label y becomes C - 1 - y (Tolpegin, Truex, Gursoy, Liu 2020, "Data Poisoning Attacks Against Federated
    Learning Systems", section 3; the flip of all labels is Fang, Cao, Jia, Gong 2020's, "Local Model Poisoning Attacks
    to Byzantine-Robust Federated Learning").

    The site then follows the protocol to the letter: this is also what an honest mistake in a data export does.
    """

    name: Literal["label_flip"] = "label_flip"
    poisons: ClassVar[bool] = True

    def poison(self, table: Table, labels: int, generator: np.random.Generator) -> Table:
        """See Attack."""
        return replace(table, targets=labels - 1 - table.targets)


class Backdoor(Attack):
    """Images with a mark are to be taken for `target`, and all others for what they are (Bagdasaryan, Veit, Hua,
    Estrin, Shmatikov 2020, "How To Backdoor Federated Learning", section 4: poisoned batches, then model replacement).

    The mark is a square of the brightest pixel in the last corner (Gu, Dolan-Gavitt, Garg 2017, "BadNets").
    """

    name: Literal["backdoor"] = "backdoor"
    poisons: ClassVar[bool] = True
    forges: ClassVar[bool] = True

    target: int = Field(default=0, ge=0)
    """The class that marked images are taken for."""
    share: float = Field(default=0.5, gt=0, le=1)
    """Of the site's training images that get the mark and that label."""
    size: int = Field(default=2, ge=1)
    """Pixels a side of the mark."""
    scale: float | None = Field(default=None, gt=0)
    """What the update is multiplied by; null: sites / hostile sites, after which a mean is the hostile sites' model. 1:
    data poisoning alone."""

    def poison(self, table: Table, labels: int, generator: np.random.Generator) -> Table:
        """See Attack. Raises ValueError for data that are no images, or have no such class."""
        if table.inputs.ndim != 4 or self.target >= labels:
            raise ValueError(f"a backdoor needs images, and a target class below {labels}")
        chosen = generator.permutation(len(table))[: max(1, round(self.share * len(table)))]
        inputs, targets = table.inputs.copy(), table.targets.copy()
        inputs[chosen] = self.marked(inputs[chosen])
        targets[chosen] = self.target
        return replace(table, inputs=inputs, targets=targets)

    def marked(self, images: Floats) -> Floats:
        """Copies of `images` (N, K, H, W) with the mark."""
        marked = images.copy()
        marked[:, :, -self.size :, -self.size :] = images.max(initial=0.0)
        return marked

    def forge(self, own: Vector, known: Round, generator: np.random.Generator) -> Vector:
        """See Attack."""
        return own * (known.sites / known.hostile if self.scale is None else self.scale)
