"""The site's own noise: inside each step (DP-SGD), or on what one unit can move by a known bound.

DP-SGD (Abadi et al. 2016): every step's sum of clipped gradients has noise, so all that follows from the steps alone
is released, the update that leaves as well as what stays. Over several steps an update is within no single sensitivity,
and need not be. What does not follow from the steps (the training loss, a model of the site's own) is raw.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from fedclaw.errors import PrivacyError
from fedclaw.privacy.accounting import NoiseEvent, calibrate
from fedclaw.privacy.distributed import Price
from fedclaw.privacy.mechanisms.integers import Integers
from fedclaw.privacy.mechanisms.mechanism import Charge, DataUse, Mechanism, Sampling, clip_out_of_range
from fedclaw.privacy.mechanisms.sum_noise import by_the_loss
from fedclaw.protocol.plan import CentralReceipt, PrivacyRequest
from fedclaw.protocol.terms import SecureRequest
from fedclaw.protocol.update import Update


@dataclass(frozen=True)
class LocalNoise(Mechanism):
    """DP-SGD at each site, for the unit example; the site calibrates, since only it knows its sampling rate.

    `onward` is how what is released leaves: in the open, or with noise on the sum as well.
    """

    request: PrivacyRequest
    onward: Mechanism

    calibrated_here: ClassVar[frozenset[str]] = frozenset({"noise_multiplier"})

    @property
    def noised_at_site(self) -> bool:
        """See Mechanism."""
        return True

    @property
    def is_sampled(self) -> bool:
        """See Mechanism."""
        return True

    @property
    def shares_noise(self) -> bool:
        """See Mechanism."""
        return self.onward.shares_noise

    @property
    def largest_update(self) -> float | None:
        """See Mechanism."""
        return self.onward.largest_update

    @property
    def samples_sites(self) -> bool:
        """See Mechanism."""
        return self.onward.samples_sites

    @property
    def central(self) -> CentralReceipt | None:
        """See Mechanism."""
        return self.onward.central

    @property
    def delta(self) -> float | None:
        """See Mechanism."""
        return self.request.delta

    @property
    def clip(self) -> float:
        """See Mechanism."""
        return self.request.max_grad_norm

    @property
    def counts_within_clip(self) -> bool:
        """See Mechanism."""
        return self.onward.counts_within_clip

    @property
    def fixed_divisor(self) -> float | None:
        """See Mechanism."""
        return self.onward.fixed_divisor

    @property
    def sum_dtype(self) -> type[np.floating[Any]]:
        """See Mechanism."""
        return self.onward.sum_dtype

    @property
    def price(self) -> Price | None:
        """See Mechanism."""
        return self.onward.price

    def contradiction(self) -> str | None:
        """See Mechanism."""
        return self.onward.contradiction()

    def out_of_range(self) -> str | None:
        """See Mechanism."""
        return clip_out_of_range("privacy.max_grad_norm", self.request.max_grad_norm) or self.onward.out_of_range()

    def uncovered(self, use: DataUse) -> str | None:
        """See Mechanism. Whatever a strategy makes of parameters and of what it kept follows from noised steps."""
        return self.onward.uncovered(use) or by_the_loss(use)

    def sampling(self, examples: int, charged: NoiseEvent | None) -> Sampling | None:
        """See Mechanism. Raises PrivacyError without a charge, which says how much noise there has to be."""
        if charged is None:
            raise PrivacyError("steps with noise were asked for before anything was charged for them")
        return Sampling(charged.sample_rate, charged.noise_multiplier, self.request.max_grad_norm)

    def bound(self, update: Update) -> Update:
        """See Mechanism."""
        return self.onward.bound(update)

    def noised(self, total: Update) -> Update:
        """See Mechanism."""
        return self.onward.noised(total)

    def integers(self, examples: int | None = None) -> Integers:
        """See Mechanism."""
        return self.onward.integers(examples)

    def scale(self, request: SecureRequest, length: int, sites: int, honest: int) -> tuple[float, float | None]:
        """See Mechanism."""
        return self.onward.scale(request, length, sites, honest)

    def charge(self, examples: int, *, trust_server_noise: bool) -> Charge:
        """Noise calibrated so that all rounds of the run together spend the epsilon asked. Raises PrivacyError."""
        rate, steps = self.sample_rate(examples), self.asked.training.local_steps(examples)
        try:
            noise = calibrate(self.request.epsilon, self.request.delta, rate, steps * self.asked.rounds)
        except PrivacyError as error:
            raise PrivacyError(
                f"no noise keeps what was asked for within epsilon {self.request.epsilon:g} at delta "
                f"{self.request.delta:g}; ask for fewer rounds or steps, smaller batches or a larger epsilon"
            ) from error
        return self._charge(examples, noise)

    def possible_charges(self, examples: int) -> tuple[Charge, ...]:
        """See Mechanism; with some noise, which the site has calibrated."""
        return (self._charge(examples, 1.0),)

    def _charge(self, examples: int, noise: float) -> Charge:
        steps = self.asked.training.local_steps(examples)
        return Charge("dp-sgd", NoiseEvent(self.sample_rate(examples), noise, steps), "nobody")
