"""Personalisation layers: one body together, a head each.

Arivazhagan, Aggarwal, Singh, Choudhary 2019, "Federated Learning with Personalization Layers", Algorithms 1 and 2
(https://arxiv.org/abs/1912.00818).
"""

from typing import ClassVar

from fedclaw.strategies.heads import SharedBody


class FedPer(SharedBody):
    """A site trains body and head at the same time; the body is averaged, the head never leaves.

    For sites whose labels mean different things (another grading, another threshold) while the inputs have the same
    features in them. Each site is evaluated with its own head; what the server keeps of it is what the run began with,
    so its model is of no use by itself, and a site that has not trained yet has nothing better.
    """

    name: ClassVar[str] = "fedper"
