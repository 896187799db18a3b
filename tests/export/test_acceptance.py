"""What is refused at export: costs that cannot be stated, and a score under the floor. Real runs, real ledgers."""

import dataclasses
import itertools
import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from fedclaw.errors import BundleError, CheckpointError, LedgerError, UsageError
from fedclaw.export.acceptance import _fall, accept, claims_of
from fedclaw.export.ledgers import HeldLedger
from fedclaw.export.source import load_source
from fedclaw.ledger import main as show
from fedclaw.privacy.mechanisms.receipts import impossible
from fedclaw.protocol.chain import GENESIS, canonical, link
from fedclaw.server.run_directory import PendingRound, RunDirectory, SiteReceipt
from tests.samples import receipt

PAST = Path(__file__).parents[1] / "past" / "8eca11f"
WARDS = ("ward-a", "ward-b", "ward-c")


@pytest.fixture
def run(table_run, tmp_path):
    root = tmp_path / "run"
    shutil.copytree(table_run.root, root, ignore=shutil.ignore_patterns("bundle", "run.lock"))
    return RunDirectory(root)


def refused(run: RunDirectory, **request) -> str:
    with pytest.raises(BundleError) as error:
        accept(load_source(run), **request)
    return str(error.value)


def test_an_honest_run_is_accepted(run):
    assert accept(load_source(run)) is None


IMPOSSIBLE = {
    "below zero": ({"epsilon_run": -5.0}, "greater than or equal to 0"),
    "not a number": ({"epsilon_lifetime": float("nan")}, "finite number"),
    "a delta of one": ({"delta": 1.0}, "less than 1"),
    "a delta of nothing": ({"delta": 0.0}, "at delta 0"),
    "no head": ({"ledger_head": "<b>trust me</b>"}, "pattern"),
    "no ledger": ({"ledger_head": "simulated"}, "names no ledger"),
    "no noise and bounded": ({"mechanism": "none"}, "without noise that counts"),
    "no noise multiplier": ({"noise_multiplier": 0.0}, "with no noise"),
    "unbounded but not in all": ({"epsilon_run": None}, "a bound on all runs together"),
    "nothing charged": ({"rounds": 0}, "no round of this run"),
    "over its budget": ({"epsilon_left": 0.0}, "nothing is left of its budget"),
}


@pytest.mark.parametrize("what", IMPOSSIBLE)
def test_a_receipt_that_cannot_be_is_refused_and_its_site_is_named(run, what):
    lie, words = IMPOSSIBLE[what]
    plain = json.loads(run.receipts_path.read_text())
    plain["south"]["receipt"] |= lie
    run.receipts_path.write_text(json.dumps(plain))
    said = refused(run)
    assert "south" in said
    assert words in said
    assert "train again without that site" in said


def told(run: RunDirectory, *epsilons: float | None) -> None:
    run.metrics_path.write_text(
        "".join(
            json.dumps({"round": n, "metrics": {"accuracy": 0.5}, "answered": ["north"], "epsilon": {"north": epsilon}})
            + "\n"
            for n, epsilon in enumerate(epsilons, 1)
        )
    )


@pytest.mark.parametrize(
    ("epsilons", "words"),
    [
        ((0.5, 1.9, 1.2), "epsilon 1.9 and, later, 1.2"),
        ((0.5, None, 1.2), "epsilon without bound and, later, 1.2"),
        ((0.5, 2.5), "epsilon 2.5 and, later, 2"),
    ],
)
def test_an_epsilon_that_falls_is_refused(run, epsilons, words):
    """The last receipt, which says 2, included."""
    told(run, *epsilons)
    said = refused(run)
    assert words in said
    assert "north" in said


@pytest.mark.parametrize("epsilons", [(0.5, 1.2, 2.0), (1.0, 1.0, 1.999), (2.001,)])
def test_what_an_accountants_grid_makes_of_epsilon_is_no_fall(run, epsilons):
    told(run, *epsilons)
    accept(load_source(run))


def test_a_site_whose_answers_are_in_the_model_has_a_receipt(run, samples):
    told(run, 1.0)
    run.write_receipts({"south": samples.private["south"]})
    assert "north answered, and receipts.json has no receipt" in refused(run)


def test_a_line_that_cannot_be_read_is_one_sentence(run):
    for line in ({"answered": "north"}, {"epsilon": {"north": "1"}}, {"epsilon": {"north": float("nan")}}):
        run.metrics_path.write_text(json.dumps({"round": 1, "metrics": {}, **line}) + "\n")
        with pytest.raises(CheckpointError, match=r"metrics\.jsonl is damaged"):
            load_source(run)


def test_a_round_in_flight_is_a_cost_that_is_not_known_yet(run):
    PendingRound(round=4, nodes=(1, 2)).write(run.root)
    assert "round 4 is in flight" in refused(run)


def test_clients_of_a_simulation_have_neither_budget_nor_ledger(run, samples):
    plain = json.loads(run.record_path.read_text()) | {"simulated": {"clients": 1}}
    run.record_path.write_text(json.dumps(plain))
    run.write_receipts(
        {"client-0": SiteReceipt(examples=9, receipt=samples.receipt(ledger_head="simulated", epsilon_left=0.0))}
    )
    assert accept(load_source(run)) is None


def test_the_floor_is_held_against_the_last_federated_evaluation(run):
    source = load_source(run)
    reached = accept(source, floor=0.875)
    assert (reached.metric, reached.value, reached.floor, reached.examples) == ("accuracy", 0.875, 0.875, 40)
    assert dataclasses.replace(source, acceptance=reached).training().acceptance == reached
    assert "final model reaches accuracy 0.8750" in refused(run, floor=0.9)
    assert "floor=0.9" in refused(run, floor=0.9)


@pytest.mark.parametrize("metrics", [{"loss": 0.1}, {"accuracy": float("nan")}])
def test_a_score_that_there_is_not_is_under_any_floor(run, metrics):
    run.append_metrics(3, {"metrics": metrics, "test_examples": 40})
    assert "floor" in refused(run, floor=0.0)
    accept(load_source(run))


def test_a_compressed_model_is_held_against_its_own_score():
    source = load_source(RunDirectory(PAST / "runs" / "local"), "compressed")
    compression = source.compression.model_copy(update={"accuracy_measure": "evaluation file", "accuracy_after": 0.7})
    measured = dataclasses.replace(source, compression=compression)
    assert accept(measured, floor=0.7).value == 0.7
    with pytest.raises(BundleError, match=r"compressed model reaches accuracy 0\.7000"):
        accept(measured, floor=0.71)
    agreement = compression.model_copy(update={"accuracy_measure": "agreement with the teacher"})
    with pytest.raises(BundleError, match="no more than agreement with its teacher"):
        accept(dataclasses.replace(source, compression=agreement), floor=0.1)


SAYS = {
    "epsilon_run": [None, 0.01, 2.0],
    "epsilon_lifetime": [None, 0.01, 3.0],
    "epsilon_left": [None, 0.0, 1e-300, 4.0],
    "delta": [0.0, 1e-5, 0.5],
    "rounds": [0, 1, 10**15],
    "trust": ["nobody", "server", "everybody"],
    "mechanism": ["dp-sgd", "none"],
    "noise_multiplier": [0.0, 1.2],
    "accountant": ["pld", "none"],
}
TOLD = [receipt(**dict(zip(SAYS, values, strict=True))) for values in itertools.product(*SAYS.values())]
POSSIBLE = [told for told in TOLD if impossible(told) is None]


@given(said=st.lists(st.sampled_from(POSSIBLE), min_size=2, max_size=6))
def test_no_site_costs_the_others_their_model(said):
    """Whatever a site says from round to round: what its rounds did not refuse, export does not refuse either."""
    kept, epsilons = said[0], [said[0].epsilon_run]
    for told in said[1:]:
        kept = told.after(kept)
        epsilons.append(kept.epsilon_run)
    assert impossible(kept) is None
    assert _fall(epsilons) is None


# Ledgers at hand: those of a run that three real sites were charged for.


@pytest.fixture(scope="module")
def local():
    return load_source(RunDirectory(PAST / "runs" / "local"), "final")


@pytest.fixture
def sites(tmp_path):
    for name in WARDS:
        shutil.copytree(PAST / "sites" / name, tmp_path / name)
    return [tmp_path / name for name in WARDS]


def test_the_sites_own_ledgers_say_what_their_receipts_said(local, sites):
    accept(local, ledgers=sites)
    ledger = HeldLedger.read(sites[0])
    claim = next(claims_of(local.runs[0], local.receipts[0]))
    found = ledger.find(claim)
    assert (found.charges, found.open) == (2, 0)
    assert found.epsilon == pytest.approx(claim.epsilon, rel=1e-9)
    assert found.sequence < ledger.index.sequence, "it has grown since"
    assert [len(one) for one in found.fingerprints] == [64]


def changed(local, **receipt):
    """The run as if ward-a's last receipt had said something else."""
    entry = local.receipts[0].by_site["ward-a"]
    lie = entry.model_copy(update={"receipt": entry.receipt.model_copy(update=receipt)})
    receipts = dataclasses.replace(local.receipts[0], by_site={**local.receipts[0].by_site, "ward-a": lie})
    return dataclasses.replace(local, receipts=(receipts,))


@pytest.mark.parametrize(
    ("lie", "words"),
    [
        ({"epsilon_run": 2.2}, "epsilon 2.2 is claimed, and its charges come to 1.991"),
        ({"rounds": 1}, "1 charges are claimed, and it has 2"),
        ({"rounds": 3}, "3 charges are claimed, and it has 2"),
        ({"unit": "person"}, "the unit person is claimed"),
        ({"ledger_head": "ab" * 32}, "is not in this ledger"),
    ],
)
def test_a_receipt_that_its_ledger_contradicts_is_refused(local, sites, lie, words):
    with pytest.raises(BundleError) as error:
        accept(changed(local, **lie), ledgers=sites[:1])
    assert words in str(error.value)
    assert "ward-a" in str(error.value)


def test_an_old_copy_of_a_ledger_is_refused(local, sites):
    shutil.copy(PAST / "ledgers" / "discrete.sqlite", sites[0] / "state" / "ledger.sqlite")
    with pytest.raises(BundleError, match="not whole"):
        accept(local, ledgers=sites[:1])


def test_a_ledger_of_nobody_here_is_refused(local):
    with pytest.raises(BundleError, match="of none of the sites"):
        accept(local, ledgers=[PAST / "sites" / "lab-a"])


def test_a_site_over_its_budget_by_its_own_policy_is_refused(local, sites):
    policy = sites[0] / "site.yaml"
    text = policy.read_text()
    assert "epsilon: 40" in text
    policy.write_text(text.replace("epsilon: 40", "epsilon: 2"))
    with pytest.raises(BundleError, match=r"ward-a is over its budget.* of a budget of 2"):
        accept(local, ledgers=sites[:1])


def printed(site: Path, target: Path) -> Path:
    """What `python -m fedclaw.ledger show json=true entries=true` prints."""
    with target.open("w") as file:
        show(["show", f"site={site}", "json=true", "entries=true"], Console(file=file))
    return target


def rewritten(path: Path, change) -> None:
    """A printed ledger that its holder has changed and linked anew, so that it is whole by its own chain."""
    plain = json.loads(path.read_text())
    plain["chain"] = change(plain["chain"])
    head = GENESIS
    for number, line in enumerate(plain["chain"], 1):
        line["sequence"] = line["body"]["sequence"] = number
        line["hash"] = head = link(head, canonical(line["body"]))
    plain["head"] = head
    path.write_text(json.dumps(plain))


def test_an_answer_in_the_model_that_was_never_settled_is_refused(local, sites, tmp_path):
    """An unsettled ledger: all entries up to the run's last charge, whose answer is in the model."""
    paper = printed(sites[0], tmp_path / "ward-a.json")

    def unsettled(chain):
        own = ("local", "ward-a-2026")
        charge = max(
            line["sequence"] for line in chain if (line["body"].get("run"), line["body"].get("data_set")) == own
        )
        # Later entries would refer to others' numbers, so the copy ends with the charge.
        return [line for line in chain if line["sequence"] <= charge]

    rewritten(paper, unsettled)
    ledger = HeldLedger.read(paper)
    claim = next(claims_of(local.runs[0], local.receipts[0]))
    with pytest.raises(LedgerError, match="2 answers are in the model, and only 1 of its charges are settled"):
        ledger.find(dataclasses.replace(claim, head=ledger.index.head))
    with pytest.raises(BundleError, match="2 answers are in the model"):
        accept(changed(local, ledger_head=ledger.index.head), ledgers=[paper])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is no ledger"),
        (b"[]", "is no ledger"),
        (b'{"chain": 3, "head": ""}', "is no ledger"),
        (b'{"chain": [{"sequence": 1, "hash": "", "body": 3}], "head": ""}', "cannot be read|is no ledger|changed"),
        (b"[" * 100_000, "is no ledger"),
        (b'{"chain": [{"sequence": 1e999, "hash": "", "body": {}}], "head": ""}', "is no ledger"),
        (b"SQLite format 3\0" + bytes(100), "malformed|not a database|no such table"),
    ],
)
def test_what_is_no_ledger_is_one_sentence(tmp_path, content, words):
    path = tmp_path / "ledger"
    path.write_bytes(content)
    with pytest.raises((UsageError, LedgerError), match=words):
        HeldLedger.read(path)


def test_a_ledger_whose_schema_is_damaged_is_one_sentence(tmp_path):
    """SQLite quotes the damaged bytes in its message, which are no text."""
    sound = Path(__file__).parents[1] / "past" / "8eca11f" / "sites" / "ward-a" / "state" / "ledger.sqlite"
    content = bytearray(sound.read_bytes())
    content[content.index(b"tableentriesentries") + len("table")] = 0xFF
    (tmp_path / "ledger.sqlite").write_bytes(content)
    with pytest.raises(LedgerError, match=r"ledger\.sqlite: malformed database schema"):
        HeldLedger.read(tmp_path / "ledger.sqlite")


def test_a_printed_ledger_that_was_touched_is_refused(local, sites, tmp_path):
    paper = printed(sites[0], tmp_path / "ward-a.json")
    plain = json.loads(paper.read_text())
    for change in ("body", "cut", "problem"):
        touched = json.loads(paper.read_text())
        if change == "body":
            touched["chain"][3]["body"]["round"] = 7
        elif change == "cut":
            touched["chain"] = touched["chain"][:-1]
        else:
            touched["problem"] = "an old copy was put back"
        paper.write_text(json.dumps(touched))
        with pytest.raises(BundleError, match="not whole"):
            accept(local, ledgers=[paper])
        paper.write_text(json.dumps(plain))
