"""Evaluation of simulated clients: on a table that the federation has as a whole, or on each client's own rows."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedclaw.federation.exchange import Declined, Evaluated
from fedclaw.federation.plan import Plan, Refusal
from fedclaw.federation.registry import strategy_class
from fedclaw.federation.strategy import PERSONAL
from fedclaw.privacy.policy_checks import permitted_metrics
from fedclaw.simulation.federation import SimulatedFederation
from fedclaw.simulation.job import State
from fedclaw.simulation.trainer import loaded_model
from fedclaw.site.evaluation import EVALUATION_BATCH

WHOLE = "federation"
"""Who answers with the metrics of a test table that belongs to no client."""


def evaluate_clients(
    federation: SimulatedFederation,
    clients: Sequence[int],
    plan: Plan,
    parameters: Mapping[str, NDArray[np.float32]],
    memory: Mapping[int, State],
    evaluated: Evaluated,
) -> None:
    """Add the metrics of `parameters` to `evaluated`."""
    model = loaded_model(federation, plan.model, dict(parameters)).eval()
    if not federation.has_tests:
        if federation.test is not None:
            logits = _logits(model, torch.from_numpy(federation.test.inputs))
            _add(federation, plan, logits, federation.test.targets, evaluated, WHOLE)
        return
    inputs, targets = torch.from_numpy(federation.table.inputs), federation.table.targets
    own_model = bool(plan.personal) or strategy_class(plan.strategy).personal_model
    for client in clients:
        rows = federation.tests(client)
        if not len(rows):
            continue
        mine = memory.get(client, {}).get(PERSONAL, {}) if own_model else {}
        tested = loaded_model(federation, plan.model, {**parameters, **mine}).eval() if mine else model
        logits = _logits(tested, inputs[torch.from_numpy(rows)])
        _add(federation, plan, logits, targets[rows], evaluated, federation.name(client))


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
        wanted = permitted_metrics(federation.policy(plan), plan.metrics, count)
    except Refusal as refusal:
        evaluated.declined.append(Declined(name, refusal.code.name.lower(), refusal.reason))
        return
    values = federation.workload.evaluate(logits, torch.from_numpy(targets))
    evaluated.answered.append(name)
    evaluated.examples += count
    for metric in wanted:
        if metric in values:
            evaluated.sums[metric] = evaluated.sums.get(metric, 0.0) + values[metric] * count
            evaluated.weights[metric] = evaluated.weights.get(metric, 0.0) + count


def _logits(model: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model(part) for part in torch.split(inputs, EVALUATION_BATCH)])
