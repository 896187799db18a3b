"""Structured pruning: a model becomes narrower until it is small enough, in steps, with recovery in between.

What goes together is found by `channel_groups`; which channels go is `importance`; how the cut is spread over the
groups is `spread`, on request by the measured `sensitivity`; how small is `targets`. With `magnitude` or `group_norm`
and a uniform spread no inputs are looked at. All others look at those they are given and nothing else, and say so.

Legend: N examples, D input shape without the batch, C outputs. A *width* is the number of channels that a group of
coupled layers has, counted within one part where there are such (they all must shrink alike).
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn

from fedclaw.compress.channel_groups import ChannelGroup, FoundGroups, Widths, find_groups, shrink
from fedclaw.compress.importance import Guide, rank_channels
from fedclaw.compress.pruning_record import (
    WEIGHTS_ALONE,
    GroupReport,
    Narrowed,
    PruningReport,
    PruningSettings,
    Target,
)
from fedclaw.compress.record import StepInputs
from fedclaw.compress.sensitivity import BATCH, measure_sensitivity
from fedclaw.compress.size import Sizes, count_parameters, measure_sizes
from fedclaw.compress.spread import Path, make_path
from fedclaw.compress.targets import Goal, make_goal
from fedclaw.errors import CompressionError, FedClawError, UsageError
from fedclaw.learning.tasks.base import Task

Recover = Callable[[nn.Module], None]
"""Trains the model that it is given, in place; what it looks at is for its owner to say."""


@dataclass(frozen=True)
class Looked:
    """Inputs (N, *D) that pruning may look at, and where they come from; never rows that a figure is reported of."""

    inputs: torch.Tensor
    task: Task
    source: StepInputs


@dataclass(frozen=True)
class Pruned:
    """A pruned copy of a model, in evaluation mode."""

    model: nn.Module
    widths: dict[str, int]
    parameters_before: int
    parameters_after: int
    report: PruningReport
    looked_at: tuple[StepInputs, ...] = ()


def prune_to_fraction(model: nn.Module, input_shape: tuple[int, ...], fraction: float) -> Pruned:
    """`prune` to at most `fraction` of the parameters, by the weights alone, every group by the same share.

    Raises UsageError, CompressionError.
    """
    if not 0 < fraction < 1:
        raise UsageError(f"fraction={fraction}: the share of parameters to keep lies between 0 and 1")
    return prune(model, input_shape, Target(share=fraction))


def prune(
    model: nn.Module,
    input_shape: tuple[int, ...],
    target: Target,
    settings: PruningSettings = WEIGHTS_ALONE,
    looked: Looked | None = None,
    recover: Recover | None = None,
    seed: int = 0,
) -> Pruned:
    """A copy of `model` (N, *D) -> (N, C) that is within `target`, and as near to it as possible.

    Every parameter or multiply-add that the rounding leaves over is given back as channels. The output layer keeps its
    outputs, and every part of a group at least one channel; a group that cannot shrink stays as it is and is named in
    the report.

    Args:
        model: not changed.
        input_shape: D.
        target: how small.
        settings: how; its own targets are not looked at (`PruningSettings.target` chooses).
        looked: inputs, where the settings look at some (`needs_inputs`).
        recover: called between two steps, not after the last one.
        seed: of what is drawn at random: which of the inputs are looked at, and directions in `teacher`.

    Raises:
        UsageError: torch-pruning is not installed.
        CompressionError: the model cannot become that small (the message has the smallest that it can be), its
            architecture cannot be pruned, or inputs are needed and there are none.
    """
    with _own_words():
        pruning = _Pruning(model, input_shape, settings, looked, seed)
        plan = pruning.plan(target)
    pruned = model
    for step in range(len(plan.widths)):
        if step and recover is not None:
            recover(pruned)
            pruned.eval()
        with _own_words():
            pruned = pruning.narrow(pruned, plan, step)
    with _own_words():
        return pruning.outcome(plan, pruned)


@contextmanager
def _own_words() -> Iterator[None]:
    """torch-pruning raises whatever it met in an architecture that it does not know; raise CompressionError."""
    try:
        yield
    except FedClawError:
        raise
    except Exception as error:
        raise CompressionError(
            f"this architecture cannot be pruned: torch-pruning does not understand one of its layers "
            f"({type(error).__name__}: {' '.join(str(error).split())[:200]})"
        ) from error


@dataclass(frozen=True)
class _Plan:
    """How a target is reached."""

    target: Target
    goal: Goal
    widths: tuple[Widths, ...]
    """After each step."""
    sensitivity: Mapping[str, tuple[Narrowed, ...]]


class _Pruning:
    """One pruning of one model."""

    def __init__(
        self,
        model: nn.Module,
        input_shape: tuple[int, ...],
        settings: PruningSettings,
        looked: Looked | None,
        seed: int,
    ) -> None:
        self._model, self._settings, self._seed = copy.deepcopy(model).eval(), settings, seed
        _require_parameters_of_their_own(model)
        self._example = torch.zeros(1, *input_shape, device=next(model.parameters()).device)
        self._found: FoundGroups = find_groups(self._model, self._example)
        self._sizes: Sizes = measure_sizes(self._model, self._example, self._found.groups)
        self._guide = (
            _guide(self._model, settings, looked, self._example.device, seed) if settings.needs_inputs else None
        )
        self._looked_at = _looked_at(settings, looked, self._guide)
        self._before = count_parameters(self._model)

    def plan(self, target: Target) -> _Plan:
        """Decide on the widths after each step."""
        groups = self._found.groups
        sensitivity = self._sensitivity()
        path = make_path(groups, self._settings.spread, sensitivity)
        goal = make_goal(target, self._settings.runtime, self._sizes, self._any_of, self._model, self._example)
        return _Plan(target, goal, tuple(self._steps(path, goal.widths(path))), sensitivity)

    def narrow(self, model: nn.Module, plan: _Plan, step: int) -> nn.Module:
        """A copy of `model`, as the step before left it, without the channels that matter least in it now."""
        groups = self._groups(plan, step)
        return shrink(model, self._example, groups, self._rank(model, groups), plan.widths[step])

    def outcome(self, plan: _Plan, pruned: nn.Module) -> Pruned:
        """Check the last model and say what was decided. Raises CompressionError."""
        widths = plan.widths[-1]
        self._check(pruned, widths)
        return Pruned(pruned, dict(widths), self._before, count_parameters(pruned), self._report(plan), self._looked_at)

    def _sensitivity(self) -> dict[str, tuple[Narrowed, ...]]:
        if self._settings.spread != "sensitivity":
            return {}
        assert self._guide is not None
        groups = self._found.groups
        return measure_sensitivity(self._model, self._example, groups, self._rank(self._model, groups), self._guide)

    def _rank(self, model: nn.Module, groups: Mapping[str, ChannelGroup]) -> dict[str, list[int]]:
        return rank_channels(model, self._example, groups, self._settings.importance, self._guide, self._seed)

    def _groups(self, plan: _Plan, step: int) -> dict[str, ChannelGroup]:
        """The groups as they are before a step."""
        if step == 0:
            return self._found.groups
        left = plan.widths[step - 1]
        return {name: replace(group, width=left[name]) for name, group in self._found.groups.items()}

    def _any_of(self, widths: Widths) -> nn.Module:
        """A model of these widths whose channels are not chosen: for its time alone."""
        groups = self._found.groups
        return shrink(self._model, self._example, groups, {name: range(groups[name].width) for name in groups}, widths)

    def _steps(self, path: Path, last: Widths) -> Iterator[Widths]:
        """The widths after each step; no step goes below the last one's."""
        end = self._sizes.parameters(last) / self._before
        for left in _schedule(self._settings, end):
            between = path.at(path.first(partial(self._within, left)))
            yield {name: max(between[name], last[name]) for name in last}
        yield last

    def _within(self, share: float, widths: Widths) -> bool:
        return self._sizes.parameters(widths) <= share * self._before

    def _check(self, pruned: nn.Module, widths: Widths) -> None:
        with torch.no_grad():
            expected, got = _outputs(self._model, self._example).shape, pruned(self._example).shape
        if expected != got or count_parameters(pruned) != self._sizes.parameters(widths):
            raise CompressionError(
                f"this architecture cannot be pruned: its output went from {tuple(expected)} to {tuple(got)} numbers, "
                "or its layers have other sizes than were asked for"
            )

    def _report(self, plan: _Plan) -> PruningReport:
        widths = plan.widths[-1]
        groups = tuple(
            GroupReport(
                layer=name,
                parts=group.parts,
                before=group.width,
                after=widths[name],
                sensitivity=plan.sensitivity.get(name, ()),
            )
            for name, group in self._found.groups.items()
        )
        return PruningReport(
            importance=self._settings.importance,
            spread=self._settings.spread,
            target=plan.target,
            reached=plan.goal.share(widths),
            measured_on=plan.goal.measured_on,
            steps=tuple(self._sizes.parameters(step) / self._before for step in plan.widths),
            groups=groups,
            kept=self._found.kept,
        )


def _require_parameters_of_their_own(model: nn.Module) -> None:
    """Raise CompressionError where layers share a parameter: each would be cut by what goes from the other, too."""
    names: dict[nn.Parameter, str] = {}
    # One layer under two names is but one here, and shrinks as any.
    own = (
        (f"{layer}.{name}", parameter)
        for layer, module in model.named_modules()
        for name, parameter in module.named_parameters(recurse=False)
    )
    for name, parameter in own:
        if names.setdefault(parameter, name) != name:
            raise CompressionError(
                f"this architecture cannot be pruned: {names[parameter]} and {name} are one parameter, which two "
                "layers share; give each its own"
            )


def _schedule(settings: PruningSettings, end: float) -> Iterator[float]:
    """The share of the parameters that is left after each step but the last."""
    for step in range(1, settings.steps):
        done = step / settings.steps
        if settings.schedule == "geometric":
            yield end**done
        elif settings.schedule == "linear":
            yield 1 - (1 - end) * done
        else:
            yield end + (1 - end) * (1 - done) ** 3


def _guide(
    model: nn.Module, settings: PruningSettings, looked: Looked | None, device: torch.device, seed: int
) -> Guide:
    """Some of the inputs, drawn at random, with the unpruned model's outputs. Raises CompressionError."""
    if looked is None or len(looked.inputs) == 0:
        raise CompressionError(
            f"pruning.importance={settings.importance} with pruning.spread={settings.spread} looks at inputs, and none "
            "were given; group_norm and uniform look at the weights alone"
        )
    drawn = torch.randperm(len(looked.inputs), generator=torch.Generator().manual_seed(seed))[: settings.examples]
    inputs = looked.inputs[drawn.to(looked.inputs.device)].to(device)
    outputs = _outputs(model, inputs)
    if not torch.isfinite(outputs).all():
        raise CompressionError("the model's outputs on the inputs that pruning looks at are not all finite")
    return Guide(inputs, outputs, looked.task)


def _outputs(model: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model(part) for part in torch.split(inputs, BATCH)])


def _looked_at(settings: PruningSettings, looked: Looked | None, guide: Guide | None) -> tuple[StepInputs, ...]:
    """What the two steps looked at; one that looked at nothing says so."""
    by_inputs = settings.importance in ("taylor", "teacher")
    steps = [_step("importance", looked, guide if by_inputs else None)]
    if settings.spread == "sensitivity":
        steps.append(_step("layer sensitivity", looked, guide))
    return tuple(steps)


def _step(step: str, looked: Looked | None, guide: Guide | None) -> StepInputs:
    if looked is None or guide is None:
        return StepInputs.model_validate({"step": step, "origin": "none", "description": "the weights alone"})
    return looked.source.model_copy(update={"step": step, "examples": len(guide.inputs)})
