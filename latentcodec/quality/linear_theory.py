"""What a VAE will do, told before it is trained: the linear VAE, which has a solution in closed form.

A VAE whose encoder and decoder are linear, with a gaussian likelihood of scale s and a KL of weight b, is probabilistic
PCA with a noise variance of v = b s^2 (Tipping and Bishop 1999; Lucas et al. 2019, "Don't blame the ELBO",
arXiv:1911.02469). A principal direction of the images with variance l is *alive* where l > v: then its latent tells
(1/2) ln(l / v) nats, its posterior has the variance v / l, and draws decode with an error of v along it. Where l <= v
nothing is told, and the error is l: posterior collapse, direction by direction. Deep VAEs begin to collapse at the same
place, since near the collapsed solution every network is linear.

Shapes: N images, D numbers in an image, c latent channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Prediction:
    """What the theory says of a VAE with `latents` numbers an image."""

    noise: float
    """v = KL weight times scale^2: what a direction's variance must exceed."""
    latents: int
    """Numbers that the VAE has for an image."""
    alive: int
    """How many of them will tell something."""
    kl: float
    """Nats an image."""
    posterior_std: float
    """Of the alive ones, their geometric mean; 1 where none is alive."""
    squared_error: float
    """Summed over an image, of decoded draws."""


def eigenvalues(images: Tensor) -> Tensor:
    """[N, ...] in [-1, 1] -> variances of the images along their principal directions, falling, float64 [min(N, D)]."""
    flat = images.flatten(1).double()
    flat = flat - flat.mean(0)
    covariance = flat.T @ flat / len(flat)
    return torch.linalg.eigvalsh(covariance).flip(0).clamp(min=0)[: min(flat.shape)]


def predict(variances: Tensor, latents: int, kl_weight: float, scale: float = 1.0) -> Prediction:
    """Of a VAE with so many numbers an image, from the `variances` that `eigenvalues` gives.

    With a weight of 0 (an autoencoder) all that can be is alive, the KL is infinite and the error what PCA leaves.
    """
    noise = kl_weight * scale**2
    leading = variances[:latents]
    alive = leading[leading > noise]
    told = float("inf") if noise == 0 else (alive / noise).log().sum().item() / 2
    lost = variances.sum().item() - (alive - noise).sum().item()
    std = (noise / alive).log().mean().div(2).exp().item() if len(alive) and noise else float(not len(alive))
    return Prediction(noise, latents, len(alive), told, std, lost)
