"""The server's half of training: weighted deltas, added up in the open or in a secure sum.

In the open the same question is asked until enough sites have answered. A secure sum is asked for once: another attempt
is a new session in which the sites train, and pay, anew, since a second sum over the same updates and other survivors
would give away the difference.

`WeightedSum` is the sum in the open: every answer is added when it arrives and then forgotten.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from flwr.app import MessageType, RecordDict
from numpy.typing import NDArray

from fedclaw.errors import PrivacyError, SecureAggregationError, UpdateError, UsageError
from fedclaw.learning import postprocess
from fedclaw.privacy.distributed import Price
from fedclaw.privacy.fixed_point import Encoding
from fedclaw.privacy.mechanisms.choice import mechanism_of
from fedclaw.privacy.mechanisms.receipts import check_receipt
from fedclaw.privacy.mechanisms.shared_noise import SharedNoise
from fedclaw.protocol.arrays import LARGEST, Arrays, Update, all_within, shapes_of, unflattened
from fedclaw.protocol.messages import SUM
from fedclaw.protocol.questions import Outgoing, question
from fedclaw.protocol.receipt import Receipt
from fedclaw.protocol.records import MessageRecords, hash_of
from fedclaw.protocol.terms import DataUnit, Plan, SecureRequest
from fedclaw.server.cohort_question import CohortQuestion, check_weight, part, receipt_in, weights_in
from fedclaw.server.exchange import Seats
from fedclaw.server.run_directory import SiteReceipt

if TYPE_CHECKING:
    from fedclaw.learning.strategy import Strategy

RobustAggregate = Callable[[NDArray[np.float32], NDArray[np.float64]], NDArray[np.float32]]
"""(updates (n, d), weights (n,)) -> (d,); see `robust_aggregation`."""


def robust_aggregation(strategy: "Strategy", state: Mapping[str, Arrays]) -> RobustAggregate | None:
    """`strategy.robust_aggregate` with the server's `state`; None for a strategy that takes the sum of the updates."""
    if not strategy.needs_single_updates:
        return None
    return lambda updates, weights: strategy.robust_aggregate(updates, weights, state)


class WeightedSum:
    """Sum of `weight x delta` over sites, and of the weights; itself an update of that form.

    Memory: one model, however many sites answer. `add` either adds everything or nothing: an update is checked
    whole before the first element of it is added.
    """

    def __init__(self, template: Mapping[str, NDArray[np.float32]], *, largest: float = np.inf) -> None:
        """`largest`: numbers beyond it are refused; `arrays.LARGEST` for what comes from others."""
        self.largest = largest
        self.arrays: Arrays = {name: np.zeros_like(array) for name, array in template.items()}
        self.weight = 0.0
        self.examples = 0
        self.heaviest = 0.0
        self.count = 0

    def add(self, arrays: Arrays, weight: float, examples: int = 0) -> None:
        """Add one weighted update. Raises UpdateError for wrong names, shapes or weight, NaN or absurd sizes."""
        self.include(Update(arrays, weight, examples, heaviest=weight), 1)

    def include(self, part: Update, count: int) -> None:
        """Add a sum over `count` sites that was made elsewhere. Raises UpdateError as `add` does."""
        self._check(part.arrays, part.weight)
        self._put(part, count)
        self.weight += part.weight
        self.examples += part.examples
        self.heaviest = max(self.heaviest, part.heaviest)
        self.count += count

    def take(self) -> Update:
        """Hand over the sum. Nothing can be added afterwards."""
        arrays, self.arrays = self.arrays, {}
        return Update(arrays, self.weight, self.examples, self.heaviest)

    def _put(self, part: Update, count: int) -> None:
        for name, total in self.arrays.items():
            with np.errstate(over="ignore"):
                np.add(total, part.arrays[name], out=total)

    def _check(self, arrays: Mapping[str, NDArray[np.float32]], weight: float) -> None:
        if not (np.isfinite(weight) and weight > 0):
            raise UpdateError(f"the update's weight is {weight}, expected a positive finite number")
        if arrays.keys() != self.arrays.keys():
            odd = sorted(arrays.keys() ^ self.arrays.keys())
            raise UpdateError(f"the update's parameters are not the model's; missing or unknown: {', '.join(odd)}")
        for name, total in self.arrays.items():
            array = arrays[name]
            if array.shape != total.shape:
                raise UpdateError(f"parameter {name!r} has shape {array.shape}, expected {total.shape}")
            if not all_within(array, self.largest):
                beyond = "" if np.isinf(self.largest) else f", or numbers beyond {self.largest:.3g}"
                raise UpdateError(f"parameter {name!r} holds NaN or infinite values{beyond}")


class UpdateStack(WeightedSum):
    """The same for an algorithm that has to see every update: they are kept, n models in memory, until they are taken.

    What is taken is what `robust_aggregate` makes of the updates (n, d) and their weights (n,), times the sum of the
    weights: a sum, like any other, whose mean is the combination. The updates are ordered by their content, so that
    the result does not depend on who answered first.

    The weights that `robust_aggregate` is given are 1 unless the sites' are `bounded`: nobody can check how many
    examples a site has, and a number that it may choose must not decide.
    """

    def __init__(
        self,
        template: Mapping[str, NDArray[np.float32]],
        robust: RobustAggregate,
        *,
        bounded: bool = False,
        largest: float = np.inf,
    ) -> None:
        """`bounded`: by a cap that the run declares."""
        super().__init__(template, largest=largest)
        self._robust = robust
        self._bounded = bounded
        self._updates: list[NDArray[np.float32]] = []
        self._weights: list[float] = []

    def take(self) -> Update:
        """Hand over the robust aggregate. Raises UpdateError when there are too few updates for it."""
        if self._updates:
            combined = self._robust(*self._in_order()) * np.float32(self.weight)
            start = 0
            for name, array in self.arrays.items():
                self.arrays[name] = combined[start : start + array.size].reshape(array.shape)
                start += array.size
        self._updates, self._weights = [], []
        return super().take()

    def _put(self, part: Update, count: int) -> None:
        """Keep one weighted update."""
        if count != 1:
            raise UpdateError("single updates are wanted here, not a sum of them")
        flat = np.concatenate([part.arrays[name].reshape(-1) for name in self.arrays])
        self._updates.append(np.divide(flat, np.float32(part.weight), dtype=np.float32))
        self._weights.append(part.weight)

    def _in_order(self) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
        """Updates (n, d) and weights (n,). Each update is released as it is copied: at most n + 1 are held."""
        digests = [hashlib.sha256(update.data).digest() for update in self._updates]
        order = sorted(range(self.count), key=lambda position: (digests[position], self._weights[position]))
        stack = np.empty((self.count, self._updates[0].size), np.float32)
        waiting = dict(enumerate(self._updates))
        self._updates = []
        for row, position in enumerate(order):
            stack[row] = waiting.pop(position)
        weights = np.array(self._weights)[order]
        return stack, weights if self._bounded else np.ones_like(weights)


@dataclass
class TrainingQuestion(CohortQuestion[SiteReceipt, Update]):
    """Train by a plan from what goes out with it. Read is the sum of the weighted deltas, or its robust aggregate.

    Raises PluginError for a strategy that is not installed.
    """

    asked: Plan
    outgoing: Outgoing
    robust: RobustAggregate | None = None
    """What is made of single updates; None: their sum."""
    unit: DataUnit = "example"
    """What the run's schema protects."""
    discount: float = field(default=1.0, init=False)
    """What the next delta is multiplied by; its weight stays what it is."""
    bytes_up: int = field(default=0, init=False)
    """Of the arrays in the answers that were added."""
    total: WeightedSum = field(init=False)
    _summed: Update | None = field(default=None, init=False, repr=False)
    """The secure sum."""
    kind: ClassVar[str] = MessageType.TRAIN

    def __post_init__(self) -> None:
        parameters, plan = self.outgoing.parameters, self.asked
        self._reader = postprocess.reader(parameters, plan)
        # Of a secure sum no part is seen, so nothing is added up here.
        template = postprocess.sum_of(parameters, plan) if plan.secure is None else {}
        self.total = (
            WeightedSum(template, largest=LARGEST)
            if self.robust is None
            else UpdateStack(template, self.robust, bounded=plan.weighting == "capped", largest=LARGEST)
        )

    @property
    def receipts(self) -> dict[str, SiteReceipt]:
        """By site."""
        return self.besides

    @property
    def bytes_down(self) -> int:
        """Of the arrays that the sites of the answers trained from."""
        return self.outgoing.nbytes * len(self.answered)

    @property
    def price(self) -> Price | None:
        """What the sites' noise costs beside a trusted server's, where they bring it."""
        mechanism = mechanism_of(self.asked)
        return mechanism.shares.price if self.asked.secure and isinstance(mechanism, SharedNoise) else None

    def content(self) -> MessageRecords:
        """See CohortQuestion."""
        return question(self.asked, self.outgoing, postprocess.answer_bytes(self.outgoing.parameters, self.asked))

    def beside(self, content: RecordDict) -> SiteReceipt:
        """See CohortQuestion."""
        weight, examples = weights_in(content)
        check_weight(weight, examples, self.asked.weighting, self.asked.weight_cap)
        receipt = receipt_in(content, Receipt)
        check_receipt(receipt, self.asked, examples, self.unit)
        return SiteReceipt(examples=examples, receipt=receipt)

    def add_open(self, content: RecordDict, beside: SiteReceipt) -> None:
        """See CohortQuestion."""
        arrays, size = self._reader(part(content.array_records, SUM))
        if self.discount != 1:
            arrays = {name: array * np.float32(self.discount) for name, array in arrays.items()}
        self.total.add(arrays, self.asked.weight(beside.examples), beside.examples)
        self.bytes_up += size

    def add_sum(self, total: NDArray[np.uint32], besides: Sequence[SiteReceipt]) -> None:
        """See CohortQuestion."""
        assert self.asked.secure is not None
        shapes = shapes_of(postprocess.template(self.outgoing.parameters, self.asked))
        vector = Encoding(self.asked.secure.step).decode(total)
        arrays = unflattened(vector, shapes, mechanism_of(self.asked).sum_dtype)
        examples = [beside.examples for beside in besides]
        weights = [self.asked.weight(one) for one in examples]
        self._summed = Update(arrays, sum(weights), sum(examples), heaviest=max(weights))
        self.bytes_up = len(besides) * total.nbytes

    def read(self) -> Update:
        """See CohortQuestion. Raises UpdateError when there are too few updates for a robust aggregate."""
        return self.total.take() if self._summed is None else self._summed


def session_of(plan: Plan, names: Sequence[str], outgoing: Outgoing, request: SecureRequest, minimum: int) -> Plan:
    """`plan` with a fresh session over the sites `names`, which all begin with `outgoing`.

    Raises UsageError when no safe session exists for them.
    """
    seats = Seats.of(names, request, minimum)
    length = sum(array.size for array in postprocess.template(outgoing.parameters, plan).values())
    content = hash_of(question(plan, outgoing).array_records).hexdigest()
    try:
        sites = len(names)
        honest = sites - seats.tolerated - seats.corrupt
        step, value_range = mechanism_of(plan).scale(request, length, sites, honest)
        largest = request.largest_weight if value_range is not None else None
        secure = seats.session(length, step, value_range=value_range, largest_weight=largest, content=content)
    except (SecureAggregationError, PrivacyError) as error:
        raise UsageError(f"secure: {error}") from error
    return plan.model_validate({**plan.model_dump(), "secure": secure})
