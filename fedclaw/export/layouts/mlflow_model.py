"""An MLflow model (pyfunc) of the bundle's pipeline, to load, register and serve as any other.

It is stored as code and files (`mlflow_code`), without a pickle, and needs neither FedClaw nor torch where it runs.
"""

import importlib.metadata
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from fedclaw.errors import BundleError, Setting, UsageError
from fedclaw.export.layout import MANIFEST, PIPELINE
from fedclaw.export.layouts.base import Deployable
from fedclaw.files import write_atomic
from fedclaw.learning.preprocessing import TypedColumn
from fedclaw.progress import quieter
from fedclaw.report.tracking import FIRST_PATIENCE, public, reason_of, settings_of_mlflow, store_errors

CODE = Path(__file__).with_name("mlflow_code.py")
RUNS_WITH = ("mlflow", "onnxruntime", "numpy", "pandas")
_CHATTY = ("mlflow", "mlflow.models", "mlflow.pyfunc", "mlflow.store", "alembic")


def write_mlflow(deployable: Deployable, directory: Path) -> None:
    """Fill `directory` with the model. Raises BundleError for a bundle without pipeline.onnx, UsageError when MLflow
    cannot be imported."""
    manifest = deployable.verified.manifest
    if (pipeline := manifest.pipeline) is None:
        why = manifest.no_pipeline or "it is of an earlier version; export its run again"
        raise BundleError(f"an MLflow model is made of {PIPELINE}, and the bundle has none: {why}")
    if deployable.graph != PIPELINE:
        raise BundleError(
            f"an MLflow model takes typed columns: it is made of {PIPELINE} (", Setting("graph", PIPELINE), ")"
        )
    mlflow = import_mlflow()
    with tempfile.TemporaryDirectory(dir=directory) as scratch, _quietly():
        root = Path(scratch)
        write_atomic(root / PIPELINE, deployable.model)
        write_atomic(root / MANIFEST, deployable.verified.contents[MANIFEST])
        mlflow.pyfunc.save_model(
            path=str(directory / "model"),
            python_model=str(CODE),
            artifacts={"pipeline": str(root / PIPELINE), "manifest": str(root / MANIFEST)},
            signature=_signature(mlflow, pipeline.columns, deployable),
            pip_requirements=[f"{name}=={importlib.metadata.version(name)}" for name in RUNS_WITH],
            metadata=deployable.provenance,
        )
    _leave_out_where_files_were(directory / "model" / "MLmodel")
    for path in list((directory / "model").iterdir()):
        path.rename(directory / path.name)
    (directory / "model").rmdir()
    deployable.write_provenance(directory)


def _leave_out_where_files_were(path: Path) -> None:
    """MLflow notes where it copied each artifact and the code from: directories of this machine.

    Of the code's path MLflow itself reads the name alone.
    """
    told = yaml.safe_load(path.read_text(encoding="utf-8"))
    flavor = told["flavors"]["python_function"]
    for artifact in flavor["artifacts"].values():
        artifact["uri"] = artifact["path"]
    flavor["model_code_path"] = CODE.name
    write_atomic(path, yaml.safe_dump(told, sort_keys=False).encode())


def register(directory: Path, name: str, alias: str | None, registry: str, provenance: dict[str, str]) -> int:
    """Register the model in `directory` as the next version of `name` and return that; `alias` points to it then.

    Raises BundleError, without the password in the registry's address, when the registry refuses or fails.
    """
    mlflow = import_mlflow()
    with _quietly(), settings_of_mlflow(FIRST_PATIENCE):
        try:
            client = mlflow.MlflowClient(tracking_uri=registry, registry_uri=registry)
            _have_name(mlflow, client, name)
            made = client.create_model_version(name, str(directory.resolve()), tags=provenance)
            if alias is not None:
                client.set_registered_model_alias(name, alias, made.version)
        except store_errors() as error:
            raise BundleError(
                f"{directory} is written and not registered: the registry at {public(registry)} refuses: "
                f"{reason_of(error)}"
            ) from error
    return int(made.version)


def _have_name(mlflow: Any, client: Any, name: str) -> None:
    try:
        client.create_registered_model(name)
    except mlflow.exceptions.MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def import_mlflow() -> Any:
    """The `mlflow` package, which reports to nobody. Raises UsageError when it, or pandas, is not installed."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("DO_NOT_TRACK", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    try:
        import mlflow
        import pandas  # noqa: F401 - a data frame is what an MLflow model is asked with
    except ImportError as error:
        raise UsageError(f"{error.name} is not installed; install it with: pip install {error.name}") from error
    return mlflow


def _signature(mlflow: Any, columns: tuple[TypedColumn, ...], deployable: Deployable) -> Any:
    """What the model takes and gives, as MLflow checks it: columns of a table, or one tensor."""
    import numpy as np
    from mlflow.types import ColSpec, DataType, Schema, TensorSpec

    manifest = deployable.verified.manifest
    assert manifest.pipeline is not None
    if len(columns) == 1 and columns[0].shape[1:] != (1,):
        (one,) = columns
        outputs: list[ColSpec | TensorSpec] = [
            TensorSpec(np.dtype(_NUMPY[told.dtype]), _sizes(told.shape), told.name)
            for told in manifest.pipeline.outputs
        ]
        taken = Schema([TensorSpec(np.dtype(one.dtype), _sizes(one.shape))])
        return mlflow.models.ModelSignature(inputs=taken, outputs=Schema(outputs))
    # MLflow refuses wider numbers than are asked for, and a data frame's are float64; the model's code narrows them.
    kinds = {"string": DataType.string, "float32": DataType.double, "float64": DataType.double}
    taken = Schema([ColSpec(kinds[column.dtype], column.name, required=True) for column in columns])
    named = [ColSpec(kinds[told.dtype], told.name) for told in manifest.pipeline.outputs if told.dtype == "string"]
    values = [ColSpec(DataType.float, "values")] if not manifest.labels else []
    shares = [ColSpec(DataType.float, f"probability of {label}") for label in manifest.labels]
    refused = [ColSpec(DataType.boolean, "refused")]
    return mlflow.models.ModelSignature(inputs=taken, outputs=Schema([*named, *values, *refused, *shares]))


def _sizes(shape: tuple[int | str, ...]) -> tuple[int, ...]:
    """-1 for what is of any size."""
    return tuple(size if isinstance(size, int) else -1 for size in shape)


_NUMPY = {"string": "str", "bool": "bool", "float32": "float32"}


@contextmanager
def _quietly() -> Iterator[None]:
    """MLflow says at length what it guesses; errors are raised as usual.

    Warnings are collected, and nobody looks at them: MLflow sets filters of its own, which would show them.
    """
    with quieter(logging.ERROR, *_CHATTY), warnings.catch_warnings(record=True):
        yield
