"""What all workloads share, whatever their inputs: the checking of a model's arguments and of its size."""

from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from pydantic import ValidationError
from torch import nn

from fedclaw.errors import UnknownModel
from fedclaw.protocol.frozen import Frozen, explain
from fedclaw.protocol.terms import ModelSpec

A = TypeVar("A", bound=Frozen)

MAX_PARAMETERS = 2**28
"""1 GiB as float32. A server names the model and a site builds it: no name may make a site run out of memory."""


def known(spec: ModelSpec, models: Mapping[str, type[A]]) -> A:
    """The checked arguments of the model that `spec` names. Raises UnknownModel: a server may have sent it."""
    if spec.name not in models:
        raise UnknownModel(f"no model is called {spec.name!r} here; there are: {', '.join(sorted(models))}")
    try:
        return models[spec.name].model_validate(spec.args)
    except ValidationError as error:
        raise UnknownModel(f"model {spec.name!r}: {explain(error)}") from error


def built(make: Callable[[], nn.Module]) -> nn.Module:
    """The model that `make` gives, once a copy without memory has shown its size. Raises UnknownModel if too large."""
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in make().parameters())
    if parameters > MAX_PARAMETERS:
        raise UnknownModel(f"a model of {parameters} parameters; at most {MAX_PARAMETERS} are built")
    return make()
