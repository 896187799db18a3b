"""Which mechanism is asked for: the one place that looks at whose noise it is.

An update and a release of statistics leave alike: with the site's own noise, or every site's share of it inside a
secure sum; an update also with noise by the server.

A site's own noise is inside each step (DP-SGD), or on what one unit can move by a known bound.

DP-SGD (Abadi et al. 2016): every step's sum of clipped gradients has noise, so all that follows from the steps alone
is released, the update that leaves as well as what stays. Over several steps an update is within no single sensitivity,
and need not be. What does not follow from the steps (the training loss, a model of the site's own) is raw.

Shares of noise inside a secure sum: every site brings its own, and no site's is enough by itself. Unit example or site,
as the sum is bounded (`fedclaw.privacy.mechanisms.sum_noise`); the noise, and what it is worth,
is that of `fedclaw.privacy.distributed`.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from fedclaw.errors import PrivacyError
from fedclaw.privacy.accounting import NoiseEvent, calibrate
from fedclaw.privacy.distributed import Integers, Shares, SumWithShare, WithShare, choose_step, share_noise
from fedclaw.privacy.fixed_point import Vector
from fedclaw.privacy.mechanisms.mechanism import Charge, DataUse, Mechanism, SampledSteps, T, clip_out_of_range
from fedclaw.privacy.mechanisms.sum_noise import ServerNoise, SumNoise, by_the_loss
from fedclaw.privacy.provenance import Bounded, Part, Permitted, Raw, Released
from fedclaw.protocol.arrays import Arrays, Update
from fedclaw.protocol.statistics import StatisticsRequest
from fedclaw.protocol.terms import Plan, PrivacyRequest, SecureAggregation, SecureRequest, Terms

if TYPE_CHECKING:
    from fedclaw.privacy.noise import GaussianSource

SENSITIVITY = 1.0
"""Of a vector of statistics (`fedclaw.privacy.statistics.Design`): one example moves it by at most that, in L2 norm."""

_EXACT = 1 + 1e-9
# For products of the same numbers in another order.

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
            raise PrivacyError("works out what leaves from more than noised steps, and no noise covers that")
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


@dataclass(frozen=True)
class SharedNoise(SumNoise):
    """A site trusts only that enough other sites add their shares: as many as the session counts on."""

    shares_noise: ClassVar[bool] = True

    @property
    def shares(self) -> Shares:
        """Each site's share of the noise. Raises PrivacyError if the plan's numbers do not add up to its multiplier."""
        return session_shares(self.session, self.sum_sensitivity, self.request.noise_multiplier)

    def contradiction(self) -> str | None:
        """See Mechanism."""
        if self.request.adaptive:
            return "an adaptive clipping bound goes with unit: site and noise_by: server"
        if self.site_rate < 1:
            return "distributed noise for the unit site asks every site: sample_rate is 1"
        if self.asked.hidden is False:
            return "noise by the sites is enough only in their sum: it needs secure aggregation"
        if not self.takes_one_step and self.asked.weighting == "examples":
            return "a site has to know the largest weight before it adds its noise: weighting: uniform or capped"
        return super().contradiction()

    def charge(self, examples: int, *, trust_server_noise: bool) -> Charge:
        """What one round costs, from the shares that the sites really add. Raises PrivacyError.

        The sum is a function of one Gaussian mechanism (`fedclaw.privacy.distributed.gaussian_multiplier`).
        """
        return Charge("distributed", self.event(self.shares.noise_multiplier), "aggregation")

    def integers(self, examples: int | None = None) -> Integers:
        """See Mechanism."""
        if not self.takes_one_step:
            return WithShare(self.shares)
        return SumWithShare(self.shares, examples, self.asked.run if isinstance(self.asked, Plan) else "")

    def let_out(self, part: Part[T], charge: Charge) -> Released[T] | Permitted[T]:
        """See Mechanism."""
        raise PrivacyError("noise by the sites is enough only in their sum, and this was to leave by itself")

    def encode(
        self, vector: Part[Vector], integers: Integers, charge: Charge, source: "GaussianSource"
    ) -> Released[NDArray[np.uint32]] | Permitted[NDArray[np.uint32]]:
        """See Mechanism."""
        return with_share(self.covered(vector), self.shares, integers, source)

    def scale(self, request: SecureRequest, length: int, sites: int, honest: int) -> tuple[float, float | None]:
        """See Mechanism. No range of values: nothing is cut off but what noise by the sites has no room for."""
        return choose_step(self.sum_sensitivity, length, sites, self.request.noise_multiplier, honest=honest), None


def with_share(
    vector: Part[Vector], shares: Shares, integers: Integers, source: "GaussianSource"
) -> Released[NDArray[np.uint32]]:
    """`vector` (d,) with its share of the noise. Raises PrivacyError for one beyond the bound that it is made for."""
    if isinstance(vector, Raw) or (isinstance(vector, Bounded) and vector.sensitivity > shares.clip * _EXACT):
        raise PrivacyError("what leaves is not within the bound that the sites' noise is made for")
    return Released(integers.encode(vector.value, source))


def session_shares(secure: SecureAggregation, sensitivity: float, noise_multiplier: float) -> Shares:
    """Each site's share of noise of that multiplier in the sum of a session. Raises PrivacyError."""
    if secure.value_range is not None:
        raise PrivacyError(
            "value_range is for secure sums without noise by the sites, and here the sites bring noise: only one can "
            "be meant"
        )
    return share_noise(
        sensitivity,
        secure.length,
        len(secure.sites),
        noise_multiplier,
        tolerated=secure.tolerated,
        colluding=secure.colluding,
        step=secure.step,
    )


class LocalAndServerNoise(LocalNoise, ServerNoise):
    """What noised steps came to is clipped as a whole, and the server adds noise to the sum."""


class LocalAndSharedNoise(LocalNoise, SharedNoise):
    """What noised steps came to is clipped as a whole, and all sites add shares of noise to the sum."""


def mechanism_of(asked: Terms) -> Mechanism:
    """The mechanism for a run's record, or for a round's plan."""
    local, central = asked.privacy is not None, asked.central
    if central is None:
        return (LocalNoise if local else Mechanism)(asked)
    if central.noise_by == "sites":
        return (LocalAndSharedNoise if local else SharedNoise)(asked)
    return (LocalAndServerNoise if local else ServerNoise)(asked)


@dataclass(frozen=True)
class SharedStatistics:
    """A share of noise in the sum of a session."""

    shares: Shares
    trust: ClassVar[Literal["aggregation"]] = "aggregation"

    @property
    def event(self) -> NoiseEvent:
        """What the ledger is charged."""
        return NoiseEvent(1.0, self.shares.noise_multiplier, 1)

    def let_out(self, part: Part[Doubles], source: "GaussianSource") -> Released[Doubles]:
        """Raises PrivacyError: a share is enough only in the sum."""
        raise PrivacyError("noise by the sites is enough only in their sum, and this was to leave by itself")

    def encode(self, part: Part[Vector], source: "GaussianSource") -> Released[NDArray[np.uint32]]:
        """The vector (d,) as integers with this site's share. Raises PrivacyError for one without its bound."""
        return with_share(part, self.shares, SumWithShare(self.shares), source)


StatisticsMechanism = OwnNoise | SharedStatistics


def mechanism_of_request(request: StatisticsRequest) -> StatisticsMechanism:
    """The mechanism for what is asked. Raises PrivacyError when no noise keeps it within its epsilon and delta."""
    return OwnNoise.calibrated(request.epsilon, request.delta) if request.secure is None else shared_of(request)


def shared_of(request: StatisticsRequest) -> SharedStatistics:
    """The mechanism for a request with a session. Raises PrivacyError."""
    if request.secure is None:
        raise PrivacyError("the request names no session")
    multiplier = OwnNoise.calibrated(request.epsilon, request.delta).noise_multiplier
    return SharedStatistics(session_shares(request.secure, SENSITIVITY, multiplier))
