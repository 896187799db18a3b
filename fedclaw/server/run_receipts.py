"""The sites' receipts of a run. Of each figure the worst that a site has reported is kept."""

import logging

from fedclaw.server.learned import hopeless_noise
from fedclaw.server.run_directory import RunDirectory, RunRecord, SiteReceipt
from fedclaw.server.training import TrainingQuestion

log = logging.getLogger(__name__)


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
