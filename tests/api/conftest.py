"""Small data whose labels can be learnt, and a net that learns them."""

import numpy as np
import pytest
import torch
from torch import nn

import fedclaw


class Net(nn.Module):
    def __init__(self, inputs=5, classes=3):
        super().__init__()
        self.hidden = nn.Linear(inputs, 8)
        self.head = nn.Linear(8, classes)

    def forward(self, inputs):
        return self.head(torch.relu(self.hidden(inputs)))


def examples(count=120, seed=0):
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 3, count)
    return generator.normal(size=(count, 5)) + 2 * labels[:, None], labels


@pytest.fixture
def federation():
    return fedclaw.Federation.from_arrays(*examples(), clients=4, seed=1)
