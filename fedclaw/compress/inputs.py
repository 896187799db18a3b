"""What the steps of a compression look at: public files, and inputs that are made at the coordinator.

The evaluation file is for the figures that are reported, and for nothing else: no row of it may be among those that a
student learns from, stops by, or is chosen by.

Legend: N examples, D input shape without the batch.
"""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedclaw.compress.models import Teacher
from fedclaw.compress.record import CompressSettings, InputOrigin, Step, StepInputs
from fedclaw.errors import DataError, UsageError
from fedclaw.files import sha256_file
from fedclaw.learning.workload import Floats, Table, schema_digest
from fedclaw.server.run_directory import ReleaseUse
from fedclaw.server.statistics_release import read_release


@dataclass(frozen=True)
class Inputs:
    """Inputs (N, *D) at the coordinator, and where they are from."""

    values: torch.Tensor
    origin: InputOrigin
    description: str
    sha256: str | None = None
    release: ReleaseUse | None = None

    def looked_at_in(self, step: Step, doing: str) -> StepInputs:
        """The record of a step that looked at them; `doing` goes behind the description."""
        return StepInputs(
            step=step,
            origin=self.origin,
            description=f"{self.description}, {doing}",
            examples=len(self.values),
            sha256=self.sha256,
            release=self.release,
        )


@dataclass(frozen=True)
class PublicFile:
    """A public file as it was read; `table` is without targets worth the name where it holds inputs alone."""

    setting: str
    path: Path
    sha256: str
    table: Table

    @property
    def named(self) -> str:
        """As the setting that gave it."""
        return f"{self.setting}={self.path}"

    @property
    def inputs(self) -> Inputs:
        """Its inputs, without its targets."""
        values = torch.from_numpy(np.array(self.table.inputs, dtype=np.float32))
        what = "public inputs" if self.setting == "inputs" else "labelled public examples"
        return Inputs(values, "public", f"{len(values)} {what} of {self.path.name}", self.sha256)


@dataclass(frozen=True)
class PublicData:
    """The public files of a compression, those of training free of the evaluation file's rows."""

    inputs: PublicFile | None = None
    labelled: PublicFile | None = None
    evaluation: PublicFile | None = None

    @property
    def known(self) -> Inputs | None:
        """What recovery can learn on: the inputs of both files; None where there is neither."""
        found = [file.inputs for file in (self.inputs, self.labelled) if file is not None]
        if len(found) < 2:
            return found[0] if found else None
        first, second = found
        values = torch.cat([first.values, second.values])
        digest = hashlib.sha256(f"{first.sha256}{second.sha256}".encode()).hexdigest()
        return Inputs(values, "public", f"{first.description} and {second.description}", digest)


def read_public(settings: CompressSettings, teacher: Teacher) -> PublicData:
    """The files that the settings name, which may share no row with the evaluation file.

    Raises DataError for a file that the schema does not fit, UsageError for rows that are in both.
    """
    schema = teacher.workload.schema
    inputs = None
    if settings.inputs is not None:
        values = schema.read_inputs(settings.inputs)
        unlabelled = Table(values, np.zeros(len(values), schema.task.target_dtype))
        inputs = PublicFile("inputs", settings.inputs, content_digest(settings.inputs), unlabelled)
    labelled, evaluation = (
        None if path is None else read_labelled(name, path, teacher)
        for name, path in (("labelled", settings.labelled), ("evaluation", settings.evaluation))
    )
    if evaluation is None:
        return PublicData(inputs, labelled)
    inputs, labelled = (
        None if file is None else apart_from(file, evaluation, settings.overlap) for file in (inputs, labelled)
    )
    return PublicData(inputs, labelled, evaluation)


def read_labelled(setting: str, path: Path, teacher: Teacher) -> PublicFile:
    """A file of labelled public examples. Raises DataError for one that the schema does not fit."""
    return PublicFile(setting, path, content_digest(path), teacher.workload.schema.read_examples(path))


def apart_from(file: PublicFile, evaluation: PublicFile, overlap: str) -> PublicFile:
    """The file without the rows of `evaluation`, on which models are measured.

    Raises UsageError, unless they are to be dropped.
    """
    if file.sha256 == evaluation.sha256:
        raise UsageError(
            f"{file.named} and {evaluation.named} have the same content: the accuracies would be of rows that the "
            "student learnt from; give rows of their own to each"
        )
    reported = set(_rows_of(evaluation.table.inputs))
    shared = np.array([row in reported for row in _rows_of(file.table.inputs)], bool)
    if not shared.any():
        return file
    if overlap == "refuse":
        raise UsageError(
            f"{int(shared.sum())} of {len(shared)} rows of {file.named} are in {evaluation.named} too: the accuracies "
            "would be of rows that the student learnt from; take them out of one of the files, or say overlap=drop to "
            "leave them out of training"
        )
    return replace(file, table=file.table.take(~shared))


def _rows_of(inputs: Floats) -> list[bytes]:
    """Each row as bytes; 0 and -0 are one."""
    flat: NDArray[Any] = inputs.reshape(len(inputs), -1) + np.float32(0)
    return [row.tobytes() for row in flat]


def content_digest(path: Path) -> str:
    """SHA-256 of a file; of a folder, of what is in its files, wherever they lie and whatever they are called."""
    if not path.is_dir():
        return sha256_file(path)
    found = sorted(sha256_file(item) for item in path.rglob("*") if item.is_file())
    return hashlib.sha256("\n".join(found).encode()).hexdigest()


def synthetic_inputs(settings: CompressSettings, teacher: Teacher) -> Inputs:
    """What synthetic recovery begins with: drawn from the statistics that the settings name, or made from the schema.

    Raises UsageError for a file that cannot be read or is of another federation or schema, DataError for one that is
    no release or says nothing of columns.
    """
    if settings.statistics is None:
        return schema_inputs(teacher, settings.synthetic, settings.seed)
    path, schema = settings.statistics, teacher.workload.schema
    release = read_release(path)
    if release.federation != teacher.record.federation:
        raise UsageError(
            f"statistics={path} is of federation {release.federation!r}, and {teacher.directory.root} is a run of "
            f"{teacher.record.federation!r}"
        )
    if release.schema_digest != schema_digest(teacher.record.schema_text):
        raise UsageError(f"statistics={path} was made with another schema than {teacher.directory.root}; make it again")
    if release.scores is not None or release.survival is not None or not release.statistics.columns:
        raise DataError(
            f"statistics={path} says nothing of the schema's columns; ask for columns= with python -m "
            "fedclaw.statistics, or leave statistics= out: inputs are then made from the schema"
        )
    try:
        random = np.random.default_rng(settings.seed)
        drawn = schema.sampled_inputs(release.statistics, settings.synthetic, random)
    except DataError as error:
        raise DataError(f"statistics={path}: {error}") from error
    values = torch.from_numpy(np.array(drawn, dtype=np.float32))
    told = f"{len(values)} synthetic inputs drawn from the statistics {release.run}"
    return Inputs(values, "charged question", told, sha256_file(path), release.use)


def schema_inputs(teacher: Teacher, count: int, seed: int) -> Inputs:
    """Inputs that are made from the schema alone."""
    values = teacher.workload.schema.synthetic_inputs(count, np.random.default_rng(seed))
    made = torch.from_numpy(np.array(values, dtype=np.float32))
    return Inputs(made, "synthetic", f"{count} synthetic inputs made from the schema")
