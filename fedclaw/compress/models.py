"""The models of a compression: the teacher, its student before and after recovery, how they compare and what they cost.

They come from a run directory and go back to arrays. Legend: N examples, C classes, D input shape without the batch.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedclaw.compress.latency import LATENCY_BATCHES, median_milliseconds
from fedclaw.compress.prune import Looked, Recover, prune
from fedclaw.compress.pruning_record import WEIGHTS_ALONE, PruningReport, PruningSettings
from fedclaw.compress.record import StepInputs
from fedclaw.errors import CheckpointError, CompressionError
from fedclaw.identity.data_keys import Keyring
from fedclaw.learning.workload import Workload
from fedclaw.protocol.arrays import Arrays
from fedclaw.protocol.terms import ModelSpec
from fedclaw.server.run_directory import RunDirectory, RunRecord
from fedclaw.site.device import SMALL_MODEL

SCORING_BATCH = 1024
REBUILD_TOLERANCE = 1e-5
"""Largest difference of logits, relative to their size, between a pruned model and the one built from its spec."""


@dataclass(frozen=True)
class Teacher:
    """A finished run's global model."""

    directory: RunDirectory
    record: RunRecord
    workload: Workload
    model: nn.Module
    parameters: Arrays
    sha256: str
    """Of the run's model.npz."""

    @property
    def input_shape(self) -> tuple[int, ...]:
        """D, without the batch."""
        return self.workload.schema.input_shape


def load_teacher(run: Path, keys: Keyring | None = None) -> Teacher:
    """The global model of a finished run, on the CPU. Raises UsageError, CheckpointError or EncryptionError."""
    directory = RunDirectory.open(run, keys)
    record = directory.record()
    directory.require_whole()
    workload = directory.workload()
    parameters = directory.read_model()
    model = workload.build(record.model)
    try:
        load_arrays(model, parameters)
    except RuntimeError as error:
        raise CheckpointError(
            f"{directory.model_path} does not fit the model of {run / 'run.json'}: {' '.join(str(error).split())}"
        ) from error
    return Teacher(directory, record, workload, model.eval(), parameters, directory.sha256_of(directory.model_path))


def load_arrays(model: nn.Module, parameters: Mapping[str, NDArray[np.float32]]) -> None:
    """Set a model's state. Raises RuntimeError, as torch does, when names or shapes differ."""
    model.load_state_dict({name: torch.from_numpy(np.array(array)) for name, array in parameters.items()})


def arrays_of(model: nn.Module) -> Arrays:
    """A model's state as float32 arrays by state-dict name."""
    return {name: tensor.detach().cpu().float().numpy().copy() for name, tensor in model.state_dict().items()}


def rebuild(workload: Workload, pruned: nn.Module) -> tuple[ModelSpec, nn.Module]:
    """The spec of a pruned model, and the model that the workload builds from it with the same parameters.

    From here on only models that a name and arguments describe are used, because that is what sites build and bundles
    state. Raises CompressionError when the spec does not give the same function.
    """
    spec = workload.spec_of(pruned)
    built = workload.build(spec)
    try:
        built.load_state_dict({name: tensor.cpu() for name, tensor in pruned.state_dict().items()})
    except RuntimeError as error:
        raise CompressionError(
            f"the workload {workload.name!r} describes the pruned model as {spec.model_dump_json()}, but that builds "
            f"other shapes: {' '.join(str(error).split())}"
        ) from error
    shape = workload.schema.input_shape
    sample = torch.randn(8, *shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, got = pruned.cpu().eval()(sample), built.eval()(sample)
    if (expected - got).abs().max() > REBUILD_TOLERANCE * (1 + expected.abs().max()):
        raise CompressionError(
            f"the workload {workload.name!r} describes the pruned model as {spec.model_dump_json()}, but that model "
            "computes something else with the same parameters"
        )
    return spec, built


@dataclass(frozen=True)
class Student:
    """A pruned teacher as the workload builds it, before recovery."""

    spec: ModelSpec
    model: nn.Module
    parameters_before: int
    parameters_after: int
    pruning: PruningReport
    looked_at: tuple[StepInputs, ...] = ()
    """What pruning looked at; recovery says of itself what it did."""


def make_student(
    teacher: Teacher,
    fraction: float,
    pruning: PruningSettings = WEIGHTS_ALONE,
    looked: Looked | None = None,
    recover: Recover | None = None,
    seed: int = 0,
) -> Student:
    """The teacher pruned to `fraction`, or to the target in `pruning`, and built from its spec.

    `looked` holds inputs where `pruning.needs_inputs`, and `recover` trains between two steps (see `prune`). Raises
    CompressionError.
    """
    target = pruning.target(fraction)
    pruned = prune(teacher.model, teacher.input_shape, target, pruning, looked, recover, seed)
    spec, model = rebuild(teacher.workload, pruned.model)
    return Student(spec, model, pruned.parameters_before, pruned.parameters_after, pruned.report, pruned.looked_at)


def predict_logits(model: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """(N, *D) -> (N, C) in evaluation mode, without gradients."""
    model.eval()
    with torch.no_grad():
        return torch.cat([model(part) for part in torch.split(inputs, SCORING_BATCH)])


@contextmanager
def threads_for(parameters: int) -> Iterator[None]:
    """Inside, torch uses one thread for a small model, and its own choice otherwise."""
    usual = torch.get_num_threads()
    if parameters < SMALL_MODEL:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(usual)


def compare_latency(
    before: nn.Module, after: nn.Module, inputs: torch.Tensor, repeats: int
) -> tuple[dict[int, float], dict[int, float]]:
    """Median milliseconds of a forward pass by batch size, of both models.

    On the CPU with one thread, alternately, so that both see the same machine. `inputs` (N, *D) are repeated to fill
    the largest batch.
    """
    models = (before.cpu().eval(), after.cpu().eval())
    largest = max(LATENCY_BATCHES)
    rows = inputs.cpu().repeat(-(-largest // len(inputs)), *[1] * (inputs.dim() - 1))
    with threads_for(0), torch.inference_mode():
        timed = {
            size: median_milliseconds([partial(model, rows[:size].clone()) for model in models], repeats)
            for size in LATENCY_BATCHES
        }
    return {size: pair[0] for size, pair in timed.items()}, {size: pair[1] for size, pair in timed.items()}
