"""The encoder's output as a diagonal gaussian over latents: its mean, its log-variance, and draws from it.

Shapes: B batch, c latent channels, h w latent cells.
"""

from __future__ import annotations

import torch
from torch import Tensor

LOGVAR_RANGE = (-30.0, 20.0)  # as diffusers' DiagonalGaussianDistribution, which decodes what we train


def mean_and_logvar(parameters: Tensor) -> tuple[Tensor, Tensor]:
    """The encoder's [B, 2c, h, w] -> the posterior's mean and log-variance, [B, c, h, w] float32 each.

    The log-variance is clamped to [-30, 20] as diffusers' DiagonalGaussianDistribution does.
    """
    mean, logvar = parameters.float().chunk(2, dim=1)
    return mean, logvar.clamp(*LOGVAR_RANGE)


def sample_posterior(mean: Tensor, logvar: Tensor, noise: Tensor) -> Tensor:
    """[B, c, h, w]: mean + e^(logvar / 2) noise, with standard normal noise of the same shape."""
    return mean + torch.exp(logvar / 2) * noise
