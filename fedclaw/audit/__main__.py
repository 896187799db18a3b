"""Attack a training configuration, to see whether it is as private as it claims.

    python -m fedclaw.audit workload.schema_file=schema.yaml
    python -m fedclaw.audit workload.schema_file=schema.yaml privacy=none central=site
    python -m fedclaw.audit sites=[sites/hospital-north,sites/hospital-east] privacy.epsilon=3 json=audit.json

The settings are those of python -m fedclaw.server. The real code of the server and of the sites runs in this process,
on the data of the site directories in sites=, or on made-up data; nothing is sent, no ledger is charged.

  sites=[DIR,...]    sites whose data is used; their policies, ledgers and logs are left alone
  synthetic=[N,...]  without sites=: examples of each made-up site (400, 100, 60 and 40)
  canaries=N         planted examples, or persons, of the one-run audit (200)
  examples=N         most of each site's own in the attacked run (300)
  rows_together=N    attack a guarantee for rows by persons with so many rows, whom it does not cover (1: by rows)
  attacked_rounds=N  most rounds of the attacked run (5; null: all)
  trials=N           most releases of each mechanism that is probed (1000)
  confidence=0.95    with which all bounds hold together
  alarm=1e-4         the probability of a false alarm
  json=FILE          the report for machines

Made from data without noise, the report on real data tells about that data: keep it where the data is.
Exit code 0: nothing exceeds the claim, which proves nothing. 1: a claim is refuted, one line says which; or the audit
could not be done. 2: wrong use.
"""

if __name__ == "__main__":
    from fedclaw.startup import begin

    begin("fedclaw.audit", __doc__, plugins=True)

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field, JsonValue
from rich.console import Console
from rich.table import Table

from fedclaw import startup
from fedclaw.audit.findings import AuditOptions, AuditReport, Check
from fedclaw.cli import make_console, require_paths, run_main, settings_of
from fedclaw.errors import PrivacyError, UsageError
from fedclaw.files import PRIVATE_MODE, write_atomic
from fedclaw.protocol.frozen import fields_of
from fedclaw.protocol.terms import RoundRules
from fedclaw.server.early_checks import check_early
from fedclaw.server.settings import RunSettings
from fedclaw.site.settings import load_site_settings

if TYPE_CHECKING:
    from fedclaw.site.service import SiteService


class AuditSettings(RunSettings, AuditOptions):
    """conf/audit.yaml, checked."""

    sites: tuple[Path, ...] | None
    synthetic: tuple[int, ...]
    report: Path | None = Field(alias="json")
    runs: Path
    run: str | None
    tracking: dict[str, JsonValue]
    """Unused, as the two above: they come with conf/federated.yaml, and an audit keeps nothing of its run."""


def main(arguments: Sequence[str], console: Console | None = None) -> None:
    """Audit as the command line says. Raises PrivacyError when a claim is refuted."""
    settings = settings_of(arguments, "audit", AuditSettings)
    for site in settings.sites or ():
        require_paths(sites=site)
    run = _run_settings(settings)
    check_early(run, None, RoundRules(minimum=1))
    with startup.loading("torch, Opacus and Flower"):
        from fedclaw.audit.run import audit_run
    sites = _sites(settings, run)
    options = AuditOptions(**fields_of(settings, AuditOptions))
    report = audit_run(run, sites, options)
    if settings.report is not None:
        write_atomic(settings.report, report.model_dump_json(indent=2).encode(), PRIVATE_MODE)
    show(report, console or make_console(), real=settings.sites is not None)
    if report.flagged:
        faults = "; ".join(f"{check.name}, {check.subject}: {check.fault}" for check in report.flagged)
        raise PrivacyError(f"the claim is refuted by {faults}")


def show(report: AuditReport, console: Console, *, real: bool) -> None:
    """Print the findings and what they mean. `real`: they are of real data."""
    for subject, checks in groupby(report.checks, lambda check: check.subject):
        console.print(_table(subject, checks, report.confidence))
    console.print(_summary(report), style="bold")
    for sentence in (*report.notes, *_meaning(report, real)):
        console.print(sentence, markup=False)


def _table(subject: str, checks: Iterable[Check], confidence: float) -> Table:
    table = Table(title=f"privacy audit: {subject}", title_justify="left", header_style="bold")
    numbers = ("claimed", f"at least, {confidence:.0%}", "share", "any mechanism")
    for heading in ("check", *numbers, "", "seen"):
        table.add_column(heading, justify="right" if heading in numbers else "left")
    for check in checks:
        table.add_row(
            check.name,
            _epsilon(check.epsilon_claimed),
            _bound(check.epsilon_lower),
            "" if check.share is None or not check.epsilon_lower else f"{check.share:.0%}",
            _bound(check.epsilon_lower_any),
            _verdict(check),
            check.seen,
        )
    return table


def _run_settings(settings: AuditSettings) -> RunSettings:
    """The run's own settings; without a schema file, with that of the first site. Raises UsageError."""
    run = RunSettings.model_construct(**fields_of(settings, RunSettings))
    if settings.sites is None:
        return run
    if not settings.sites:
        raise UsageError("sites= is empty: give directories of sites, or leave it out for made-up data")
    for site in settings.sites:
        load_site_settings(site)
    if run.workload.schema_file is None:
        schema = load_site_settings(settings.sites[0]).schema_file
        run = run.model_copy(update={"workload": run.workload.model_copy(update={"schema_file": schema})})
    return run


def _sites(settings: AuditSettings, run: RunSettings) -> Mapping[str, "SiteService"]:
    """The sites whose data is used. Raises UsageError or DataError."""
    from fedclaw.audit.subject import FEDERATION, synthetic_sites
    from fedclaw.transport.in_process import open_sites

    if settings.sites is None:
        return synthetic_sites(run, settings.synthetic)
    return open_sites(settings.sites, FEDERATION)


def _epsilon(value: float | None) -> str:
    from fedclaw.audit.bounds import LARGEST_EPSILON

    if value is None:
        return "none"
    return f"> {LARGEST_EPSILON:g}" if value >= LARGEST_EPSILON else f"{value:.3g}"


def _bound(value: float | None) -> str:
    return _epsilon(value) if value else "-"


def _verdict(check: Check) -> str:
    if check.flagged:
        return "[bold red]EXCEEDS[/]"
    if check.epsilon_claimed is None:
        return ""
    return "[yellow]unsure[/]" if _is_unsure(check) else "[green]below[/]"


def _is_unsure(check: Check) -> bool:
    return not check.flagged and check.epsilon_claimed is not None and check.epsilon_lower > check.epsilon_claimed


def _summary(report: AuditReport) -> str:
    claims = sum(check.epsilon_claimed is not None for check in report.checks)
    unsure = sum(map(_is_unsure, report.checks))
    if not claims:
        return "Nothing was claimed, so there was nothing to refute."
    found = f"{len(report.flagged) or 'None'} of {claims} claims refuted"
    found = f"{found}, {unsure} unsure." if unsure else f"{found}."
    best = report.sharpest
    if best is None or best.share is None:
        return found
    return f"{found} The best attack shows {best.share:.0%} of epsilon {best.epsilon_claimed:.2f}: {best.name}."


def _meaning(report: AuditReport, real: bool) -> list[str]:
    sentences = [
        f"'At least' is a lower bound on the true epsilon at delta {report.delta:g}: all of them hold together with "
        f"{report.confidence:.0%} confidence. A bound above the claim proves a fault. A bound below it proves nothing: "
        "a better attack might find more, and what was not attacked was not seen.",
        "'At least' assumes noise of the kind that the accountant counts, however much of it: of another mechanism it "
        "bounds no epsilon. 'Any mechanism' assumes nothing of the noise. Share: 'at least' over the epsilon claimed.",
    ]
    if report.flagged:
        sentences.append(f"EXCEEDS: the claim is refuted, at a risk of a false alarm of {report.alarm:g}.")
    if any(map(_is_unsure, report.checks)):
        sentences.append("Unsure: above the claim, but not surely enough to refute it; audit again with more trials.")
    if real:
        sentences.append("This report was made from the sites' data without noise: keep it where the data is.")
    return sentences


if __name__ == "__main__":
    run_main("fedclaw.audit", __doc__ or "", main)
