"""How weights move: parameter groups, the learning rate as a function of progress, and the moving average.

Nothing here keeps a schedule's state: the learning rate of a step follows from the step.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import nn

Schedule = Literal["cosine", "linear", "constant"]


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Trainable parameters in two groups: weights of convolutions and projections decay, all others do not."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def learning_rate(peak: float, schedule: Schedule, progress: float, warmup: float) -> float:
    """The learning rate at `progress` in [0, 1] of the run.

    A line from 0 to `peak` over the first `warmup` of the run, then `schedule` down to 0 (constant: none).
    """
    if progress < warmup:
        return peak * progress / warmup
    rest = min(1.0, (progress - warmup) / max(1.0 - warmup, 1e-9))
    match schedule:
        case "cosine":
            return peak * (1 + math.cos(math.pi * rest)) / 2
        case "linear":
            return peak * (1 - rest)
        case "constant":
            return peak


def ema_decay(largest: float, updates: int) -> float:
    """The decay after `updates` updates: young averages forget their start faster (as TensorFlow's EMA does)."""
    return min(largest, (1 + updates) / (10 + updates))


@torch.no_grad()
def update_ema(average: nn.Module, model: nn.Module, decay: float) -> None:
    """average <- decay average + (1 - decay) model, over all parameters, in place, in float32."""
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
