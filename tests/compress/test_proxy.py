"""The recovery loop: what it keeps, when it stops, and what it is fed."""

import pytest
import torch
from torch import nn

from fedclaw.compress.models import predict_logits
from fedclaw.compress.proxy import distil, split_inputs, train
from fedclaw.compress.record import RecoverySettings
from fedclaw.errors import CompressionError
from fedclaw.learning.step_loop import CLASSES

INPUTS = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def teacher():
    torch.manual_seed(0)
    return nn.Linear(4, 3)


def test_the_best_model_is_kept_not_the_last(teacher):
    """A student that is perfect already, and a loss that ruins it: the start is the best there was."""
    held = INPUTS[:20], predict_logits(teacher, INPUTS[:20])

    def ruin(model, rows):
        return model(INPUTS[rows]).pow(2).mean()

    recovered = train(teacher, 60, ruin, held, RecoverySettings(steps=1000, patience=120, learning_rate=0.1), seed=0)
    assert recovered.agreement == recovered.agreement_before == 1.0
    assert torch.equal(recovered.model.weight, teacher.weight)
    assert recovered.steps == 150  # looked at every 50 steps: 150 is the first that is 120 after the best


def test_every_row_comes_once_before_any_comes_again(teacher):
    seen = []

    def note(model, rows):
        seen.append(rows.tolist())
        return model(INPUTS[rows]).mean()

    held = INPUTS[:5], torch.zeros(5, 3)
    train(teacher, 10, note, held, RecoverySettings(steps=7, batch_size=4), seed=0)
    assert [len(rows) for rows in seen] == [4, 4, 2, 4, 4, 2, 4]
    for epoch in (seen[:3], seen[3:6]):
        assert sorted(row for rows in epoch for row in rows) == list(range(10))
    assert seen[:3] != seen[3:6]


def test_no_held_out_input_is_trained_on(teacher):
    split = split_inputs(teacher, INPUTS, 0.25, seed=1)
    assert (len(split.held), len(split.train)) == (15, 45)
    rows = torch.cat([split.held, split.train])
    assert torch.equal(rows[rows[:, 0].argsort()], INPUTS[INPUTS[:, 0].argsort()])
    torch.testing.assert_close(split.held_logits, predict_logits(teacher, split.held))
    torch.testing.assert_close(split.train_logits, predict_logits(teacher, split.train))


def test_a_linear_teacher_is_learnt_exactly(teacher):
    torch.manual_seed(5)
    student = nn.Linear(4, 3)
    split = split_inputs(teacher, INPUTS, 0.2, seed=0)
    for mix in (True, False):
        recovered = distil(student, teacher, split, RecoverySettings(steps=600, learning_rate=0.05, mix=mix), seed=0)
        expected, got = (torch.softmax(predict_logits(model, INPUTS), 1) for model in (teacher, recovered.model))
        torch.testing.assert_close(got, expected, atol=0.02, rtol=0)
        assert recovered.agreement > recovered.agreement_before


def test_mixtures_are_scored_by_the_teacher():
    """A teacher that knows one thing only between the inputs: without mixtures nobody can learn it."""

    class Between(nn.Module):
        def forward(self, inputs):
            inside = 5 - 10 * (inputs.abs() - 0.5).sign()
            return torch.cat([inside, torch.full_like(inside, 5)], 1)

    inputs = torch.tensor([[-1.0], [1.0]]).repeat(20, 1)
    split = split_inputs(Between(), inputs, 0.25, seed=0)
    torch.manual_seed(0)
    student = nn.Sequential(nn.Linear(1, 16), nn.ReLU(), nn.Linear(16, 2))
    middle = torch.linspace(-0.3, 0.3, 30)[:, None]
    found = {}
    for mix in (True, False):
        asked = RecoverySettings(steps=400, learning_rate=0.02, mix=mix)
        recovered = distil(student, Between(), split, asked, seed=0)
        found[mix] = CLASSES.agreement(predict_logits(recovered.model, middle), predict_logits(Between(), middle))
    assert found[True] == 1.0
    assert found[False] < 0.5


def test_too_few_inputs(teacher):
    with pytest.raises(CompressionError, match="9 proxy inputs"):
        split_inputs(teacher, INPUTS[:9], 0.2, seed=0)
    assert len(split_inputs(teacher, INPUTS[:10], 0.99, seed=0).train) == 1
