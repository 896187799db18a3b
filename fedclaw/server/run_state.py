"""The state of a run between rounds: model, optimiser and the strategy's memory. It is checkpointed and resumed."""

import time
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from fedclaw.learning import postprocess
from fedclaw.learning.strategy import Participation, Strategy
from fedclaw.protocol.arrays import shapes_of
from fedclaw.protocol.plan import Plan
from fedclaw.protocol.update import Update
from fedclaw.server import checkpoint
from fedclaw.server.checkpoint import Checkpoint
from fedclaw.server.global_model import GlobalModel
from fedclaw.server.round_report import RoundResult, result_of
from fedclaw.server.run_directory import RunDirectory, RunRecord


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
