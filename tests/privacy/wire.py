"""A real site service in this process, and what leaves it: for measurements on neighbouring data sets."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from experiments.datasets import DatasetSettings, SitePolicy, write_sites
from fedclaw.learning.workload import Table
from fedclaw.privacy.noise import GaussianSource
from fedclaw.protocol.arrays import unpack
from fedclaw.protocol.receipt import Receipt
from fedclaw.protocol.terms import LocalTraining, ModelSpec
from tests.site.conftest import Asker

CAP = 100
WEIGHTINGS = [
    {"weighting": "examples"},
    {"weighting": "uniform"},
    {"weighting": "capped", "weight_cap": CAP},
]
NAMES = [str(each["weighting"]) for each in WEIGHTINGS]


class WireSite:
    """One hospital with the breast cancer data (363 examples), whose budget has no limit."""

    def __init__(self, root: Path) -> None:
        (directory,) = write_sites(
            root,
            DatasetSettings(name="breast_cancer", sites=1),
            SitePolicy(epsilon=None, delta=1e-3, trust_server_noise=True, allow_training_without_privacy=True),
        )
        self.asker = Asker(directory)
        self.site = self.asker.site
        self.inputs = self.site.data.train.inputs
        self.targets = self.site.data.train.targets
        self.receipt: Receipt | None = None
        # A model that has no opinion yet: no example is so well known to it that its gradient vanishes.
        self.asker.parameters = {name: np.zeros_like(array) for name, array in self.asker.parameters.items()}

    def take(self, model: ModelSpec) -> None:
        """Ask about `model` from now on, with the parameters that it is built with."""
        network = self.site.workload.build(model)
        self.asker.parameters = {name: p.detach().numpy().copy() for name, p in network.named_parameters()}
        self.asker.plan = self.asker.plan.model_copy(update={"model": model})

    def leaves(
        self,
        inputs: NDArray[np.float32] | None = None,
        targets: NDArray[np.int64] | None = None,
        *,
        key: int | None = None,
        **changes: object,
    ) -> NDArray[np.float64]:
        """All numbers that leave in answer to one question, with `inputs` (N, 30) and `targets` (N,) as training data.

        `key` makes sampling and noise repeatable.
        """
        inputs = self.inputs if inputs is None else inputs
        targets = self.targets[: len(inputs)] if targets is None else targets
        self.site.use(replace(self.site.data, train=Table(inputs, targets)), "as they are")
        if key is not None:
            self.site.source = GaussianSource(insecure_fixed_key_for_tests=key.to_bytes(32, "big"))
        reply = self.asker.ask(**changes)
        assert not reply.has_error(), reply.error.reason
        self.receipt = Receipt.model_validate_json(reply.content["receipt"]["json"])
        arrays = unpack(reply.content["sum"])
        return np.concatenate([arrays[name].ravel().astype(np.float64) for name in sorted(arrays)])


def emptied(inputs: NDArray[np.float32], *rows: int) -> NDArray[np.float32]:
    """`inputs` without what is in `rows`: their gradients are not finite, which counts as zero, and N stays public."""
    changed = inputs.copy()
    changed[list(rows)] = np.nan
    return changed


def loud(inputs: NDArray[np.float32], row: int) -> NDArray[np.float32]:
    """`inputs` with an example in `row` whose gradient is far beyond any clipping bound."""
    changed = inputs.copy()
    changed[row] = 1000.0 * (1 + np.arange(inputs.shape[1]) % 3)
    return changed


def weight_of(changes: dict[str, object], examples: int) -> float:
    """What the site's update counts by, worked out here."""
    if changes["weighting"] == "uniform":
        return 1.0
    return float(min(examples, CAP) if changes["weighting"] == "capped" else examples)


def sgd(steps: int, batch_size: int, momentum: float = 0.0, learning_rate: float = 0.1) -> LocalTraining:
    """Plain local training of so many steps."""
    return LocalTraining(steps=steps, batch_size=batch_size, learning_rate=learning_rate, momentum=momentum)


def reaches(steps: int, momentum: float) -> list[float]:
    """By step: how often its gradient counts in the round's delta, through momentum, until the end of the round."""
    return [math.fsum(momentum**later for later in range(steps - step)) for step in range(steps)]
