"""What is refused at export, whatever it was trained for: costs that cannot be stated, and a score under the floor.

What a site says is refused at the round that it says it in (`fedclaw.privacy.mechanisms.receipts`): its answer is in no
model then, and it costs nobody else anything. What is refused here got past that: in runs of earlier versions, or by a
hand in the run's files.

    a receipt that cannot be      it contradicts itself; epsilon falls from round to round; or there is none of a site
                                  whose answers are in the model
    a site over its budget        by its own receipt, or by its ledger where that is at hand
    costs that are still open     a round is in flight, or a ledger at hand has not settled an answer in the model
    a score under the floor       of the very model that is exported, where the floor is asked for

Clients of a simulation have no budgets and no ledgers; their receipts are what the simulation worked out.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from fedclaw.errors import BundleError, LedgerError, Setting
from fedclaw.export.ledgers import SAME, Claimed, HeldLedger
from fedclaw.export.source import Source, SourceRun
from fedclaw.export.statement import Receipts
from fedclaw.export.training_record import Acceptance
from fedclaw.privacy.mechanisms.receipts import impossible
from fedclaw.protocol.receipt import Receipt

_TRAIN_AGAIN = "its data is in the model, so train again without that site"


def accept(source: Source, floor: float | None = None, ledgers: Sequence[Path] = ()) -> Acceptance | None:
    """Whether `source` may be exported: what it scored, where a `floor` is asked for.

    `ledgers` are those of its sites that are at hand. Raises BundleError for the first thing that is refused.
    """
    for run, receipts in zip(source.runs, source.receipts, strict=True):
        if run.record.simulated is None:
            _check_costs(run, receipts)
    _check_ledgers(source, [_read(path) for path in ledgers])
    return None if floor is None else _check_floor(source, floor)


def _check_costs(run: SourceRun, receipts: Receipts) -> None:
    where = f"run {receipts.run}"
    if run.pending is not None:
        raise BundleError(
            f"{where}: round {run.pending} is in flight, and what its sites were charged for it is not known yet; go "
            "on with the run, by resume=… or the same fedclaw.compress command, until it has ended"
        )
    for name, entry in sorted(receipts.by_site.items()):
        if reason := impossible(entry.receipt):
            raise BundleError(f"{where}: the receipt of {name} cannot be true: {reason}; {_TRAIN_AGAIN}")
    for name, epsilons in sorted(_told(run, receipts).items()):
        if fallen := _fall(epsilons):
            raise BundleError(
                f"{where}: {name} said that the run had cost it epsilon {fallen[0]} and, later, {fallen[1]}: no ledger "
                f"says that; {_TRAIN_AGAIN}"
            )
    if missing := sorted(set(answers_of(run)) - set(receipts.by_site)):
        raise BundleError(
            f"{where}: {', '.join(missing[:5])} answered, and receipts.json has no receipt of it: what the model cost "
            "there cannot be stated; restore the run's directory from a backup, or train again"
        )


def answers_of(run: SourceRun) -> Counter[str]:
    """How many of the run's rounds each site's answers are in."""
    return Counter(name for line in run.costs for name in line.answered)


def claims_of(run: SourceRun, receipts: Receipts) -> Iterator[Claimed]:
    """What the receipts of a run say of their sites' ledgers."""
    answers = answers_of(run)
    for name, entry in sorted(receipts.by_site.items()):
        receipt: Receipt = entry.receipt
        yield Claimed(
            site=name,
            federation=run.record.federation,
            run=run.record.run,
            head=receipt.ledger_head,
            charges=receipt.rounds,
            epsilon=receipt.epsilon_run,
            delta=receipt.delta,
            unit=receipt.unit,
            answers=answers.get(name),
        )


def _told(run: SourceRun, receipts: Receipts) -> dict[str, list[float | None]]:
    """By site, what it said of the run's epsilon, in order; the last receipt last."""
    told: dict[str, list[float | None]] = {}
    for line in run.costs:
        for name, epsilon in line.epsilon.items():
            told.setdefault(name, []).append(epsilon)
    for name, entry in receipts.by_site.items():
        told.setdefault(name, []).append(entry.receipt.epsilon_run)
    return told


def _fall(epsilons: Iterable[float | None]) -> tuple[str, str] | None:
    """The first figure and the smaller one after it, in words; None: there is none. Unbounded is above all numbers.

    What an accountant's grid makes of it is no fall.
    """
    largest = 0.0
    for epsilon in epsilons:
        value = math.inf if epsilon is None else epsilon
        if value < largest * (1 - SAME) or (largest == math.inf and value < largest):
            return _words(largest), _words(value)
        largest = max(largest, value)
    return None


def _words(epsilon: float) -> str:
    return "without bound" if epsilon == math.inf else f"{epsilon:.4g}"


def _read(path: Path) -> HeldLedger:
    try:
        return HeldLedger.read(path)
    except LedgerError as error:
        raise BundleError(f"a ledger at hand is not whole: {error}") from error


def _check_ledgers(source: Source, ledgers: Sequence[HeldLedger]) -> None:
    claims = [
        claim
        for run, receipts in zip(source.runs, source.receipts, strict=True)
        if run.record.simulated is None
        for claim in claims_of(run, receipts)
    ]
    for ledger in ledgers:
        own = [claim for claim in claims if ledger.site == claim.site or ledger.has(claim.head)]
        if not own:
            raise BundleError(f"{ledger.path} is the ledger of none of the sites that this model was trained at")
        for claim in own:
            try:
                ledger.find(claim)
            except LedgerError as error:
                raise BundleError(f"{error}; nothing is stated of it until it is explained") from error
            if over := ledger.over_budget(claim.federation, claim.run):
                raise BundleError(f"{claim.site} is over its budget: {over}; {_TRAIN_AGAIN}")


def _check_floor(source: Source, floor: float) -> Acceptance:
    reached = _scored(source, floor)
    if not reached.value >= floor:
        raise BundleError(
            f"the {source.variant} model reaches {reached.metric} {reached.value:.4f} ({reached.measured}, "
            f"{reached.examples:,} examples), under the ",
            Setting("floor", f"{floor:g}"),
            "; train on, compress less, or take another floor",
        )
    return reached


def _scored(source: Source, floor: float) -> Acceptance:
    """The score of the very model that is exported, from its own record."""
    score, compression = source.schema.task.score, source.compression
    if compression is not None:
        if compression.accuracy_measure == "agreement with the teacher":
            raise BundleError(
                Setting("floor", f"{floor:g}"),
                f" is a floor for {score}, and the compression measured no more than agreement with its teacher; "
                "compress again with ",
                Setting("evaluation", "FILE"),
                " of labelled public data, or export ",
                Setting("model", "final"),
            )
        return Acceptance(
            metric=compression.score,
            floor=floor,
            value=compression.accuracy_after,
            measured=compression.accuracy_measure,
            examples=compression.accuracy_examples,
        )
    last = source.metrics[-1] if source.metrics else {"metrics": {}}
    if not math.isfinite(value := last["metrics"].get(score, math.nan)):
        raise BundleError(
            Setting("floor", f"{floor:g}"),
            f" is a floor for {score}, and the run's last round has none that is a number: "
            "have the sites' policies let it out, or leave floor out",
        )
    return Acceptance(
        metric=score,
        floor=floor,
        value=value,
        measured="federated evaluation",
        examples=last.get("test_examples") or 0,
    )
