"""How a site answers a request for statistics: by its policy, under a reservation, with noise of its own.

What leaves is one vector whose sensitivity is 1 (`fedclaw.privacy.statistics`), with Gaussian noise that the site
calibrates itself for the epsilon and delta that are asked; or, in a secure sum, with its share of noise of that size,
masked. It is worked out from the training data's file, whose
content has to be what the ledger is charged for.
"""

import logging
from dataclasses import dataclass

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from pydantic import ValidationError

from fedclaw.errors import DataError, PrivacyError
from fedclaw.learning.score_statistics import score_records
from fedclaw.learning.statistics import design_for
from fedclaw.learning.workload import Floats
from fedclaw.privacy.accounting import NoiseEvent
from fedclaw.privacy.distributed import Shares
from fedclaw.privacy.mechanisms.statistics import noise_of, shares_of
from fedclaw.privacy.noise import GaussianSource
from fedclaw.privacy.statistics import Design, Doubles, Records
from fedclaw.protocol.arrays import pack
from fedclaw.protocol.frozen import explain
from fedclaw.protocol.messages import ABOUT, ARRAYS, CHARGE, JSON, RECEIPT, SUM
from fedclaw.protocol.plan import Refusal, RefusalCode, SecureAggregation
from fedclaw.protocol.statistics import REQUEST, ROUND, VECTOR, ScoreQuestion, StatisticsReceipt, StatisticsRequest
from fedclaw.site.data import check_constants, files_of, fingerprint, prepare, require_same
from fedclaw.site.outputs import one_by_one
from fedclaw.site.policy.statistics import check_statistics
from fedclaw.site.privacy_budget import Account, Asking, Due, reserve
from fedclaw.site.secure import Mask
from fedclaw.site.site import Site, sent_arrays

log = logging.getLogger(__name__)


def answer_statistics(
    site: Site, request: StatisticsRequest, asking: Asking, mask: Mask | None = None, content: RecordDict | None = None
) -> RecordDict:
    """The noised vector, masked by `mask` if the request has a secure sum, with its receipt.

    `content` holds the parameters of the model whose scores are asked for. Raises Refusal before anything is paid for.
    """
    check_statistics(site.policy, request, len(site.data.train))
    design = _design(site, request)
    files_of(site.data)
    model = _scored(site, request.scores, content or RecordDict()) if request.scores else None
    noise = _noise(site, request, design)
    due = Due(asking, request.federation, request.run, ROUND, noise.mechanism, Account.training(site))
    charge = reserve(site, due)
    vector = (
        statistics_vector(site, design)
        if request.scores is None or model is None
        else design.vector([scores_of(site, request.scores, model)])
    )
    if mask is None:
        left: dict[str, ArrayRecord | ConfigRecord] = {
            SUM: pack({VECTOR: noised(vector, noise.mechanism.noise_multiplier, site.source)})
        }
    else:
        assert noise.shares is not None
        left = mask(noise.shares.encode_sum(vector, site.source)[0])
    receipt = _receipt(site, request, noise)
    log.info(
        "statistics %s of %d columns leave with noise; epsilon %.3f by this run",
        *(request.run, len(request.columns), receipt.epsilon_run or 0.0),
    )
    return RecordDict(
        {
            **left,
            RECEIPT: ConfigRecord({JSON: receipt.model_dump_json()}),
            ABOUT: ConfigRecord({CHARGE: charge.hash}),
        }
    )


def request_of(content: RecordDict) -> StatisticsRequest:
    """The request in a message. Raises Refusal."""
    try:
        return StatisticsRequest.model_validate_json(str(content.config_records[REQUEST][JSON]))
    except (KeyError, ValueError) as error:
        reason = explain(error) if isinstance(error, ValidationError) else f"the message lacks {error}"
        raise Refusal(RefusalCode.MALFORMED, f"the request cannot be read: {reason}") from error


def statistics_vector(site: Site, design: Design) -> Doubles:
    """The vector of the site's training data, (d,), without noise: it must not leave like that. Raises DataError."""
    train = files_of(site.data).train
    vector = design.vector(site.workload.schema.records(train))
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
    """In which cell each training row is, under any parameters whatever. Raises Refusal or DataError.

    Row by row, though that is slower: in a batch, how the products of one row are rounded depends on how many rows
    there are, so that a row more could carry others over the edge of a bin, and one example would count for many.
    """
    prepare(site, asked.preprocessing)
    inputs, targets = site.on_device("train", site.data.train)
    logits = one_by_one(model, inputs).double().cpu().numpy()
    with np.errstate(invalid="ignore"):
        return score_records(logits[:, 1] - logits[:, 0], targets.cpu().numpy(), asked.bins)


def noised(vector: Doubles, deviation: float, source: GaussianSource) -> Floats:
    """What may leave: `vector` with Gaussian noise, added in float64 and rounded to float32 once."""
    values = source.perturb_(torch.from_numpy(vector.copy()), deviation)
    rounded: Floats = values.numpy().astype(np.float32)
    return rounded


@dataclass(frozen=True)
class _Noise:
    """What the ledger is charged, and this site's share of it in a secure sum."""

    mechanism: NoiseEvent
    shares: Shares | None


def _noise(site: Site, request: StatisticsRequest, design: Design) -> _Noise:
    """The noise that keeps the request's epsilon. Raises Refusal when none does."""
    try:
        if request.secure is None:
            return _Noise(NoiseEvent(1.0, noise_of(request.epsilon, request.delta), 1), None)
        _check_sum(site, request.secure, design)
        shares = shares_of(request)
    except PrivacyError as error:
        raise Refusal(RefusalCode.EPSILON, f"statistics: {error}") from error
    return _Noise(NoiseEvent(1.0, shares.noise_multiplier, 1), shares)


def _check_sum(site: Site, secure: SecureAggregation, design: Design) -> None:
    """That the secure sum has room for this site's vector: a number that is cut off would be a wrong statistic."""
    if secure.length != design.dimension:
        raise Refusal(
            RefusalCode.SECURE_AGGREGATION,
            f"a secure sum of {secure.length} numbers was asked for; the statistics have {design.dimension}",
        )
    if secure.largest_weight is None or len(site.data.train) > secure.largest_weight:
        raise Refusal(
            RefusalCode.SECURE_AGGREGATION,
            f"the secure sum is made for sites of at most {secure.largest_weight or 0:g} examples, and this one has "
            "more",
        )


def _design(site: Site, request: StatisticsRequest) -> Design:
    try:
        return design_for(site.workload.schema, request)
    except DataError as error:
        raise Refusal(RefusalCode.SCHEMA, str(error)) from error


def _receipt(site: Site, request: StatisticsRequest, noise: _Noise) -> StatisticsReceipt:
    run = site.ledger.spent(request.delta, run=request.run, federation=request.federation)
    return StatisticsReceipt(
        trust="nobody" if noise.shares is None else "aggregation",
        noise_multiplier=noise.mechanism.noise_multiplier,
        delta=request.delta,
        **StatisticsReceipt.figures(run, site.ledger.spent(site.policy.delta), site.policy.epsilon),
        ledger_head=site.ledger.head(),
    )
