"""The loss on hidden features: what it compares, and that a student learns them through a projection."""

import copy

import pytest
import torch
from torch import nn

from fedclaw.compress.features import FeatureLoss
from fedclaw.compress.proxy import Labelled, distil, losses_of, split_inputs
from fedclaw.compress.record import RecoverySettings
from fedclaw.learning.tasks.classification import Classification

INPUTS = torch.randn(80, 4, generator=torch.Generator().manual_seed(0))
TASK = Classification(("a", "b", "c"))


def net(hidden, seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, hidden), nn.ReLU(), nn.Linear(hidden, 3))


def test_the_loss_by_hand():
    teacher, student = net(6, 0), net(2, 1)
    compared = FeatureLoss(teacher, student, INPUTS, seed=0)
    outputs, loss = compared(student, INPUTS)
    wanted, seen = (torch.relu(model[0](INPUTS)) for model in (teacher, student))
    assert torch.equal(outputs, student(INPUTS))
    expected = (compared.projection(seen) - wanted).square().mean() / wanted.var(dim=0, unbiased=False).mean()
    torch.testing.assert_close(loss, expected)


def test_a_copy_with_the_same_projection_costs_nothing_and_nothing_flows_to_the_teacher():
    teacher = net(5, 0)
    student = copy.deepcopy(teacher)
    compared = FeatureLoss(teacher, student, INPUTS, seed=0)
    with torch.no_grad():
        compared.projection.weight.copy_(torch.eye(5))
        compared.projection.bias.zero_()
    assert compared(student, INPUTS)[1].item() == 0
    torch.nn.init.normal_(student[0].weight)
    compared(student, INPUTS)[1].backward()
    assert student[0].weight.grad.abs().sum() > 0
    assert compared.projection.weight.grad.abs().sum() > 0
    assert teacher[0].weight.grad is None


def test_features_that_are_maps_are_taken_as_they_are():
    teacher = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 3), nn.Flatten(), nn.Linear(8, 3))
    images = torch.randn(5, 1, 4, 4)
    outputs, loss = FeatureLoss(teacher, copy.deepcopy(teacher), images, seed=0)(copy.deepcopy(teacher), images)
    assert outputs.shape == (5, 3)
    assert torch.isfinite(loss)


def residual(student, teacher):
    """What of the teacher's features a linear function of the student's cannot say, as a share."""
    with torch.no_grad():
        wanted, seen = (torch.relu(model[0](INPUTS)) for model in (teacher, student))
        seen = torch.cat([seen, torch.ones(len(seen), 1)], 1)
        left = wanted - seen @ torch.linalg.lstsq(seen, wanted).solution
        return (left.square().mean() / wanted.var(dim=0, unbiased=False).mean()).item()


def test_a_student_learns_the_features():
    teacher, student = net(6, 0), net(4, 1)
    split = split_inputs(teacher, INPUTS, 0.2, seed=0, task=TASK)
    left = {}
    for weight in (0.0, 5.0):
        how = RecoverySettings(steps=400, learning_rate=0.02, mix=False, features=weight, patience=1000)
        left[weight] = residual(distil(student, teacher, split, how, seed=0).model, teacher)
    assert left[5.0] < 0.8 * left[0.0]


def test_labels_are_learnt_by_their_weight():
    """Labels that contradict the teacher: whoever is listened to more is agreed with."""
    teacher, student = net(16, 0), net(16, 1)
    split = split_inputs(teacher, INPUTS, 0.2, seed=0, task=TASK)
    wrong = (teacher(INPUTS).argmax(1) + 1) % 3
    labels, share = Labelled(INPUTS, wrong, TASK), {}
    for weight in (0.0, 0.05, 1.0):
        how = RecoverySettings(steps=300, learning_rate=0.02, mix=False, labels=weight, patience=1000)
        held = (
            split if weight < 1 else type(split)(split.train, split.train_logits, INPUTS, TASK.outputs_of(wrong), TASK)
        )
        found = distil(student, teacher, held, how, 0, labels).model
        share[weight] = (found(INPUTS).argmax(1) == wrong).float().mean().item()
    assert share[0.0] < 0.2 > share[0.05]
    assert share[1.0] > 0.8


def test_the_parts_of_the_loss_in_words():
    labels = Labelled(INPUTS, torch.zeros(80, dtype=torch.int64), TASK)
    told = losses_of(RecoverySettings(temperature=4, features=0.5, labels=0.25), labels)
    assert told == (
        "the teacher's logits at temperature 4",
        "labels of 80 public examples, weight 0.25",
        "the teacher's features before its output layer, weight 0.5",
    )
    assert losses_of(RecoverySettings(), None) == ("the teacher's logits at temperature 2",)


@pytest.mark.parametrize("settings", [{"features": -1}, {"labels": 2}])
def test_weights_have_bounds(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        RecoverySettings(**settings)
