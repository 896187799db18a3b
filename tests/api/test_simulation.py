"""One call from data and a module to a run: the same as the simulation below it, and refused before anybody trains."""

import json
import logging
import math
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import nn

import fedclaw
from fedclaw.api.module import around
from fedclaw.learning.registry import STRATEGIES, installed, lent, workload_class
from fedclaw.server.run_directory import RunDirectory
from fedclaw.simulation import SimulatedFederation, SimulationSettings, simulate_cohorts, simulated
from fedclaw.strategies.fedprox import FedProx
from tests.api.conftest import Net, examples

QUICK = {"rounds": 3, "learning_rate": 0.1, "batch_size": 8}
PRIVATE = fedclaw.LocalPrivacy(epsilon=4, delta=1e-3, clip=1.0)


class Slow(fedclaw.Strategy):
    """FedAvg at half the pace."""

    name: ClassVar[str] = "slow"
    pace: float = 0.5

    def server_optimizer(self, parameters):
        return torch.optim.SGD(parameters, lr=self.pace)


def test_a_run_learns_and_says_what_it_did(federation):
    run = fedclaw.simulate(federation, Net, rounds=15, learning_rate=0.2, batch_size=8)
    assert run.metrics["accuracy"] > 0.8
    assert [entry["round"] for entry in run.history] == list(range(1, 16))
    assert run.metrics.keys() <= run.history[-1].keys()
    assert (run.epsilon, run.delta) == (math.inf, None)
    assert sorted(run.receipts) == [f"client-{number}" for number in range(4)]
    assert repr(run).startswith("Run(fedavg, 15 of 15 rounds, accuracy 0.")


def test_the_module_that_comes_out_is_the_one_that_was_tested(federation):
    run = fedclaw.simulate(federation, Net, **QUICK)
    model = run.model()
    assert isinstance(model, Net)
    assert not model.training
    guesses = model(torch.from_numpy(federation.test.inputs)).argmax(1).numpy()
    assert (guesses == federation.test.targets).mean() == pytest.approx(run.metrics["accuracy"])
    assert {name: value.shape for name, value in model.named_parameters()} == {
        name: value.shape for name, value in run.parameters.items()
    }


def test_it_is_the_simulation_itself(federation, tmp_path):
    """The record that `simulate` made, run by what it runs: the same to the last bit."""
    run = fedclaw.simulate(federation, Net, seed=7, strategy="fedadam", **QUICK)
    own = around(Net, "arrays")
    with lent({("fedclaw.clients", "arrays"): own}):
        again = SimulatedFederation(own(federation.schema), federation.table, federation.shares, test=federation.test)
        settings = SimulationSettings()
        directory = RunDirectory.create(tmp_path / "again", simulated(run.record, settings, 4))
        outcome = simulate_cohorts(directory, again, settings)
    for name, array in run.parameters.items():
        np.testing.assert_array_equal(array, outcome.parameters[name])


@pytest.mark.parametrize("privacy", [None, PRIVATE])
def test_worker_processes_change_nothing(federation, privacy):
    def at(workers):
        run = fedclaw.simulate(
            federation, lambda: Net(5), privacy=privacy, repeatable_noise=True, workers=workers, **QUICK
        )
        return run.parameters

    one, two = at(1), at(2)
    assert all(np.array_equal(one[name], two[name]) for name in one)


def test_a_module_given_as_it_is_begins_with_its_own_parameters(federation):
    model = Net()
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    run = fedclaw.simulate(federation, model, rounds=1, learning_rate=1e-30, batch_size=8)
    for name, value in model.named_parameters():
        assert torch.equal(value, before[name]), "the caller's own is left alone"
        np.testing.assert_allclose(run.parameters[name], value.detach().numpy(), atol=1e-7)


def test_a_strategy_of_ones_own(federation):
    for strategy in (Slow, Slow()):
        run = fedclaw.simulate(federation, Net, strategy=strategy, rounds=1, learning_rate=0.1, batch_size=8)
        assert run.record.strategy.settings == {"pace": 0.5}
    whole = fedclaw.simulate(federation, Net, strategy=Slow(pace=1.0), rounds=1, learning_rate=0.1, batch_size=8)
    start = fedclaw.simulate(federation, Net, strategy=Slow(pace=0.0), rounds=1, learning_rate=0.1, batch_size=8)
    for name in run.parameters:
        middle = (whole.parameters[name] + start.parameters[name]) / 2
        np.testing.assert_allclose(run.parameters[name], middle, atol=1e-6)
    assert "slow" not in installed(STRATEGIES), "it is lent for the call alone"
    with pytest.raises(fedclaw.PluginError, match="no strategies plug-in is called 'slow'"):
        fedclaw.simulate(federation, Net, strategy="slow", **QUICK)


def test_a_class_of_ones_own_stands_before_an_installed_one_of_its_name(federation):
    class Mine(Slow):
        name: ClassVar[str] = "fedavg"

    run = fedclaw.simulate(federation, Net, strategy=Mine(pace=0.0), rounds=1, learning_rate=0.1, batch_size=8)
    plain = fedclaw.simulate(federation, Net, strategy="fedavg", rounds=1, learning_rate=0.1, batch_size=8)
    assert any(not np.array_equal(run.parameters[name], plain.parameters[name]) for name in run.parameters)


def test_an_installed_strategy_with_settings(federation):
    run = fedclaw.simulate(federation, Net, strategy=FedProx(mu=0.3), **QUICK)
    assert (run.record.strategy.name, run.record.strategy.settings["mu"]) == ("fedprox", 0.3)


@pytest.mark.parametrize("privacy", [None, PRIVATE])
def test_what_is_not_to_be_trained_stays(federation, privacy):
    run = fedclaw.simulate(federation, Half, privacy=privacy, directory=None, **QUICK)
    torch.manual_seed(run.record.seed)
    start = Half()
    np.testing.assert_array_equal(run.parameters["hidden.weight"], start.hidden.weight.detach().numpy())
    assert np.abs(run.parameters["head.weight"] - start.head.weight.detach().numpy()).max() > 1e-3


@pytest.mark.parametrize("strategy", ["krum", "median", "trimmed_mean", "scaffold", "fedper"])
def test_strategies_that_count_on_more_than_one_answer(strategy):
    federation = fedclaw.Federation.from_arrays(*examples(), clients=6, seed=1)
    run = fedclaw.simulate(federation, Net, strategy=strategy, **QUICK)
    assert run.record.rules.minimum == 6
    assert len(run.history) == 3


def test_a_number_is_predicted():
    x, y = examples()
    federation = fedclaw.Federation.from_arrays(x, x[:, 0] + y, clients=4, value_range=(-10, 10), seed=1)
    asked = {"rounds": 12, "learning_rate": 0.3, "batch_size": 8}
    for privacy in (None, PRIVATE):
        run = fedclaw.simulate(federation, lambda: Net(5, 1), privacy=privacy, **asked)
        assert run.metrics.keys() >= {"rmse", "mae", "r2"}
        assert run.record.task == "regression"
    run = fedclaw.simulate(federation, lambda: Net(5, 1), **asked)
    assert run.metrics["r2"] > 0.5
    assert ", rmse " in repr(run)
    with pytest.raises(fedclaw.UsageError, match=r"one number to predict.*\(2, 1\)"):
        fedclaw.simulate(federation, Net, **asked)


def test_the_cost_of_a_private_run_is_what_was_asked_for_at_most(federation):
    run = fedclaw.simulate(federation, Net, privacy=PRIVATE, **QUICK)
    assert 0 < run.epsilon <= 4
    assert run.epsilon == max(receipt.receipt.epsilon_run for receipt in run.receipts.values())
    assert run.delta == 1e-3
    assert {receipt.receipt.mechanism for receipt in run.receipts.values()} == {"dp-sgd"}


def test_the_servers_noise(federation):
    by_site = fedclaw.CentralPrivacy(epsilon=6, delta=1e-3, clip=0.5)
    run = fedclaw.simulate(federation, Net, privacy=by_site, weighting="uniform", **QUICK)
    assert (run.epsilon, run.delta) == (6, 1e-3)
    assert run.record.central.unit == "site"
    by_example = fedclaw.CentralPrivacy(epsilon=6, delta=1e-3, clip=0.5, unit="example", sample_rate=0.1)
    run = fedclaw.simulate(federation, Net, privacy=by_example, local_steps=1, **QUICK)
    assert run.record.central.unit == "example"


def test_with_noise_of_both_epsilon_and_delta_are_those_of_the_clients(federation, tmp_path):
    """A run of real sites can have both: what it cost is told for the noise that trusts nobody, at its own delta."""
    run = fedclaw.simulate(federation, Net, privacy=PRIVATE, **QUICK)
    by_site = fedclaw.CentralPrivacy(epsilon=6, delta=1e-6, clip=0.5)
    other = fedclaw.simulate(federation, Net, privacy=by_site, weighting="uniform", **QUICK)
    both = run.record.model_copy(update={"central": other.record.central, "weighting": "uniform"})
    directory = RunDirectory.create(tmp_path / "both", both)
    directory.write_receipts(run.receipts)
    told = fedclaw.read_run(tmp_path / "both")
    assert (told.epsilon, told.delta) == (run.epsilon, run.delta)


def test_some_clients_a_round_and_tests_of_their_own():
    federation = fedclaw.Federation.from_arrays(*examples(), clients=6, test_at="clients", seed=1)
    told = []
    run = fedclaw.simulate(
        federation,
        Net,
        strategy="ditto",
        fraction=0.5,
        on_round=lambda number, metrics: told.append((number, dict(metrics))),
        **QUICK,
    )
    assert told == [(entry["round"], {k: v for k, v in entry.items() if k != "round"}) for entry in run.history]
    lines = RunDirectory.open(run.path).read_metrics()
    assert {len(line["answered"]) for line in lines} == {3}


def test_where_a_run_is_kept(federation, tmp_path):
    run = fedclaw.simulate(federation, Net, directory=tmp_path / "kept", **QUICK)
    assert run.path == tmp_path / "kept"
    assert json.loads((run.path / "run.json").read_text())["workload"] == "arrays"
    with pytest.raises(fedclaw.UsageError, match=r"already holds a run: read it, fedclaw.read_run\(...\), or"):
        fedclaw.simulate(federation, Net, directory=tmp_path / "kept", **QUICK)
    gone = fedclaw.simulate(federation, Net, **QUICK).path
    assert not gone.exists(), "nobody holds it"


def test_nothing_is_printed_and_no_logger_is_set_up(federation, capfd):
    fedclaw.simulate(federation, Net, **QUICK)
    assert capfd.readouterr() == ("", "")
    assert not logging.getLogger("fedclaw").handlers


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(5)
        self.head = nn.Linear(5, 3)

    def forward(self, inputs):
        return self.head(self.norm(inputs))


class Unkept(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(5, track_running_stats=False)
        self.head = nn.Linear(5, 3)

    def forward(self, inputs):
        return self.head(self.norm(inputs))


class Infinite(Net):
    def forward(self, inputs):
        return super().forward(inputs) / 0


class Half(Net):
    """Its first layer is not to be trained, and it has it twice."""

    def __init__(self):
        super().__init__()
        self.hidden.requires_grad_(False)
        self.again = self.head


class Nameless(fedclaw.Strategy):
    def server_optimizer(self, parameters):
        return torch.optim.SGD(parameters, lr=1.0)


class Unfinished(fedclaw.Strategy):
    name: ClassVar[str] = "unfinished"


class Needing(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.head = nn.Linear(width, 3)


def infinite():
    model = Net()
    nn.init.constant_(model.head.bias, math.inf)
    return model


@pytest.mark.parametrize(
    ("model", "changes", "words"),
    [
        (Normed, {}, r"in BatchNorm1d \(norm.running_mean.*take GroupNorm"),
        (Unkept, {}, "norm is a BatchNorm1d.*take GroupNorm"),
        (Infinite, {}, "gives numbers that are not finite"),
        (Needing, {}, r"Needing cannot be made without arguments.*lambda: Needing\(\.\.\.\)"),
        (lambda: Net(5, 4), {}, r"gives \(2, 4\) for inputs of the shape \(2, 5\), and the data has 3 classes"),
        (lambda: Net(7), {}, r"cannot take inputs of the shape \(2, 5\).*RuntimeError: mat1 and mat2"),
        (lambda: nn.LSTM(5, 3), {}, "gives a tuple; it is to give a tensor"),
        (nn.Identity, {}, "no parameters to train"),
        (lambda: Net().double(), {}, "torch.float64 on cpu"),
        (infinite, {}, "parameter head.bias begins with numbers that are not finite"),
        (lambda: nn.Sequential(Net(), nn.Softmax(1)), {}, "gives probabilities.* leave the last softmax out"),
        (lambda: 3, {}, "made a int, and a torch.nn.Module"),
        ("net", {}, "'net' is no torch module"),
        (Net, {"strategy": "fedvag"}, "did you mean fedavg"),
        (Net, {"strategy": Nameless}, "Nameless has no name"),
        (Net, {"strategy": Unfinished}, "Unfinished does not say server_optimizer"),
        (Net, {"strategy": FedProx(mu=0.1).server_optimizer}, "is no strategy"),
        (Net, {"rounds": 0}, "rounds=0"),
        (Net, {"rounds": "ten"}, "rounds='ten': a whole number"),
        (Net, {"on_round": 5}, r"on_round=5: a function is needed"),
        (Net, {"learning_rate": -1}, "learning_rate: .*greater than 0"),
        (Net, {"learning_rate": 1e9}, "the learning rate is 1e.09"),
        (Net, {"privacy": fedclaw.LocalPrivacy(4, 1e-3, clip=1e-9)}, "simulate: clip is 1e-09, and a clipping bound"),
        (Net, {"strategy": "scaffold", "momentum": 0.5}, "take optimizer='sgd' and momentum=0$"),
        (Net, {"local_epochs": 0}, "local_epochs: .*greater than 0"),
        (Net, {"local_epochs": 1, "local_steps": 1}, "simulate: set exactly one of local_epochs and local_steps"),
        (Net, {"batch_size": 0}, "batch_size: .*greater than 0"),
        (Net, {"optimizer": "adamw"}, "optimizer: .*'sgd' or 'adam'"),
        (Net, {"fraction": 0}, "fraction: .*greater than 0"),
        (Net, {"workers": 0}, "workers: .*greater than or equal to 1"),
        (
            Net,
            {"strategy": "fedbuff"},
            r"simulated clients answer all at once: take another one, or sites, .* speed \(fedclaw server\)$",
        ),
        (Net, {"strategy": "krum"}, "at least 5 .*counts with 4: set clients= times fraction= to 5 or more"),
        (Net, {"weighting": "equal"}, "weighting: "),
        (Net, {"weighting": "capped"}, "weight_cap goes with weighting: capped"),
        (Net, {"privacy": fedclaw.LocalPrivacy(4, 0.5, 1)}, r"delta=0.5 means nothing to a client with \d+ examples"),
        (Net, {"directory": 3}, "directory=3: the path of a file or a directory is needed"),
        (Net, {"privacy": 8}, "give fedclaw.LocalPrivacy"),
        (Net, {"privacy": PRIVATE, "strategy": "qfedavg"}, "training data, which no noise covers; take privacy=None$"),
        (
            Net,
            {"privacy": fedclaw.CentralPrivacy(1, 1e-3, 1), "strategy": "median"},
            r"made for a mean; take fedclaw.LocalPrivacy\(\.\.\.\)$",
        ),
        (Net, {"privacy": fedclaw.CentralPrivacy(1, 1e-3, 1, unit="example")}, "one plain step a round"),
    ],
)
def test_what_cannot_be_right_is_told_before_anybody_trains(federation, tmp_path, model, changes, words):
    with pytest.raises(fedclaw.FedClawError, match=words) as raised:
        fedclaw.simulate(federation, model, **{"directory": tmp_path / "run", **QUICK, **changes})
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: fedclaw.LocalPrivacy(epsilon=0, delta=1e-5, clip=1), "privacy: epsilon: .*greater than 0"),
        (lambda: fedclaw.LocalPrivacy(epsilon=1, delta=2, clip=1), "privacy: delta: .*less than 1"),
        (lambda: fedclaw.LocalPrivacy(epsilon=1, delta=1e-5, clip=-1), "privacy: clip: .*greater than 0"),
        (lambda: fedclaw.CentralPrivacy(epsilon=1, delta=1e-5, clip=1, unit="person"), "privacy: unit: "),
    ],
)
def test_a_guarantee_that_is_none(make, words):
    with pytest.raises(fedclaw.UsageError, match=words):
        make()


def test_what_a_thread_was_lent_is_its_own():
    with lent({("fedclaw.clients", "theirs"): Net}):
        assert workload_class("theirs") is Net
    with pytest.raises(fedclaw.PluginError):
        workload_class("theirs")


def test_data_that_is_no_federation():
    with pytest.raises(fedclaw.UsageError, match=r"federation is a ndarray: make one, fedclaw.Federation.from_arrays"):
        fedclaw.simulate(np.ones((4, 5)), Net, **QUICK)


def test_a_directory_with_other_files_is_left_alone(federation, tmp_path):
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(fedclaw.UsageError, match="holds other files; name a directory that is empty"):
        fedclaw.simulate(federation, Net, directory=tmp_path, **QUICK)
    assert [path.name for path in tmp_path.iterdir()] == ["notes"]


def test_a_client_counts_by_at_most_the_cap(federation):
    run = fedclaw.simulate(federation, Net, weighting="capped", weight_cap=5, **QUICK)
    same = fedclaw.simulate(federation, Net, weighting="uniform", **QUICK)
    assert run.record.weight_cap == 5
    for name, array in run.parameters.items():
        np.testing.assert_allclose(array, same.parameters[name], rtol=1e-4, atol=1e-6)


def test_a_directory_that_is_a_file(federation, tmp_path):
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(fedclaw.UsageError, match=r"directory=.*notes' is a file"):
        fedclaw.simulate(federation, Net, directory=tmp_path / "notes", **QUICK)
