"""Central differential privacy: the sites clip, and the server adds noise to the mean of what they sent.

Sensitivity, of the mean over the sites, by the weights that were really used:

    unit site      clip x (largest weight / sum of weights)      not clip / n: a site with 99% of the examples moves an
                                                                 example-weighted mean by 0.99 clip
    unit example   learning rate x clip / (sample rate x sum of examples)

each a little larger for what rounding adds on the way (`_rounding`): to float32, and to a secure sum's steps;
and the noise is N(0, (noise multiplier x sensitivity)^2) in every coordinate. Unit site: McMahan, Ramage, Talwar, Zhang
2018 ("Learning Differentially Private Recurrent Language Models"), with the clipping bound of Andrew, Thakkar,
McMahan, Ramaswamy 2021 ("Differentially Private Learning with Adaptive Clipping") where it is adaptive. Unit example:
one DP-SGD step (Abadi et al. 2016) on the pooled data, since sum n_k delta_k = -(rate / q) x sum of clipped gradients.

Where the sites bring the noise themselves, inside secure aggregation, the server adds none.
"""

import math
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from fedclaw.privacy.postprocessor import Postprocessor, SiteContext
from fedclaw.protocol.arrays import Arrays, Shapes
from fedclaw.protocol.plan import LARGEST_CLIP, SMALLEST_CLIP, AdaptiveClip, CentralPrivacy, Plan
from fedclaw.protocol.update import Update

WITHIN = "fedclaw.within_clip"
"""The array beside the parameters that counts who stayed within an adaptive bound: +1/2 or -1/2 a site."""

_NORM_MARGIN = 1 + 1e-6
# Keeps the rounding to float32 from lifting a clipped update over the bound.


class CentralNoise(Postprocessor):
    """Clip at the site; noise at the server, unless the sites bring it."""

    def at_site(self, update: Update, plan: Plan, context: SiteContext) -> Update:
        """Scale the delta to an L2 norm of at most `clip` (unit site). An update that is not finite counts as zero."""
        central = plan.central
        if central is None or central.unit == "example":
            # Each example's gradient was clipped by the step that made this update.
            return update
        norm = clip_to(update.arrays, central.clip)
        if central.adaptive is None:
            return update
        vote = np.array([0.5 if norm <= central.clip else -0.5], np.float32)
        return replace(update, arrays={**update.arrays, WITHIN: vote})

    def at_server(self, total: Update, plan: Plan, shapes: Shapes) -> Update:
        """Add the noise that the mean's sensitivity asks for."""
        import torch

        from fedclaw.privacy.noise import GaussianSource

        central = plan.central
        if central is None or central.noise_by == "sites":
            return total
        source = GaussianSource()
        arrays = dict(total.arrays)
        votes = arrays.pop(WITHIN, None)
        deviation = central.update_noise_multiplier * sensitivity(plan, central, total)
        # In float64 and rounded once, with the noise in it.
        exact = [torch.from_numpy(array.astype(np.float64)) for array in arrays.values()]
        noisy = [source.perturb_(values, deviation).to(torch.float32) for values in exact]
        arrays = {name: values.numpy() for name, values in zip(arrays, noisy, strict=True)}
        clip = None
        if central.adaptive and votes is not None:
            one_site = total.heaviest if central.expected_sites is None else 1 / central.expected_sites
            share = 0.5 + float(votes[0]) + source.normal((1,), central.adaptive.count_noise * one_site).item()
            clip = moved(central.clip, share, central.adaptive)
        return replace(total, arrays=arrays, clip=clip)


def sensitivity(plan: Plan, central: CentralPrivacy, mean: Update) -> float:
    """How far, in L2 norm, one unit can move `mean`: the mean that the weighting made, with what it was made of."""
    return (1 + _rounding(plan, central, mean)) * _exact_sensitivity(plan, central, mean)


def _exact_sensitivity(plan: Plan, central: CentralPrivacy, mean: Update) -> float:
    if central.unit == "example":
        return plan.training.learning_rate * central.clip / (central.sample_rate * mean.examples)
    if central.expected_sites is not None:
        return central.clip / central.expected_sites
    return central.clip * mean.heaviest


def _rounding(plan: Plan, central: CentralPrivacy, mean: Update) -> float:
    """What rounding adds to how far one unit moves a site's part of the sum, as a share of that.

    An update within its clipping bound stays within it in float32. A sum over sampled examples is as long as so many
    bounds: two such that are rounded to float32 are up to 2^-23 of that further apart. A sample is larger than
    m + 10 sqrt(m) + 50, m the expected size, with probability 2^-64 (Bernstein's inequality). A secure sum rounds each
    of d numbers to the nearest step, two of which are up to sqrt(d) steps further apart.
    """
    share = 0.0
    if central.unit == "example":
        expected = central.sample_rate * mean.examples
        share = min(mean.examples, expected + 10 * math.sqrt(expected) + 50) * 2.0**-23
    if plan.secure is not None:
        share += (
            plan.secure.step * math.sqrt(plan.secure.length) / (_exact_sensitivity(plan, central, mean) * mean.divisor)
        )
    return share


def unit_bound(plan: Plan, central: CentralPrivacy) -> float:
    """How far, in L2 norm, one unit can move the sum over the sites of weight x delta."""
    if central.unit == "example":
        return plan.training.learning_rate * central.clip / central.sample_rate
    return central.clip * (plan.weight_cap or 1)


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


def moved(clip: float, share: float, adaptive: AdaptiveClip) -> float:
    """The next bound, when the (noisy) `share` of the sites stayed within this one (Andrew et al. 2021, section 2)."""
    wanted = clip * math.exp(-adaptive.learning_rate * (min(max(share, 0.0), 1.0) - adaptive.quantile))
    return min(max(wanted, SMALLEST_CLIP), LARGEST_CLIP)


def _square(array: NDArray[np.float32]) -> float:
    flat = array.reshape(-1).astype(np.float64)
    return float(np.dot(flat, flat))
