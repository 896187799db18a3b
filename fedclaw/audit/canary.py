"""The canary that the adversary plants, an example with a large gradient, and the blank that takes its place.

The server may send whatever parameters it likes, so the adversary chooses them such that the same input has no
gradient with one target, and with another one as large a gradient as it likes:

    classes   the initial parameters times a factor: under a saturated softmax the model is sure of one label
    a number  the same with a last layer of zeros: the model answers every input with the same value

A data set of blanks then has no gradient at all, and a canary among them has one whose direction the adversary knows.
Whatever else is in an update is noise.
"""

import os
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from fedclaw.errors import PrivacyError
from fedclaw.learning.step_loop import load_parameters
from fedclaw.learning.tasks.base import Targets
from fedclaw.learning.workload import Floats, Table, Workload
from fedclaw.protocol.arrays import Arrays
from fedclaw.protocol.terms import ModelSpec

LOUD = 20.0
"""The norm of a canary's gradient, at least, in units of the clipping bound."""

_SILENT = 1e-4
# A blank's gradient over the clipping bound.
_FACTORS = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)
_CANDIDATES = 16


@dataclass(frozen=True)
class Canary:
    """A row (1, *D) with its loud and its silent label, the parameters at which they are that, and the direction
    (d,), of length 1, into which one step from there moves the parameters."""

    parameters: Arrays
    inputs: Floats
    loud: Targets
    silent: Targets
    direction: NDArray[np.float64]

    def rows(self, count: int, present: int) -> Table:
        """`count` rows, of which the first `present` are canaries and the others blanks."""
        inputs = np.repeat(self.inputs, count, axis=0)
        return Table(inputs, np.concatenate([np.repeat(self.loud, present), np.repeat(self.silent, count - present)]))


def make_canary(
    workload: Workload, spec: ModelSpec, parameters: Arrays, clip: float, generator: np.random.Generator
) -> Canary:
    """A canary for this model with gradients of LOUD x `clip` at least. Raises PrivacyError when none is found."""
    model = workload.build(spec)
    inputs = workload.schema.synthetic_inputs(_CANDIDATES, generator)
    for factor in _FACTORS:
        scaled = {name: np.float32(factor) * array for name, array in parameters.items()}
        for chosen in (scaled, _with_zero_head(scaled)):
            load_parameters(model, chosen)
            for row in np.float32(factor) * inputs[:, None]:
                found = _canary(workload, model, chosen, row, clip)
                if found is not None:
                    return found
    raise PrivacyError(
        f"no input makes model {spec.name!r} loud enough for a canary: whatever it is sure of, its gradients stay small"
    )


def _with_zero_head(parameters: Arrays) -> Arrays:
    """`parameters` with the last matrix of weights, and what comes after it, as zeros."""
    names = list(parameters)
    head = max((place for place, name in enumerate(names) if parameters[name].ndim > 1), default=0)
    return {**parameters, **{name: np.zeros_like(parameters[name]) for name in names[head:]}}


def gradient(workload: Workload, model: torch.nn.Module, inputs: Floats, targets: Targets) -> NDArray[np.float64]:
    """The gradient of the mean loss over (inputs, targets) by all parameters, (d,): plain automatic differentiation."""
    loss = workload.loss(model(torch.from_numpy(inputs)), torch.from_numpy(targets))
    parts = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    flat = [
        torch.zeros(parameter.numel()) if part is None else part.reshape(-1)
        for part, parameter in zip(parts, model.parameters(), strict=True)
    ]
    return torch.cat(flat).double().numpy()


def coins(count: int) -> NDArray[np.bool_]:
    """Fair coins from the operating system's cryptographic source, which is none of those under audit."""
    bits = np.unpackbits(np.frombuffer(os.urandom(-(-count // 8)), np.uint8))
    return bits[:count].astype(np.bool_)


def _canary(workload: Workload, model: torch.nn.Module, parameters: Arrays, row: Floats, clip: float) -> Canary | None:
    with torch.no_grad():
        logits = model(torch.from_numpy(row))
    silent, loud = workload.task.answers(logits), workload.task.contradictions(logits)
    signal, rest = (gradient(workload, model, row, label) for label in (loud, silent))
    norm = float(np.linalg.norm(signal))
    if not (np.isfinite(norm) and norm >= LOUD * clip and np.linalg.norm(rest) <= _SILENT * clip):
        return None
    return Canary(parameters, row, loud, silent, -signal / norm)
