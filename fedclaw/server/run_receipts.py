"""The sites' receipts of a run. Of each figure the worst that a site has reported is kept.

By them a run whose noise leaves nothing to learn is called that. By its figures: `Task.nothing_learned`.
"""

import logging
import math
from collections.abc import Mapping, Sequence

from fedclaw.privacy.mechanisms.choice import mechanism_of
from fedclaw.privacy.mechanisms.sum_noise import SumNoise
from fedclaw.server.run_directory import RunDirectory, RunRecord, SiteReceipt
from fedclaw.server.training import TrainingQuestion

log = logging.getLogger(__name__)

_LEAST_SIGNAL = 3.0
# Standard deviations. Below, not even gradients that all point one way can be told from the noise.


def hopeless_noise(record: RunRecord, receipts: Mapping[str, SiteReceipt], sites: int) -> str | None:
    """The warning for a run whose noise drowns whatever there is to learn; None: it does not.

    A run's steps move the model by at most the clipping bound each, and by that only if the gradients of all examples
    point one way at every step; of the noise's own path, its deviation in that one direction is compared with the sum.
    """
    found = [signal for signal in _signals(record, list(receipts.values()), sites) if signal < _LEAST_SIGNAL]
    if not found:
        return None
    return (
        f"with this noise nothing can be learned: even if all gradients pointed one way, {record.rounds} rounds would "
        f"move the model by {max(found):.2g} standard deviations of the noise; take a larger epsilon, more examples or "
        "sites, larger batches or more rounds"
    )


def _signals(record: RunRecord, receipts: Sequence[SiteReceipt], sites: int) -> list[float]:
    """Largest possible signal over the noise in its direction, over the whole run; empty without noise."""
    if record.privacy is not None:
        noised = [item for item in receipts if item.receipt.mechanism == "dp-sgd" and item.receipt.noise_multiplier > 0]
        if not noised or len(noised) < len(receipts):
            return []
        # A mean of K sites' paths: signals add up to at most K of the best one's, deviations to the root of K.
        best = max(_of_one(item, record.rounds) for item in noised)
        return [best * math.sqrt(len(noised))]
    mechanism = mechanism_of(record)
    if not isinstance(mechanism, SumNoise):
        return []
    return [mechanism.signal_to_noise(sum(item.examples for item in receipts), sites)]


def _of_one(item: SiteReceipt, rounds: int) -> float:
    """Of T steps on samples of B: T C against sqrt(T) z C / B."""
    receipt = item.receipt
    return receipt.sample_rate * item.examples * math.sqrt(receipt.steps * rounds) / receipt.noise_multiplier


class RunReceipts:
    """The last receipt of each site, by name."""

    def __init__(self, directory: RunDirectory, record: RunRecord) -> None:
        self._directory = directory
        self._record = record
        self._judged_noise = False
        self.by_site: dict[str, SiteReceipt] = directory.read_receipts()

    def add(self, trained: TrainingQuestion) -> None:
        """Take up a round's receipts; those in `trained` say no less afterwards than each site said before."""
        if self._record.simulated is None:
            for site, now in trained.receipts.items():
                trained.receipts[site] = now.after(self._before(site, now))
        self.by_site.update(trained.receipts)
        if not self._judged_noise and (warning := hopeless_noise(self._record, self.by_site, len(trained.answered))):
            log.warning("%s", warning)
        self._judged_noise = True

    def write(self) -> None:
        """On disk on return."""
        self._directory.write_receipts(self.by_site)

    def _before(self, site: str, now: SiteReceipt) -> SiteReceipt | None:
        before = self.by_site.get(site)
        if before is not None and now.receipt.is_better_than(before.receipt):
            log.warning(
                "%s says that less is spent than it said before in this run: the worst that it has told stays, "
                "and its ledger should be looked at",
                site,
            )
        return before
