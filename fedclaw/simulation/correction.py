"""A strategy's correction of the gradients of one client, or of many at once."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray

from fedclaw.learning.stacked.layout import Layout
from fedclaw.learning.step_loop import Correction as StepCorrection
from fedclaw.learning.strategy import StepContext, Strategy, is_overridden
from fedclaw.simulation.job import Round, State

Correct = Callable[[Sequence[torch.Tensor], StepContext], None]


@dataclass(frozen=True)
class Correction:
    """What a correction is told of a stack of clients; tensors in the parameters' order."""

    correct: Correct | None
    """None: there is nothing to correct."""
    round: Round
    layout: Layout
    start: Sequence[torch.Tensor]
    broadcast: Mapping[str, Sequence[torch.Tensor]]
    state: Mapping[str, Sequence[torch.Tensor]]
    """By kind, one row a client."""

    @classmethod
    def of(cls, strategy: type[Strategy], round: Round, layout: Layout, states: Sequence[State]) -> Self:
        """The strategy's, for clients that remember `states`."""
        correct = strategy.correct_gradients if is_overridden(strategy, "correct_gradients") else None
        if correct is None:
            return cls(None, round, layout, (), {}, {})
        return cls._told(correct, strategy, round, layout, states)

    @classmethod
    def of_personal(cls, strategy: type[Strategy], round: Round, layout: Layout, states: Sequence[State]) -> Self:
        """The same for the clients' own models."""
        return cls._told(strategy.correct_personal_gradients, strategy, round, layout, states)

    @classmethod
    def _told(
        cls,
        correct: Correct,
        strategy: type[Strategy],
        round: Round,
        layout: Layout,
        states: Sequence[State],
    ) -> Self:
        start = _tensors(layout, round.parameters)
        sent = {kind: _tensors(layout, arrays) for kind, arrays in round.broadcast.items()}
        state = {kind: _stacked(layout, states, kind) for kind in strategy.client_state}
        return cls(correct, round, layout, start, sent, state)

    def without(self) -> Self:
        """None at all: where a gradient still waits for its noise, whose bound nothing may change."""
        return replace(self, correct=None)

    def of_rows(self, steps: int, *, alone: bool) -> StepCorrection | None:
        """What the step loop calls on rows (k, D), of `steps` steps; None: there is nothing to correct.

        `alone`: the strategy sees one client, its tensors as they are.
        """
        if self.correct is None:
            return None
        return lambda rows, step: self._apply(rows[0], step, steps, alone=alone)

    def _apply(self, stack: torch.Tensor, step: int, steps: int, *, alone: bool) -> None:
        gradients = stack.grad
        assert self.correct is not None
        assert gradients is not None
        parameters = self.layout.views(stack)
        changes = self.layout.views(gradients)
        state = {kind: [own[: len(stack)] for own in tensors] for kind, tensors in self.state.items()}
        if alone:
            parameters, changes = [part[0] for part in parameters], [part[0] for part in changes]
            state = {kind: [own[0] for own in tensors] for kind, tensors in state.items()}
        for parameter, change in zip(parameters, changes, strict=True):
            parameter.grad = change
        plan = self.round.plan
        personal = [place.name in plan.personal for place in self.layout.places]
        rate = plan.training.learning_rate
        context = StepContext(plan.strategy_fields, self.start, self.broadcast, state, step, steps, rate, personal)
        with torch.no_grad():
            self.correct(parameters, context)
        for parameter, change in zip(parameters, changes, strict=True):
            # Most change `.grad` in place; one that puts another tensor there is taken at its word.
            if parameter.grad is not None and parameter.grad is not change:
                change.copy_(parameter.grad)


def _tensors(layout: Layout, arrays: Mapping[str, NDArray[np.float32]]) -> list[torch.Tensor]:
    """Zeros for a name that is not among them: a personal parameter has no part in what is sent."""
    return [
        torch.from_numpy(np.array(arrays[place.name])) if place.name in arrays else torch.zeros(place.shape)
        for place in layout.places
    ]


def _stacked(layout: Layout, states: Sequence[State], kind: str) -> list[torch.Tensor]:
    views = layout.views(torch.zeros(len(states), layout.size))
    for number, state in enumerate(states):
        for place, view in zip(layout.places, views, strict=True):
            if place.name in state.get(kind, {}):
                view[number].copy_(torch.from_numpy(state[kind][place.name]))
    return views
