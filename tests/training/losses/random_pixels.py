"""Random pixels for the tests of losses."""

import torch
from torch import Tensor

SHAPE = (3, 2, 6, 5)


def pixels(*shape: int) -> Tensor:
    """Images in [-1, 1]."""
    return torch.rand(*shape) * 2 - 1
