"""What `python -m fedclaw.compress` can be told; conf/compress.yaml holds the defaults."""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from fedclaw.protocol.frozen import Frozen
from fedclaw.server.settings import ListenAddress
from fedclaw.server.waiting import CohortWaiting


class RecoverySettings(Frozen):
    """How a pruned model is trained at the coordinator."""

    temperature: float = Field(default=2.0, gt=0)
    steps: int = Field(default=2000, ge=1)
    """Optimiser steps, at most."""
    batch_size: int = Field(default=32, ge=1)
    learning_rate: float = Field(default=2e-3, gt=0)
    schedule: Literal["cosine", "constant"] = "cosine"
    mix: bool | None = None
    """Train on random mixtures of two inputs each, scored by the teacher as they are, not on the inputs alone.
    None: mixtures of public inputs, which are few (measured on digits, 180 inputs: 98.5 instead of 97.6%), and
    synthetic inputs as they are (mixing them took 91.4 down to 87.4%)."""
    held_out: float = Field(default=0.2, gt=0, lt=1)
    """Share of the inputs that is kept back to measure agreement and to stop early."""
    patience: int = Field(default=600, ge=1)
    """Steps without a better model after which training stops."""


class SiteRecovery(CohortWaiting):
    """Recovery at the sites: more rounds of training under differential privacy, on their ledgers."""

    rounds: int = Field(default=5, ge=1)
    epsilon: float | None = Field(default=None, gt=0)
    """What all these rounds together may cost a site, beyond the run itself; by default as much as the run."""
    temperature: float = Field(default=2.0, gt=0)
    weight: float = Field(default=0.7, ge=0, le=1)
    """Of the teacher in the loss; the rest is the loss on the site's own targets."""


class CompressSettings(Frozen):
    """The whole configuration of one compression."""

    run: Path
    mode: Literal["proxy", "federated"] = "proxy"
    fraction: float = Field(default=0.3, gt=0, lt=1)
    """Largest share of the parameters that may be left."""
    overwrite: bool = False
    """Replace an earlier result, once the new one is whole."""
    inputs: Path | None = None
    """Public unlabelled inputs, in the workload's own format; None: synthetic ones made from the schema."""
    synthetic: int = Field(default=4096, ge=10)
    """Number of synthetic inputs when there is no inputs file."""
    evaluation: Path | None = None
    """Labelled public data for accuracies."""
    labelled: Path | None = None
    """Labelled public training data, used by the control without a teacher only."""
    controls: bool = False
    """Also train the two controls: without a teacher (needs `labelled`), and the same net from scratch."""
    recovery: RecoverySettings = RecoverySettings()
    federation: Path | None = None
    """The coordinator's federation directory; needed in federated mode."""
    address: ListenAddress | None = None
    """host:port to listen on instead of the descriptor's."""
    sites: SiteRecovery = SiteRecovery()
    latency_repeats: int = Field(default=100, ge=1)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the proxy recovery computes; auto takes CUDA if there."""
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.mode == "federated" and self.federation is None:
            raise ValueError("mode=federated needs federation=DIR, the coordinator's federation directory")
        if self.mode == "federated" and (self.inputs is not None or self.controls):
            raise ValueError(
                "inputs= and controls= belong to mode=proxy; in mode=federated the data stays at the sites"
            )
        return self
