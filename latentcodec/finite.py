"""Nothing that is not finite is saved or scored.

Weights are looked at when they are loaded and before they are saved, reconstructions before they are scored. Results
may hold what has no value, such as the deviation of one number; JSON gets null for it.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class NotFinite(ValueError):
    """Numbers that must be finite are NaN or infinite; the message names where."""


def require_finite(tensors: Mapping[str, Tensor], what: str) -> None:
    """Raises `NotFinite` naming `what` and the first tensor that holds NaN or an infinity."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or tensor.device.type == "meta":
            continue
        is_finite = torch.isfinite(tensor.float() if tensor.itemsize == 1 else tensor)  # not there for float8
        if not is_finite.all():
            count = int((~is_finite).sum())
            raise NotFinite(f"{what}: {count} of {tensor.numel()} numbers of {name} are NaN or infinite")


def finite(value: Any) -> Any:
    """`value` with every inf and nan in it replaced by None, which JSON can hold."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
