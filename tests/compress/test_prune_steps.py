"""Pruning in steps, to each kind of target, and what it says of itself."""

import copy

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from fedclaw.compress import targets
from fedclaw.compress.prune import Looked, prune
from fedclaw.compress.pruning_record import PruningReport, PruningSettings, Target
from fedclaw.compress.record import CompressSettings, StepInputs
from fedclaw.compress.size import count_parameters, multiply_adds
from fedclaw.errors import CompressionError
from fedclaw.learning.tasks.classification import Classification

WEIGHTS = PruningSettings(importance="group_norm", spread="uniform", steps=1)
"""By the weights alone."""


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 24, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24 * 36, 3)
    )


def looked(count=40):
    rows = torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    source = StepInputs(step="recovery", origin="public", description="40 public inputs of a.csv", sha256="ab" * 32)
    return Looked(rows, Classification(("a", "b", "c")), source)


def with_(**changes):
    return WEIGHTS.model_copy(update=changes)


@pytest.mark.parametrize(
    ("schedule", "shares"),
    [("geometric", [0.1**0.25, 0.1**0.5, 0.1**0.75, 0.1]), ("linear", [0.775, 0.55, 0.325, 0.1]), ("cubic", None)],
)
def test_each_step_leaves_what_the_schedule_says(schedule, shares):
    shares = shares or [0.1 + 0.9 * (1 - step / 4) ** 3 for step in (1, 2, 3, 4)]
    sizes = []
    pruned = prune(
        net(),
        (1, 8, 8),
        Target(share=0.1),
        with_(steps=4, schedule=schedule),
        recover=lambda model: sizes.append(count_parameters(model)),
    )
    assert [size / pruned.parameters_before for size in sizes] == list(pruned.report.steps[:3])
    assert pruned.report.steps[-1] == pruned.parameters_after / pruned.parameters_before <= 0.1
    for left, share in zip(pruned.report.steps, shares, strict=True):
        assert share - 0.06 < left <= share
    assert pruned.widths == prune(net(), (1, 8, 8), Target(share=0.1), WEIGHTS).widths


def test_importance_is_found_anew_after_each_recovery():
    """Recovery turns the order round: what it makes large stays, though it was small before."""
    model = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.arange(1.0, 9.0)[:, None].expand(8, 2))
        model[0].bias.copy_(torch.arange(1.0, 9.0))
        model[2].weight.fill_(0.1)
    seen = []

    def recover(net):
        seen.append(net[0].bias.tolist())
        with torch.no_grad():
            net[0].weight.copy_(net[0].weight.flip(0))
        net.train()

    widths = {"0": 2}
    pruned = prune(model, (2,), Target(share=9 / 33), with_(steps=2), recover=recover)
    assert pruned.widths == widths
    assert seen == [[5.0, 6.0, 7.0, 8.0]]
    assert pruned.model[0].bias.tolist() == [5.0, 6.0]
    assert not pruned.model.training


def test_an_error_of_recovery_is_its_own():
    def fails(_):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        prune(net(), (1, 8, 8), Target(share=0.2), with_(steps=2), recover=fails)


@pytest.mark.parametrize("share", [0.5, 0.12])
def test_multiply_adds_are_met_as_near_as_possible(share):
    model = net()
    pruned = prune(model, (1, 8, 8), Target(kind="multiply_adds", share=share), WEIGHTS)
    whole, left = multiply_adds(model, (1, 8, 8)), multiply_adds(pruned.model, (1, 8, 8))
    assert pruned.report.reached == left / whole
    assert share - 0.06 < left / whole <= share
    with pytest.raises(CompressionError, match=r"pruning.multiply_adds=0\.\d+; ask for at least that"):
        prune(model, (1, 8, 8), Target(kind="multiply_adds", share=0.0001), WEIGHTS)


def wide():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 600), nn.ReLU(), nn.Linear(600, 600), nn.ReLU(), nn.Linear(600, 3))


def test_a_latency_is_measured_and_met():
    pruned = prune(wide(), (64,), Target(kind="latency", share=0.6), with_(runtime="torch"))
    assert 0 < pruned.report.reached <= 0.6
    assert "torch" in pruned.report.measured_on
    assert "batch 1" in pruned.report.measured_on
    assert all(0 < width < 600 for width in pruned.widths.values())


def _calls(model):
    """What stands for a clock: a model's multiply-adds, by which it is told from another."""
    return lambda: multiply_adds(model, (64,))


def test_the_widest_that_is_fast_enough_twice_is_taken(monkeypatch):
    """With a clock that the test moves: a time is a count of multiply-adds, every second one 10% worse."""
    measured = []

    def clock(calls, *_):
        whole, narrow = (call() for call in calls)
        measured.append(narrow / whole)
        return [whole, narrow * (1.1 if len(measured) % 2 else 1.0)]

    monkeypatch.setattr(targets, "median_milliseconds", clock)
    monkeypatch.setattr(targets, "_in_torch", lambda model, _: _calls(model))
    pruned = prune(wide(), (64,), Target(kind="latency", share=0.5), with_(runtime="torch"))
    left = multiply_adds(pruned.model, (64,)) / multiply_adds(wide(), (64,))
    assert 0.35 < left <= 0.5
    assert pruned.report.reached in (pytest.approx(left), pytest.approx(1.1 * left))
    with pytest.raises(CompressionError, match=r"cannot be pruned to 0.0001 of its latency .* pruning.latency=0.01"):
        prune(wide(), (64,), Target(kind="latency", share=0.0001), with_(runtime="torch"))


@pytest.mark.slow  # an export to ONNX for each candidate
def test_latency_in_onnx_runtime():
    pruned = prune(wide(), (64,), Target(kind="latency", share=0.6), with_(runtime="onnxruntime"))
    assert pruned.report.reached <= 0.6
    assert "ONNX Runtime" in pruned.report.measured_on


@pytest.mark.slow  # the exporter tries several ways
def test_what_cannot_be_exported_cannot_be_timed_in_onnx_runtime():
    class Untraceable(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = wide()

        def forward(self, rows):
            return self.layers(rows) if rows.detach().numpy().sum() < 1e9 else rows.new_zeros(len(rows), 3)

    with pytest.raises(CompressionError, match=r"cannot be written as ONNX .*pruning.runtime=torch"):
        prune(Untraceable(), (64,), Target(kind="latency", share=0.6), with_(runtime="onnxruntime"))


def test_the_weights_alone_look_at_nothing():
    pruned = prune(net(), (1, 8, 8), Target(share=0.3), WEIGHTS, looked())
    assert [(step.step, step.origin, step.examples) for step in pruned.looked_at] == [("importance", "none", 0)]


@pytest.mark.parametrize("importance", ["group_norm", "taylor", "teacher"])
def test_what_looks_at_inputs_says_at_which(importance):
    settings = with_(importance=importance, spread="sensitivity", examples=16)
    pruned = prune(net(), (1, 8, 8), Target(share=0.3), settings, looked())
    weigh, sense = pruned.looked_at
    assert sense == StepInputs(
        step="layer sensitivity",
        origin="public",
        description="40 public inputs of a.csv",
        examples=16,
        sha256="ab" * 32,
    )
    assert weigh.step == "importance"
    assert weigh.origin == ("none" if importance == "group_norm" else "public")


@pytest.mark.parametrize("changes", [{"importance": "taylor"}, {"importance": "teacher"}, {"spread": "sensitivity"}])
@pytest.mark.parametrize("given", [None, looked(0)], ids=["none", "empty"])
def test_inputs_that_are_needed_and_missing(changes, given):
    with pytest.raises(CompressionError, match="looks at inputs, and none were given"):
        prune(net(), (1, 8, 8), Target(share=0.3), with_(**changes), given)


def test_outputs_that_are_not_finite():
    model = net()
    with torch.no_grad():
        model[0].weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(CompressionError, match="not all finite"):
        prune(model, (1, 8, 8), Target(share=0.3), with_(importance="teacher"), looked())


def test_the_report_has_every_group_and_survives_json():
    model = net()
    settings = with_(spread="sensitivity", steps=2)
    report = prune(copy.deepcopy(model), (1, 8, 8), Target(share=0.3), settings, looked()).report
    assert {group.layer: group.before for group in report.groups} == {"0": 12, "2": 24}
    assert all(1 <= group.after < group.before for group in report.groups)
    assert all(
        0 <= point.agreement <= 1 and point.divergence >= 0 for group in report.groups for point in group.sensitivity
    )
    assert all(len(group.sensitivity) == 3 for group in report.groups)
    assert PruningReport.model_validate_json(report.model_dump_json()) == report


def test_one_target_at_a_time(tmp_path):
    with pytest.raises(ValidationError, match="two targets"):
        PruningSettings(multiply_adds=0.2, latency=0.3)
    with pytest.raises(ValidationError, match="two targets"):
        CompressSettings(run=tmp_path, fraction=0.1, pruning=PruningSettings(latency=0.3))
    settings = CompressSettings(run=tmp_path, pruning=PruningSettings(latency=0.3))
    assert settings.pruning.target(settings.fraction) == Target(kind="latency", share=0.3)
    assert CompressSettings(run=tmp_path, fraction=0.1).pruning.target(0.1) == Target(share=0.1)
