"""A workload around a torch module of the caller's own, on arrays held in memory; nothing has to be installed for it.

Legend: N examples, D shape of one input, C classes.
"""

import copy
import inspect
import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from pydantic import Field, ValidationError, model_validator
from torch import nn

from fedclaw.errors import DataError, PluginError, UsageError
from fedclaw.learning.registry import SCHEMAS, WORKLOADS
from fedclaw.learning.tasks.base import Task
from fedclaw.learning.tasks.regression import NumberTarget
from fedclaw.learning.workload import Floats, Schema, Table, Workload
from fedclaw.protocol.frozen import Frozen, explain
from fedclaw.protocol.terms import ModelSpec

NAME = "arrays"
"""The workload's name in a run's record."""
Model = type[nn.Module] | nn.Module | Callable[[], nn.Module]
"""A module's class that takes no arguments, a module (its parameters are what the run begins with), or a function that
makes one."""

_PROBES = 2


class _Content(Frozen):
    input_shape: tuple[int, ...] = Field(min_length=1)
    labels: tuple[str, ...] = ()
    """Of the classes; or there is a `target`."""
    target: NumberTarget | None = None
    columns: tuple[str, ...] = ()
    """Names of the inputs, where a data frame had them."""

    @model_validator(mode="after")
    def _one_task(self) -> Self:
        if (len(self.labels) < 2) != (self.target is not None):
            raise ValueError("there are labels of two classes or more, or a target")
        return self


class ArraySchema(Schema):
    """Inputs and labels of arrays in memory: there are no files to read."""

    name: ClassVar[str] = NAME

    def __init__(self, content: _Content) -> None:
        self._content = content

    @classmethod
    def of(cls, input_shape: tuple[int, ...], target: tuple[str, ...] | NumberTarget) -> Self:
        """The schema of arrays of that shape, whose target is of classes or a number."""
        if isinstance(target, NumberTarget):
            return cls(_Content(input_shape=input_shape, target=target))
        return cls(_Content(input_shape=input_shape, labels=target))

    def with_columns(self, columns: tuple[str, ...]) -> Self:
        """The same, with names of the inputs."""
        return type(self)(self._content.model_copy(update={"columns": columns}))

    @classmethod
    def parse(cls, text: str, origin: str) -> Self:
        """Read what `to_json` wrote. Raises DataError."""
        try:
            return cls(_Content.model_validate_json(text))
        except ValidationError as error:
            raise DataError(f"{origin}: {explain(error)}") from error

    def to_json(self) -> str:
        """Canonical JSON."""
        return json.dumps(self._content.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))

    @property
    def input_shape(self) -> tuple[int, ...]:
        """D."""
        return self._content.input_shape

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the C classes; none where the target is a number."""
        return self._content.labels

    @property
    def task(self) -> Task:
        """Classification by the labels, or regression to the target."""
        return super().task if self._content.target is None else self._content.target.task

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the inputs; none where they came as an array."""
        return self._content.columns

    def read_examples(self, path: Path) -> Table:
        """Raises DataError: the examples are in memory."""
        raise self._refusal(path)

    def read_inputs(self, path: Path) -> Floats:
        """Raises DataError: the examples are in memory."""
        raise self._refusal(path)

    def describe_inputs(self) -> Mapping[str, Any]:
        """Shape and columns."""
        return self._content.model_dump(mode="json")

    def synthetic_inputs(self, count: int, generator: np.random.Generator) -> Floats:
        """(count, *D) standard normal numbers: the schema knows no more of them."""
        return generator.standard_normal((count, *self.input_shape)).astype(np.float32)

    @staticmethod
    def _refusal(path: Path) -> DataError:
        return DataError(f"{path}: a federation of arrays reads no files; give its data to fedclaw.Federation")


class ArrayWorkload(Workload):
    """Builds what its subclass was given (`around`); by itself it knows no model."""

    name: ClassVar[str] = NAME
    make: ClassVar[Any] = None
    """What makes a module, a static method; None where nobody gave one."""

    def default_model(self) -> ModelSpec:
        """The one that there is."""
        return ModelSpec(name="module")

    def build(self, spec: ModelSpec) -> nn.Module:
        """A fresh module. Raises PluginError where nobody gave one."""
        if self.make is None:
            raise PluginError("the model is a torch module of the program that made the run: give it, run.model(MyNet)")
        model: nn.Module = self.make()
        return model

    def spec_of(self, model: nn.Module) -> ModelSpec:
        """The same spec for every module."""
        return ModelSpec(name="module", args={"class": type(model).__name__})


def around(model: Model) -> type[ArrayWorkload]:
    """The workload whose model is `model`. Raises UsageError for what is none."""
    return type("ArrayWorkload", (ArrayWorkload,), {"make": staticmethod(factory_of(model))})


def factory_of(model: Model) -> Callable[[], nn.Module]:
    """What makes a fresh module. Raises UsageError."""
    if isinstance(model, nn.Module):
        return partial(copy.deepcopy, model)
    if not callable(model):
        raise UsageError(
            f"model={model!r:.60} is no torch module: give a class (MyNet), a module (MyNet()) or a function that "
            "makes one (lambda: MyNet(64))"
        )
    return model


def plugins(workload: type[ArrayWorkload] = ArrayWorkload) -> dict[tuple[str, str], type[Any]]:
    """What to lend (`fedclaw.learning.registry.lent`) for a run on arrays."""
    return {(SCHEMAS, NAME): ArraySchema, (WORKLOADS, NAME): workload}


def check_model(workload: ArrayWorkload, inputs: Floats) -> ModelSpec:
    """Build the model and have it predict a few examples; its spec.

    Raises UsageError for a module that cannot be made, has state besides its parameters, is not float32 in main memory
    or does not map (N, *D) to (N, C).
    """
    model = _made(workload)
    _require_parameters_alone(model)
    _require_shape(model, torch.from_numpy(inputs[:_PROBES]), workload.task)
    return workload.spec_of(model)


def _made(workload: ArrayWorkload) -> nn.Module:
    make = workload.make
    assert make is not None
    name = getattr(make, "__name__", "the model")
    try:
        with torch.random.fork_rng(devices=[]):
            model = workload.build(workload.default_model())
    except TypeError as error:
        if not inspect.isclass(make):
            raise UsageError(f"model={name} cannot be made: {error}") from error
        raise UsageError(
            f"model={name} cannot be made without arguments ({error}): give a function that makes it, "
            f"lambda: {name}(...)"
        ) from error
    if not isinstance(model, nn.Module):
        raise UsageError(f"model={name} made a {type(model).__name__}, and a torch.nn.Module is needed")
    return model


def _require_parameters_alone(model: nn.Module) -> None:
    if buffers := [name for name, _ in model.named_buffers()]:
        layers = sorted({type(model.get_submodule(name.rpartition(".")[0])).__name__ for name in buffers})
        raise UsageError(
            f"the model keeps state besides its parameters, in {', '.join(layers)} ({', '.join(buffers[:3])}): "
            "clients' batch statistics cannot be averaged, nor be private; take GroupNorm or LayerNorm in place of "
            "BatchNorm"
        )
    for name, layer in model.named_modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            raise UsageError(
                f"{name} is a {type(layer).__name__}, which makes one example's output depend on the others of its "
                "batch: take GroupNorm or LayerNorm"
            )
    parameters = dict(model.named_parameters())
    if not parameters:
        raise UsageError("the model has no parameters to train")
    for name, parameter in parameters.items():
        if parameter.dtype != torch.float32 or parameter.device.type != "cpu":
            raise UsageError(
                f"parameter {name} is {parameter.dtype} on {parameter.device}: simulated clients train in float32 on "
                'the processor; model.float().to("cpu")'
            )
        if not torch.isfinite(parameter).all():
            raise UsageError(f"parameter {name} begins with numbers that are not finite")


def _require_shape(model: nn.Module, inputs: torch.Tensor, task: Task) -> None:
    shape = tuple(inputs.shape)
    try:
        with torch.no_grad():
            outputs = model.eval()(inputs)
    except Exception as error:
        what = " ".join(f"{type(error).__name__}: {error}".split())
        raise UsageError(f"the model cannot take inputs of the shape {shape} (examples first): {what}") from error
    if not isinstance(outputs, torch.Tensor):
        raise UsageError(f"the model gives a {type(outputs).__name__}; it is to give a tensor (examples, outputs)")
    if tuple(outputs.shape) != (len(inputs), task.outputs):
        what = f"{task.outputs} classes" if task.labels else "one number to predict"
        raise UsageError(
            f"the model gives {tuple(outputs.shape)} for inputs of the shape {shape}, and the data has {what}: its "
            f"last layer has to have {task.outputs} outputs, ({len(inputs)}, {task.outputs})"
        )
    if not torch.isfinite(outputs).all():
        raise UsageError("the model gives numbers that are not finite for the first examples")
