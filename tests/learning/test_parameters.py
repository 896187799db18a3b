"""A model takes parameters of its own names and shapes, and no others."""

from collections.abc import Mapping

import numpy as np
import pytest
import torch

from fedclaw.learning.workload import Floats, load_parameters

OWN = {"weight": np.arange(6, dtype=np.float32).reshape(3, 2), "bias": np.ones(3, np.float32)}


def test_a_model_takes_its_parameters() -> None:
    model = torch.nn.Linear(2, 3)
    load_parameters(model, OWN)
    assert {name: array.tolist() for name, array in OWN.items()} == {
        name: parameter.tolist() for name, parameter in model.named_parameters()
    }


@pytest.mark.parametrize(
    ("changed", "shown"),
    [
        ({"weight": np.ones((1, 2), np.float32)}, r"weight \(1, 2\) against \(3, 2\)"),
        ({"more": np.ones(1, np.float32)}, r"more \(1,\) against nothing"),
    ],
)
def test_what_would_be_stretched_or_left_over_is_refused(changed: Mapping[str, Floats], shown: str) -> None:
    with pytest.raises(ValueError, match=shown):
        load_parameters(torch.nn.Linear(2, 3), {**OWN, **changed})


def test_what_is_missing_is_refused() -> None:
    with pytest.raises(ValueError, match="bias nothing against"):
        load_parameters(torch.nn.Linear(2, 3), {"weight": OWN["weight"]})
