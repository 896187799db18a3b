"""Groups of coupled layers: which there are, in how many parts they shrink, and that nothing else changes."""

import random

import pytest
import torch
from torch import nn
from torch.nn import functional

from fedclaw.compress.channel_groups import find_groups, output_layer, shrink, trace
from fedclaw.compress.importance import owned_by
from fedclaw.compress.prune import prune, prune_to_fraction
from fedclaw.compress.pruning_record import WEIGHTS_ALONE, Target
from fedclaw.compress.size import count_parameters, measure_sizes, multiply_adds
from fedclaw.errors import CompressionError


class Depthwise(nn.Module):
    """A depthwise convolution between two pointwise ones, and two that are grouped."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 12, 3, padding=1)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.pointwise = nn.Conv2d(12, 24, 1)
        self.grouped = nn.Conv2d(24, 16, 3, groups=4)
        self.between = nn.Conv2d(16, 20, 1)
        self.grouped_too = nn.Conv2d(20, 30, 1, groups=5)
        self.head = nn.Linear(30, 3)

    def forward(self, images):
        maps = self.pointwise(torch.relu(self.depthwise(self.stem(images))))
        maps = self.grouped_too(torch.relu(self.between(torch.relu(self.grouped(torch.relu(maps))))))
        return self.head(torch.relu(maps).mean((2, 3)))


class Joined(nn.Module):
    """A skip connection, maps that are put beside one another, and a flattening of maps to features."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.inner = nn.Conv2d(8, 10, 3, padding=1)
        self.back = nn.Conv2d(10, 8, 3, padding=1)
        self.beside = nn.Conv2d(1, 6, 3, padding=1)
        self.mixed = nn.Conv2d(14, 9, 1)
        self.hidden = nn.Linear(9 * 16, 12)
        self.head = nn.Linear(12, 3)

    def forward(self, images):
        maps = torch.relu(self.stem(images))
        maps = maps + self.back(torch.relu(self.inner(maps)))
        maps = torch.relu(self.mixed(torch.cat([maps, torch.relu(self.beside(images))], 1)))
        return self.head(torch.relu(self.hidden(functional.max_pool2d(maps, 2).flatten(1))))


class Untold(nn.Module):
    """The forward pass needs a multiple of six channels, and no layer says so."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(64, 24)
        self.second = nn.Linear(24, 18)
        self.head = nn.Linear(18, 3)

    def forward(self, images):
        features = torch.relu(self.first(images.flatten(1))).unflatten(1, (6, -1)).flatten(1)
        return self.head(torch.relu(self.second(features)))


class Fixed(nn.Module):
    """The forward pass takes the size of the first layer for granted."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(64, 24)
        self.second = nn.Linear(24, 18)
        self.head = nn.Linear(18, 3)

    def forward(self, images):
        return self.head(torch.relu(self.second(self.first(images.flatten(1)).view(-1, 24))))


class Attention(nn.Module):
    """Two heads of a fixed scale, told by a `view` alone."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(8, 12)
        self.query, self.key, self.value = nn.Linear(12, 8), nn.Linear(12, 8), nn.Linear(12, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, images):
        tokens = self.embed(images[:, 0])
        parts = (layer(tokens).unflatten(-1, (2, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value))
        attended = functional.scaled_dot_product_attention(*parts, scale=0.5)
        return self.head(attended.transpose(1, 2).flatten(2).mean(1))


ALL = [Depthwise, Joined, Untold, Fixed, Attention]
EXAMPLE = torch.zeros(1, 1, 8, 8)


def found_in(model):
    return find_groups(model.eval(), EXAMPLE)


@pytest.mark.parametrize(
    ("kind", "groups", "kept"),
    [
        (
            Depthwise,
            {"depthwise": (1, 12), "pointwise": (4, 6), "grouped": (4, 4), "between": (5, 4), "grouped_too": (5, 6)},
            (),
        ),
        (Joined, {"back": (1, 8), "inner": (1, 10), "beside": (1, 6), "mixed": (1, 9), "hidden": (1, 12)}, ()),
        (Untold, {"second": (1, 18), "first": (6, 4)}, ()),
        (Fixed, {"second": (1, 18)}, ("first",)),
        (Attention, {"value": (2, 4), "embed": (1, 12)}, ()),
    ],
)
def test_groups_and_the_parts_that_must_shrink_alike(kind, groups, kept):
    found = found_in(kind())
    assert {name: (group.parts, group.width) for name, group in found.groups.items()} == groups
    assert found.kept == kept


@pytest.mark.parametrize("kind", ALL)
def test_sizes_are_those_of_the_model_that_is_built(kind):
    model = kind()
    groups = found_in(model).groups
    sizes = measure_sizes(model, EXAMPLE, groups)
    for _ in range(4):
        widths = {name: random.randint(1, group.width) for name, group in groups.items()}
        ranking = {name: random.sample(range(group.width), group.width) for name, group in groups.items()}
        narrow = shrink(model, EXAMPLE, groups, ranking, widths)
        assert sizes.parameters(widths) == count_parameters(narrow)
        assert sizes.multiply_adds(widths) == multiply_adds(narrow, (1, 8, 8))


@pytest.mark.parametrize("kind", ALL)
def test_channels_that_do_nothing_can_go_and_nothing_changes(kind):
    """An oracle for the coupling: what the library removes is what belongs to those channels, everywhere."""
    model = kind().eval()
    groups = found_in(model).groups
    traced = trace(model, EXAMPLE)
    parameters = dict(model.named_parameters())
    dead, widths = {}, {}
    with torch.no_grad():
        for name, members in traced.groups(output_layer(traced.model, EXAMPLE)):
            if name not in groups:
                continue
            group = groups[name]
            dead[name] = random.sample(range(group.width), group.width // 2)
            widths[name] = group.width - len(dead[name])
            gone = {part * group.width + place for part in range(group.parts) for place in dead[name]}
            for share in owned_by(traced, members):
                if share.blocks == 1:
                    places = [
                        place
                        for place, owner in zip(share.places.tolist(), share.owners.tolist(), strict=True)
                        if owner in gone
                    ]
                    parameters[share.parameter].index_fill_(share.dim, torch.tensor(places, dtype=torch.long), 0)
    ranking = {
        name: [*gone, *(place for place in range(groups[name].width) if place not in gone)]
        for name, gone in dead.items()
    }
    narrow = shrink(model, EXAMPLE, groups, ranking, widths)
    images = torch.randn(5, 1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(narrow(images), model(images), rtol=1e-4, atol=1e-5)
    assert count_parameters(narrow) < count_parameters(model)


@pytest.mark.parametrize("kind", ALL)
def test_the_smallest_model_has_a_channel_in_each_part_and_a_smaller_one_is_refused(kind):
    model = kind()
    with pytest.raises(CompressionError, match="ask for at least that") as refused:
        prune_to_fraction(model, (1, 8, 8), 0.001)
    least = float(str(refused.value).split("fraction=")[1].split(";")[0])
    pruned = prune_to_fraction(model, (1, 8, 8), least)
    assert set(pruned.widths.values()) == {1}
    assert all(size > 0 for parameter in pruned.model.parameters() for size in parameter.shape)
    assert pruned.model(torch.randn(4, 1, 8, 8)).shape == (4, 3)


def test_what_cannot_shrink_is_named():
    assert prune_to_fraction(Fixed(), (1, 8, 8), 0.9).report.kept == ("first",)
    alone = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 8)), nn.ReLU(), nn.Linear(8, 2))
    with pytest.raises(CompressionError, match=r"cannot be pruned: its layers \(0\)"):
        prune_to_fraction(alone, (6,), 0.5)


def test_batch_statistics_of_a_model_in_training_are_not_touched():
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 3)).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pruned = prune(model, (1, 8, 8), Target(share=0.5), WEIGHTS_ALONE)
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert len(pruned.model[1].running_mean) == pruned.widths["0"]


def test_a_normalisation_is_not_left_with_a_single_number():
    model = nn.Sequential(nn.Conv2d(1, 6, 8), nn.GroupNorm(1, 6), nn.Flatten(), nn.Linear(6, 3))  # maps of one pixel
    assert [(group.width, group.least) for group in found_in(model).groups.values()] == [(6, 2)]
    assert prune_to_fraction(model, (1, 8, 8), 0.4).model(torch.randn(1, 1, 8, 8)).shape == (1, 3)


class Tied(nn.Module):
    """One layer under two names, or two layers with one weight."""

    def __init__(self, *, layers):
        super().__init__()
        self.first, self.hidden, self.head = nn.Linear(5, 16), nn.Linear(16, 16), nn.Linear(16, 3)
        self.again = self.hidden
        if layers == 2:
            self.again = nn.Linear(16, 16)
            self.again.weight = self.hidden.weight

    def forward(self, inputs):
        return self.head(self.again(self.hidden(self.first(inputs).relu()).relu()).relu())


def test_layers_that_share_a_parameter_are_refused_and_a_layer_used_twice_is_not():
    assert prune_to_fraction(Tied(layers=1), (5,), 0.5).parameters_after <= 0.5 * count_parameters(Tied(layers=1))
    with pytest.raises(CompressionError, match=r"hidden\.weight and again\.weight are one parameter"):
        prune_to_fraction(Tied(layers=2), (5,), 0.5)
