"""FedBN, FedPer and FedRep: what stays at a site, what it is good for, and that it outlives a restart."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from fedclaw.errors import UsageError
from fedclaw.learning.strategy import PERSONAL, StepContext
from fedclaw.learning.workload import Table
from fedclaw.protocol.arrays import unpack
from fedclaw.protocol.terms import CentralNoise, LocalTraining, ModelSpec
from fedclaw.server.early_checks import check_combination
from fedclaw.server.run_directory import RunDirectory
from fedclaw.strategies.fedbn import FedBN
from fedclaw.strategies.fedper import FedPer
from fedclaw.strategies.fedrep import FedRep
from fedclaw.transport.in_process import LocalGrid
from tests.crashes import server_dies
from tests.least_squares import FEDERATION, asked
from tests.small_nets import SmallNets, first, nets, own_labels, own_scales, record_of, run
from tests.states import newest

LABELS, SCALES = own_labels(), own_scales()


class TwoHeads(nn.Module):
    """A normalised body, and two layers after it."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 4), nn.GroupNorm(1, 4), nn.LayerNorm(4, elementwise_affine=False))
        self.grades, self.head = nn.Linear(4, 4), nn.Linear(4, 2)


def test_which_parameters_stay() -> None:
    model = TwoHeads()
    assert FedBN().personal(model) == {"body.1.weight", "body.1.bias"}
    assert FedPer().personal(model) == {"head.weight", "head.bias"}
    both = FedRep(head=("grades.", "head.")).personal(model)
    assert both == {"grades.weight", "grades.bias", "head.weight", "head.bias"}
    assert FedPer().personal(nn.Linear(2, 2)) == {"weight", "bias"}


@pytest.mark.parametrize(
    ("strategy", "model", "changes", "reason"),
    [
        (FedBN(), nn.Linear(2, 2), {}, "model 'point' has none with parameters"),
        (FedBN(), nn.LayerNorm(2), {}, "has nothing else"),
        (FedPer(), nn.Linear(2, 2), {}, "does not part into both"),
        (FedPer(), nn.ReLU(), {}, "does not part into both"),
        (FedPer(head=("tail",)), TwoHeads(), {}, "begins with tail; there are: body.0.weight"),
        (FedRep(head=("body", "grades", "head")), TwoHeads(), {}, "does not part into both"),
        (FedRep(), TwoHeads(), {"momentum": 0.5}, "momentum, weight decay and Adam"),
        (FedRep(), TwoHeads(), {"weight_decay": 0.1}, "momentum, weight decay and Adam"),
        (FedRep(), TwoHeads(), {"optimizer": "adam"}, "momentum, weight decay and Adam"),
    ],
)
def test_what_cannot_be_right_is_refused(strategy, model, changes, reason) -> None:
    training = LocalTraining(steps=2, batch_size=1, learning_rate=0.1, **changes)
    with pytest.raises(UsageError, match=reason):
        check_combination(asked(strategy.name, rounds=1, training=training), strategy, model)


@pytest.mark.parametrize("strategy", [FedBN(), FedPer(), FedRep(head=("grades", "head"))])
def test_a_model_that_parts_is_not_refused(strategy) -> None:
    check_combination(asked(strategy.name, rounds=1), strategy, TwoHeads())


def test_two_halves_do_not_go_into_one_step() -> None:
    central = CentralNoise(
        unit="example", noise_by="server", epsilon=8, delta=1e-3, clip=1, noise_multiplier=1, sample_rate=0.1
    )
    training = LocalTraining(steps=1, batch_size=1, learning_rate=0.1)
    record = asked("fedrep", rounds=1, training=training, central=central)
    with pytest.raises(UsageError, match="one step a round"):
        check_combination(record, FedRep(), TwoHeads())


@pytest.mark.parametrize("strategy", [FedBN(), FedPer()])
def test_what_stays_at_a_site_is_not_trained_by_a_step_whose_noise_is_on_the_sum(strategy) -> None:
    """It would be trained without noise, and be where the next round begins: every example's gradient would tell of it.

    A whole update within a bound covers it.
    """
    training = LocalTraining(steps=1, batch_size=1, learning_rate=0.1)
    fields = {"noise_by": "server", "epsilon": 8, "delta": 1e-3, "clip": 1, "noise_multiplier": 1}
    record = asked(strategy.name, rounds=1, training=training, central=CentralNoise(unit="example", **fields))
    with pytest.raises(UsageError, match="trains without noise"):
        check_combination(record, strategy, TwoHeads())
    check_combination(record.model_copy(update={"central": CentralNoise(unit="site", **fields)}), strategy, TwoHeads())


def test_fedrep_moves_the_head_first_and_then_the_body() -> None:
    def left(step: int, steps: int, share: float) -> list[float]:
        parameters = [torch.zeros(1, requires_grad=True) for _ in range(3)]
        for parameter in parameters[:2]:
            parameter.grad = torch.ones(1)
        FedRep.correct_gradients(
            parameters,
            StepContext({"head_share": share}, [], step=step, steps=steps, personal=[False, True, True]),
        )
        return [parameter.grad.item() for parameter in parameters[:2]]

    head, body, both = [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]
    assert [left(step, 4, 0.75) for step in range(4)] == [head, head, head, body]
    assert [left(step, 4, 0.01) for step in range(4)] == [head, body, body, body]
    assert [left(step, 4, 0.99) for step in range(4)] == [head, head, head, body]
    assert left(0, 1, 0.5) == both


def test_nonsense_from_a_server_is_refused() -> None:
    for share in (0.0, 1.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="head_share"):
            FedRep.check_fields({"head_share": share})
    with pytest.raises(KeyError, match="head_share"):
        FedRep.check_fields({})


class Listening(LocalGrid):
    """Notes what is asked and what is answered."""

    def __init__(self, sites, run_id) -> None:
        super().__init__(sites, run_id)
        type(self).seen = []

    def _answer(self, message):
        reply = super()._answer(message)
        self.seen.append((message.content, reply.content))
        return reply


@pytest.mark.parametrize(
    ("strategy", "model", "tables"),
    [("fedbn", "normed", SCALES), ("fedper", "parted", LABELS), ("fedrep", "parted", LABELS)],
)
def test_what_is_personal_stays_at_its_site(tmp_path, strategy, model, tables) -> None:
    inputs = next(iter(tables.values()))[0].inputs.shape[1]
    record = record_of(strategy, model, inputs, rounds=2, steps=4, rate=0.5)
    sites = nets(tables)
    outcome = run(tmp_path / "run", record, sites, grid=Listening)
    shared = set(first(model, inputs)) - set(record.personal)
    sums = [unpack(answer["sum"]) for _, answer in Listening.seen if "sum" in answer.array_records]
    assert len(sums) == 2 * len(sites)
    assert all(set(left) == shared for left in sums)
    kept = [newest(site.states, FEDERATION, record.run)[PERSONAL] for site in sites.values()]
    for name, begun in first(model, inputs).items():
        if name in record.personal:
            assert np.array_equal(outcome.parameters[name], begun), "the server has what it began with"
            assert not any(np.array_equal(own[name], begun) for own in kept)
            assert not np.array_equal(kept[0][name], kept[1][name])
        else:
            assert not np.array_equal(outcome.parameters[name], begun)
            assert not any(name in own for own in kept)


def test_the_shared_mean_by_hand(tmp_path) -> None:
    """Two full-batch rounds at two sites of unequal weight, worked out with torch alone."""
    tables = dict(list(LABELS.items())[:2])
    name = list(tables)[1]
    train, test = tables[name]
    tables[name] = (Table(train.inputs[::2], train.targets[::2]), test)
    record = record_of("fedper", "parted", 12, rounds=2, steps=3, rate=0.3)
    outcome = run(tmp_path / "run", record, nets(tables))
    workload = SmallNets(12)
    body, heads = first("parted", 12)["body.weight"], {}
    for _ in range(2):
        total, weights = 0.0, 0
        for site, (train, _) in tables.items():
            model = workload.build(ModelSpec(name="parted"))
            begun = {**first("parted", 12), **heads.get(site, {}), "body.weight": body}
            model.load_state_dict({key: torch.tensor(value) for key, value in begun.items()})
            optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
            for _ in range(3):
                optimizer.zero_grad()
                workload.loss(model(torch.tensor(train.inputs)), torch.tensor(train.targets)).backward()
                optimizer.step()
            ended = {key: value.detach().numpy() for key, value in model.state_dict().items()}
            heads[site] = {key: ended[key] for key in ("head.weight", "head.bias")}
            total, weights = total + len(train) * (ended["body.weight"] - body), weights + len(train)
        body = body + total / weights
    np.testing.assert_allclose(outcome.parameters["body.weight"], body, rtol=1e-4, atol=1e-6)


def test_a_head_each_serves_sites_whose_labels_mean_different_things(tmp_path) -> None:
    """Arivazhagan et al. 2019, section 4, and Collins et al. 2021, section 5.

    FedAvg has one head for labels that contradict each other, and is no better than a coin; each site by itself (Ditto
    with lambda 0) has too few examples to find the features; FedRep finds them together.
    """
    found = {}
    for name, settings in (("fedavg", {}), ("ditto", {"regularisation": 0.0}), ("fedper", {}), ("fedrep", {})):
        record = record_of(name, "parted", 12, rounds=10, steps=10, rate=0.5, settings=settings, run=name)
        found[name] = run(tmp_path / name, record, nets(LABELS)).metrics["accuracy"]
    assert found["fedavg"] < 0.55
    assert found["fedper"] > found["fedavg"] + 0.15
    assert found["fedrep"] > found["ditto"] + 0.02


def test_a_normalisation_each_serves_sites_that_measure_differently(tmp_path) -> None:
    """Li et al. 2021, section 5: under feature shift FedBN is ahead of FedAvg."""
    found = {}
    for name in ("fedavg", "fedbn"):
        record = record_of(name, "normed", 8, rounds=12, steps=5, rate=0.5, run=name)
        found[name] = run(tmp_path / name, record, nets(SCALES)).metrics["accuracy"]
    assert found["fedbn"] > found["fedavg"] + 0.1


@pytest.mark.parametrize(("strategy", "model"), [("fedbn", "normed"), ("fedper", "parted"), ("fedrep", "parted")])
def test_servers_and_sites_that_are_killed_go_on_as_if_nothing_had_been(tmp_path, strategy, model) -> None:
    tables = dict(list((SCALES if model == "normed" else LABELS).items())[:3])
    inputs = next(iter(tables.values()))[0].inputs.shape[1]
    record = record_of(strategy, model, inputs, rounds=4, steps=3, rate=0.4)
    straight = run(tmp_path / "straight", record, nets(tables))
    sites = nets(tables, tmp_path / "sites")
    with server_dies(list(sites.values())[-1], in_round=3):
        run(tmp_path / "killed", record, sites)
    resumed = run(tmp_path / "killed", record, nets(tables, tmp_path / "sites"))
    # A batch of all examples is summed in shuffled order, so the last bit is not the same.
    for name, array in straight.parameters.items():
        np.testing.assert_allclose(resumed.parameters[name], array, rtol=0, atol=1e-5)
    assert resumed.metrics == pytest.approx(straight.metrics, abs=2e-3)
    forgetful = run(tmp_path / "forgetful", record.model_copy(update={"rounds": 2}), nets(tables))
    (forgetful.directory.root / "run.json").write_text(record.model_dump_json())
    gone = run(tmp_path / "forgetful", record, nets(tables))
    assert any(not np.allclose(gone.parameters[name], array, atol=1e-4) for name, array in straight.parameters.items())


def test_a_model_that_is_not_whole_at_the_server_is_not_taken_for_one(tmp_path) -> None:
    record = record_of("fedper", "parted", 12, rounds=1, steps=2)
    outcome = run(tmp_path / "run", record, nets(LABELS))
    with pytest.raises(UsageError, match=r"head\.bias, head\.weight.*are at its sites"):
        RunDirectory.open(outcome.directory.root).require_whole()
    plain = run(tmp_path / "plain", record_of("ditto", "parted", 12, rounds=1, run="plain"), nets(LABELS))
    RunDirectory.open(plain.directory.root).require_whole()
