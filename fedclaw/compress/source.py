"""From a run directory to torch models, and back to arrays: what compression starts from and ends with."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedclaw.errors import CheckpointError, CompressionError
from fedclaw.files import sha256_file
from fedclaw.learning.workload import Workload
from fedclaw.protocol.arrays import Arrays
from fedclaw.protocol.terms import ModelSpec
from fedclaw.server.run_directory import RunDirectory, RunRecord

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


def load_teacher(run: Path) -> Teacher:
    """The global model of a finished run, on the CPU. Raises UsageError or CheckpointError."""
    directory = RunDirectory.open(run)
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
    return Teacher(directory, record, workload, model.eval(), parameters, sha256_file(directory.model_path))


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
