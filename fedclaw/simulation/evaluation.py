"""Evaluation of simulated clients: on a table that the federation has as a whole, or on each client's own rows."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedclaw.learning.registry import strategy_class
from fedclaw.learning.step_loop import load_parameters
from fedclaw.learning.strategy import PERSONAL
from fedclaw.protocol.refusal import Refusal
from fedclaw.protocol.terms import ModelSpec
from fedclaw.server.cohort_question import Declined
from fedclaw.server.evaluation import EvaluationQuestion
from fedclaw.simulation.federation import SimulatedFederation
from fedclaw.simulation.job import State
from fedclaw.simulation.trainer import loaded_model
from fedclaw.site.evaluation import EVALUATION_BATCH, exact_sums, permitted

WHOLE = "federation"
"""Who answers with the metrics of a test table that belongs to no client."""


class Evaluator:
    """Keeps its model warm."""

    def __init__(self, federation: SimulatedFederation) -> None:
        self._federation = federation
        self._inputs = torch.from_numpy(federation.table.inputs)
        self._models: dict[str, nn.Module] = {}

    def evaluate(self, clients: Sequence[int], memory: Mapping[int, State], evaluated: EvaluationQuestion) -> None:
        """Add what the clients find; those with parameters of their own evaluate these."""
        federation, plan, parameters = self._federation, evaluated.asked, evaluated.parameters
        if not federation.has_tests:
            if federation.test is not None:
                outputs = _outputs(self._model(plan.model, parameters), torch.from_numpy(federation.test.inputs))
                _add(federation, outputs, federation.test.targets, evaluated, WHOLE)
            return
        own_models = bool(plan.personal) or strategy_class(plan.strategy).personal_model
        model = self._model(plan.model, parameters)
        for client in clients:
            rows = federation.tests(client)
            if not len(rows):
                continue
            if own_models:
                mine = memory.get(client, {}).get(PERSONAL, {})
                model = self._model(plan.model, {**parameters, **mine})
            outputs = _outputs(model, self._inputs[torch.from_numpy(rows)])
            _add(federation, outputs, federation.table.targets[rows], evaluated, federation.name(client))

    def _model(self, spec: ModelSpec, parameters: Mapping[str, NDArray[np.float32]]) -> nn.Module:
        key = spec.model_dump_json()
        if key not in self._models:
            model = loaded_model(self._federation, spec, parameters).eval()
            # Pooling is several times faster with channels last.
            self._models[key] = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        load_parameters(self._models[key], parameters)
        return self._models[key]


def _add(
    federation: SimulatedFederation,
    outputs: torch.Tensor,
    targets: NDArray[Any],
    evaluated: EvaluationQuestion,
    name: str,
) -> None:
    count, workload, plan = len(targets), federation.workload, evaluated.asked
    try:
        wanted, bins = permitted(federation.policy(plan), workload.task, plan, count)
    except Refusal as refusal:
        evaluated.declined.append(Declined(name, refusal.code.name.lower(), refusal.reason))
        return
    sums = exact_sums(workload, wanted, bins, outputs, torch.from_numpy(targets))
    evaluated.include(name, count, sums)


def _outputs(model: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model(part) for part in torch.split(inputs, EVALUATION_BATCH)])
