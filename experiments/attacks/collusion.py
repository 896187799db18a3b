"""Attacks of hostile sites that work together: all of them send the same, made of what they know of the round."""

from statistics import NormalDist
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from experiments.attacks.base import Attack, Knowledge, Round, Vector


class Colluding(Attack):
    """An attack that is made of several sites' honest updates."""

    forges: ClassVar[bool] = True

    knows: Knowledge = "hostile"
    """hostile: the updates that the hostile sites themselves would honestly have sent, as real attackers can know. all:
    those of all sites, honest ones included, the strongest attacker that papers consider."""

    @property
    def knowledge(self) -> Knowledge:
        """See Attack."""
        return self.knows


class LittleIsEnough(Colluding):
    """The known updates' mean minus z of their standard deviations, coordinate by coordinate (Baruch, Baruch, Goldberg
    2019, "A Little Is Enough: Circumventing Defenses For Distributed Learning", section 4, Algorithm 3).

    Within the spread of honest updates, so that no rule about distances throws it out. A hostile site that knows only
    its own update knows no deviation and sends that update: it takes two, or `knows: all`.
    """

    name: Literal["little_is_enough"] = "little_is_enough"

    z: float | None = Field(default=None, gt=0)
    """null: the paper's z_max, at which as many honest sites are expected beyond the lie as make a majority with the
    hostile ones; 0 where that is impossible."""

    def forge(self, own: Vector, known: Round, generator: np.random.Generator) -> Vector:
        """See Attack."""
        z = largest_z(known.sites, known.hostile) if self.z is None else self.z
        return np.asarray(known.updates.mean(axis=0) - z * known.updates.std(axis=0))


class InnerProduct(Colluding):
    """-epsilon times the known updates' mean (Xie, Koyejo, Gupta 2020, "Fall of Empires: Breaking Byzantine-tolerant
    SGD by Inner Product Manipulation", section 4).

    A small epsilon keeps the lie near to the honest updates, where rules about distances take it for one of them; above
    (n - m) / m it turns the mean itself round.
    """

    name: Literal["inner_product"] = "inner_product"

    epsilon: float = Field(default=0.5, gt=0)

    def forge(self, own: Vector, known: Round, generator: np.random.Generator) -> Vector:
        """See Attack."""
        return np.asarray(-self.epsilon * known.updates.mean(axis=0))


def largest_z(sites: int, hostile: int) -> float:
    """Baruch et al.'s z_max for `hostile` of `sites`; never below 0."""
    supporters = sites // 2 + 1 - hostile
    share = (sites - hostile - supporters) / (sites - hostile)
    return max(0.0, NormalDist().inv_cdf(share)) if 0 < share < 1 else 0.0
