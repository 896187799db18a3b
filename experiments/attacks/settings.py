"""conf/attack/*.yaml: one of the attacks, told apart by its name."""

from typing import Annotated, Literal

from pydantic import Field

from experiments.attacks.base import Attack
from experiments.attacks.collusion import InnerProduct, LittleIsEnough
from experiments.attacks.data import Backdoor, LabelFlip
from experiments.attacks.updates import GaussianNoise, SignFlip


class NoAttack(Attack):
    """Every site is honest."""

    name: Literal["none"] = "none"
    sites: Literal[0] = 0


AttackSettings = Annotated[
    NoAttack | LabelFlip | SignFlip | GaussianNoise | Backdoor | LittleIsEnough | InnerProduct,
    Field(discriminator="name"),
]
