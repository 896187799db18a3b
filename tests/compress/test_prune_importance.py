"""Which channels go, by four importances, and what measuring the layers' sensitivity says; against oracles."""

import pytest
import torch
from torch import nn

from fedclaw.compress.channel_groups import find_groups, shrink
from fedclaw.compress.importance import TEMPERATURE, Guide, rank_channels
from fedclaw.compress.sensitivity import measure_sensitivity
from fedclaw.compress.spread import make_path
from fedclaw.errors import CompressionError
from fedclaw.learning.tasks.classification import Classification
from fedclaw.learning.tasks.regression import Regression

CLASSES = Classification(("a", "b", "c"))
VALUES = Regression("y", -10.0, 10.0)
IMPORTANCES = ("magnitude", "group_norm", "taylor", "teacher")


def net(outputs=3, inputs=4, hidden=6):
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs)).eval()


def guide_of(model, task, count=200, inputs=4):
    rows = torch.randn(count, inputs, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return Guide(rows, model(rows), task)


def order(model, importance, guide=None, inputs=4):
    example = torch.zeros(1, inputs)
    (ranking,) = rank_channels(model, example, find_groups(model, example).groups, importance, guide).values()
    return ranking


def test_by_the_weights_worked_out_by_hand():
    model = net(outputs=1, inputs=2, hidden=3)
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 1.0], [1.8, 0.0], [1.1, 1.1]]))
        model[0].bias.zero_()
        model[2].weight.copy_(torch.tensor([[3.0, 0.1, 0.2]]))
    # sums of |w| of what writes them: 2, 1.8, 2.2; of w^2 of all: 11, 3.25, 2.46
    assert order(model, "magnitude", inputs=2) == [1, 0, 2]
    assert order(model, "group_norm", inputs=2) == [2, 1, 0]


@pytest.mark.parametrize("task", [CLASSES, VALUES], ids=["classes", "values"])
@pytest.mark.parametrize("importance", ["taylor", "teacher"])
def test_a_channel_that_the_inputs_never_wake_goes_first_however_large_its_weights(importance, task):
    model = net(task.outputs)
    with torch.no_grad():
        model[0].weight[4] *= 50
        model[0].bias[4] = -1e4
        model[2].weight[:, 4] = 50
    assert order(model, importance, guide_of(model, task))[0] == 4
    assert order(model, "group_norm")[-1] == order(model, "magnitude")[-1] == 4


@pytest.mark.parametrize("task", [CLASSES, VALUES], ids=["classes", "values"])
def test_the_teachers_order_is_that_of_the_distillation_loss_without_each_channel(task):
    """The slow way: remove each channel by itself and compare the outputs with the whole model's."""
    model = net(task.outputs, hidden=8)
    with torch.no_grad():
        model[2].weight.mul_(0.01 * torch.tensor([1, 4, 64, 2, 16, 128, 8, 32]))  # small: to the second order
    guide, example = guide_of(model, task, 150), torch.zeros(1, 4)
    groups = find_groups(model, example).groups

    def loss(channel):
        others = [place for place in range(8) if place != channel]
        narrow = shrink(model, example, groups, {"0": [channel, *others]}, {"0": 7})
        with torch.no_grad():
            return task.divergence(narrow(guide.inputs), guide.outputs, TEMPERATURE).item()

    slowly = sorted(range(8), key=loss)
    assert order(model, "teacher", guide) == slowly
    assert order(model, "magnitude") != slowly


def test_parts_that_shrink_alike_are_ranked_by_their_mean():
    model = nn.Sequential(nn.Conv2d(1, 6, 1), nn.GroupNorm(2, 6), nn.Flatten(), nn.Linear(6 * 4, 2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.1)
        model[0].weight[:, 0, 0, 0] = torch.tensor([5.0, 1.0, 3.0, 1.0, 2.0, 4.0])
    example = torch.zeros(1, 1, 2, 2)
    groups = find_groups(model, example).groups
    assert groups["0"].parts == 2
    # parts (5, 1, 3) and (1, 2, 4): means 3, 1.5, 3.5
    assert rank_channels(model, example, groups, "magnitude", None) == {"0": [1, 0, 2]}


@pytest.mark.parametrize("importance", IMPORTANCES)
def test_the_same_again_gives_the_same_order(importance):
    model = net()
    guide = guide_of(model, CLASSES)
    first = order(model, importance, guide)
    assert sorted(first) == list(range(6))
    assert order(model, importance, guide) == first


@pytest.mark.parametrize("importance", ["taylor", "teacher"])
def test_outputs_that_never_change_say_nothing_of_channels(importance):
    model = net(1)
    with torch.no_grad():
        model[2].weight.zero_()
    with pytest.raises(CompressionError, match="finds no channel that matters"):
        order(model, importance, guide_of(model, VALUES))


class Two(nn.Module):
    """Two branches of the same width, the second of which hardly counts."""

    def __init__(self, little=0.02):
        super().__init__()
        self.first, self.second = nn.Linear(4, 12), nn.Linear(4, 12)
        self.head = nn.Linear(24, 3)
        with torch.no_grad():
            self.head.weight.mul_(8)
            self.head.weight[:, 12:] *= little

    def forward(self, rows):
        return self.head(torch.relu(torch.cat([self.first(rows), self.second(rows)], 1)))


def measured(model):
    example, guide = torch.zeros(1, 4), guide_of(model, CLASSES)
    groups = find_groups(model, example).groups
    ranking = rank_channels(model, example, groups, "group_norm", None)
    return groups, measure_sensitivity(model, example, groups, ranking, guide)


def test_sensitivity_is_how_far_the_model_is_from_itself_with_one_group_narrow():
    torch.manual_seed(0)
    _, curves = measured(Two().eval())
    assert [point.share for point in curves["first"]] == [6 / 12, 3 / 12, 2 / 12]
    for hurt, spared in zip(curves["first"], curves["second"], strict=True):
        assert hurt.divergence > 20 * spared.divergence >= 0
        assert hurt.agreement < spared.agreement <= 1
    assert curves["first"][0].divergence < curves["first"][-1].divergence


def test_the_cut_spares_the_group_that_suffers():
    torch.manual_seed(0)
    groups, curves = measured(Two().eval())
    even = make_path(groups, "uniform", {}).at(12)
    spared = make_path(groups, "sensitivity", curves).at(12)
    assert even["first"] == even["second"]
    assert spared["first"] > spared["second"]


def test_balanced_takes_more_of_wide_groups_and_every_path_ends_at_one_channel():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 3)).eval()
    groups = find_groups(model, torch.zeros(1, 4)).groups
    path = make_path(groups, "balanced", {})
    # At t the widths are 2t and 8t: the wide group falls from 64 to 16 before the narrow one loses a channel.
    assert path.removals[:48] == ("2",) * 48
    assert path.at(48) == {"0": 4, "2": 16}
    assert path.at(len(path.removals)) == {"0": 1, "2": 1}
