"""A round of training whose updates the server never sees: one secure sum (`fedclaw.server.secure_exchange`).

A new attempt is a new session in which the sites train, and pay, anew: a second sum over the same updates and other
survivors would give away the difference.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from flwr.app import MessageType, RecordDict
from flwr.serverapp import Grid
from numpy.typing import NDArray

from fedclaw.errors import PrivacyError, SecureAggregationError, UsageError
from fedclaw.learning import postprocess
from fedclaw.privacy.distributed import Price
from fedclaw.privacy.fixed_point import Encoding
from fedclaw.privacy.mechanisms.choice import mechanism_of
from fedclaw.privacy.mechanisms.receipts import check_receipt
from fedclaw.privacy.mechanisms.shared_noise import SharedNoise
from fedclaw.protocol.arrays import shapes_of, unflattened
from fedclaw.protocol.plan import Plan
from fedclaw.protocol.questions import Outgoing, question
from fedclaw.protocol.records import hash_of
from fedclaw.protocol.terms import SecureRequest
from fedclaw.protocol.update import Update
from fedclaw.server.accumulator import WeightedSum
from fedclaw.server.answers import Trained, check_weight, receipt_in, weights_in
from fedclaw.server.exchange import training_question
from fedclaw.server.run_directory import SiteReceipt
from fedclaw.server.secure_exchange import Seats, SecureExchange

log = logging.getLogger(__name__)


@dataclass
class SecurelyTrained(Trained):
    """The sum of the survivors' vectors. `spent` tells whether sites had been asked to train when it failed."""

    spent: bool = False
    unmasking: bool = False
    """Whether they had been asked to unmask, which they do once for a round."""
    failure: str | None = None
    price: Price | None = None
    """What the sites' noise costs beside a trusted server's, where they bring it."""


def session_of(
    plan: Plan,
    names: Sequence[str],
    outgoing: Outgoing,
    request: SecureRequest,
    minimum: int,
) -> Plan:
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


def train(
    grid: Grid,
    nodes: Sequence[int],
    plan: Plan,
    outgoing: Outgoing,
    deadline: float,
    before_unmasking: Callable[[], None] = lambda: None,
) -> SecurelyTrained:
    """Ask `nodes` to train by `plan`, which has a session, and learn the sum of their answers and nothing else.

    `before_unmasking` is called at the point from which the round cannot be asked again. A sum that cannot be made is
    no error: nobody has `answered` then, and `failure` says why.
    """
    return _Round(grid, nodes, plan, outgoing, deadline).run(before_unmasking)


class _Round:
    def __init__(self, grid: Grid, nodes: Sequence[int], plan: Plan, outgoing: Outgoing, deadline: float) -> None:
        self._plan = plan
        self._template = postprocess.template(outgoing.parameters, plan)
        self._asked = training_question(plan, outgoing)
        self._weights: dict[str, tuple[float, int]] = {}
        self._receipts: dict[str, SiteReceipt] = {}
        mechanism = mechanism_of(plan)
        price = mechanism.shares.price if isinstance(mechanism, SharedNoise) else None
        self._result = SecurelyTrained(total=WeightedSum({}), weighting=plan.weighting, price=price)
        self._outgoing = outgoing.nbytes
        self._exchange = SecureExchange(grid, nodes, plan, deadline, self._result)

    def run(self, before_unmasking: Callable[[], None]) -> SecurelyTrained:
        result = self._result
        further = dict(self._asked.array_records)
        try:
            asked = question(self._plan)
            total, survivors = self._exchange.sum(MessageType.TRAIN, asked, further, self._accept, before_unmasking)
            self._finish(total, survivors)
        except SecureAggregationError as error:
            log.warning("round %d: %s", self._plan.round, error)
            result.failure = str(error)
            result.answered = []
        result.receipts = self._receipts
        result.spent = self._exchange.spent
        result.unmasking = self._exchange.unmasking
        return result

    def _accept(self, site: str, content: RecordDict) -> None:
        weight, examples = weights_in(content)
        check_weight(weight, examples, self._plan.weighting, self._plan.weight_cap)
        receipt = receipt_in(content)
        check_receipt(receipt, self._plan, examples)
        self._receipts[site] = SiteReceipt(examples=examples, receipt=receipt)
        self._weights[site] = weight, examples

    def _finish(self, total: NDArray[np.uint32], survivors: Sequence[str]) -> None:
        mechanism = mechanism_of(self._plan)
        arrays = unflattened(
            Encoding(mechanism.session.step).decode(total), shapes_of(self._template), mechanism.sum_dtype
        )
        weights = [self._weights[site] for site in survivors]
        self._result.total.restore(
            Update(
                arrays,
                weight=sum(weight for weight, _ in weights),
                examples=sum(examples for _, examples in weights),
                heaviest=max(weight for weight, _ in weights),
            ),
            len(survivors),
        )
        self._result.answered = list(survivors)
        self._result.bytes_up = len(survivors) * total.nbytes
        self._result.bytes_down = len(survivors) * self._outgoing
