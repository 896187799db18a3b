"""The job "digits-100" as a user of Apple's pfl would simulate it, in one process.

    pip install --no-deps pfl multiprocess prv-accountant dill

(without its dependencies, for pfl 0.6 asks for a dp-accounting older than FedClaw's.) pfl has no setting for a cohort
without repetition, nor for batches drawn anew in each epoch: a sampler and a dataset of a few lines do both, at the
places that pfl has for them. In its first round pfl also evaluates the clients' models on their own examples, which
cannot be turned off. But for the random numbers that this draws, a run trains the plain loop's models one by one.
"""

import os
from collections.abc import Iterator

# Before pfl is imported. Its own choice is an accelerator where there is one, and the job is for a processor.
os.environ.setdefault("PFL_PYTORCH_DEVICE", "cpu")

import numpy as np
import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm import FederatedAveraging, NNAlgorithmParams
from pfl.callback.central_evaluation import CentralEvaluationCallback
from pfl.data import FederatedDataset
from pfl.data.pytorch import PyTorchTensorDataset
from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams
from pfl.metrics import Weighted, get_overall_value
from pfl.model.pytorch import PyTorchModel
from torch.nn import functional

from experiments.benchmarks.digits import ASKED, BATCH, CLIENTS, EPOCHS, RATE, Job

ACCURACY = "accuracy"


class Classifier(torch.nn.Module):
    """The job's model with the loss and the metrics that pfl asks of a module."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def loss(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The mean over a batch."""
        return functional.cross_entropy(self.model(inputs), targets)

    @torch.no_grad()
    def metrics(self, inputs: torch.Tensor, targets: torch.Tensor) -> dict[str, Weighted]:
        """How many are right, of how many."""
        right = int((self.model(inputs).argmax(1) == targets).sum())
        return {ACCURACY: Weighted(right, len(targets))}


class Shuffled(PyTorchTensorDataset):  # type: ignore[misc]
    """A client's examples, in a new order each time that they are gone through."""

    def iter(self, batch_size: int | None) -> Iterator[list[torch.Tensor]]:
        """Batches."""
        inputs, targets = self.raw_data
        for rows in torch.split(torch.randperm(len(targets)), batch_size or len(targets)):
            yield [inputs[rows], targets[rows]]


def run_pfl(job: Job, rounds: int, seed: int = 0) -> float:
    """The last accuracy on the job's test examples."""
    torch.manual_seed(seed)
    model = PyTorchModel(
        model=(classifier := Classifier(job.federation.workload.build(job.model))),
        local_optimizer_create=torch.optim.SGD,
        central_optimizer=torch.optim.SGD(classifier.parameters(), lr=1.0),
    )
    test = PyTorchTensorDataset((torch.from_numpy(job.test.inputs), torch.from_numpy(job.test.targets)))
    clients = _clients(job, seed)
    FederatedAveraging().run(
        algorithm_params=NNAlgorithmParams(
            central_num_iterations=rounds,
            evaluation_frequency=rounds,
            train_cohort_size=ASKED,
            val_cohort_size=None,
        ),
        backend=SimulatedBackend(training_data=clients, val_data=clients, postprocessors=[WeightByDatapoints()]),
        model=model,
        model_train_params=NNTrainHyperParams(
            local_num_epochs=EPOCHS, local_learning_rate=RATE, local_batch_size=BATCH
        ),
        model_eval_params=NNEvalHyperParams(local_batch_size=None),
        callbacks=[CentralEvaluationCallback(test)],
        # It would print each round's metrics.
        send_metrics_to_platform=False,
    )
    (accuracy,) = (value for _, value in model.evaluate(test))
    return float(get_overall_value(accuracy))


def _clients(job: Job, seed: int) -> FederatedDataset:
    inputs, targets = torch.from_numpy(job.federation.table.inputs), torch.from_numpy(job.federation.table.targets)
    shares = [torch.from_numpy(job.federation.share(client)) for client in range(CLIENTS)]
    data = [Shuffled((inputs[share], targets[share])) for share in shares]
    cohorts = _cohorts(seed)
    return FederatedDataset(data.__getitem__, lambda: next(cohorts))


def _cohorts(seed: int) -> Iterator[int]:
    generator = np.random.default_rng(seed)
    while True:
        yield from map(int, generator.choice(CLIENTS, ASKED, replace=False))
