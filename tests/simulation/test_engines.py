"""Models that fold, models that only vmap takes, and models that have to be trained one by one."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from fedclaw.errors import UsageError
from fedclaw.learning.stacked.layout import Layout, pack, shuffled
from fedclaw.learning.workload import Table
from fedclaw.protocol.terms import LocalTraining
from fedclaw.simulation.choice import Trial, agrees, choose
from fedclaw.simulation.job import units_of


def mean_loss(_inputs, outputs, targets):
    return functional.cross_entropy(outputs, targets)


def weighted_loss(_inputs, outputs, targets):
    return functional.cross_entropy(outputs, targets, weight=torch.tensor([1.0, 5.0, 0.2]))


class Strided(nn.Module):
    """Every stacked layer in an unusual form."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 4, (3, 2), stride=(2, 1), padding=(2, 1), dilation=(1, 2))
        self.norm = nn.GroupNorm(2, 4)
        self.second = nn.Conv2d(4, 3, 1, bias=False)
        self.layer = nn.LayerNorm(5)
        self.places = nn.Linear(5, 6, bias=False)
        self.head = nn.Linear(6, 3)

    def forward(self, images):
        maps = torch.relu(self.second(torch.relu(self.norm(self.first(images)))))
        rows = self.layer(maps.flatten(2)[:, :, :5])
        return self.head(self.places(rows).mean(1))


class Shared(nn.Module):
    """A parameter that no layer has, and one layer used twice."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(36))
        self.twice = nn.Linear(36, 36)
        self.head = nn.Linear(36, 3)

    def forward(self, images):
        rows = images.flatten(1) * self.scale
        return self.head(torch.relu(self.twice(torch.relu(self.twice(rows)))))


class Dropped(nn.Module):
    """Random while it is trained."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(36, 3)
        self.drop = nn.Dropout(0.5)

    def forward(self, images):
        return self.head(self.drop(images.flatten(1)))


class Mixing(nn.Module):
    """Examples see one another."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(36, 3)

    def forward(self, images):
        rows = images.flatten(1)
        return self.head(rows - rows.mean(0))


@pytest.fixture
def table():
    generator = np.random.default_rng(0)
    return Table(generator.normal(size=(60, 1, 6, 6)).astype(np.float32), generator.integers(0, 3, 60))


def trial_of(table, model, loss):
    training = LocalTraining(epochs=1, batch_size=4, learning_rate=0.1)
    return Trial(model, loss, table, training, [np.arange(0, 9), np.arange(9, 15)])


@pytest.mark.parametrize(
    ("model", "loss", "kinds"),
    [
        (Strided, mean_loss, {"batched", "vmap"}),
        (Shared, mean_loss, {"vmap"}),
        (Dropped, mean_loss, set()),
        (Mixing, mean_loss, set()),
        (Strided, weighted_loss, {"vmap"}),
    ],
)
def test_only_what_gives_the_plain_gradient_is_believed(table, model, loss, kinds):
    trial = trial_of(table, model, loss)
    if model is Mixing:
        # Mapped over clients, each batch is one client's: that is right even so.
        kinds = {"vmap"} if agrees("vmap", trial) else set()
        assert not agrees("batched", trial)
    assert {kind for kind in ("batched", "vmap") if agrees(kind, trial)} == kinds


def test_a_model_that_cannot_be_stacked_is_trained_by_itself(table):
    dropped, shared, strided = (trial_of(table, model, mean_loss) for model in (Dropped, Shared, Strided))
    options = {"elementwise": True, "private": False}
    assert not choose("auto", dropped, **options).many
    with pytest.raises(UsageError, match="mode=many"):
        choose("many", dropped, **options)
    assert choose("many", shared, **options).kind == "vmap"
    assert not choose("auto", shared, elementwise=True, private=True).many
    with pytest.raises(UsageError, match="one by one"):
        choose("many", strided, elementwise=False, private=False)


def test_nothing_is_computed_for_a_client_that_has_finished():
    batches = [[np.arange(5)] * 3, [np.arange(5), np.arange(2)], [np.arange(4)]]
    steps = pack(batches)
    assert [step.clients for step in steps] == [3, 2, 1]
    assert [len(step.rows) for step in steps] == [14, 7, 5]
    assert [step.sizes for step in steps] == [(5, 5, 4), (5, 2), (5,)]
    filled = pack(batches, spare=1)
    assert [len(step.segments) for step in filled] == [1, 2, 1]
    assert [len(step.rows) for step in filled] == [15, 7, 5]
    np.testing.assert_allclose(filled[0].weights.numpy(), [0.2] * 10 + [0.25] * 4 + [0])


@pytest.mark.parametrize("epochs", [0.4, 1, 2.5])
def test_batches_are_those_of_shuffled_epochs(epochs):
    training = LocalTraining(epochs=epochs, batch_size=8, learning_rate=0.1)
    share = np.arange(100, 121)
    batches = shuffled(share, training, np.random.default_rng(0))
    assert len(batches) == training.local_steps(21)
    assert [len(batch) for batch in batches] == [8, 8, 5, 8, 8, 5, 8, 8][: len(batches)]
    if epochs >= 1:
        assert sorted(np.concatenate(batches[:3])) == share.tolist()


@pytest.mark.parametrize("count", [1, 2, 3, 20, 100])
def test_units_have_every_client_once_and_the_most_steps_first(count):
    sizes = np.random.default_rng(count).integers(1, 60, count).tolist()
    training = LocalTraining(epochs=2, batch_size=8, learning_rate=0.1)
    clients = list(range(7, 7 + count))
    units = units_of(clients, sizes, training, [(10, 64), (10,)])
    assert sorted(client for unit in units for client in unit) == clients
    assert max(map(len, units)) <= 16
    assert len(units) >= min(2, count)
    for unit in units:
        steps = [training.local_steps(sizes[client - 7]) for client in unit]
        assert steps == sorted(steps, reverse=True)


@pytest.mark.parametrize("shapes", [[(512, 512), (512,)], [(32, 16, 3, 3), (32,)]])
def test_two_processes_get_as_much_to_do(shapes):
    training = LocalTraining(epochs=2, batch_size=8, learning_rate=0.1)
    matrices = len(shapes[0]) == 2
    for seed in range(50):
        sizes = np.random.default_rng(seed).integers(8, 33, 20).tolist()
        units = units_of(range(20), sizes, training, shapes)
        assert len(units) == 2, "a third one would leave a process idle"
        costs = []
        for unit in units:
            steps = [training.local_steps(sizes[client]) for client in unit]
            costs.append(32 * max(steps) + (8 + 8 * matrices) * sum(steps))
        assert max(costs) < 1.35 * min(costs)


def test_a_row_holds_parameters_in_any_order_of_axes():
    generator = np.random.default_rng(0)
    arrays = {
        "w": generator.normal(size=(4, 3, 2, 5)).astype(np.float32),
        "b": generator.normal(size=(4,)).astype(np.float32),
    }
    layout = Layout({name: array.shape for name, array in arrays.items()}, {"w": (0, 2, 3, 1)})
    row = layout.row(arrays)
    assert layout.size == 124
    for name, array in layout.arrays(row).items():
        np.testing.assert_array_equal(array, arrays[name])
    np.testing.assert_array_equal(row[:30].numpy(), arrays["w"][0].transpose(1, 2, 0).ravel())
