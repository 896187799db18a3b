"""The state of a run between rounds: model, optimiser and the strategy's memory. It is checkpointed and resumed.

`GlobalModel` is the server's half of a strategy: global parameters, and the optimiser that moves them.
"""

import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedclaw.errors import CheckpointError
from fedclaw.learning import postprocess
from fedclaw.learning.strategy import Participation, Strategy
from fedclaw.protocol.arrays import Arrays, shapes_of
from fedclaw.protocol.plan import Plan
from fedclaw.protocol.update import Update
from fedclaw.server import checkpoint
from fedclaw.server.checkpoint import Checkpoint
from fedclaw.server.round_report import RoundResult, result_of
from fedclaw.server.run_directory import RunDirectory, RunRecord

_STATE_PREFIX = "optimizer/"


class GlobalModel:
    """Global parameters under a strategy's server optimiser.

    `parameters` are numpy views of the tensors that the optimiser steps in place.
    """

    def __init__(self, initial: Mapping[str, NDArray[np.float32]], strategy: Strategy) -> None:
        self.parameters: Arrays = {name: np.array(array, dtype=np.float32) for name, array in initial.items()}
        self._tensors = {name: torch.from_numpy(array) for name, array in self.parameters.items()}
        self._optimizer = strategy.server_optimizer(list(self._tensors.values()))

    @np.errstate(over="ignore")
    def step(self, mean_delta: Mapping[str, NDArray[np.float32]]) -> float:
        """Move along the mean of the sites' deltas and return its L2 norm. `mean_delta` is overwritten.

        The norm is infinite where its square is too large for float32: a model that has diverged is no error here.

        Parameters that it lacks, which the sites keep to themselves, stay where they are.
        """
        squares = 0.0
        for name, tensor in self._tensors.items():
            delta = mean_delta.get(name)
            if delta is None:
                continue
            flat = delta.reshape(-1)
            squares += float(np.dot(flat, flat))
            tensor.grad = torch.from_numpy(np.negative(delta, out=delta))
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return float(np.sqrt(squares))

    def optimizer_state(self) -> dict[str, NDArray[Any]]:
        """The optimiser's state as named arrays, for a checkpoint."""
        state = self._optimizer.state_dict()["state"]
        return {
            f"{_STATE_PREFIX}{index}/{key}": _to_array(value)
            for index, entries in state.items()
            for key, value in entries.items()
            if value is not None
        }

    def restore_optimizer(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Take the state that `optimizer_state` gave. Raises CheckpointError when it does not fit the optimiser."""
        state: dict[int, dict[str, Any]] = {}
        for name, array in arrays.items():
            index, key = name.removeprefix(_STATE_PREFIX).split("/", 1)
            state.setdefault(int(index), {})[key] = torch.from_numpy(np.array(array))
        snapshot = self._optimizer.state_dict()
        snapshot["state"] = state or snapshot["state"]
        try:
            self._optimizer.load_state_dict(snapshot)
        except (ValueError, KeyError) as error:
            raise CheckpointError(f"the checkpoint's optimiser state does not fit: {error}") from error


def _to_array(value: Any) -> NDArray[Any]:
    return value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)


class RunState:
    """The state after `completed` rounds; that of the newest checkpoint, or of a new run that begins with `initial`."""

    def __init__(
        self,
        directory: RunDirectory,
        record: RunRecord,
        strategy: Strategy,
        initial: Mapping[str, NDArray[np.float32]],
    ) -> None:
        saved = checkpoint.newest(directory.root)
        self._root = directory.root
        self._strategy = strategy
        self.model = GlobalModel(saved.parameters if saved else initial, strategy)
        if saved:
            self.model.restore_optimizer(saved.optimizer)
        self.completed = saved.round if saved else 0
        self.clip = saved.clip if saved else None
        """The adaptive clipping bound, where there is one."""
        shared = {name: a for name, a in self.model.parameters.items() if name not in record.personal}
        self.memory = dict(saved.strategy) if saved else strategy.server_state(shared)
        self.result = result_of(saved)
        """The last round's; None if it was passed over, and before the first round."""
        self._saved_at = time.monotonic()
        if not saved:
            self.save()

    def step(self, summed: Update, plan: Plan, participation: Participation) -> float:
        """Move the model along the mean of what the sites sent; the update's L2 norm. Raises UpdateError."""
        mean = postprocess.at_server(summed, plan, shapes_of(self.model.parameters))
        self.clip = mean.clip or self.clip
        return self.model.step(self._strategy.aggregate(mean.arrays, self.memory, participation))

    def complete(self, number: int, result: RoundResult | None) -> None:
        """Record that round `number` is done, or was passed over (`result` None)."""
        self.completed, self.result = number, result

    @property
    def unsaved_seconds(self) -> float:
        """Since the last checkpoint."""
        return time.monotonic() - self._saved_at

    def save(self) -> None:
        """Write the checkpoint; on disk on return."""
        checkpoint.save(
            self._root,
            Checkpoint(
                self.completed,
                self.model.parameters,
                self.model.optimizer_state(),
                self.clip,
                self.memory,
                None if self.result is None else self.result.model_dump(mode="json"),
            ),
        )
        self._saved_at = time.monotonic()
