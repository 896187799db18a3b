"""A run, as a person at the terminal sees it."""

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fedclaw.privacy.accounting import epsilon_of_sum, largest
from fedclaw.privacy.mechanisms.choice import mechanism_of
from fedclaw.protocol.terms import CentralNoise
from fedclaw.report.tables import Figures, epsilon_words, parts_in_lines, shortened
from fedclaw.server.run_directory import RunDirectory, RunRecord, SiteReceipt

if TYPE_CHECKING:
    from fedclaw.privacy.distributed import Price
    from fedclaw.server.round_report import Outcome, RoundReport

MOST_SITES = 20
"""Rows of the table at the end."""
_LONGEST_NAME = 40


class TerminalProgress:
    """Observer: a bar, a line a round, and a table at the end."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total} rounds"),
            TimeElapsedColumn(),
            TextColumn("[dim]left[/]"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
            transient=True,
        )
        self._task = self._progress.add_task("training", total=1)
        self._priced = False
        self._missing: dict[str, str] = {}
        """Who did not take part when last asked, and why."""

    def started(self, record: RunRecord, first_round: int) -> None:
        """Announce the run."""
        self._say(
            f"run {record.run}: {record.workload}, {record.strategy.name}, {record.rounds} rounds from {first_round}, "
            f"{privacy_words(record)}"
        )
        self._progress.update(self._task, total=record.rounds, completed=first_round - 1)
        self._progress.start()

    def finished_round(self, report: "RoundReport") -> None:
        """One line: who took part, what the model can do, what it cost. Who is missing is named when that is new."""
        spent = largest(item.receipt.epsilon_run for item in report.receipts.values())
        cost = "epsilon unbounded" if spent is None else f"epsilon <= {spent:.3f}"
        missing = {declined.site: declined.code for declined in report.declined}
        missing |= dict.fromkeys(report.silent, "silent")
        count, new = len(report.answered), [site for site in missing if self._missing.get(site) != missing[site]]
        self._missing = {site: why for site, why in self._missing.items() if site not in report.answered} | missing
        parts = [f"round {report.round:>3}/{report.rounds}", f"{count} of {count + len(missing)} sites"]
        if not missing:
            parts[-1] = f"{count} sites"
        parts += metric_words(report.metrics, (report.beside.get("majority") or {}).get("accuracy"))
        parts += [cost, f"{report.train_seconds + report.evaluate_seconds:.1f} s"]
        parts += [f"without {shortened(site, _LONGEST_NAME)} ({missing[site]})" for site in new]
        self._progress.console.print(
            parts_in_lines(parts, self.console.width), style="yellow" if new else "", markup=False
        )
        if report.price is not None and not self._priced:
            self._priced = True
            self._say(price_words(report.price))
        self._progress.update(self._task, completed=report.round)

    def finished(self, outcome: "Outcome") -> None:
        """The summary table."""
        self._progress.stop()
        self.console.print(receipt_table(outcome.receipts))
        line = (outcome.directory.read_metrics() or [{}])[-1]
        majority = (line.get("majority") or {}).get("accuracy")
        metrics = ", ".join(metric_words(outcome.metrics, majority)) or "none were permitted"
        if spent := central_words(outcome.directory.record()):
            self._say(spent)
        if moved := bytes_words(outcome.directory):
            self._say(moved)
        self._say(f"federated evaluation: {metrics}")
        for words in beside_words(line):
            self._say(words)
        self.console.print(f"model: {outcome.directory.model_path}", soft_wrap=True, markup=False)

    def _say(self, text: str) -> None:
        """A sentence on lines of the terminal's width; what a site or a setting is called is text and nothing else."""
        self._progress.console.print(text, markup=False, soft_wrap=False)

    def close(self) -> None:
        """Leave the terminal as it was, also after an error."""
        self._progress.stop()


def metric_words(metrics: Mapping[str, float], majority: float | None) -> Iterator[str]:
    """Each metric with its value, and beside the accuracy that of whoever always answers with the commonest class."""
    for name, value in metrics.items():
        yield f"{name} {value:.4f}" + (f" (majority class {majority:.4f})" if name == "accuracy" and majority else "")


def beside_words(line: Mapping[str, Any]) -> Iterator[str]:
    """What a round's line in the metrics says beside them: the AUROC's bound, and the means over the sites."""
    if area := line.get("auroc"):
        low, high = area["interval"]
        yield f"auroc lies in [{low:.4f}, {high:.4f}] (bins and noise of the score histograms)"
    means = [
        f"{name} {values['mean']:.4f} +- {values['spread']:.4f}"
        for name, values in (line.get("over_sites") or {}).items()
        if values["sites"] > 1
    ]
    if means:
        yield f"mean over sites, and spread: {', '.join(means)}"


def bytes_words(directory: RunDirectory) -> str | None:
    """What the arrays of all rounds came to on the wire; None if no site trained."""
    lines = directory.read_metrics()
    up, down = (sum(int(line.get(way, 0)) for line in lines) for way in ("bytes_up", "bytes_down"))
    if not up:
        return None
    compression = directory.record().compression
    how = f" (compression {compression.method})" if compression else ""
    return f"updates: {up / 1e6:,.3g} MB from the sites{how}, {down / 1e6:,.3g} MB of parameters to them"


def central_words(record: RunRecord) -> str | None:
    """What the noise on the sum comes to over the whole run; None if there is none by the server."""
    central = record.central
    if not central or mechanism_of(record).shares_noise:
        # What the sites' shares come to is in their receipts.
        return None
    spent = epsilon_of_sum(central, record.rounds)
    return (
        f"noise on the sum, by the server, unit {_unit_of_sum(record, central)}: epsilon {spent:.3f} at delta "
        f"{central.delta:g}, towards everybody but the server"
    )


def _unit_of_sum(record: RunRecord, central: CentralNoise) -> str:
    """What noise on the sum hides: a site, or what the schema protects at each."""
    return central.unit if central.unit == "site" else record.unit


def price_words(price: "Price") -> str:
    """What noise by the sites costs beside a trusted server's, for a person."""
    return (
        f"the price of noise by the sites: {price.extra_variance:.1%} more variance than promised while nobody drops "
        f"out, {price.rounding_inflation - 1:.2%} more deviation for rounding; a number of the sum leaves its range "
        f"with a probability below {price.wrap_probability:.1g}"
    )


def privacy_words(record: RunRecord) -> str:
    """What a run asks for, in a few words."""
    words, local, central = list[str](), record.privacy, record.central
    if local:
        words.append(f"epsilon {local.epsilon:g}, delta {local.delta:g} at each site (unit {record.unit})")
    if central:
        by = "all sites together" if mechanism_of(record).shares_noise else "the server"
        unit = _unit_of_sum(record, central)
        words.append(f"epsilon {central.epsilon:g}, delta {central.delta:g} in the sum (unit {unit}) by {by}")
    if record.secure is not None:
        words.append("secure aggregation")
    return ", ".join(words) or "without differential privacy"


def receipt_table(receipts: dict[str, SiteReceipt]) -> Figures:
    """What the run cost each site; of very many, those that paid most."""
    columns = ("site", "examples", "noise", "trusts", "epsilon: run", "lifetime", "left", "delta", "rounds")
    table = Figures(columns, title="Privacy spent, by site", words=frozenset({"noise", "trusts"}))
    dearest = sorted(receipts.items(), key=lambda item: (-_paid(item[1]), item[0]))
    for site, item in sorted(dearest[:MOST_SITES]):
        receipt = item.receipt
        table.add_row(
            site,
            str(item.examples),
            receipt.mechanism,
            receipt.trust,
            epsilon_words(receipt.epsilon_run),
            epsilon_words(receipt.epsilon_lifetime),
            epsilon_words(receipt.epsilon_left, absent="no limit"),
            f"{receipt.delta:g}",
            str(receipt.rounds),
        )
    if rest := [item for _, item in dearest[MOST_SITES:]]:
        table.caption = f"and {len(rest)} sites that paid no more than these; receipts.json has all"
    return table


def _paid(item: SiteReceipt) -> float:
    return math.inf if item.receipt.epsilon_run is None else item.receipt.epsilon_run
