"""How an answer may leave a site: one frozen object a way, which alone looks at whose noise goes where.

`mechanism_of` (`fedclaw.privacy.mechanisms.choice`) makes it of what is asked: a run's terms at the server, a plan at
each site. From then on nobody asks again whether noise is local, central or shared, and for which unit: the object
says what it does not go with (`contradiction`, `refuse`), how steps are taken and on which samples, how far what leaves
is bounded and what is added to it at either end, what the ledger books and what a receipt has to say of it. No
sensitivity and no deviation of noise is derived anywhere else.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from fedclaw.errors import PrivacyError, Reason, Setting, UsageError
from fedclaw.privacy.accounting import NoiseEvent
from fedclaw.privacy.distributed import Integers, Nearest
from fedclaw.privacy.fixed_point import Vector, nearest_step
from fedclaw.privacy.provenance import Part, Permitted, Raw, Released
from fedclaw.protocol.arrays import Arrays, Update
from fedclaw.protocol.frozen import Frozen, fields_of
from fedclaw.protocol.limits import LARGEST_CLIP, LARGEST_RATE, SMALLEST_CLIP
from fedclaw.protocol.receipt import CentralReceipt, Trust
from fedclaw.protocol.terms import (
    CentralNoise,
    CentralRequest,
    PrivacyRequest,
    SecureAggregation,
    SecureRequest,
    Terms,
    Unit,
)

if TYPE_CHECKING:
    import torch

    from fedclaw.privacy.noise import GaussianSource
    from fedclaw.privacy.speed import StepSpeed
    from fedclaw.privacy.steps import StepTaker

    Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

T = TypeVar("T")

Kind = Literal["dp-sgd", "central", "distributed", "none"]
"""Whose noise a ledger books, as a receipt calls it."""


@dataclass(frozen=True)
class DataUse:
    """What a strategy uses of the data beyond clipped and noised gradients, as its class declares it."""

    needs_single_updates: bool
    """Whether its server half sees every update by itself, and takes no mean."""
    uses_training_loss: bool
    """Whether what leaves depends on the loss on the training data: raw, whatever noised the steps."""
    trains_own_model: bool
    """Whether each site trains a second model, without noise, that stays there: raw."""
    changes_step: bool
    """Whether it changes what a site's steps came to, or keeps something of them."""
    sends_extras: bool
    """Whether arrays leave beside the parameters' deltas."""
    keeps_parameters: bool
    """Whether some of the shared model's parameters stay at the sites."""


@dataclass(frozen=True)
class SampledSteps:
    """Poisson samples at `rate`; each example's gradient clipped to the L2 norm `clip`, their sum with noise of
    `noise_multiplier` times that (0: others add it later)."""

    rate: float
    noise_multiplier: float
    clip: float


class Origin(Frozen):
    """By what mechanism something was made that a site keeps."""

    local: bool
    """Whether every step was noised here."""
    unit: Unit | None
    noise_by: Literal["server", "sites"] | None
    """Of noise on the sum. Its bound may move from round to round (adaptive clipping): what leaves is within it
    whatever it was made from."""
    secure: bool

    @property
    def noise_words(self) -> str:
        """In words, to be compared with another's."""
        noise = ["the site's own noise"] if self.local else []
        if self.unit is not None:
            noise.append(f"noise on the sum by the {self.noise_by} for the unit {self.unit}")
        return f"{' and '.join(noise) or 'no noise'}, {'in a secure sum' if self.secure else 'in the open'}"


@dataclass(frozen=True)
class Charge:
    """What a ledger books for one round (`mechanism` None: no noise that counts), and whom that trusts."""

    kind: Kind
    mechanism: NoiseEvent | None
    trust: Trust


UNPROTECTED = Charge("none", None, "everybody")


@dataclass(frozen=True)
class Mechanism:
    """How the answer to a round of training leaves. By itself: in the open, with no promise but that of a secure sum if
    there is one. A class for each kind of noise overrides what it changes.
    """

    asked: Terms

    claims_privacy: ClassVar[bool] = False
    """Whether differential privacy is promised at all."""
    noises_steps: ClassVar[bool] = False
    """Whether each step is noised at the site, and so all that follows from the steps is released."""
    shares_noise: ClassVar[bool] = False
    """Whether each site brings a share of the noise, and counts on the others'."""
    sum_dtype: ClassVar[type[np.floating[Any]]] = np.float32
    """The type in which a server adds updates."""

    @property
    def origin(self) -> Origin:
        """What a site notes beside what it keeps."""
        central = self.asked.central
        return Origin(
            local=self.noises_steps,
            unit=central.unit if central else None,
            noise_by=central.noise_by if central else None,
            secure=self.asked.secure is not None,
        )

    @property
    def takes_one_step(self) -> bool:
        """Whether what leaves is one clipped step, whose noise is on the sum: nothing else may be made of it."""
        return self.asked.central is not None and protects_examples(self.asked.central)

    @property
    def clips_updates(self) -> bool:
        """Whether a whole update is clipped at its site."""
        return self.asked.central is not None and not self.takes_one_step

    @property
    def is_sampled(self) -> bool:
        """Whether local batches are Poisson samples."""
        return self.noises_steps or self.takes_one_step

    @property
    def site_rate(self) -> float:
        """The rate at which sites are asked at random, as the accounting assumes; 1: all may be asked.

        Below 1, who is asked is to stay hidden.
        """
        return self.asked.central.sample_rate if self.asked.central and self.clips_updates else 1.0

    @property
    def counts_within_clip(self) -> bool:
        """Whether each site says beside its update if that was within the clipping bound (`WITHIN`)."""
        return self.asked.central is not None and self.asked.central.adaptive is not None

    def guarantee(self, *, trust_server_noise: bool = True) -> PrivacyRequest | CentralNoise | None:
        """The (epsilon, delta) of the whole run that counts at a site: of the noise that needs the least trust.

        A guarantee for the unit site covers all of its examples, so it holds for each of them as well.
        """
        on_sum = self.asked.central if self.shares_noise or trust_server_noise else None
        return self.asked.privacy or on_sum

    @property
    def clip(self) -> float:
        """The L2 bound of an example's gradient, or of a site's update; 0: none."""
        local, central = self.asked.privacy, self.asked.central
        return local.max_grad_norm if local else central.clip if central else 0.0

    # Refused at both ends

    def contradiction(self) -> str | None:
        """Why the settings' guarantee would not hold, as a sentence; None: it would."""
        if (self.asked.weighting == "capped") != (self.asked.weight_cap is not None):
            return "weight_cap goes with weighting: capped, and only with that"
        return None

    def out_of_range(self) -> str | None:
        """Numbers at which floating point would not keep what is promised, as a sentence; None: there are none.

        A site asks it of every plan, and a server of itself before a run; a record of an older run may hold others.
        """
        if not self.asked.training.learning_rate <= LARGEST_RATE:
            return (
                f"the learning rate is {self.asked.training.learning_rate:g}, and at most {LARGEST_RATE:g} is allowed"
            )
        return None

    def refuse(self, use: DataUse) -> str | None:
        """Why a strategy that uses the data like that cannot leave by this mechanism, as a sentence's end."""
        return (self._unmasked(use) if self.asked.secure is not None else None) or self.uncovered(use)

    def _unmasked(self, use: DataUse) -> str | None:
        """What a secure sum does not go with, or does not hide.

        A sum hides its parts only if none is known beforehand. All sites begin with the same parameters (they sign a
        digest of them), so a server cannot have some of them send nothing, except through parameters that each brings
        itself: a head that was spoilt in an earlier round, of other sites, stops every gradient below it.
        """
        if use.needs_single_updates:
            return Reason(
                "has to see every update by itself, which secure aggregation hides; take another strategy or ",
                Setting("secure", "none"),
            )
        if not (self.noises_steps or self.shares_noise) and use.keeps_parameters:
            return Reason(
                "keeps parameters at each site, of which secure aggregation cannot see that all sites begin alike: "
                "without noise at the sites a sum could be one site's update; take ",
                Setting("privacy", "dp"),
                ", or a strategy that shares all",
            )
        return None

    def uncovered(self, use: DataUse) -> str | None:
        """What of that no noise of this mechanism covers, as a sentence's end."""
        return None

    # Steps

    def sampling(self, examples: int, charged: NoiseEvent | None) -> SampledSteps | None:
        """How a site with so many examples samples and clips, which was charged that; None: shuffled epochs."""
        return None

    def step_taker(
        self,
        model: "torch.nn.Module",
        loss: "Loss",
        examples: int,
        charged: NoiseEvent | None,
        source: "GaussianSource",
        speed: "StepSpeed | None" = None,
    ) -> "StepTaker":
        """How a step is taken at a site. Raises PrivacyError for a model whose examples cannot be told apart."""
        from fedclaw.privacy.steps import PlainGradients, PrivateGradients

        sampling = self.sampling(examples, charged)
        if sampling is None:
            return PlainGradients(model, loss)
        return PrivateGradients(
            model,
            loss,
            max_grad_norm=sampling.clip,
            noise_multiplier=sampling.noise_multiplier,
            expected_batch_size=sampling.rate * examples,
            source=source,
            speed=speed,
            steps_ahead=self.asked.training.local_steps(examples),
        )

    def batches(
        self, examples: int, present: int, charged: NoiseEvent | None, source: "GaussianSource"
    ) -> "Iterator[torch.Tensor]":
        """Which of `present` units are in each step of a round; rate and steps are made by the stated number
        `examples`. A batch without noise has `batch_size` units."""
        from fedclaw.privacy.steps import poisson_batches, shuffled_batches

        training, sampling = self.asked.training, self.sampling(examples, charged)
        count = training.local_steps(examples)
        if sampling is None:
            return shuffled_batches(present, training.batch_size, count, source)
        return poisson_batches(present, sampling.rate, count, source)

    # What leaves

    def outcome(self, delta: Arrays, examples: int) -> Part[Arrays]:
        """What the steps of this mechanism came to, `delta` by parameter name, at a site with so many examples."""
        return Raw(delta)

    def bound(self, part: Part[Update]) -> Part[Update]:
        """Clip all that has no noise on it yet, in place. What is not finite counts as zero where there is a bound.

        Raises PrivacyError for what no noise will cover.
        """
        return part

    def covered(self, part: Part[T]) -> Part[T]:
        """`part`, as it may go on to be noised or to leave. Raises PrivacyError for what no noise covers."""
        return part

    def let_out(self, part: Part[T], charge: Charge) -> Released[T] | Permitted[T]:
        """What leaves a site that was charged that. Raises PrivacyError for what no noise covers."""
        return _leaving(self.covered(part), charge)

    def encode(
        self, vector: Part[Vector], integers: Integers, charge: Charge, source: "GaussianSource"
    ) -> "Released[NDArray[np.uint32]] | Permitted[NDArray[np.uint32]]":
        """What a site hands to secure aggregation of `vector` (d,). Raises PrivacyError for what no noise covers."""
        return _leaving(self.covered(vector).then(lambda values: integers.encode(values, source)), charge)

    def noised(self, total: Update) -> Update:
        """The server's half: the mean, with its noise if the server brings any."""
        return total

    # Inside a secure sum

    def integers(self, present: int | None = None) -> Integers:
        """How a site where so many units are present hands its update to secure aggregation. Raises PrivacyError."""
        secure = self.session
        if secure.value_range is None:
            raise PrivacyError("secure aggregation without noise by the sites needs a range of values")
        return Nearest(secure.step, secure.value_range)

    def scale(self, request: SecureRequest, length: int, sites: int, honest: int) -> tuple[float, float | None]:
        """What one integer of a sum over so many sites stands for, and the range of values where numbers are cut off.

        `honest` sites' noise is counted on. Raises PrivacyError when no step will do, and UsageError for a request that
        says too little, or steps that are too coarse.
        """
        largest = self.asked.weight_cap or (request.largest_weight if self.asked.weighting == "examples" else 1.0)
        if largest is None:
            raise UsageError(
                "secure.largest_weight is not set: with weighting=examples, say how many examples no site exceeds"
            )
        value_range = request.value_range * largest
        return nearest_step(value_range, sites), value_range

    @property
    def largest_update(self) -> float | None:
        """The largest number of an update that a secure sum's integers hold; None: no limit is set."""
        secure = self.asked.secure
        if secure is None or secure.value_range is None or self.shares_noise:
            return None
        if not isinstance(secure, SecureAggregation):
            return secure.value_range
        # That of a session bounds weight x delta.
        weighed = secure.largest_weight if self.asked.weighting == "examples" else None
        return secure.value_range / (self.asked.weight_cap or weighed or 1.0)

    @property
    def session(self) -> SecureAggregation:
        """That of the plan, which has one. Raises PrivacyError for terms that are no plan's."""
        if not isinstance(self.asked.secure, SecureAggregation):
            raise PrivacyError("noise by the sites hides nothing without secure aggregation")
        return self.asked.secure

    # The ledger, and what a receipt says of it

    def charge(self, examples: int, *, trust_server_noise: bool) -> Charge:
        """What one round costs a site with so many examples. Raises PrivacyError when no noise is enough."""
        return UNPROTECTED

    def possible_charges(self, examples: int) -> tuple[Charge, ...]:
        """What a site's ledger may have booked, but for what only the site can work out. Raises PrivacyError."""
        return (self.charge(examples, trust_server_noise=True),)

    def receipt_fields(self, examples: int, charge: Charge) -> dict[str, object]:
        """What a receipt says that follows from what was asked and what was charged."""
        event, asked, central = charge.mechanism, self.guarantee(), self.asked.central
        return {
            "mechanism": charge.kind,
            "trust": charge.trust,
            "secure_aggregation": self.asked.secure is not None,
            "central": CentralReceipt(**fields_of(central, CentralReceipt)) if central else None,
            "sampler": "poisson" if self.is_sampled else "shuffle",
            "accountant": "none" if event is None else "pld" if event.family == "gaussian" else "rdp",
            "sample_rate": self.sample_rate(examples) if event is None else event.sample_rate,
            "steps": self.asked.training.local_steps(examples),
            "noise_multiplier": 0.0 if event is None else event.noise_multiplier,
            "max_grad_norm": self.clip,
            **({"delta": asked.delta} if asked else {}),
        }

    def sample_rate(self, examples: int) -> float:
        """The share of the examples in a batch."""
        return min(1.0, self.asked.training.batch_size / examples)


def clip_out_of_range(name: str, clip: float) -> str | None:
    """A sentence about a clipping bound beyond what floating point keeps; None: it is within."""
    if SMALLEST_CLIP <= clip <= LARGEST_CLIP:
        return None
    bounds = f"[{SMALLEST_CLIP:g}, {LARGEST_CLIP:g}]"
    return Reason(Setting(name), f" is {clip:g}, and a clipping bound lies in {bounds}")


def protects_examples(request: CentralRequest) -> bool:
    """Whether noise on the sum that is asked for like that promises its epsilon to single examples."""
    return request.unit == "example"


def _leaving(part: Part[T], charge: Charge) -> Released[T] | Permitted[T]:
    """What is not released leaves by the clause of the policy that whom the charge trusts comes to."""
    if isinstance(part, Released):
        return part
    return Permitted(part.value, "trust_server_noise" if charge.trust == "server" else "allow_training_without_privacy")
