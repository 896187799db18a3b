"""How a site answers a request for statistics: by its policy, under a reservation, with noise of its own.

What leaves is one vector of a known sensitivity (`fedclaw.privacy.statistics`, `fedclaw.privacy.survival`), with
Gaussian noise that the site calibrates itself for the epsilon and delta that are asked; or, in a secure sum, with its
share of noise of that size, masked. It is worked out from the training data's file, whose content has to be what the
ledger is charged for.
"""

import logging
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar

import numpy as np
import torch
from flwr.app import ConfigRecord, RecordDict
from numpy.typing import NDArray
from pydantic import ValidationError

from fedclaw.errors import DataError, PrivacyError
from fedclaw.learning.statistics import design_for, score_records
from fedclaw.privacy.mechanisms.choice import StatisticsMechanism, mechanism_of_request
from fedclaw.privacy.mechanisms.shared_noise import SharedStatistics
from fedclaw.privacy.provenance import Bounded, Part, Released
from fedclaw.privacy.statistics import Doubles, Records, VectorDesign
from fedclaw.protocol.arrays import pack
from fedclaw.protocol.frozen import explain
from fedclaw.protocol.messages import ARRAYS, JSON, RECEIPT, SUM
from fedclaw.protocol.refusal import Refusal, RefusalCode
from fedclaw.protocol.statistics import REQUEST, STATISTICS, VECTOR, ScoreQuestion, StatisticsReceipt, StatisticsRequest
from fedclaw.protocol.terms import SecureAggregation
from fedclaw.site.device import one_by_one
from fedclaw.site.pipeline import Answering, ReplyRecords
from fedclaw.site.policy.checks import check_statistics
from fedclaw.site.privacy_budget import Account, Due
from fedclaw.site.site import Site, check_constants, files_of, fingerprint, prepare, require_same, sent_arrays

log = logging.getLogger(__name__)


@dataclass
class StatisticsAnswer(Answering[Doubles, Doubles]):
    """One vector of the training data."""

    asked: StatisticsRequest
    kind: ClassVar[str] = STATISTICS
    record: ClassVar[str] = REQUEST
    _model: torch.nn.Module | None = field(default=None, init=False, repr=False)

    @cached_property
    def _design(self) -> VectorDesign:
        """Raises Refusal for what the schema does not have."""
        try:
            return design_for(self.site.workload.schema, self.asked)
        except DataError as error:
            raise Refusal(RefusalCode.SCHEMA, str(error)) from error

    @cached_property
    def _mechanism(self) -> StatisticsMechanism:
        """The noise that keeps the request's epsilon. Raises Refusal when none does."""
        try:
            return mechanism_of_request(self.asked, self._design.sensitivity)
        except PrivacyError as error:
            raise Refusal(RefusalCode.EPSILON, f"statistics: {error}") from error

    @classmethod
    def read(cls, content: RecordDict) -> StatisticsRequest:
        """See Answering."""
        try:
            return StatisticsRequest.model_validate_json(str(content.config_records[REQUEST][JSON]))
        except (KeyError, ValueError) as error:
            reason = explain(error) if isinstance(error, ValidationError) else f"the message lacks {error}"
            raise Refusal(RefusalCode.MALFORMED, f"the request cannot be read: {reason}") from error

    def admit(self) -> None:
        """See Answering."""
        check_statistics(self.site.policy, self.asked, self.site.examples)

    def check_session(self, secure: SecureAggregation) -> None:
        """See Answering."""
        mechanism_of_request(self.asked, self._design.sensitivity)

    def prepare(self) -> Due:
        """See Answering."""
        site, request = self.site, self.asked
        design = self._design
        files_of(site.data)
        if request.scores is not None:
            self._model = _scored(site, request.scores, self.content)
        if request.secure is not None:
            _check_sum(site, request.secure, design)
        return Due(self.asking, self._mechanism.event, Account.training(site))

    def answer(self, charge: str) -> Part[Doubles]:
        """See Answering."""
        if self.asked.scores is None or self._model is None:
            vector = statistics_vector(self.site, self._design)
        else:
            vector = self._design.vector([scores_of(self.site, self.asked.scores, self._model)])
        return Bounded(vector, self._design.sensitivity)

    def let_out(self, contribution: Part[Doubles]) -> Released[Doubles]:
        """See Answering."""
        return self._mechanism.let_out(contribution, self.site.source)

    def encode(self, contribution: Part[Doubles]) -> Released[NDArray[np.uint32]]:
        """See Answering."""
        if not isinstance(self._mechanism, SharedStatistics):
            raise PrivacyError("a secure sum of these statistics was not asked for")
        return self._mechanism.encode(contribution, self.site.source)

    def pack(self, left: Doubles) -> ReplyRecords:
        """See Answering. Rounded to float32 once, with the noise in it."""
        return {SUM: pack({VECTOR: left.astype(np.float32)})}

    def beside(self) -> ReplyRecords:
        """See Answering."""
        request, mechanism = self.asked, self._mechanism
        receipt = StatisticsReceipt(
            unit=self.site.data.train.unit,
            relation=self.site.relation,
            trust=mechanism.trust,
            noise_multiplier=mechanism.event.noise_multiplier,
            **Account.training(self.site).spent(self.asking, request.delta),
        )
        log.info(
            "statistics %s (%d numbers) leave with noise; epsilon %.3f by this run",
            *(request.run, self._design.dimension, receipt.epsilon_run or 0.0),
        )
        return {RECEIPT: ConfigRecord({JSON: receipt.model_dump_json()})}


def statistics_vector(site: Site, design: VectorDesign) -> Doubles:
    """The vector of the site's training data, (d,), without noise: it must not leave like that. Raises DataError."""
    train, schema, most = files_of(site.data).train, site.workload.schema, design.rows_per_person
    # A schema that knows no persons need not know of the argument.
    fewer = most is not None and (schema.rows_per_person or 1) > most
    records = schema.records(train, most) if fewer else schema.records(train)
    vector = design.vector(records if len(site.data.train) else ())
    require_same(train, site.data.fingerprint, fingerprint(train))
    return vector


def _scored(site: Site, asked: ScoreQuestion, content: RecordDict) -> torch.nn.Module:
    """The model whose scores are asked for; nothing of it depends on data. Raises Refusal."""
    check_constants(site, asked.preprocessing)
    if site.workload.schema.data_dependent:
        raise Refusal(
            RefusalCode.STATISTICS,
            "scores were asked for, and the schema standardises by this site's own statistics: one row would move the "
            "scores of all, which no noise for one covers",
        )
    return site.model(asked.model, sent_arrays(content, ARRAYS)).eval()


def scores_of(site: Site, asked: ScoreQuestion, model: torch.nn.Module) -> Records:
    """In which cell each training row is, of a person the first ones, under any parameters whatever.

    Raises Refusal or DataError.

    Row by row, though that is slower: in a batch, how the products of one row are rounded depends on how many rows
    there are, so that a row more could carry others over the edge of a bin, and one example would count for many.
    """
    prepare(site, asked.preprocessing)
    inputs, targets = site.on_device("train")
    used = torch.from_numpy(site.data.train.first_rows(site.workload.schema.rows_per_person or 1)).to(inputs.device)
    inputs, targets = inputs[used], targets[used]
    logits = one_by_one(model, inputs).double().cpu().numpy()
    with np.errstate(invalid="ignore"):
        return score_records(logits[:, 1] - logits[:, 0], targets.cpu().numpy(), asked.bins)


def _check_sum(site: Site, secure: SecureAggregation, design: VectorDesign) -> None:
    """That the secure sum has room for this site's vector: a number that is cut off would be a wrong statistic."""
    if secure.length != design.dimension:
        raise Refusal(
            RefusalCode.SECURE_AGGREGATION,
            f"a secure sum of {secure.length} numbers was asked for; the statistics have {design.dimension}",
        )
    if secure.largest_weight is None or site.examples > secure.largest_weight:
        raise Refusal(
            RefusalCode.SECURE_AGGREGATION,
            f"the secure sum is made for sites of at most {secure.largest_weight or 0:g} examples, and this one has "
            "more",
        )
