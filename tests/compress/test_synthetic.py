"""Inputs that are made at the coordinator: drawn from a charged release of statistics, or by a generator network."""

import json

import numpy as np
import pytest
import torch

from fedclaw.clients.tabular import TabularWorkload
from fedclaw.clients.tabular_schema import TabularSchema
from fedclaw.compress.generator import Generator
from fedclaw.compress.models import predict_logits
from fedclaw.compress.record import CompressSettings, GeneratorSettings, RecoverySettings
from fedclaw.compress.stage import compress
from fedclaw.errors import CompressionError, DataError, FedClawError, UsageError
from fedclaw.export.bundle import _compression_cost
from fedclaw.export.source import load_source
from fedclaw.files import sha256_file
from fedclaw.learning.marginals import draw
from fedclaw.learning.tasks.classification import Classification
from fedclaw.learning.workload import schema_digest
from fedclaw.privacy.statistics import ColumnStatistics, Estimate, StatisticColumn
from fedclaw.protocol.message_identity import assume_server_identity
from fedclaw.protocol.statistics import StatisticsRequest
from fedclaw.protocol.terms import ModelSpec
from fedclaw.server.statistics import release_statistics
from fedclaw.server.statistics_release import write_release
from fedclaw.transport.in_process import LocalGrid, open_sites
from tests.made_tables import make_sites


def told(missing=0.0, **fields):
    return ColumnStatistics(missing=figure(0), missing_rate=figure(missing), **fields)


def figure(value):
    return Estimate(value=value, error=0.1)


DOSE = StatisticColumn("dose", bounds=(0.0, 100.0))
WARD = StatisticColumn("ward", levels=("a", "b", "c"))


def drawn(column, statistics, count=4000):
    return draw(column, statistics, count, np.random.default_rng(0))


def test_numbers_have_the_mean_and_variance_told_and_stay_within_the_bounds():
    values = drawn(DOSE, told(mean=figure(20.0), variance=figure(150.0), missing=0.25))
    known = values[~np.isnan(values)]
    assert 1 - len(known) / len(values) == pytest.approx(0.25, abs=0.03)
    assert known.mean() == pytest.approx(20, abs=1)
    assert known.var() == pytest.approx(150, rel=0.1)
    assert 0 <= known.min() <= known.max() <= 100


def test_numbers_follow_quantiles_where_there_are_some():
    quantiles = {"0.25": figure(10.0), "0.5": figure(12.0), "0.75": figure(60.0)}
    values = drawn(DOSE, told(mean=figure(50.0), variance=figure(9.0), quantiles=quantiles))
    assert np.quantile(values, [0.25, 0.5, 0.75]) == pytest.approx([10, 12, 60], abs=2)


def test_levels_come_as_often_as_told_and_less_than_none_is_none():
    counts = {"a": figure(300.0), "b": figure(100.0), "c": figure(-40.0)}
    shares = np.bincount(drawn(WARD, told(levels=counts)).astype(int), minlength=3) / 4000
    assert shares == pytest.approx([0.75, 0.25, 0.0], abs=0.03)
    assert drawn(WARD, told(levels=dict.fromkeys("abc", figure(-1.0)))) is None
    assert drawn(DOSE, told()) is None


@pytest.mark.parametrize(
    "fields",
    [
        {"mean": figure(1e300), "variance": figure(1e300)},
        {"mean": figure(-1e300), "variance": figure(-5.0)},
        {"quantiles": {"0.9": figure(1e308), "0.1": figure(-1e308)}},
        {"mean": figure(50.0), "variance": figure(1e308), "missing": 7.0},
    ],
)
def test_a_hostile_release_moves_no_value_out_of_bounds(fields):
    values = drawn(DOSE, told(**fields))
    known = values[~np.isnan(values)]
    assert np.isfinite(known).all()
    assert ((known >= 0) & (known <= 100)).all()
    assert len(drawn(WARD, told(levels=dict.fromkeys("abc", figure(1e308))))) == 4000


@pytest.mark.parametrize(
    ("column", "fields", "message"),
    [
        (WARD, {"levels": {"z": figure(1.0)}}, "no level 'z'"),
        (DOSE, {"quantiles": {"median": figure(1.0)}}, "at no number"),
        (DOSE, {"quantiles": {"1.5": figure(1.0)}}, "not between 0 and 1"),
        (DOSE, {"quantiles": {"nan": figure(1.0)}}, "not between 0 and 1"),
    ],
)
def test_what_no_release_says_is_refused(column, fields, message):
    with pytest.raises(DataError, match=message):
        drawn(column, told(**fields))


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    """A real release by real sites, and their workload."""
    root, constants = tmp_path_factory.mktemp("sites"), {"dose": (5000.0, 3000.0), "age": (60.0, 20.0)}
    made = make_sites(root, standardise="schema", constants=constants, epsilon=None)
    sites = open_sites(made.directories, "clinic")
    workload = next(iter(sites.values())).workload
    assume_server_identity(1)
    grid = LocalGrid(sites, 1)
    request = StatisticsRequest(
        federation="clinic",
        run="statistics-1",
        cohort=len(sites),
        workload="tabular",
        schema_digest=schema_digest(workload.schema.to_json()),
        columns=("dose", "age", "smoker", "ward"),
        epsilon=8.0,
        delta=1e-4,
    )
    return workload, release_statistics(
        grid, sorted(grid.get_node_ids()), workload.schema, request, (), minimum=2, deadline=10
    )
    return workload, made


@pytest.fixture
def clinic(release, make_run, tmp_path):
    """go(**settings) -> record of a run in the release's federation; with the release's file."""
    workload, made = release
    torch.manual_seed(0)
    run = make_run(workload, workload.build(ModelSpec(name="mlp", args={"hidden": [16, 8]})))
    record = run.record().model_copy(update={"federation": "clinic"})
    run.record_path.write_text(record.model_dump_json())
    path = tmp_path / "statistics.json"
    write_release(path, made)

    def go(statistics=path, **changes):
        usual = {"run": run.root, "mode": "synthetic", "fraction": 0.6, "latency_repeats": 1, "device": "cpu"}
        usual |= {"statistics": statistics, "synthetic": 300, "recovery": RecoverySettings(steps=20)}
        return compress(CompressSettings(**usual | {"controls": False, "overwrite": True} | changes))

    go.run, go.path = run, path
    return go


def test_recovery_on_a_charged_release_says_what_it_cost(clinic, release):
    record = clinic()
    step = next(item for item in record.looked_at if item.step == "recovery")
    assert (step.origin, step.sha256, step.release) == ("charged question", sha256_file(clinic.path), release[1].use)
    assert step.description.startswith(
        "300 synthetic inputs drawn from the statistics statistics-1, and those of a gen"
    )
    assert record.releases == (release[1].use,)
    said = _compression_cost(load_source(clinic.run))
    assert "it looked at the charged statistics statistics-1 (epsilon 8, delta 0.0001 at each site)" in said


def test_inputs_are_drawn_as_the_sites_rows_are(release):
    workload, made = release
    inputs = workload.schema.sampled_inputs(made.statistics, 4000, np.random.default_rng(0))
    assert inputs.shape == (4000, *workload.schema.input_shape)
    features = workload.schema.describe_inputs()["features"]
    smokers = made.statistics.columns["smoker"].levels
    wanted = smokers["true"].value / (smokers["true"].value + smokers["false"].value)
    values = inputs[:, features.index("smoker")]
    assert values[values != 0.5].mean() == pytest.approx(wanted, abs=0.03)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"federation": "another"}, UsageError, "is of federation 'another'"),
        ({"schema_digest": "0" * 64}, UsageError, "was made with another schema"),
        ({"epsilon": -1}, DataError, "is not a statistics.json of FedClaw"),
        ({"statistics": {"count": {"value": 9, "error": 1}, "labels": {}, "columns": {}}}, DataError, "says nothing"),
        ({"scores": {"model": "0" * 64, "bins": 5, "labels": ["a", "b"]}}, DataError, "says nothing"),
        (None, DataError, "is not a statistics.json"),
    ],
)
def test_a_wrong_release_is_one_clear_error(clinic, tmp_path, change, error, message):
    wrong = tmp_path / "wrong.json"
    wrong.write_text("[]" if change is None else json.dumps(json.loads(clinic.path.read_text()) | change))
    with pytest.raises(FedClawError, match=message) as caught:
        clinic(wrong)
    assert type(caught.value) is error
    assert "\n" not in str(caught.value)
    assert not clinic.run.compressed.exists()


def test_a_hostile_column_name_is_refused(clinic, tmp_path):
    plain = json.loads(clinic.path.read_text())
    plain["statistics"]["columns"]["extra"] = plain["statistics"]["columns"]["dose"]
    wrong = tmp_path / "wrong.json"
    wrong.write_text(json.dumps(plain))
    with pytest.raises(DataError, match=r"statistics=.*wrong\.json: the schema has no column 'extra'"):
        clinic(wrong)


def rings(count, generator):
    """Points of three rings: inputs that uniform noise seldom hits where the classes meet."""
    angle, kind = generator.random(count) * 2 * np.pi, generator.integers(0, 3, count)
    radius = 0.15 + 0.3 * kind + 0.05 * generator.standard_normal(count)
    points = np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1)
    return torch.from_numpy(points.astype(np.float32)), torch.from_numpy(kind)


@pytest.fixture(scope="module")
def ring_teacher():
    torch.manual_seed(0)
    inputs, targets = rings(600, np.random.default_rng(0))
    model = torch.nn.Sequential(torch.nn.Linear(2, 32), torch.nn.ReLU(), torch.nn.Linear(32, 3))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(300):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
    return model.eval()


BASE = torch.rand(400, 2, generator=torch.Generator().manual_seed(0)) * 2 - 1


def trained_generator(teacher, student, steps=150, **settings):
    task = Classification(("a", "b", "c"))
    generator = Generator(teacher, BASE, task, GeneratorSettings(every=1, learning_rate=5e-3, **settings), seed=0)
    made = [generator.inputs(student, 16) for _ in range(steps)]
    return generator, torch.cat(made[-30:])


def test_a_generator_makes_what_the_teacher_is_sure_of_in_every_class(ring_teacher):
    found = {}
    for balance in (0.0, 5.0):
        _, made = trained_generator(ring_teacher, ring_teacher, adversarial=0.0, balance=balance)
        answers = torch.softmax(predict_logits(ring_teacher, made), 1)
        rarest = torch.bincount(answers.argmax(1), minlength=3).min() / len(made)
        found[balance] = answers.max(1).values.mean(), rarest
    noise = torch.softmax(predict_logits(ring_teacher, BASE), 1)
    assert found[0.0][0] > noise.max(1).values.mean()
    assert found[5.0][1] > max(0.2, found[0.0][1])
    assert (made >= BASE.amin(0)).all()
    assert (made <= BASE.amax(0)).all()


def test_an_adversary_finds_what_the_student_does_not_know(ring_teacher):
    torch.manual_seed(1)
    student = torch.nn.Linear(2, 3)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    apart = {}
    for weight in (0.0, 10.0):
        _, made = trained_generator(ring_teacher, student, adversarial=weight, confidence=0.1)
        logits = predict_logits(ring_teacher, made)
        apart[weight] = Classification().divergence(predict_logits(student, made), logits, 1.0).item() / len(made)
    assert apart[10.0] > 1.2 * apart[0.0]
    # It is the generator that learnt: nothing of the student's has moved or waits to be added to.
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
    assert all(parameter.grad is None for parameter in student.parameters())


def test_the_same_seed_makes_the_same_inputs(ring_teacher):
    one, two = (trained_generator(ring_teacher, ring_teacher, steps=31)[1] for _ in range(2))
    assert torch.equal(one, two)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 5, 7), (2, 3, 3), (6,), (2, 5)])
def test_any_shape_of_inputs(shape):
    torch.manual_seed(0)
    base = torch.rand(20, *shape)
    teacher = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(base[0].numel(), 3))
    generator = Generator(teacher, base, Classification(("a", "b", "c")), GeneratorSettings(bank=40), seed=0)
    assert generator.inputs(teacher, 5).shape == (5, *shape)
    assert generator.kept().shape == (20, *shape)


def test_a_generator_that_diverges_is_one_clear_error():
    teacher = torch.nn.Linear(2, 3)
    torch.nn.init.constant_(teacher.weight, torch.nan)
    generator = Generator(teacher, BASE, Classification(("a", "b", "c")), GeneratorSettings(), seed=0)
    with pytest.raises(CompressionError, match="the generator diverged"):
        generator.inputs(teacher, 4)


def test_a_share_of_no_batch_makes_nothing_and_is_not_told(clinic):
    step = next(item for item in clinic(generator=GeneratorSettings(share=0.01)).looked_at if item.step == "recovery")
    assert step.examples == 300
    assert "generator" not in step.description


def test_a_number_is_recovered_without_data_too(make_run):
    definition = {
        "columns": [{"name": f"x{i}", "kind": "numeric", "range": [-1, 1]} for i in range(4)],
        "target": {"name": "y", "kind": "numeric", "range": [-4, 4]},
    }
    workload = TabularWorkload(TabularSchema.parse(json.dumps(definition), "schema"))
    torch.manual_seed(0)
    run = make_run(workload, workload.build(ModelSpec(name="mlp", args={"hidden": [16, 8]})))
    usual = {"run": run.root, "mode": "synthetic", "fraction": 0.6, "latency_repeats": 1, "device": "cpu"}
    how = RecoverySettings(steps=200, learning_rate=0.01)
    record = compress(CompressSettings(**usual, recovery=how, synthetic=400))
    assert record.score == "r2"
    assert record.accuracy_after > max(0.8, record.accuracy_pruned)
    assert record.after.interval.low < record.accuracy_after <= record.after.interval.high + 1e-9
    assert record.difference.interval.high <= 0
    assert len(record.controls) == 3
