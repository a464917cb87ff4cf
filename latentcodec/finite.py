"""Nothing that is not finite is saved or scored.

Weights are looked at when they are loaded and before they are saved, reconstructions before they are scored.
"""

from collections.abc import Mapping

import torch
from torch import Tensor


class NotFinite(ValueError):
    """Numbers that must be finite are NaN or infinite; the message names where."""


def require_finite(tensors: Mapping[str, Tensor], what: str) -> None:
    """Raises `NotFinite` naming `what` and the first tensor that holds NaN or an infinity."""
    for name, tensor in tensors.items():
        numbers = tensor.is_floating_point() and tensor.device.type != "meta"
        if numbers and not torch.isfinite(tensor).all():
            count = int((~torch.isfinite(tensor)).sum())
            raise NotFinite(f"{what}: {count} of {tensor.numel()} numbers of {name} are NaN or infinite")
