"""Simulated clients, many at once and one by one, plain and private: the model that the CPU comes to."""

import pytest
import torch

from fedclaw.errors import UsageError
from fedclaw.protocol.terms import CentralNoise, LocalTraining, ModelSpec, PrivacyRequest, StrategyRecord
from fedclaw.server.run_directory import RunDirectory
from fedclaw.simulation import SimulationSettings, simulate_cohorts, simulated
from fedclaw.simulation.choice import Trial, agrees, choose, make_engine
from fedclaw.simulation.run import Evaluator
from tests.cuda.conftest import SAME_MODEL, apart
from tests.simulation.conftest import make_federation, make_record

PRIVACY = PrivacyRequest(epsilon=6, delta=1e-3, max_grad_norm=0.7)
CENTRAL = {"noise_by": "server", "epsilon": 5, "delta": 1e-3, "clip": 0.05, "noise_multiplier": 1e-9}
"""Next to no noise, which the server draws anew in each run."""
SLOW = pytest.mark.slow
ONE_STEP = LocalTraining(steps=1, batch_size=8, learning_rate=0.1)
WIDE = ModelSpec(name="mlp", args={"hidden": [200, 130]})
"""With a weight that is kept as factors."""


@pytest.fixture
def same(tmp_path, wanted):
    """Runs the same simulation on the CPU and on the device, and gives both outcomes."""

    def go(kind, mode, **changes):
        outcomes = []
        for where in ("cpu", wanted):
            federation = make_federation(kind)
            settings = SimulationSettings(mode=mode, device=where, repeatable_noise=True)
            record = simulated(make_record(federation, kind, rounds=2, **changes), settings, len(federation))
            directory = RunDirectory.create(tmp_path / f"{mode}-{len(outcomes)}", record)
            outcomes.append(simulate_cohorts(directory, federation, settings))
        return outcomes

    return go


@pytest.mark.parametrize("mode", [pytest.param("one", marks=SLOW), "many"])
@pytest.mark.parametrize("kind", ["cnn", "mlp"])
@pytest.mark.parametrize("privacy", [None, PRIVACY])
def test_the_same_seed_leads_to_the_same_model(same, kind, mode, privacy):
    cpu, there = same(kind, mode, privacy=privacy)
    assert apart(there.parameters, cpu.parameters) < SAME_MODEL
    assert there.metrics["accuracy"] == pytest.approx(cpu.metrics["accuracy"], abs=0.05)


@pytest.mark.parametrize("mode", ["one", pytest.param("many", marks=SLOW)])
@pytest.mark.parametrize(
    "changes",
    [
        {"model": WIDE},
        {"training": LocalTraining(epochs=1, batch_size=8, learning_rate=0.01, optimizer="adam")},
        {"training": LocalTraining(epochs=1, batch_size=8, learning_rate=0.1, momentum=0.9, weight_decay=0.01)},
        {"strategy": StrategyRecord(name="scaffold")},
        {"strategy": StrategyRecord(name="fedprox")},
        {"strategy": StrategyRecord(name="ditto")},
        {"strategy": StrategyRecord(name="qfedavg")},
        {"strategy": StrategyRecord(name="median")},
        {"central": CentralNoise(unit="site", **CENTRAL), "weighting": "uniform"},
        {"central": CentralNoise(unit="example", sample_rate=1.0, **CENTRAL), "training": ONE_STEP},
    ],
    ids=["factors", "adam", "momentum", "scaffold", "fedprox", "ditto", "qfedavg", "median", "site", "example"],
)
def test_whatever_clients_do_besides_a_step_comes_to_the_same(same, mode, changes):
    """Factors, optimisers with memory, corrections, states, models of a client's own, clipped and single updates."""
    cpu, there = same("mlp", mode, **changes)
    assert apart(there.parameters, cpu.parameters) < SAME_MODEL


def test_a_model_that_is_mapped_over_clients(device):
    """By torch.func, which takes what has no stacked form."""
    federation = make_federation("mlp")
    table, loss = federation.table, lambda _, outputs, targets: federation.workload.loss(outputs, targets)
    shares = [federation.share(client) for client in range(3)]
    training = LocalTraining(epochs=1, batch_size=4, learning_rate=0.1)

    def build():
        return torch.nn.Sequential(Twice(), torch.nn.Linear(6, 3))

    trial = Trial(build, loss, table, training, shares, device)
    assert not agrees("batched", trial)
    assert choose("many", trial, elementwise=True, private=False).kind == "vmap"
    assert make_engine("vmap", trial.model, loss).layout.device == device


class Twice(torch.nn.Module):
    """One layer that is used twice."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(5, 3)

    def forward(self, inputs):
        return torch.cat([self.layer(inputs), self.layer(-inputs)], 1)


def test_the_fastest_way_is_looked_for_where_clients_are_trained(device):
    federation = make_federation("mlp")
    loss = lambda _, outputs, targets: federation.workload.loss(outputs, targets)  # noqa: E731
    shares = [federation.share(client) for client in range(4)]
    training = LocalTraining(epochs=1, batch_size=4, learning_rate=0.1)
    made = []

    def build():
        made.append(federation.workload.build(make_record(federation, "mlp").model))
        return made[-1]

    choose("auto", Trial(build, loss, federation.table, training, shares, device), elementwise=True, private=False)
    assert {parameter.device.type for model in made[1:] for parameter in model.parameters()} >= {device.type}


def test_clients_are_evaluated_there(device):
    found = Evaluator(make_federation("cnn"), device)
    model = found._model(make_record(make_federation("cnn"), "cnn").model, first_parameters("cnn"))
    assert {parameter.device.type for parameter in model.parameters()} == {device.type}


def first_parameters(kind):
    federation = make_federation(kind)
    model = federation.workload.build(make_record(federation, kind).model)
    return {name: value.detach().numpy() for name, value in model.named_parameters()}


def test_one_process_trains_on_a_card(tmp_path, device, wanted):
    """Its workers are forked, which a process that has used CUDA does not survive."""
    federation = make_federation("mlp")
    settings = SimulationSettings(workers=2, device=wanted)
    record = simulated(make_record(federation, "mlp", rounds=1), settings, len(federation))
    directory = RunDirectory.create(tmp_path / "run", record)
    if device.type == "cpu":
        simulate_cohorts(directory, federation, settings)
        return
    with pytest.raises(UsageError, match="workers=2: a simulation on a card is one process"):
        simulate_cohorts(directory, federation, settings)
