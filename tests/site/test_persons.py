"""A site whose schema says whose a row is, asked by the real messages: all that is counted and noised is a person."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from flwr.app import ConfigRecord, Message, RecordDict

from fedclaw.errors import DataError, LedgerError
from fedclaw.learning.statistics import design_of
from fedclaw.privacy.accounting import calibrate
from fedclaw.privacy.noise import GaussianSource
from fedclaw.protocol.arrays import pack, unpack
from fedclaw.protocol.message_identity import assign_message_id, assume_server_identity
from fedclaw.protocol.receipt import Receipt
from fedclaw.protocol.refusal import Refusal
from fedclaw.protocol.statistics import STATISTICS, ScoreQuestion, StatisticsReceipt, StatisticsRequest
from fedclaw.protocol.terms import LocalTraining, ModelSpec, Plan, PrivacyRequest, SecureAggregation
from fedclaw.site import training
from fedclaw.site.directory import open_service
from fedclaw.site.preflight.check import examine
from fedclaw.site.service import SiteService
from fedclaw.site.settings import load_site_settings
from fedclaw.site.statistics import _check_sum

SCHEMA = {
    "columns": [{"name": "x", "kind": "numeric", "range": [-10, 10]}, {"name": "z", "kind": "numeric"}],
    "target": {"name": "outcome", "labels": ["no", "yes"]},
    "person": "patient",
}
PEOPLE = 20
MODEL = ModelSpec(name="logistic")
NOISED = {"metrics_epsilon": 1.0, "metrics_budget": {"epsilon": 8.0, "delta": 1e-3}}


def rows_of(people: range, generator: np.random.Generator) -> list[tuple[str, float, float, str]]:
    """One to five rows of each person, those of several between one another."""
    rows = []
    for person in people:
        for _ in range(1 + person % 5):
            x, z = generator.normal(size=2)
            rows.append((f"p{person}", float(x), float(z), "yes" if x > 0 else "no"))
    return [rows[place] for place in generator.permutation(len(rows))]


def write_rows(path: Path, rows: list[tuple[str, float, float, str]]) -> None:
    lines = [f"{person},{x!r},{z!r},{outcome}" for person, x, z, outcome in rows]
    path.write_text("\n".join(["patient,x,z,outcome", *lines, ""]))


def make_site(
    root: Path,
    *,
    train: list[tuple[str, float, float, str]] | None = None,
    test: list[tuple[str, float, float, str]] | None = None,
    schema: dict | None = None,
    **policy,
) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(1)
    write_rows(root / "train.csv", rows_of(range(PEOPLE), generator) if train is None else train)
    write_rows(root / "test.csv", rows_of(range(PEOPLE, 2 * PEOPLE), generator) if test is None else test)
    (root / "schema.yaml").write_text(yaml.safe_dump(SCHEMA if schema is None else schema))
    rules = {"workloads": ["tabular"], "strategies": ["fedavg"], "epsilon": 50.0, "delta": 1e-3, "minimum_cohort": 1}
    rules |= {"statistics": {"epsilon": 40.0, "scores": True}, **policy}
    site = {"name": "north", "workload": "tabular", "schema_file": "schema.yaml", "policy": rules}
    (root / "site.yaml").write_text(yaml.safe_dump({**site, "data": {"train": "train.csv", "test": "test.csv"}}))
    return root


class Asker:
    """Asks the site in a directory as an honest server would."""

    def __init__(self, root: Path, *, durable: bool = True) -> None:
        assume_server_identity(1)
        self.site: SiteService = open_service(root, load_site_settings(root), "clinic", durable=durable)
        torch.manual_seed(0)
        built = self.site.workload.build(MODEL)
        self.parameters = {name: value.detach().numpy().copy() for name, value in built.named_parameters()}
        self._count = 0

    def plan(self, **changes) -> Plan:
        fields = {
            "federation": "clinic",
            "run": "run-1",
            "round": 1,
            "rounds": 2,
            "cohort": 3,
            "workload": "tabular",
            "schema_digest": self.site.schema_digest,
            "model": MODEL,
            "strategy": "fedavg",
            "training": LocalTraining(epochs=1, batch_size=5, learning_rate=0.1),
            "privacy": PrivacyRequest(epsilon=4, delta=1e-3, max_grad_norm=1),
            "metrics": ("loss", "accuracy"),
        }
        return Plan(**{**fields, **changes})

    def train(self, kind: str = "train", **changes) -> Message:
        plan = ConfigRecord({"json": self.plan(**changes).model_dump_json()})
        return self.ask(kind, RecordDict({"arrays": pack(self.parameters), "plan": plan}))

    def statistics(self, **changes) -> Message:
        content = {"arrays": pack(self.parameters)} if "scores" in changes else {}
        fields = {"federation": "clinic", "run": "statistics", "cohort": 3, "workload": "tabular", "bins": 0}
        fields |= {"columns": ("x",), "epsilon": 1.0, "delta": 1e-3, "schema_digest": self.site.schema_digest}
        request = StatisticsRequest(**{**fields, **changes})
        return self.ask(
            STATISTICS, RecordDict({**content, "request": ConfigRecord({"json": request.model_dump_json()})})
        )

    def ask(self, kind: str, content: RecordDict) -> Message:
        message = Message(content, dst_node_id=7, message_type=kind, group_id="1")
        self._count += 1
        assign_message_id(message, f"message-{self._count}")
        reply = self.site.answer(message)
        self.site.release(message, reply, 10, "00" * 32)
        assert not reply.has_error(), reply.error.reason
        return reply


def receipt_of(reply: Message) -> Receipt:
    return Receipt.model_validate_json(str(reply.content.config_records["receipt"]["json"]))


def test_weight_rate_and_receipt_count_persons(tmp_path: Path) -> None:
    asker = Asker(make_site(tmp_path))
    assert len(asker.site.data.train) == 60
    reply = asker.train()
    receipt, metrics = receipt_of(reply), reply.content.metric_records["metrics"]
    assert (receipt.unit, receipt.sample_rate, receipt.steps) == ("person", 5 / PEOPLE, PEOPLE // 5)
    assert (metrics["examples"], metrics["weight"]) == (PEOPLE, PEOPLE)
    charged = asker.site.ledger.entries()[1].body
    assert charged["unit"] == "person"
    assert receipt.epsilon_run == pytest.approx(asker.site.ledger.spent(1e-3))


def test_a_batch_has_all_rows_of_whoever_is_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asker = Asker(make_site(tmp_path), durable=False)
    persons, batches = asker.site.data.train.persons, []
    taken = training.take_steps

    def watched(steps, *rest):
        batches.extend(steps)
        return taken(iter(batches), *rest)

    monkeypatch.setattr(training, "take_steps", watched)
    for privacy in (PrivacyRequest(epsilon=4, delta=1e-3, max_grad_norm=1), None):
        batches.clear()
        if privacy is None:
            asker.site.policy = asker.site.policy.model_copy(
                update={"allow_training_without_privacy": True, "epsilon": None}
            )
        asker.train(privacy=privacy)
        assert len(batches) == PEOPLE // 5
        # A tensor of one row would be taken for a number.
        for rows in (batch.numpy() for batch in batches):
            there = set(persons[rows].tolist())
            assert sorted(rows.tolist()) == np.flatnonzero(np.isin(persons, list(there))).tolist()
            if privacy is None:
                assert len(there) == 5
    # Without privacy an epoch goes through everybody once.
    assert sorted(int(row) for rows in batches for row in rows) == list(range(60))


class Silent(GaussianSource):
    """No noise, and everybody is sampled: what is left is the mechanism's arithmetic. The noise asked for is noted."""

    def __init__(self) -> None:
        super().__init__()
        self.deviations: list[float] = []
        self.before: list[np.ndarray] = []

    def perturb_(self, values: torch.Tensor, std: float) -> torch.Tensor:
        self.deviations.append(std)
        self.before.append(values.numpy().astype(np.float64).ravel().copy())
        return values

    def bernoulli(self, count: int, q: float) -> np.ndarray:
        return np.ones(count, bool)


def moved(root: Path, one: list, other: list) -> tuple[float, float]:
    """How far apart the updates of two data sets are, by one step at a rate of 1; and the largest noise asked for."""
    deltas, deviations = [], []
    for number, rows in enumerate((one, other)):
        asker = Asker(make_site(root / str(number), train=rows), durable=False)
        asker.site.source = source = Silent()
        # With these every row is half wrong, and as long as its inputs.
        asker.parameters = {name: np.zeros_like(values) for name, values in asker.parameters.items()}
        reply = asker.train(training=LocalTraining(steps=1, batch_size=1, learning_rate=1.0))
        weighted = np.concatenate([values.ravel() for values in unpack(reply.content["sum"]).values()])
        deltas.append(weighted / reply.content.metric_records["metrics"]["weight"])
        deviations += source.deviations
    return float(np.linalg.norm(deltas[0] - deltas[1])), max(deviations)


@pytest.mark.parametrize("rows", [1, 40, 3000])
def test_a_person_moves_a_step_by_one_bound_whatever_is_in_their_rows(tmp_path: Path, rows: int) -> None:
    """Expected batch size 1: the sum itself leaves. 3,000 loud rows are clipped as one."""
    others = [(f"q{number}", 0.1 * number, 0.0, "no") for number in range(9)]
    loud = [("p", 10.0, -1e6, "yes")] * rows
    distance, deviation = moved(tmp_path, [*others, *loud], [*others, ("p", 0.0, 0.0, "no")])
    assert 0.5 < distance <= 2 * (1 + 1e-6)
    alone, _ = moved(tmp_path / "alone", loud, loud[:1])
    assert alone == pytest.approx(0, abs=1e-3)
    noise = calibrate(4, 1e-3, 1 / 10, 2)
    assert deviation == pytest.approx(noise, rel=1e-6)


def test_one_person_alone_trains_and_is_counted_as_one(tmp_path: Path) -> None:
    rows = [("p", float(number), 0.0, "no" if number % 2 else "yes") for number in range(8)]
    asker = Asker(make_site(tmp_path, train=rows))
    reply = asker.train(training=LocalTraining(steps=2, batch_size=4, learning_rate=0.1))
    assert receipt_of(reply).sample_rate == 1.0
    assert reply.content.metric_records["metrics"]["examples"] == 1


def by_hand(asker: Asker, path: Path, most: int) -> np.ndarray:
    """The vector of statistics of each person's first rows, by another reader than the schema's."""
    seen: dict[str, int] = {}
    kept = []
    for line in path.read_text().splitlines()[1:]:
        person, x, _, outcome = line.split(",")
        seen[person] = seen.get(person, 0) + 1
        if seen[person] <= most:
            kept.append((float(x), outcome == "yes"))
    labels = [sum(not yes for _, yes in kept), sum(yes for _, yes in kept)]
    t = np.array([x for x, _ in kept]) / 10
    return np.array([len(kept), *labels, 0, t.sum(), (t**2 - 0.5).sum()])


@pytest.mark.parametrize("most", [1, 3])
def test_statistics_are_of_the_first_rows_with_noise_for_all_of_them(tmp_path: Path, most: int) -> None:
    """120 draws of 6 numbers: a right deviation is within 13% but once in 10^6, and that of other rows is not."""
    root = make_site(tmp_path, schema={**SCHEMA, "rows_per_person": most}, epsilon=None)
    asker = Asker(root, durable=False)
    replies = [asker.statistics() for _ in range(120)]
    receipt = StatisticsReceipt.model_validate_json(str(replies[0].content.config_records["receipt"]["json"]))
    assert (receipt.unit, receipt.noise_multiplier) == ("person", calibrate(1.0, 1e-3, 1.0, 1))
    drawn = np.stack([unpack(reply.content["sum"])["statistics"] for reply in replies])
    third = 1 / np.sqrt(3)
    weights = third * np.array([1, 1, 1, 1, np.sqrt(1 / 2), np.sqrt(2)])
    noise = drawn - weights * by_hand(asker, root / "train.csv", most)
    deviation = most * receipt.noise_multiplier
    assert np.std(noise) == pytest.approx(deviation, rel=0.13)
    assert np.abs(noise.mean(axis=0)).max() < 6 * deviation / np.sqrt(120)


@pytest.mark.parametrize(("declared", "most"), [(None, PEOPLE), (7, 7), (500, 500)])
def test_a_secure_sum_has_room_by_persons_as_stated(tmp_path: Path, declared: int | None, most: int) -> None:
    """60 rows of 20 persons: whether the site refuses tells of neither where another number is declared."""
    site = Asker(make_site(tmp_path), durable=False).site
    site.data = replace(site.data, public_examples=declared)
    design = design_of(site.workload.schema, ("x",), labels=False, bins=0)
    secure = SecureAggregation(
        session="0" * 32,
        sites=("a", "b", "c"),
        threshold=2,
        neighbours=2,
        minimum=3,
        length=design.dimension,
        step=2.0**-14,
    )
    _check_sum(site, secure.model_copy(update={"largest_weight": float(most)}), design)
    with pytest.raises(Refusal, match=f"at most {most - 1} examples"):
        _check_sum(site, secure.model_copy(update={"largest_weight": most - 1.0}), design)


def test_a_histogram_of_scores_is_of_the_first_rows(tmp_path: Path) -> None:
    for most, count in ((1, PEOPLE), (3, 4 * (1 + 2 + 3 + 3 + 3))):
        schema = {**SCHEMA, "rows_per_person": most}
        asker = Asker(make_site(tmp_path / str(most), schema=schema, epsilon=None), durable=False)
        asker.site.source = source = Silent()
        reply = asker.statistics(columns=(), labels=False, scores=ScoreQuestion(model=MODEL, bins=5))
        vector = unpack(reply.content["sum"])["statistics"] / np.sqrt(1 / 2)
        assert vector[0] == pytest.approx(count, rel=1e-6)
        assert vector[2:].sum() == pytest.approx(count, rel=1e-6)
        assert source.deviations == [pytest.approx(most * calibrate(1.0, 1e-3, 1.0, 1))]


@pytest.mark.parametrize("most", [1, 2])
def test_metrics_give_everybody_the_same_weight(tmp_path: Path, most: int) -> None:
    """Three persons with 3, 1 and 2 rows; right are b, and a and c in the first row. With two rows b counts twice."""
    test = [("a", 1, 0, "yes"), ("a", 1, 0, "no"), ("a", 1, 0, "no"), ("b", 1, 0, "yes"), ("c", -1, 0, "no")]
    test += [("c", -1, 0, "yes")]
    schema = {**SCHEMA, "rows_per_person": most}
    asker = Asker(make_site(tmp_path, test=test, schema=schema, minimum_test_examples=3), durable=False)
    asker.parameters = {name: np.zeros_like(values) for name, values in asker.parameters.items()}
    weight = next(name for name, values in asker.parameters.items() if values.ndim == 2)
    asker.parameters[weight][1, 0] = 5.0
    asker.site.policy = asker.site.policy.model_copy(update={"metrics": ("loss", "accuracy")})
    metrics = asker.train("evaluate").content.metric_records["metrics"]
    assert metrics["examples"] == 3 * most
    # As it leaves: how many are right.
    assert metrics["accuracy"] == {1: 3, 2: 4}[most]


def test_metrics_with_noise_cover_all_that_a_person_adds(tmp_path: Path) -> None:
    deviations = {}
    for most in (1, 4):
        schema = {**SCHEMA, "rows_per_person": most}
        asker = Asker(make_site(tmp_path / str(most), schema=schema, **NOISED), durable=False)
        asker.site.source = source = Silent()
        reply = asker.train("evaluate")
        assert receipt_of(reply).unit == "person"
        assert reply.content.metric_records["metrics"]["examples"] == PEOPLE * most
        (deviations[most],) = source.deviations
    assert deviations[4] == pytest.approx(4 * deviations[1])


@pytest.mark.parametrize("most", [1, 3])
@pytest.mark.parametrize("rows", [1, 2, 500])
def test_a_person_there_or_not_moves_an_answer_by_what_its_noise_is_made_for(
    tmp_path: Path, most: int, rows: int
) -> None:
    """Statistics and scores with a person and without; metrics with a person, and with another in their place."""
    others = rows_of(range(PEOPLE), np.random.default_rng(3))
    loud = [("p", 10.0, -1e3, "yes")] * rows
    schema = {**SCHEMA, "rows_per_person": most}
    scores = ScoreQuestion(model=MODEL, bins=5)
    seen = []
    for number, own in enumerate(([*others[:9], *loud, *others[9:]], others)):
        folder = tmp_path / str(number)
        test = [
            (f"t{person}", x, z, label) for person, x, z, label in own + [("q", -10.0, 0.0, "no")] * (1 - len(seen))
        ]
        root = make_site(folder, train=own, test=test, schema=schema, epsilon=None, **NOISED)
        asker = Asker(root, durable=False)
        asker.site.source = source = Silent()
        asker.statistics()
        asker.statistics(columns=(), labels=False, scores=scores, run="scores")
        asker.train("evaluate")
        seen.append(source)
    multipliers = [calibrate(1.0, 1e-3, 1.0, 1)] * 3
    reach = [min(rows, most)] * 2 + [most]
    for one, other, deviation, multiplier, times, of in zip(
        seen[0].before, seen[1].before, seen[0].deviations, multipliers, reach, (1, 1, 2), strict=True
    ):
        moved = float(np.linalg.norm(one - other))
        assert 0 < moved <= of * deviation / multiplier * (1 + 1e-9)
        assert deviation / multiplier >= times * (1 - 1e-9)


def test_too_few_persons_share_no_metrics_however_many_rows_they_have(tmp_path: Path) -> None:
    test = [("a", 1, 0, "yes"), ("b", 1, 0, "no")] * 30
    asker = Asker(make_site(tmp_path, test=test, schema={**SCHEMA, "rows_per_person": 20}), durable=False)
    with pytest.raises(AssertionError, match="metrics of at least 10 test"):
        asker.train("evaluate")


def test_nobody_is_in_both(tmp_path: Path) -> None:
    generator = np.random.default_rng(2)
    root = make_site(tmp_path, test=rows_of(range(PEOPLE - 3, PEOPLE + 5), generator))
    with pytest.raises(DataError, match=r"3 of 8 persons in .*test\.csv are in .*train\.csv too.*Split by person"):
        Asker(root)
    assert not (root / "state" / "ledger.sqlite").exists()
    with pytest.raises(DataError, match="3 of 8 persons"):
        examine(root, load_site_settings(root))


@pytest.mark.parametrize("by_rows_first", [True, False])
def test_a_budget_counts_one_unit(tmp_path: Path, by_rows_first: bool) -> None:
    by_rows = {name: value for name, value in SCHEMA.items() if name != "person"} | {"identifiers": ["patient"]}
    first, second = (by_rows, SCHEMA) if by_rows_first else (SCHEMA, by_rows)
    asker = Asker(make_site(tmp_path, schema=first))
    asker.train()
    asker.site.ledger.close()
    (tmp_path / "schema.yaml").write_text(yaml.safe_dump(second))
    units = ("example", "person") if by_rows_first else ("person", "example")
    with pytest.raises(
        LedgerError, match="was charged for each {}, and by the schema .* for each {}: neither".format(*units)
    ):
        Asker(tmp_path)
    assert "neither says what was spent on the other" in str(
        examine(tmp_path, load_site_settings(tmp_path)).findings.failure
    )
    (tmp_path / "schema.yaml").write_text(yaml.safe_dump(first))
    assert receipt_of(Asker(tmp_path).train()).rounds == 2


def test_training_without_privacy_is_unbounded_for_persons_too(tmp_path: Path) -> None:
    by_rows = {name: value for name, value in SCHEMA.items() if name != "person"} | {"identifiers": ["patient"]}
    asker = Asker(make_site(tmp_path, schema=by_rows, allow_training_without_privacy=True, epsilon=None))
    asker.train(privacy=None)
    asker.site.ledger.close()
    (tmp_path / "schema.yaml").write_text(yaml.safe_dump(SCHEMA))
    assert receipt_of(Asker(tmp_path).train()).epsilon_lifetime is None


def test_a_person_column_changes_the_digest_that_sites_compare(tmp_path: Path) -> None:
    by_rows = {name: value for name, value in SCHEMA.items() if name != "person"} | {"identifiers": ["patient"]}
    sites = [Asker(make_site(tmp_path / str(n), schema=schema)).site for n, schema in enumerate((SCHEMA, by_rows))]
    assert sites[0].schema_digest != sites[1].schema_digest
