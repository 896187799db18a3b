"""Noise on the sum over the sites, whoever brings it: what is bounded at a site, and how far one unit moves the sum.

Unit `site`: the update is clipped as a whole, so whatever a site kept, or trained besides, its part is within the
bound. Unit `example`: each site takes one step on a Poisson sample, each example's gradient clipped, without noise of
its own; the sum over the sites is one DP-SGD step (Abadi et al. 2016) on the pooled data, since
sum n_k delta_k = -(rate / q) x sum of clipped gradients. That step leaves as it is: nothing that a strategy makes of
it, no extras, and nothing that stays at the site. What was trained without noise would be where the next round begins,
and one example would move every gradient of that round, sampled in it or not.

The server's noise (`ServerNoise`): the sites clip, and the server adds noise to the mean of what they sent.

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
from numpy.typing import NDArray

from fedclaw.errors import PrivacyError, Reason, Setting, UsageError
from fedclaw.privacy.accounting import NoiseEvent
from fedclaw.privacy.mechanisms.mechanism import (
    UNPROTECTED,
    Charge,
    DataUse,
    Mechanism,
    SampledSteps,
    T,
    clip_out_of_range,
)
from fedclaw.privacy.provenance import Bounded, Part, Raw, Released
from fedclaw.protocol.arrays import Arrays, Update
from fedclaw.protocol.limits import LARGEST_CLIP, SMALLEST_CLIP
from fedclaw.protocol.terms import AdaptiveClip, CentralNoise, CentralRequest, SecureAggregation, SecureRequest

WITHIN = "fedclaw.within_clip"
"""The array beside the parameters that counts who stayed within an adaptive bound: +1/2 or -1/2 a site."""

_NORM_MARGIN = 1 + 1e-6
# Keeps the rounding to float32 from lifting a clipped update over the bound.
_BLOCK = 1 << 16
_LARGEST_NUMBER = 1e30
# What a plan's numbers multiply to stays below, and its reciprocal above: a float32 has room for it.
_AT_THE_SITES = Setting("privacy", "dp")
_FOR_EXAMPLES, _FOR_SITES = Setting("central.unit", "example"), Setting("central.unit", "site")


@dataclass(frozen=True)
class SumNoise(Mechanism):
    """Noise on the sum, as `request` announces it."""

    claims_privacy: ClassVar[bool] = True

    @property
    def request(self) -> CentralNoise:
        """What is asked of the sum."""
        assert self.asked.central is not None
        return self.asked.central

    @property
    def sum_sensitivity(self) -> float:
        """How far, in L2 norm, one unit can move the sum over the sites of weight x delta."""
        if self.takes_one_step:
            return self.asked.training.learning_rate * self.request.clip / self.request.sample_rate
        return self.request.clip * (self.asked.weight_cap or 1)

    @property
    def update_noise_multiplier(self) -> float:
        """What of the noise multiplier is for the update."""
        return self.request.noise_multiplier

    def signal_to_noise(self, examples: int, sites: int) -> float:
        """The largest possible signal of a whole run by the noise in its direction: of T rounds whose sum is over m
        units, T m C against sqrt(T) z C."""
        units = self.request.sample_rate * (examples if self.takes_one_step else sites)
        return units * math.sqrt(self.asked.rounds) / self.update_noise_multiplier

    def event(self, noise_multiplier: float) -> NoiseEvent:
        """What a round costs an example or person, by the noise multiplier for the unit that it was made for.

        Unit `site`: two data sets that differ in one of them give two updates within the clipping bound, which may lie
        twice the bound apart, while a site's absence moves the sum by the bound: so they have half the multiplier.
        That a site is asked only now and then is not counted, as its ledger holds only the rounds that asked it.
        """
        if self.takes_one_step:
            return NoiseEvent(self.request.sample_rate, noise_multiplier, 1)
        return NoiseEvent(1.0, noise_multiplier / 2, 1)

    def contradiction(self) -> str | None:
        """See Mechanism."""
        if reason := super().contradiction():
            return reason
        if self.asked.hidden and self.site_rate < 1:
            return "secure aggregation tells its sites who is asked, which sample_rate below 1 counts on hiding"
        if self.takes_one_step:
            return self._not_one_step()
        if (self.site_rate < 1 or self.request.adaptive) and self.asked.weighting != "uniform":
            return "sites asked at random, and an adaptive clipping bound, go with weighting: uniform"
        return None

    def _not_one_step(self) -> str | None:
        training = self.asked.training
        if self.asked.privacy is not None:
            return "central privacy of the unit example adds its noise to the sum: it goes without local noise"
        plain = training.optimizer == "sgd" and training.momentum == 0 and training.weight_decay == 0
        if training.steps != 1 or not plain:
            return "the unit example is one plain step a round: training steps 1, sgd, no momentum or decay"
        if self.asked.weighting != "examples":
            return "the unit example makes one step on the pooled data: weighting: examples"
        return None

    def out_of_range(self) -> str | None:
        """See Mechanism."""
        if reason := super().out_of_range() or clip_out_of_range("central.clip", self.request.clip):
            return reason
        for value in (self.sum_sensitivity, self.sum_sensitivity * self.request.noise_multiplier):
            if not 1 / _LARGEST_NUMBER <= value <= _LARGEST_NUMBER:
                return (
                    f"learning rate, clipping bound, sample rate, weight cap and noise multiplier multiply to "
                    f"{value:g}, which floating point has no room for"
                )
        return None

    def uncovered(self, use: DataUse) -> str | None:
        """See Mechanism."""
        return _unsummed(use) or (_unstepped(use) if self.takes_one_step else None)

    def sampling(self, examples: int, charged: NoiseEvent | None) -> SampledSteps | None:
        """See Mechanism. Unit example: without noise of the site's own."""
        return SampledSteps(self.request.sample_rate, 0.0, self.request.clip) if self.takes_one_step else None

    def sample_rate(self, examples: int) -> float:
        """See Mechanism."""
        return self.request.sample_rate if self.takes_one_step else super().sample_rate(examples)

    def outcome(self, delta: Arrays, examples: int) -> Part[Arrays]:
        """See Mechanism. Unit example: each example's gradient was clipped by the step that made it."""
        return Bounded(delta, self.sum_sensitivity / examples) if self.takes_one_step else Raw(delta)

    def bound(self, part: Part[Update]) -> Part[Update]:
        """Unit site: scale the update to an L2 norm of at most `clip`. Unit example: it is the one clipped step."""
        if self.takes_one_step:
            return self.covered(part)
        arrays = part.value.arrays
        norm = clip_to(arrays, self.request.clip)
        clipped = part.then(lambda update: update)
        if self.counts_within_clip:
            vote = np.array([0.5 if norm <= self.request.clip else -0.5], np.float32)
            clipped = clipped.then(lambda update: replace(update, arrays={**arrays, WITHIN: vote}))
        return clipped if isinstance(clipped, Released) else Bounded(clipped.value, self.request.clip)

    def covered(self, part: Part[T]) -> Part[T]:
        """See Mechanism."""
        if isinstance(part, Raw):
            meant = "more than the one clipped step" if self.takes_one_step else "not within the bound"
            raise PrivacyError(f"the update is {meant} that the noise on the sum is made for")
        return part


def _unsummed(use: DataUse) -> str | None:
    """What noise on the sum does not go with."""
    if use.needs_single_updates:
        return Reason("takes no mean of the updates, and noise on the sum is made for a mean; take ", _AT_THE_SITES)
    if use.sends_extras:
        # The server's half would take the noise for them.
        return Reason("sends more than updates, and noise on the sum is made for updates alone; take ", _AT_THE_SITES)
    if use.trains_own_model:
        return Reason("trains a second model at each site, which noise on the sum does not cover; take ", _AT_THE_SITES)
    return by_the_loss(use)


def _unstepped(use: DataUse) -> str | None:
    """What does not go with one clipped step a round whose noise is on the sum."""
    if use.keeps_parameters:
        return Reason(
            "keeps parameters at each site, which ",
            _FOR_EXAMPLES,
            ", one step a round with the noise on the sum, trains without noise, and the next round begins with them; "
            "take ",
            _FOR_SITES,
            " or ",
            _AT_THE_SITES,
        )
    if use.changes_step:
        return Reason(
            "makes more of a site's step than the step, and ",
            _FOR_EXAMPLES,
            " bounds each example's part in the step alone; take ",
            _FOR_SITES,
            " or ",
            _AT_THE_SITES,
        )
    return None


def by_the_loss(use: DataUse) -> str | None:
    """What no noise covers, wherever it is added, of a strategy that uses the training loss."""
    if use.uses_training_loss:
        return Reason(
            "works out what leaves from the loss on the training data, which no noise covers; take ",
            Setting("privacy", "none"),
        )
    return None


def clip_to(arrays: Arrays, bound: float) -> float:
    """Scale `arrays`, in place, to a joint L2 norm of at most `bound`; returns the norm that they had.

    What is not finite becomes zero, and its norm is infinite.
    """
    norm = math.sqrt(sum(_square(array) for array in arrays.values()))
    if not math.isfinite(norm):
        for array in arrays.values():
            array[...] = 0
        return math.inf
    if norm > bound:
        # In float64: the factor may be smaller than any number that float32 holds.
        factor = np.float64(bound / (norm * _NORM_MARGIN))
        for array in arrays.values():
            np.multiply(array, factor, out=array, dtype=np.float64, casting="same_kind")
    return norm


def shorten(arrays: Arrays, longest: float) -> None:
    """Scale `arrays`, in place, to a joint L2 norm of at most `longest`, to the last digits of float64.

    The nearest within the ball: it brings no two further apart, as `clip_to`, with its margin, may at the bound.
    """
    norm = math.sqrt(sum(_square(array) for array in arrays.values()))
    if norm > longest:
        for array in arrays.values():
            array *= longest / norm


def _square(array: NDArray[np.float32]) -> float:
    """The square of the L2 norm, in float64, a block at a time: a model in float64 takes twice its memory."""
    flat = array.reshape(-1)
    blocks = (flat[start : start + _BLOCK].astype(np.float64) for start in range(0, flat.size, _BLOCK))
    return float(sum(np.dot(block, block) for block in blocks))


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

    def bound(self, part: Part[Update]) -> Part[Update]:
        """See SumNoise. Unit example: no longer than the largest sample that `_rounding` counts on.

        Where a site declares how many examples it has, its samples can be larger. Scaling down to a length brings no
        two updates further apart.
        """
        bounded = super().bound(part)
        if self.takes_one_step and isinstance(bounded, Bounded):
            longest = _largest_sample(self.request.sample_rate, bounded.value.examples) * bounded.sensitivity
            shorten(bounded.value.arrays, longest)
        return bounded

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
        many bounds: two such that are rounded to float32 are up to 2^-23 of that further apart. No site's is longer
        than its `_largest_sample` allows (`bound`). A secure sum rounds each of d numbers to the nearest step, two of
        which are up to sqrt(d) steps further apart.
        """
        share = 0.0
        if self.takes_one_step:
            share = _largest_sample(self.request.sample_rate, mean.examples) * 2.0**-23
        secure = self.asked.secure
        if isinstance(secure, SecureAggregation):
            share += secure.step * math.sqrt(secure.length) / (self._exact_sensitivity(mean) * mean.divisor)
        return share


def _largest_sample(rate: float, examples: int) -> float:
    """Of so many examples at that rate: more than m + 10 sqrt(m) + 50, m the expected size, come with probability
    2^-64 (Bernstein's inequality)."""
    expected = rate * examples
    return min(examples, expected + 10 * math.sqrt(expected) + 50)


def moved(clip: float, share: float, adaptive: AdaptiveClip) -> float:
    """The next bound, when the (noisy) `share` of the sites stayed within this one (Andrew et al. 2021, section 2).

    Every site is told it, so it has a float32's digits: the last ones of the noised share do not leave with it.
    """
    wanted = clip * math.exp(-adaptive.learning_rate * (min(max(share, 0.0), 1.0) - adaptive.quantile))
    return min(max(float(np.float32(wanted)), SMALLEST_CLIP), LARGEST_CLIP)
