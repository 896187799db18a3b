"""Differential privacy in a simulation: the same sums as Opacus, noise of the right scale, the receipts of a site."""

import json

import numpy as np
import pytest
import torch

from fedclaw.clients.tabular import TabularWorkload
from fedclaw.errors import UsageError
from fedclaw.learning.registry import schema_class
from fedclaw.learning.stacked.engines import BatchedModel
from fedclaw.learning.stacked.layout import pack
from fedclaw.learning.stacked.private import ClientSampling, PrivateStep
from fedclaw.privacy.noise import GaussianSource
from fedclaw.privacy.speed import StepSpeed
from fedclaw.privacy.steps import PrivateGradients
from fedclaw.protocol.terms import CentralNoise, LocalTraining, PrivacyRequest, StrategyRecord
from fedclaw.server.run_directory import RunDirectory
from fedclaw.simulation import SimulatedFederation, SimulationSettings
from fedclaw.transport.in_process import simulate
from tests.simulation.conftest import MODELS, make_federation, make_record
from tests.simulation.test_modes import identical, largest_difference, real_sites

PRIVACY = PrivacyRequest(epsilon=6, delta=1e-3, max_grad_norm=0.7)
TRAINING = LocalTraining(epochs=1, batch_size=8, learning_rate=0.2)


def stacked_step(federation, kind, batches, noise, bound=0.3, persons=None):
    """Gradients (K, D) of clients with parameters of their own, and those parameters, by one stacked step."""
    workload = federation.workload
    torch.manual_seed(1)
    engine = BatchedModel(workload.build(MODELS[kind]), lambda _, outputs, targets: workload.loss(outputs, targets))
    start = {name: value.detach().numpy() for name, value in workload.build(MODELS[kind]).named_parameters()}
    stack = engine.layout.row(start).expand(len(batches), -1).clone()
    stack.add_(torch.randn_like(stack), alpha=0.1)
    gradients = torch.full_like(stack, 7.0)
    engine.bind(stack, gradients)
    samplings = [ClientSampling(0.25, noise, bound, 20 + 4 * k, GaussianSource()) for k in range(len(batches))]
    (packing,) = pack([[batch] for batch in batches], spare=5)
    table = federation.table
    inputs, targets = torch.from_numpy(table.inputs)[packing.rows], torch.from_numpy(table.targets)[packing.rows]
    owners = None if persons is None else persons[packing.rows]
    PrivateStep(engine).gradients(packing, inputs, targets, gradients, samplings, owners)
    return engine.layout, stack, gradients, samplings


@pytest.mark.parametrize("kind", ["cnn", "mlp"])
def test_stacked_clients_get_what_opacus_gives_each(kind):
    """The same Poisson batches, an empty one and single examples among them, without noise."""
    federation = make_federation(kind)
    batches = [np.arange(0, 7), np.arange(7, 14), np.arange(20, 21), np.arange(0), np.arange(30, 40)]
    layout, stack, gradients, samplings = stacked_step(federation, kind, batches, noise=0.0)
    table, workload = federation.table, federation.workload
    for client, batch in enumerate(batches):
        model = workload.build(MODELS[kind])
        with torch.no_grad():
            for name, value in model.named_parameters():
                value.copy_(torch.from_numpy(layout.arrays(stack[client])[name]))
        with PrivateGradients(
            model,
            lambda _, outputs, targets: workload.loss(outputs, targets),
            max_grad_norm=samplings[client].bound,
            noise_multiplier=0.0,
            expected_batch_size=samplings[client].expected,
            source=GaussianSource(),
            speed=StepSpeed(mode="opacus"),
        ) as opacus:
            opacus.gradients(torch.from_numpy(table.inputs[batch]), torch.from_numpy(table.targets[batch]))
            for name, value in model.named_parameters():
                ours = layout.arrays(gradients[client])[name]
                np.testing.assert_allclose(ours, value.grad.numpy(), atol=2e-7, rtol=1e-4)


def test_each_client_has_noise_of_its_own_scale():
    """Deviation = multiplier x bound / expected batch; 3 per cent of 40,000 draws are beyond six deviations."""
    federation = make_federation("mlp")
    batches = [np.arange(0), np.arange(0), np.arange(0)]
    drawn = [stacked_step(federation, "mlp", batches, noise=1.5) for _ in range(200)]
    samplings = drawn[0][3]
    for client, sampling in enumerate(samplings):
        values = torch.cat([gradients[client] for _, _, gradients, _ in drawn])
        assert len(values) > 30_000
        expected = 1.5 * sampling.bound / sampling.expected
        assert float(values.std()) == pytest.approx(expected, rel=0.03)
        assert abs(float(values.mean())) < 6 * expected / len(values) ** 0.5


@pytest.mark.parametrize("mode", ["one", "many"])
def test_receipts_are_those_of_a_real_site(run, tmp_path, mode):
    changes = {"privacy": PRIVACY, "training": TRAINING, "rounds": 2}
    federation = make_federation("mlp", sizes=(20, 12, 20))
    ours = run("mlp", SimulationSettings(mode=mode), federation=federation, **changes)
    record = make_record(federation, "mlp", **changes)
    directory = RunDirectory.create(tmp_path / "sites", record)
    theirs = simulate(directory, dict(real_sites(federation, record)))
    assert ours.receipts.keys() == theirs.receipts.keys()
    written = ours.directory.read_receipts()
    for name, item in theirs.receipts.items():
        same = item.receipt.model_dump(exclude={"ledger_head"})
        assert ours.receipts[name].receipt.model_dump(exclude={"ledger_head"}) == same
        assert written[name].receipt.model_dump(exclude={"ledger_head"}) == same
        assert ours.receipts[name].examples == item.examples
        assert 0 < item.receipt.epsilon_run <= PRIVACY.epsilon


def test_private_noise_is_never_the_same_unless_that_is_asked_for(run):
    changes = {"privacy": PRIVACY, "training": TRAINING, "rounds": 1}
    federation = make_federation("mlp", sizes=(20, 12, 20))

    def go(workers, repeatable, mode="many"):
        settings = SimulationSettings(workers=workers, repeatable_noise=repeatable, mode=mode)
        return run("mlp", settings, federation=federation, **changes)

    first, second = go(1, True), go(2, True)
    assert identical(first, second)
    assert first.directory.record().simulated.repeatable_noise
    assert largest_difference(first, go(1, True, "one")) < 1e-5
    assert largest_difference(go(1, False), go(1, False)) > 1e-4


def test_noise_on_the_sum_of_single_steps(run, tmp_path):
    """Central privacy of the unit example: clipped, without noise of the clients' own."""
    central = CentralNoise(
        unit="example", noise_by="server", epsilon=5, delta=1e-3, clip=0.5, noise_multiplier=1e-9, sample_rate=1.0
    )
    changes = {"central": central, "training": LocalTraining(steps=1, batch_size=8, learning_rate=0.5), "rounds": 2}
    federation = make_federation("mlp")
    record = make_record(federation, "mlp", **changes)
    theirs = simulate(RunDirectory.create(tmp_path / "s", record), dict(real_sites(federation, record)))
    for mode in ("one", "many"):
        assert largest_difference(run("mlp", SimulationSettings(mode=mode), **changes), theirs) < 1e-5


def test_clipped_updates_of_whole_clients(run, tmp_path):
    central = CentralNoise(unit="site", noise_by="server", epsilon=5, delta=1e-3, clip=0.05, noise_multiplier=1e-9)
    training = LocalTraining(epochs=1, batch_size=64, learning_rate=0.5)
    changes = {"central": central, "training": training, "rounds": 2, "weighting": "uniform"}
    federation = make_federation("mlp")
    record = make_record(federation, "mlp", **changes)
    theirs = simulate(RunDirectory.create(tmp_path / "s", record), dict(real_sites(federation, record)))
    assert largest_difference(run("mlp", SimulationSettings(mode="many"), **changes), theirs) < 1e-5


def with_persons(federation, fewest=1, most=6):
    """The same clients, whose rows belong to persons of about so many rows each, not one after another."""
    random, owners = np.random.default_rng(3), np.empty(len(federation.table), np.int64)
    for client in range(len(federation)):
        rows = federation.share(client)
        owners[rows] = 1000 * client + random.permutation(np.arange(len(rows)) // random.integers(fewest, most + 1))
    names = [str(number) for number in range(1000 * len(federation))]
    table, shares = federation.table.owned_by(owners, names), [federation.share(k) for k in range(len(federation))]
    schema = {**json.loads(federation.workload.schema.to_json()), "person": "who", "rows_per_person": 2}
    workload = TabularWorkload(schema_class("tabular").parse(json.dumps(schema), "test"))
    return SimulatedFederation(workload, table, shares, tests=shares)


@pytest.mark.parametrize("kind", ["cnn", "mlp"])
def test_the_rows_of_a_person_are_summed_and_clipped_together(kind):
    """Clients of persons with several rows, one among them empty, and batches filled up with rows of no one."""
    federation = make_federation(kind)
    batches = [np.arange(0, 7), np.arange(7, 13), np.arange(20, 21), np.arange(0), np.arange(30, 40)]
    persons = torch.arange(len(federation.table)) // 3
    layout, stack, gradients, samplings = stacked_step(federation, kind, batches, noise=0.0, persons=persons)
    table, workload = federation.table, federation.workload
    for client, batch in enumerate(batches):
        model = workload.build(MODELS[kind])
        with torch.no_grad():
            for name, value in model.named_parameters():
                value.copy_(torch.from_numpy(layout.arrays(stack[client])[name]))
        with PrivateGradients(
            model,
            lambda _, outputs, targets: workload.loss(outputs, targets),
            max_grad_norm=samplings[client].bound,
            noise_multiplier=0.0,
            expected_batch_size=samplings[client].expected,
            source=GaussianSource(),
            speed=StepSpeed(mode="opacus"),
        ) as opacus:
            rows = torch.from_numpy(batch)
            opacus.gradients(torch.from_numpy(table.inputs)[rows], torch.from_numpy(table.targets)[rows], persons[rows])
            for name, value in model.named_parameters():
                ours = layout.arrays(gradients[client])[name]
                np.testing.assert_allclose(ours, value.grad.numpy(), atol=2e-7, rtol=1e-4)


def test_clients_of_persons_train_alike_one_by_one_and_many_at_once(run):
    federation = with_persons(make_federation("mlp", sizes=(20, 12, 20)))
    assert sum(federation.examples(client) for client in range(len(federation))) == federation.table.units
    changes = {"training": LocalTraining(epochs=2, batch_size=3, learning_rate=0.2), "rounds": 1}

    def go(mode, of=federation, **more):
        settings = SimulationSettings(repeatable_noise=True, mode=mode)
        return run("mlp", settings, federation=of, **changes, **more)

    for more in ({}, {"privacy": PRIVACY}):
        one = go("one", **more)
        assert largest_difference(one, go("many", **more)) < 1e-5
        assert largest_difference(one, go("one", make_federation("mlp", sizes=(20, 12, 20)), **more)) > 1e-3
    receipts = {item.receipt.unit for item in one.receipts.values()}
    assert receipts == {"person"}


@pytest.mark.parametrize("central", [True, False])
def test_clients_of_persons_are_what_sites_of_persons_are(run, tmp_path, central):
    """Whole batches, with hardly any noise or none: what comes out is no matter of chance."""
    changes = {"training": LocalTraining(steps=1, batch_size=64, learning_rate=0.5), "rounds": 2}
    if central:
        changes["central"] = CentralNoise(
            unit="example", noise_by="server", epsilon=5, delta=1e-3, clip=0.1, noise_multiplier=1e-9, sample_rate=1.0
        )
    federation = with_persons(make_federation("mlp"))
    record = make_record(federation, "mlp", **changes)
    theirs = simulate(RunDirectory.create(tmp_path / "s", record), dict(real_sites(federation, record)))
    rows = run("mlp", **changes)
    for mode in ("one", "many"):
        ours = run("mlp", SimulationSettings(mode=mode), federation=federation, **changes)
        assert largest_difference(ours, theirs) < 1e-5
        assert largest_difference(ours, rows) > 1e-4
        for name, item in theirs.receipts.items():
            assert ours.receipts[name].examples == item.examples
            assert ours.receipts[name].receipt.unit == item.receipt.unit == "person"


def test_a_model_of_a_client_s_own_is_trained_on_whole_persons_too(run, tmp_path):
    """All persons of a client go into one batch, and not all of its rows would."""
    federation = with_persons(make_federation("mlp", sizes=(40, 24, 30)), fewest=2)
    changes = {
        "strategy": StrategyRecord(name="ditto"),
        "training": LocalTraining(epochs=2, batch_size=20, learning_rate=0.5),
        "rounds": 2,
    }
    assert max(federation.examples(client) for client in range(3)) <= 20
    record = make_record(federation, "mlp", **changes)
    theirs = simulate(RunDirectory.create(tmp_path / "s", record), dict(real_sites(federation, record)))
    ours = run("mlp", federation=federation, **changes)
    assert ours.metrics["loss"] == pytest.approx(theirs.metrics["loss"], rel=1e-5)


def test_a_test_counts_each_person_alike(run, tmp_path):
    federation = with_persons(make_federation("mlp"))
    for client in range(len(federation)):
        counted = np.bincount(federation.table.persons[federation.tests(client)])
        assert set(counted[counted > 0]) == {2}
    record = make_record(federation, "mlp", rounds=1, training=LocalTraining(steps=1, batch_size=64, learning_rate=0.5))
    theirs = simulate(RunDirectory.create(tmp_path / "s", record), dict(real_sites(federation, record)))
    ours = run("mlp", federation=federation, rounds=1, training=record.training)
    assert ours.metrics
    assert ours.metrics == pytest.approx(theirs.metrics)


def test_a_schema_and_a_table_agree_on_whose_rows_they_are():
    federation = with_persons(make_federation("mlp"))
    shares = [federation.share(client) for client in range(len(federation))]
    with pytest.raises(UsageError, match="the unit is the person by the schema, and the example by the data"):
        SimulatedFederation(federation.workload, make_federation("mlp").table, shares)
