"""Evaluation of simulated clients: on a table that the federation has as a whole, or on each client's own rows."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedclaw.learning.pooled import histogram_shape, histograms_of
from fedclaw.learning.registry import strategy_class
from fedclaw.learning.strategy import PERSONAL
from fedclaw.protocol.plan import SCORE_HISTOGRAM, ModelSpec, Plan, Refusal
from fedclaw.server.exchange import Declined, Evaluated
from fedclaw.simulation.federation import SimulatedFederation
from fedclaw.simulation.job import State
from fedclaw.simulation.trainer import load, loaded_model
from fedclaw.site.evaluation import EVALUATION_BATCH, counted
from fedclaw.site.policy.checks import permitted_metrics

WHOLE = "federation"
"""Who answers with the metrics of a test table that belongs to no client."""


class Evaluator:
    """Keeps its model warm."""

    def __init__(self, federation: SimulatedFederation) -> None:
        self._federation = federation
        self._inputs = torch.from_numpy(federation.table.inputs)
        self._models: dict[str, nn.Module] = {}

    def evaluate(
        self,
        clients: Sequence[int],
        plan: Plan,
        parameters: Mapping[str, NDArray[np.float32]],
        memory: Mapping[int, State],
        evaluated: Evaluated,
    ) -> None:
        """Add the metrics of `parameters` to `evaluated`; of clients with parameters of their own, of those."""
        federation = self._federation
        if not federation.has_tests:
            if federation.test is not None:
                logits = _logits(self._model(plan.model, parameters), torch.from_numpy(federation.test.inputs))
                _add(federation, plan, logits, federation.test.targets, evaluated, WHOLE)
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
            logits = _logits(model, self._inputs[torch.from_numpy(rows)])
            _add(federation, plan, logits, federation.table.targets[rows], evaluated, federation.name(client))

    def _model(self, spec: ModelSpec, parameters: Mapping[str, NDArray[np.float32]]) -> nn.Module:
        key = spec.model_dump_json()
        if key not in self._models:
            model = loaded_model(self._federation, spec, parameters).eval()
            # Pooling is several times faster with channels last.
            self._models[key] = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        load(self._models[key], parameters)
        return self._models[key]


def _add(
    federation: SimulatedFederation,
    plan: Plan,
    logits: torch.Tensor,
    targets: NDArray[np.int64],
    evaluated: Evaluated,
    name: str,
) -> None:
    count = len(targets)
    try:
        policy = federation.policy(plan)
        wanted = permitted_metrics(policy, plan.metrics, count)
    except Refusal as refusal:
        evaluated.declined.append(Declined(name, refusal.code.name.lower(), refusal.reason))
        return
    labels = torch.from_numpy(targets)
    values = federation.workload.evaluate(logits, labels)
    evaluated.answered.append(name)
    found = {metric: values[metric] * count for metric in wanted if metric in values}
    counts = counted(wanted, values, logits, labels)
    evaluated.include(name, count, found, {kind: np.array(numbers, np.float64) for kind, numbers in counts.items()})
    bins = plan.score_bins if SCORE_HISTOGRAM in policy.shared_metrics else None
    if bins and histogram_shape(logits.shape[1], bins):
        scores = histograms_of(logits.numpy().astype(np.float64), targets, bins)
        evaluated.pooled.add_histograms(scores, 0.0, count)


def _logits(model: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model(part) for part in torch.split(inputs, EVALUATION_BATCH)])
