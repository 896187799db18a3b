"""The state of a run between rounds: model, optimiser, the strategy's memory, and the sites' receipts.

`GlobalModel` is the server's half of a strategy: global parameters, and the optimiser that moves them. `RunState` holds
it and the strategy's memory; it is checkpointed and resumed. `RunReceipts` keeps of each figure the worst that a site
has reported. By them a run whose noise leaves nothing to learn is called that; by its figures, `Task.nothing_learned`.
"""

import logging
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedclaw.errors import CheckpointError
from fedclaw.learning import postprocess
from fedclaw.learning.strategy import Participation, Strategy
from fedclaw.privacy.mechanisms.choice import mechanism_of
from fedclaw.privacy.mechanisms.sum_noise import SumNoise
from fedclaw.protocol.arrays import Arrays, Update, shapes_of
from fedclaw.protocol.terms import Plan
from fedclaw.server import checkpoint
from fedclaw.server.checkpoint import Checkpoint
from fedclaw.server.round_report import RoundResult, result_of
from fedclaw.server.run_directory import RunDirectory, RunRecord, SiteReceipt
from fedclaw.server.training import TrainingQuestion

log = logging.getLogger(__name__)

_LEAST_SIGNAL = 3.0
# Standard deviations. Below, not even gradients that all point one way can be told from the noise.


def hopeless_noise(record: RunRecord, receipts: Mapping[str, SiteReceipt], sites: int) -> str | None:
    """The warning for a run whose noise drowns whatever there is to learn; None: it does not.

    A run's steps move the model by at most the clipping bound each, and by that only if the gradients of all examples
    point one way at every step; of the noise's own path, its deviation in that one direction is compared with the sum.
    """
    found = [signal for signal in _signals(record, list(receipts.values()), sites) if signal < _LEAST_SIGNAL]
    if not found:
        return None
    return (
        f"with this noise nothing can be learned: even if all gradients pointed one way, {record.rounds} rounds would "
        f"move the model by {max(found):.2g} standard deviations of the noise; take a larger epsilon, more examples or "
        "sites, larger batches or more rounds"
    )


def _signals(record: RunRecord, receipts: Sequence[SiteReceipt], sites: int) -> list[float]:
    """Largest possible signal over the noise in its direction, over the whole run; empty without noise."""
    if record.privacy is not None:
        noised = [item for item in receipts if item.receipt.mechanism == "dp-sgd" and item.receipt.noise_multiplier > 0]
        if not noised or len(noised) < len(receipts):
            return []
        # A mean of K sites' paths: signals add up to at most K of the best one's, deviations to the root of K.
        best = max(_of_one(item, record.rounds) for item in noised)
        return [best * math.sqrt(len(noised))]
    mechanism = mechanism_of(record)
    if not isinstance(mechanism, SumNoise):
        return []
    return [mechanism.signal_to_noise(sum(item.examples for item in receipts), sites)]


def _of_one(item: SiteReceipt, rounds: int) -> float:
    """Of T steps on samples of B: T C against sqrt(T) z C / B."""
    receipt = item.receipt
    return receipt.sample_rate * item.examples * math.sqrt(receipt.steps * rounds) / receipt.noise_multiplier


class RunReceipts:
    """The last receipt of each site, by name."""

    def __init__(self, directory: RunDirectory, record: RunRecord) -> None:
        self._directory = directory
        self._record = record
        self._judged_noise = False
        self.by_site: dict[str, SiteReceipt] = directory.read_receipts()

    def add(self, trained: TrainingQuestion) -> None:
        """Take up a round's receipts; those in `trained` say no less afterwards than each site said before."""
        if self._record.simulated is None:
            for site, now in trained.receipts.items():
                trained.receipts[site] = now.after(self._before(site, now))
        self.by_site.update(trained.receipts)
        if not self._judged_noise and (warning := hopeless_noise(self._record, self.by_site, len(trained.answered))):
            log.warning("%s", warning)
        self._judged_noise = True

    def write(self) -> None:
        """On disk on return."""
        self._directory.write_receipts(self.by_site)

    def _before(self, site: str, now: SiteReceipt) -> SiteReceipt | None:
        before = self.by_site.get(site)
        if before is not None and now.receipt.is_better_than(before.receipt):
            log.warning(
                "%s says that less is spent than it said before in this run: the worst that it has told stays, "
                "and its ledger should be looked at",
                site,
            )
        return before


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
        saved = checkpoint.newest(directory.root, directory.store)
        self._directory = directory
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
            self._directory.root,
            Checkpoint(
                self.completed,
                self.model.parameters,
                self.model.optimizer_state(),
                self.clip,
                self.memory,
                None if self.result is None else self.result.model_dump(mode="json"),
            ),
            self._directory.store,
        )
        self._saved_at = time.monotonic()
