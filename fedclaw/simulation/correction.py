"""A strategy's correction of the gradients of one client, or of many at once."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray

from fedclaw.learning.stacked.layout import Layout
from fedclaw.learning.strategy import StepContext
from fedclaw.simulation.job import Round, State

Correct = Callable[[Sequence[torch.Tensor], StepContext], None]


@dataclass(frozen=True)
class Correction:
    """Corrects the gradients of a stack of clients; called by the step loop on rows (k, D)."""

    correct: Correct
    round: Round
    layout: Layout
    start: Sequence[torch.Tensor]
    """This and what follows: tensors in the parameters' order."""
    broadcast: Mapping[str, Sequence[torch.Tensor]]
    state: Mapping[str, Sequence[torch.Tensor]]
    """By kind, one row a client."""
    steps: int
    """Of the round."""
    alone: bool
    """Whether the strategy sees one client, its tensors as they are."""

    @classmethod
    def of(
        cls,
        correct: Correct,
        kinds: Sequence[str],
        round: Round,
        layout: Layout,
        states: Sequence[State],
        *,
        steps: int,
        alone: bool,
    ) -> Self:
        """`correct` of a strategy whose clients remember `states`, of these kinds."""
        start = _tensors(layout, round.parameters)
        sent = {kind: _tensors(layout, arrays) for kind, arrays in round.broadcast.items()}
        return cls(
            correct, round, layout, start, sent, {kind: _stacked(layout, states, kind) for kind in kinds}, steps, alone
        )

    def __call__(self, rows: Sequence[torch.Tensor], step: int) -> None:
        """See `fedclaw.learning.step_loop.Correction`."""
        (stack,) = rows
        gradients = stack.grad
        assert gradients is not None
        parameters = self.layout.views(stack)
        changes = self.layout.views(gradients)
        state = {kind: [own[: len(stack)] for own in tensors] for kind, tensors in self.state.items()}
        if self.alone:
            parameters, changes = [part[0] for part in parameters], [part[0] for part in changes]
            state = {kind: [own[0] for own in tensors] for kind, tensors in state.items()}
        for parameter, change in zip(parameters, changes, strict=True):
            parameter.grad = change
        plan = self.round.plan
        personal = [place.name in plan.personal for place in self.layout.places]
        rate = plan.training.learning_rate
        context = StepContext(plan.strategy_fields, self.start, self.broadcast, state, step, self.steps, rate, personal)
        with torch.no_grad():
            self.correct(parameters, context)
        for parameter, change in zip(parameters, changes, strict=True):
            # Most change `.grad` in place; one that puts another tensor there is taken at its word.
            if parameter.grad is not None and parameter.grad is not change:
                change.copy_(parameter.grad)


def _tensors(layout: Layout, arrays: Mapping[str, NDArray[np.float32]]) -> list[torch.Tensor]:
    """Zeros for a name that is not among them: a personal parameter has no part in what is sent."""
    return [
        torch.tensor(arrays[place.name], device=layout.device)
        if place.name in arrays
        else torch.zeros(place.shape, device=layout.device)
        for place in layout.places
    ]


def _stacked(layout: Layout, states: Sequence[State], kind: str) -> list[torch.Tensor]:
    views = layout.views(torch.zeros(len(states), layout.size, device=layout.device))
    for number, state in enumerate(states):
        for place, view in zip(layout.places, views, strict=True):
            if place.name in state.get(kind, {}):
                view[number].copy_(torch.from_numpy(state[kind][place.name]))
    return views
