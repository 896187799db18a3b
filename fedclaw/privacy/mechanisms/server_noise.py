"""The server's noise: the sites clip, and the server adds noise to the mean of what they sent.

Sensitivity, of the mean over the sites, by the weights that were really used:

    unit site      clip x (largest weight / sum of weights)      not clip / n: a site with 99% of the examples moves an
                                                                 example-weighted mean by 0.99 clip
    unit example   learning rate x clip / (sample rate x sum of examples)

each a little larger for what rounding adds on the way (`_rounding`): to float32, and to a secure sum's steps;
and the noise is N(0, (noise multiplier x sensitivity)^2) in every coordinate. Unit site: McMahan, Ramage, Talwar, Zhang
2018 ("Learning Differentially Private Recurrent Language Models"), with the clipping bound of Andrew, Thakkar,
McMahan, Ramaswamy 2021 ("Differentially Private Learning with Adaptive Clipping") where it is adaptive.
"""

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from fedclaw.errors import UsageError
from fedclaw.privacy.mechanisms.mechanism import UNPROTECTED, Charge
from fedclaw.privacy.mechanisms.sum_noise import WITHIN, SumNoise
from fedclaw.protocol.limits import LARGEST_CLIP, SMALLEST_CLIP
from fedclaw.protocol.terms import AdaptiveClip, CentralRequest, SecureAggregation, SecureRequest
from fedclaw.protocol.update import Update

_ROUNDING = 1e-3
# Of the bound: what rounding to a secure sum's steps may add to it.


def noise_of_the_server(**fields: Any) -> CentralRequest:
    """What a run asks for where the server adds the noise. Raises pydantic's ValidationError."""
    return CentralRequest(noise_by="server", **fields)


@dataclass(frozen=True)
class ServerNoise(SumNoise):
    """The server adds the noise, and everybody trusts it to; a site's policy says whether that counts."""

    sum_dtype: ClassVar[type[np.floating[Any]]] = np.float64
    """Rounded once, with the noise in it, as the roundings of all the others would differ by who is in the sum."""

    @property
    def update_noise_multiplier(self) -> float:
        """What of the multiplier is left for the update when an adaptive bound's count takes its share.

        Andrew et al. 2021, theorem 1: z_update = (z^-2 - (2 count_noise)^-2)^(-1/2).
        """
        if self.request.adaptive is None:
            return self.request.noise_multiplier
        rest = self.request.noise_multiplier**-2 - (2 * self.request.adaptive.count_noise) ** -2
        return math.inf if rest <= 0 else rest**-0.5

    def contradiction(self) -> str | None:
        """See Mechanism."""
        if self.request.adaptive and self.takes_one_step:
            return "an adaptive clipping bound goes with unit: site and noise_by: server"
        if math.isinf(self.update_noise_multiplier):
            return f"adaptive: count_noise has to be above {self.request.noise_multiplier / 2:.4g} at this epsilon"
        return super().contradiction()

    def charge(self, examples: int, *, trust_server_noise: bool) -> Charge:
        """See Mechanism."""
        event = self.event(self.request.noise_multiplier)
        return Charge("central", event, "server") if trust_server_noise else UNPROTECTED

    def possible_charges(self, examples: int) -> tuple[Charge, ...]:
        """See Mechanism. The site says if its ledger counts the server's noise."""
        return *super().possible_charges(examples), UNPROTECTED

    def scale(self, request: SecureRequest, length: int, sites: int, honest: int) -> tuple[float, float | None]:
        """See Mechanism. To the nearest step, rounding moves two vectors of d numbers apart by up to sqrt(d) steps."""
        step, value_range = super().scale(request, length, sites, honest)
        if step * math.sqrt(length) > _ROUNDING * self.sum_sensitivity:
            raise UsageError(
                f"secure: steps of {step:.3g} are too coarse for noise by the server on updates of {length} numbers; "
                "set a smaller secure.value_range or secure.largest_weight, or let the sites bring the noise "
                "(central.noise_by)"
            )
        return step, value_range

    def noised(self, total: Update) -> Update:
        """Add the noise that the mean's sensitivity asks for; a float64 `total` is overwritten."""
        import torch

        from fedclaw.privacy.noise import GaussianSource

        source, request = GaussianSource(), self.request
        arrays = dict(total.arrays)
        votes = arrays.pop(WITHIN, None)
        deviation = self.update_noise_multiplier * self.mean_sensitivity(total)
        # In float64, in place if it is that already, and rounded once, with the noise in it.
        exact = [torch.from_numpy(array.astype(np.float64, copy=False)) for array in arrays.values()]
        noisy = [source.perturb_(values, deviation).to(torch.float32) for values in exact]
        arrays = {name: values.numpy() for name, values in zip(arrays, noisy, strict=True)}
        clip = None
        if request.adaptive and votes is not None:
            one_site = total.heaviest if request.expected_sites is None else 1 / request.expected_sites
            share = 0.5 + float(votes[0]) + source.standard(1).item() * request.adaptive.count_noise * one_site
            clip = moved(request.clip, share, request.adaptive)
        return replace(total, arrays=arrays, clip=clip)

    def mean_sensitivity(self, mean: Update) -> float:
        """How far, in L2 norm, one unit can move `mean`: what the weighting made, with what it was made of."""
        return (1 + self._rounding(mean)) * self._exact_sensitivity(mean)

    def _exact_sensitivity(self, mean: Update) -> float:
        if self.takes_one_step:
            return self.sum_sensitivity / mean.examples
        if self.request.expected_sites is not None:
            return self.request.clip / self.request.expected_sites
        return self.request.clip * mean.heaviest

    def _rounding(self, mean: Update) -> float:
        """What rounding adds to how far one unit moves a site's part of the sum, as a share of that.

        An update within its clipping bound stays within it in float32. A sum over sampled examples is as long as so
        many bounds: two such that are rounded to float32 are up to 2^-23 of that further apart. A sample is larger than
        m + 10 sqrt(m) + 50, m the expected size, with probability 2^-64 (Bernstein's inequality). A secure sum rounds
        each of d numbers to the nearest step, two of which are up to sqrt(d) steps further apart.
        """
        share = 0.0
        if self.takes_one_step:
            expected = self.request.sample_rate * mean.examples
            share = min(mean.examples, expected + 10 * math.sqrt(expected) + 50) * 2.0**-23
        secure = self.asked.secure
        if isinstance(secure, SecureAggregation):
            share += secure.step * math.sqrt(secure.length) / (self._exact_sensitivity(mean) * mean.divisor)
        return share


def moved(clip: float, share: float, adaptive: AdaptiveClip) -> float:
    """The next bound, when the (noisy) `share` of the sites stayed within this one (Andrew et al. 2021, section 2)."""
    wanted = clip * math.exp(-adaptive.learning_rate * (min(max(share, 0.0), 1.0) - adaptive.quantile))
    return min(max(wanted, SMALLEST_CLIP), LARGEST_CLIP)
