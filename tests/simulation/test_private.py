"""Differential privacy in a simulation: the same sums as Opacus, noise of the right scale, the receipts of a site."""

import numpy as np
import pytest
import torch

from fedclaw.learning.stacked.engines import BatchedModel
from fedclaw.learning.stacked.layout import pack
from fedclaw.learning.stacked.private import ClientSampling, PrivateStep
from fedclaw.privacy.noise import GaussianSource
from fedclaw.privacy.speed import StepSpeed
from fedclaw.privacy.steps import PrivateGradients
from fedclaw.protocol.terms import CentralNoise, LocalTraining, PrivacyRequest
from fedclaw.server.run_directory import RunDirectory
from fedclaw.simulation import SimulationSettings
from fedclaw.transport.in_process import simulate
from tests.simulation.conftest import MODELS, make_federation, make_record
from tests.simulation.test_modes import identical, largest_difference, real_sites

PRIVACY = PrivacyRequest(epsilon=6, delta=1e-3, max_grad_norm=0.7)
TRAINING = LocalTraining(epochs=1, batch_size=8, learning_rate=0.2)


def stacked_step(federation, kind, batches, noise, bound=0.3):
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
    PrivateStep(engine).gradients(packing, inputs, targets, gradients, samplings)
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
