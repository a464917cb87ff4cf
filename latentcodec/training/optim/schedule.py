"""How long a run trains, and how weights move: parameter groups, learning rate by progress, moving average.

Nothing here keeps a schedule's state: the learning rate of a step follows from the step.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jsonargparse.typing import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import nn

from latentcodec.training.ranges import BelowOne

Schedule = Literal["cosine", "linear", "constant"]

REFERENCE_FAN_IN = 288  # of a 3x3 convolution from 32 channels, which gets AdamW's learning rate as it is
ORTHOGONAL_SCALE = (
    10.0  # singular values of an orthogonal step, in learning rates (measured in LOG.md, 2026-11-26)
)


@dataclass
class TrainConfig:
    """How long, how fast, how often."""

    max_steps: PositiveInt = 1000
    """Optimizer steps of the run."""
    max_minutes: PositiveFloat | None = None
    """End after this much training time even if max_steps is not reached; the schedule follows the nearer end. A
    run that stops by the clock cannot be repeated bit by bit."""
    batch_size: PositiveInt = 16
    """Crops per process and micro-batch."""
    accumulation: PositiveInt = 1
    """Micro-batches per optimizer step."""
    seed: int = 0
    """Of everything random: weights, order, crops, noise."""
    lr: PositiveFloat = 1e-3
    """Peak learning rate: of AdamW, and a tenth of that of Muon, which moves the weights inside the blocks."""
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.95)
    """AdamW's averaging factors."""
    weight_decay: NonNegativeFloat = 1e-4
    """Share of its convolution and projection weights that a step takes away, in learning rates of their group: ten
    times lr for Muon's weights, lr or less for the others."""
    schedule: Schedule = "cosine"
    """Course of the learning rate after the warm-up."""
    warmup: BelowOne = 0.02
    """Share of the run over which the learning rate rises from 0."""
    clip_norm: PositiveFloat = 1.0
    """Largest gradient norm, of the objective in nats per pixel-channel."""
    ema_decay: BelowOne = 0.999
    """Decay per step of the averaged weights, the ones that are validated and saved."""
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    """Autocast of the network over float32 weights. auto: bf16 where the machine trains faster in it (GPUs, x86
    processors with AMX), else no; decided when the run begins and kept in its config.yaml. bf16 or fp16 told to
    `accelerate launch` count as said here."""
    threads: PositiveInt | Literal["auto"] = "auto"
    """Threads that each process computes with on CPUs. auto: the physical cores that it may use, divided among the
    processes of the machine, less one for each data worker as long as that is at most every fourth. OMP_NUM_THREADS,
    which launchers set to 1, does not count."""
    channels_last: bool = True
    """Memory layout of weights and images; faster on tensor cores and CPUs with bf16 units."""
    validate_every: NonNegativeInt = 250
    """Steps between two validations (with a sample grid); 0: only at the end."""
    checkpoint_every: PositiveInt = 250
    """Steps between two checkpoints; each also refreshes codec/."""
    keep_last: PositiveInt = 2
    """Checkpoints to keep."""
    patience_minutes: PositiveFloat = 30.0
    """End with a sentence where nothing has happened for so long: a disk that does not answer, a data worker or another
    process that was lost. With several processes, more than the longest validation. Downloads take as long as they
    take."""
    statistics_images: PositiveInt = 512
    """Crops, with nothing drawn over them, over which mean and deviation of the latents are measured for codec/."""
    trackers: list[str] | None = None
    """Accelerate's trackers to report to, such as tensorboard, trackio or wandb; metrics.jsonl is always written."""


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters for `Muon`; "scale" is what a group's learning rate is multiplied with.

    Weights inside the blocks, from feature map to feature map, are "orthogonal". AdamW moves every weight by about the
    learning rate, so the output of any other layer moves with its fan-in: dividing by the fan-in (Yang et al. 2022,
    arXiv:2203.03466, table 3) lets one learning rate fit narrow and wide layers, and a codec of any width. Weights
    of convolutions and projections decay; norms and biases neither decay nor scale.
    """
    groups: dict[tuple[bool, int], list[nn.Parameter]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_vector = (
                parameter.numel() == parameter.shape[:1].numel()
            )  # also the gains [C, 1, 1] of RMS norms
            fan_in = 0 if is_vector else parameter[0].numel()
            # diffusers' down_blocks, up_blocks and mid_block; not conv_in, conv_out, quant_conv, post_quant_conv
            inner = "block" in name and fan_in > 0
            groups[inner, 0 if inner else fan_in].append(parameter)
    return [
        {
            "params": parameters,
            "orthogonal": inner,
            "scale": ORTHOGONAL_SCALE if inner else min(1.0, REFERENCE_FAN_IN / max(1, fan_in)),
            "weight_decay": weight_decay if inner or fan_in else 0.0,
        }
        for (inner, fan_in), parameters in sorted(groups.items(), key=lambda entry: entry[0])
    ]


def load_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Take the averages from a checkpoint; settings such as betas and the decay stay those of this run's config."""
    optimizer.load_state_dict({**saved, "param_groups": optimizer.state_dict()["param_groups"]})


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
