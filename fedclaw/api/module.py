"""A workload around a torch module of the caller's own; nothing has to be installed for it.

Legend: N examples, D shape of one input, C classes.
"""

import copy
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from fedclaw.errors import UsageError
from fedclaw.learning.tasks.base import Task
from fedclaw.learning.workload import Floats, Workload
from fedclaw.protocol.terms import ModelSpec

OWN = "module"
"""What a run's record calls a model that is the caller's own module."""
Model = type[nn.Module] | nn.Module | Callable[[], nn.Module]
"""A module's class that takes no arguments, a module (its parameters are what the run begins with), or a function that
makes one."""

_PROBES = 2


class ModuleWorkload(Workload, ABC):
    """Builds a module of the caller's own (`around`) for whatever schema the data has."""

    @staticmethod
    @abstractmethod
    def make() -> nn.Module:
        """A fresh module."""

    def default_model(self) -> ModelSpec:
        """The one that there is."""
        return ModelSpec(name=OWN)

    def build(self, spec: ModelSpec) -> nn.Module:
        """A fresh module."""
        return self.make()

    def spec_of(self, model: nn.Module) -> ModelSpec:
        """The same spec for every module."""
        return ModelSpec(name=OWN, args={"class": type(model).__name__})


def around(model: Model, name: str) -> type[ModuleWorkload]:
    """The workload of that name whose model is `model`. Raises UsageError for what is none."""
    return type("ModuleWorkload", (ModuleWorkload,), {"name": name, "make": staticmethod(factory_of(model))})


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


def check_model(workload: ModuleWorkload, inputs: Floats) -> ModelSpec:
    """Build the model and have it predict a few examples; its spec.

    Raises UsageError for a module that cannot be made, has state besides its parameters, is not float32 in main memory
    or does not map (N, *D) to (N, C).
    """
    model = _made(workload)
    _require_parameters_alone(model)
    _require_shape(model, torch.from_numpy(inputs[:_PROBES]), workload.task)
    return workload.spec_of(model)


def _made(workload: ModuleWorkload) -> nn.Module:
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
    if task.labels and (outputs >= 0).all() and torch.allclose(outputs.sum(dim=1), torch.ones(len(inputs)), atol=1e-4):
        raise UsageError(
            "the model gives probabilities, which add up to 1, and the loss takes logits: leave the last softmax out"
        )
