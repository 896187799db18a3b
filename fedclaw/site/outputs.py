"""What a model makes of each row by itself: nothing that other rows do to the rounding of one."""

import torch


def one_by_one(model: torch.nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """The outputs (N, C) of inputs (N, *D), each row on its own, whatever else is there, and wherever it stands.

    In a batch, how the products of one row are rounded can depend on how many rows there are, and on where in memory
    it lies: so each has memory of its own. With parameters that leave little but rounding, one row more would otherwise
    turn the outputs of many.
    """
    with torch.no_grad():
        return torch.cat([model(row.clone()) for row in torch.split(inputs, 1)])
