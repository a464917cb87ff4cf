"""Rate control: the weight of the KL divergence in each step, steered to a rate where the configuration names one.

The KL divergence is the number of nats that the posterior tells about an image: the rate of the codec. Its weight
trades rate against distortion, but which weight gives which rate depends on data and network. So the configuration may
name the rate itself (`loss.target_bits`) or the posterior's relative standard deviation (`loss.target_std`), and the
weight is moved a little in each step until the measured value is the one named. Free bits need the same statistics.

Shapes: c latent channels.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from latentcodec.training.losses.terms import LossConfig

KL_WEIGHT_RANGE = (1e-10, 1e4)  # beyond these a rate target is out of reach, and the weight would run away
CONTROL_GAIN = (
    0.05  # octaves per step and bit of error; a codec that follows at once reaches its target in 40 steps
)
LARGEST_RATE_ERROR = 1.0  # bits: a start far from its target moves the weight by at most 3.5 % a step


class RateControl:
    """The KL weight of each step, and the statistics of the step before that free bits and a target need."""

    def __init__(self, config: LossConfig, latent_channels: int) -> None:
        self.config = config
        self.weight = config.kl_weight
        self.reference = torch.zeros(latent_channels)  # [c] nats per element, of the step before
        self.centre = torch.zeros(latent_channels)  # [c] of the latent, of the step before
        self.deviation = torch.ones(latent_channels)  # likewise, the posterior's noise included

    def at(self, step: int) -> float:
        """The weight that counts at an optimizer step."""
        return self.weight * kl_warmup(step, self.config.kl_warmup_steps)

    def update(self, step: int, per_channel: Tensor, statistics: Tensor) -> dict[str, float]:
        """Take in the whole step's statistics ([c] and [3, c], means over all processes) and steer the weight."""
        config, self.reference = self.config, per_channel
        self.centre, self.deviation = statistics[0], deviations(statistics)
        rate, std = bits_per_element(per_channel), relative_std(statistics)
        report = {"kl_weight": self.at(step), "latent_bits": rate, "latent_noise": std}
        if step >= config.kl_warmup_steps and config.target_bits is not None:
            self.weight = next_kl_weight(self.weight, rate, config.target_bits)
        elif step >= config.kl_warmup_steps and config.target_std is not None:
            self.weight = next_kl_weight(self.weight, bits_of_std(std), bits_of_std(config.target_std))
        return report

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold, as JSON has it."""
        return {
            "weight": self.weight,
            "reference": self.reference.tolist(),
            "centre": self.centre.tolist(),
            "deviation": self.deviation.tolist(),
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Go on from a checkpoint; the weight is the configuration's, except where a target has moved it."""
        self.reference = torch.tensor(saved["reference"])
        for name in (
            "centre",
            "deviation",
        ):  # older checkpoints lack one or both; the next step measures them
            if name in saved:
                setattr(self, name, torch.tensor(saved[name]))
        if self.config.target_bits is not None or self.config.target_std is not None:
            self.weight = saved["weight"]


def bits_per_element(per_channel: Tensor) -> float:
    """`kl_per_channel` -> bits per latent element, the mean over the channels: what target_bits is held
    against."""
    return per_channel.mean().item() / math.log(2)


def channel_statistics(mean: Tensor, logvar: Tensor) -> Tensor:
    """[3, c]: per channel the batch mean of the posterior's mean, of its square, and of its variance.

    Means, so that those of N processes with equal batches average to those of one.
    """
    return torch.stack([mean.mean((0, 2, 3)), mean.square().mean((0, 2, 3)), logvar.exp().mean((0, 2, 3))])


def deviations(statistics: Tensor) -> Tensor:
    """`channel_statistics` -> [c]: the latent's deviation, of the posterior's mean and of its draw together."""
    centre, square, noise = statistics
    return (square - centre.square()).clamp(min=0).add(noise).sqrt()


def relative_std(statistics: Tensor) -> float:
    """`channel_statistics` -> the posterior's std over that of the latent: 1 where nothing is encoded.

    Per channel sqrt(noise / (noise + signal)) with the mean variance of the posterior as noise and the
    variance of its mean as signal; then the geometric mean over the channels, which no unused channel
    dominates.
    """
    centre, square, noise = statistics.double()
    signal = (square - centre.square()).clamp(min=0)
    return (torch.log(noise / (noise + signal)).mean() / 2).exp().item()


def bits_of_std(std: float) -> float:
    """The rate in bits per element of a posterior with this relative std, -log2 std: the gaussian channel."""
    return -math.log2(std)


def kl_warmup(step: int, warmup_steps: int) -> float:
    """The factor of the KL weight at an optimizer step, counted from 0: a line from 0 to 1, then 1."""
    return min(1.0, step / warmup_steps) if warmup_steps else 1.0


def next_kl_weight(weight: float, measured: float, target: float) -> float:
    """The KL weight of the next optimizer step; measured and target are rates in bits per latent element.

    log2 weight grows by CONTROL_GAIN * (measured - target), the error limited to +-1 bit: an integral
    controller in octaves. The optimal posterior variance of a gaussian decoder is proportional to the KL
    weight, so one bit per element needs two octaves of weight. For a target std give `bits_of_std` of both.
    The measured rate must be the same on all processes.
    """
    error = max(-LARGEST_RATE_ERROR, min(LARGEST_RATE_ERROR, measured - target))
    low, high = KL_WEIGHT_RANGE
    return max(low, min(high, weight * 2 ** (CONTROL_GAIN * error)))
