"""Attacks of sites that send something else than what they trained, each by itself."""

from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from experiments.attacks.base import Attack, Round, Vector


class SignFlip(Attack):
    """-scale times the site's own update (Li, Xu, Chen, Giannakis, Ling 2019, "RSA: Byzantine-Robust Stochastic
    Aggregation Methods for Distributed Learning from Heterogeneous Datasets", section 5)."""

    name: Literal["sign_flip"] = "sign_flip"
    forges: ClassVar[bool] = True

    scale: float = Field(default=10.0, gt=0)

    def forge(self, own: Vector, known: Round, generator: np.random.Generator) -> Vector:
        """See Attack."""
        return -self.scale * own


class GaussianNoise(Attack):
    """Noise in the place of an update (Blanchard et al. 2017, section 5, with a deviation of 200 for any update)."""

    name: Literal["gaussian"] = "gaussian"
    forges: ClassVar[bool] = True

    scale: float = Field(default=30.0, gt=0)
    """The noise's standard deviation, in those of the numbers in the site's own update."""

    def forge(self, own: Vector, known: Round, generator: np.random.Generator) -> Vector:
        """See Attack."""
        return generator.normal(0.0, self.scale * float(np.sqrt(np.mean(own**2))), own.shape)
