"""The server's half of training: weighted deltas, added up in the open or in a secure sum.

In the open the same question is asked until enough sites have answered. A secure sum is asked for once: another attempt
is a new session in which the sites train, and pay, anew, since a second sum over the same updates and other survivors
would give away the difference.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
from flwr.app import MessageType, RecordDict
from numpy.typing import NDArray

from fedclaw.errors import PrivacyError, SecureAggregationError, UsageError
from fedclaw.learning import postprocess
from fedclaw.privacy.distributed import Price
from fedclaw.privacy.fixed_point import Encoding
from fedclaw.privacy.mechanisms.choice import mechanism_of
from fedclaw.privacy.mechanisms.receipts import check_receipt
from fedclaw.privacy.mechanisms.shared_noise import SharedNoise
from fedclaw.protocol.arrays import LARGEST, shapes_of, unflattened
from fedclaw.protocol.messages import SUM
from fedclaw.protocol.plan import Plan
from fedclaw.protocol.questions import Outgoing, question
from fedclaw.protocol.receipt import Receipt
from fedclaw.protocol.records import MessageRecords, hash_of
from fedclaw.protocol.terms import SecureRequest
from fedclaw.protocol.update import Update
from fedclaw.server.accumulator import RobustAggregate, UpdateStack, WeightedSum
from fedclaw.server.answers import check_weight, part, receipt_in, weights_in
from fedclaw.server.cohort_question import CohortQuestion
from fedclaw.server.run_directory import SiteReceipt
from fedclaw.server.secure_exchange import Seats


@dataclass
class TrainingQuestion(CohortQuestion[SiteReceipt, Update]):
    """Train by a plan from what goes out with it. Read is the sum of the weighted deltas, or its robust aggregate.

    Raises PluginError for a strategy that is not installed.
    """

    asked: Plan
    outgoing: Outgoing
    robust: RobustAggregate | None = None
    """What is made of single updates; None: their sum."""
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
        check_receipt(receipt, self.asked, examples)
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
