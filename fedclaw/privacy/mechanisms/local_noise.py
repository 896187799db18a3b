"""The site's own noise: inside each step (DP-SGD), or on what one unit can move by a known bound.

DP-SGD (Abadi et al. 2016): every step's sum of clipped gradients has noise, so all that follows from the steps alone
is released, the update that leaves as well as what stays. Over several steps an update is within no single sensitivity,
and need not be. What does not follow from the steps (the training loss, a model of the site's own) is raw.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from fedclaw.errors import PrivacyError
from fedclaw.privacy.accounting import NoiseEvent, calibrate
from fedclaw.privacy.mechanisms.mechanism import Charge, DataUse, Mechanism, SampledSteps, T, clip_out_of_range
from fedclaw.privacy.mechanisms.sum_noise import by_the_loss
from fedclaw.privacy.provenance import Part, Raw, Released
from fedclaw.protocol.arrays import Arrays, Update
from fedclaw.protocol.terms import PrivacyRequest

if TYPE_CHECKING:
    from fedclaw.privacy.noise import GaussianSource

Doubles = NDArray[np.float64]


class LocalNoise(Mechanism):
    """DP-SGD at each site, for the unit example; the site calibrates, since only it knows its sampling rate.

    By itself, what is released goes on in the open. Where there is noise on the sum as well, this class comes before
    that noise's (`fedclaw.privacy.mechanisms.choice`).
    """

    claims_privacy: ClassVar[bool] = True
    noises_steps: ClassVar[bool] = True

    @property
    def local(self) -> PrivacyRequest:
        """What is asked of the steps."""
        assert self.asked.privacy is not None
        return self.asked.privacy

    def out_of_range(self) -> str | None:
        """See Mechanism."""
        return clip_out_of_range("privacy.max_grad_norm", self.local.max_grad_norm) or super().out_of_range()

    def uncovered(self, use: DataUse) -> str | None:
        """See Mechanism. Whatever a strategy makes of parameters and of what it kept follows from noised steps."""
        return super().uncovered(use) or by_the_loss(use)

    def sampling(self, examples: int, charged: NoiseEvent | None) -> SampledSteps | None:
        """See Mechanism. Raises PrivacyError without a charge, which says how much noise there has to be."""
        if charged is None:
            raise PrivacyError("steps with noise were asked for before anything was charged for them")
        return SampledSteps(charged.sample_rate, charged.noise_multiplier, self.local.max_grad_norm)

    def outcome(self, delta: Arrays, examples: int) -> Part[Arrays]:
        """See Mechanism. Every step had its noise."""
        return Released(delta)

    def bound(self, part: Part[Update]) -> Part[Update]:
        """See Mechanism."""
        return super().bound(self.covered(part))

    def covered(self, part: Part[T]) -> Released[T]:
        """See Mechanism."""
        if not isinstance(part, Released):
            raise PrivacyError("the update is worked out from more than noised steps, and no noise covers that")
        return part

    def charge(self, examples: int, *, trust_server_noise: bool) -> Charge:
        """Noise calibrated so that all rounds of the run together spend the epsilon asked. Raises PrivacyError."""
        asked, rate = self.local, self.sample_rate(examples)
        steps = self.asked.training.local_steps(examples) * self.asked.rounds
        try:
            return self._charge(examples, calibrate(asked.epsilon, asked.delta, rate, steps))
        except PrivacyError as error:
            raise PrivacyError(
                f"no noise keeps what was asked for within epsilon {asked.epsilon:g} at delta {asked.delta:g}; ask for "
                "fewer rounds or steps, smaller batches or a larger epsilon"
            ) from error

    def possible_charges(self, examples: int) -> tuple[Charge, ...]:
        """See Mechanism; with some noise, which the site has calibrated."""
        return (self._charge(examples, 1.0),)

    def _charge(self, examples: int, noise: float) -> Charge:
        steps = self.asked.training.local_steps(examples)
        return Charge("dp-sgd", NoiseEvent(self.sample_rate(examples), noise, steps), "nobody")


@dataclass(frozen=True)
class OwnNoise:
    """Gaussian noise of the site's own on an answer that one unit moves by a bounded amount.

    N(0, (noise multiplier x sensitivity)^2) in every number makes it one Gaussian mechanism (Dwork, Roth 2014,
    appendix A).
    """

    noise_multiplier: float
    trust: ClassVar[Literal["nobody"]] = "nobody"

    @classmethod
    def calibrated(cls, epsilon: float, delta: float) -> "OwnNoise":
        """What keeps one answer within epsilon and delta. Raises PrivacyError when none does."""
        return cls(calibrate(epsilon, delta, 1.0, 1))

    @property
    def event(self) -> NoiseEvent:
        """What the ledger books."""
        return NoiseEvent(1.0, self.noise_multiplier, 1)

    def deviation(self, sensitivity: float) -> float:
        """Of the noise in each number."""
        return self.noise_multiplier * sensitivity

    def let_out(self, part: Part[Doubles], source: "GaussianSource") -> Released[Doubles]:
        """The numbers with their noise, float64. Raises PrivacyError for what has no bound."""
        if isinstance(part, Raw):
            raise PrivacyError("an answer has no bound that noise could be made for")
        if isinstance(part, Released):
            return part
        import torch

        values = torch.from_numpy(part.value.copy())
        return Released(source.perturb_(values, self.deviation(part.sensitivity)).numpy())
