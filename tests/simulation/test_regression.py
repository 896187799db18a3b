"""A number to predict, by every engine of a simulation and by real sites: nothing but the task knows of classes."""

import numpy as np
import pytest
import torch

from fedclaw.protocol.terms import LocalTraining, PrivacyRequest, StrategyRecord
from fedclaw.server.run_directory import RunDirectory
from fedclaw.simulation import SimulationSettings
from fedclaw.transport.in_process import simulate
from tests.simulation.conftest import SIZES, make_federation, make_record
from tests.simulation.test_modes import identical, largest_difference, real_sites

LOSSES = pytest.mark.parametrize("kind", ["squared", "huber", "poisson"])
FULL = LocalTraining(epochs=3, batch_size=max(SIZES), learning_rate=0.2, momentum=0.5)


@LOSSES
def test_many_at_once_is_one_at_a_time_and_a_real_site(run, tmp_path, kind):
    one, many = (run(kind, SimulationSettings(mode=mode), training=FULL) for mode in ("one", "many"))
    assert largest_difference(one, many) < 2e-5
    federation = make_federation(kind)
    record = make_record(federation, kind, training=FULL)
    theirs = simulate(RunDirectory.create(tmp_path / "sites", record), dict(real_sites(federation, record)))
    assert largest_difference(many, theirs) < 1e-4


@LOSSES
def test_the_figures_are_those_of_the_model_on_all_examples(run, kind):
    outcome = run(kind, training=FULL)
    federation = make_federation(kind)
    model = federation.workload.build(outcome.directory.record().model)
    model.load_state_dict({name: torch.from_numpy(np.array(value)) for name, value in outcome.parameters.items()})
    with torch.no_grad():
        outputs = model(torch.from_numpy(federation.table.inputs))
    expected = federation.workload.evaluate(outputs, torch.from_numpy(federation.table.targets))
    assert outcome.metrics == pytest.approx(expected, rel=1e-5)
    assert outcome.metrics["r2"] > 0


@pytest.mark.parametrize("kind", ["squared", "poisson"])
def test_with_noise_both_modes_take_the_same_steps(run, kind):
    """The noise comes from the run's seed, so that the two can be compared."""
    privacy = PrivacyRequest(epsilon=6, delta=1e-3, max_grad_norm=0.7)
    training = LocalTraining(epochs=1, batch_size=8, learning_rate=0.2)
    one, many = (
        run(kind, SimulationSettings(mode=mode, repeatable_noise=True), training=training, privacy=privacy)
        for mode in ("one", "many")
    )
    assert largest_difference(one, many) < 5e-4
    assert all(item.receipt.epsilon_run <= 6 for item in many.receipts.values())


@pytest.mark.parametrize("strategy", ["scaffold", "qfedavg", "ditto", "fednova"])
def test_strategies_do_not_notice(run, strategy):
    """qFedAvg goes by the training loss, Ditto evaluates models of the clients' own."""
    record = {"strategy": StrategyRecord(name=strategy)}
    one, many = (run("squared", SimulationSettings(mode=mode), **record) for mode in ("one", "many"))
    assert largest_difference(one, many) < 5e-4
    assert identical(many, run("squared", SimulationSettings(mode="many", workers=2), **record))
