"""Pruning of attentions: heads shrink alike, whether torch's layer or one written out in linear layers."""

import pytest
import torch
from torch import nn

from fedclaw.compress.prune import prune_to_fraction
from fedclaw.compress.size import count_parameters

HEADS = 4


class TorchEncoder(nn.Module):
    """Eight tokens of four numbers, a class token and positions; torch's own encoder."""

    def __init__(self, *, norm_first=False):
        super().__init__()
        self.embed = nn.Linear(4, 16)
        self.token = nn.Parameter(torch.randn(1, 1, 16))
        self.positions = nn.Parameter(torch.randn(1, 9, 16))
        layer = nn.TransformerEncoderLayer(16, HEADS, 32, dropout=0.1, batch_first=True, norm_first=norm_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, 5)

    def forward(self, inputs):
        tokens = self.embed(inputs.unflatten(1, (8, 4)))
        tokens = torch.cat([self.token.expand(len(tokens), -1, -1), tokens], 1) + self.positions
        return self.head(self.encoder(tokens)[:, 0])


class OwnAttention(nn.Module):
    """Heads that nothing but a `view` in the forward pass tells of."""

    def __init__(self, *, fused=False, fixed=False):
        super().__init__()
        self.size = 16 // HEADS if fixed else -1
        self.embed = nn.Linear(4, 16)
        self.norm = nn.LayerNorm(16)
        self.projections = nn.ModuleList([nn.Linear(16, 48)] if fused else [nn.Linear(16, 16) for _ in range(3)])
        self.out = nn.Linear(16, 16)
        self.up = nn.Linear(16, 32)
        self.down = nn.Linear(32, 16)
        self.head = nn.Linear(16, 5)

    def forward(self, inputs):
        tokens = self.embed(inputs.unflatten(1, (8, 4)))
        normed = self.norm(tokens)
        parts = [projection(normed) for projection in self.projections]
        parts = parts[0].chunk(3, -1) if len(parts) == 1 else parts
        query, key, value = (part.unflatten(-1, (HEADS, self.size)).transpose(1, 2) for part in parts)
        attended = nn.functional.scaled_dot_product_attention(query, key, value)
        tokens = tokens + self.out(attended.transpose(1, 2).flatten(2))
        tokens = tokens + self.down(torch.relu(self.up(tokens)))
        return self.head(tokens.mean(1))


@pytest.mark.parametrize("fraction", [0.1, 0.4, 0.8])
@pytest.mark.parametrize(
    "make",
    [
        TorchEncoder,
        lambda: TorchEncoder(norm_first=True),
        OwnAttention,
        lambda: OwnAttention(fused=True),
    ],
    ids=["torch", "torch, norm first", "own", "own, fused"],
)
def test_a_transformer_becomes_as_small_as_asked_and_runs(make, fraction):
    model = make()
    pruned = prune_to_fraction(model, (32,), fraction)
    assert pruned.parameters_after == count_parameters(pruned.model) <= fraction * pruned.parameters_before
    assert all(size > 0 for parameter in pruned.model.parameters() for size in parameter.shape)
    inputs = torch.randn(7, 32)
    outputs = pruned.model(inputs)
    assert outputs.shape == (7, 5)
    with torch.no_grad():  # torch's encoder takes another path there
        torch.testing.assert_close(pruned.model(inputs), outputs, rtol=1e-4, atol=1e-5)
    outputs.sum().backward()
