"""Measures of a VAE whose latent is one vector an image, as introductions draw it: in raw units, not normalised.

What pages of other codecs show is normalised, which would hide the very thing to be seen here: without a KL codes lie
anywhere, with too much of it all at the origin.

Shapes: N images, M draws, C channels, H W pixels, c numbers of a latent.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from latentcodec.latents import decode_raw, posterior_parameters
from latentcodec.quality.decoder_measures import batches, decibels, decoder_spread
from latentcodec.vae.posterior import mean_and_logvar

ACTIVE_NATS = 0.01  # a number that tells less of an image is asleep
NEIGHBOURS = 5  # for the labels of neighbours
REACH = 2.0  # deviations of a code within which its decoder has been trained


@dataclass(frozen=True)
class RawCodec:
    """A VAE with latents of one cell, in the units that it was trained with. Its inputs may be on another device."""

    vae: Any
    size: tuple[int, int]
    """Pixels of its images."""

    @torch.no_grad()
    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[N, C, H, W] in [-1, 1] -> mean and deviation, [N, c] each."""
        parts = (x[part].to(self.vae.device) for part in self._parts(len(x)))
        found = [mean_and_logvar(posterior_parameters(self.vae, part)) for part in parts]
        mean, logvar = (torch.cat(values).flatten(1).to(x.device) for values in zip(*found, strict=True))
        return mean, (logvar / 2).exp()

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """[N, c] -> [N, C, H, W], clamped to [-1, 1]."""
        maps = z[:, :, None, None]
        parts = (maps[part].to(self.vae.device) for part in self._parts(len(z)))
        return torch.cat([decode_raw(self.vae, part).clamp(-1, 1) for part in parts]).to(z.device)

    def _parts(self, count: int) -> list[slice]:
        return batches(count, self.size[0] * self.size[1])


def kl_by_number(mean: Tensor, std: Tensor) -> Tensor:
    """[N, c] twice -> [c] nats: what each number of the latent tells of an image, on average."""
    return ((mean.square() + std.square() - 1) / 2 - std.log()).mean(0)


def measure(x: Tensor, mean: Tensor, std: Tensor, y: Tensor, drawn: Tensor) -> dict[str, Any]:
    """Of images x [N, C, H, W], their posterior [N, c], the decoded means y and decoded draws: what a table shows."""
    kl = kl_by_number(mean, std)
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(2))
    z = mean + std * noise
    correlation = torch.corrcoef(z.T) if z.shape[1] > 1 else torch.ones(1, 1)
    off = correlation - torch.eye(len(correlation))
    return {
        "psnr_db": decibels(x, y).mean().item(),
        "squared_error": (y - x).square().flatten(1).sum(1).mean().item(),
        "drawn_squared_error": (drawn - x).square().flatten(1).sum(1).mean().item(),
        "drawn_psnr_db": decibels(x, drawn).mean().item(),
        "kl_nats": kl.sum().item(),
        "kl_by_number": kl.tolist(),
        "active": int((kl > ACTIVE_NATS).sum()),
        "numbers": len(kl),
        "mean_sigma": std.mean().item(),
        "mean_square_mu": mean.square().mean().item(),
        "mean_abs_mu": mean.abs().mean().item(),
        "codes_low": mean.min().item(),
        "codes_high": mean.max().item(),
        "codes_std": mean.std(0).mean().item(),
        "decoder_spread": decoder_spread(x, y),
        "draws_mean": z.mean(0).abs().max().item(),
        "draws_std": z.std(0).tolist(),
        "draws_correlation": (off.square().sum() / max(1, off.numel() - len(off))).sqrt().item(),
        "within": [(z.abs() < k).float().mean().item() for k in (1, 2, 3)],
    }


def label_agreement(codes: Tensor, labels: Tensor) -> float:
    """Share of the five nearest codes [N, c] that are of the same class [N]."""
    distance = torch.cdist(codes, codes)
    distance.fill_diagonal_(math.inf)
    nearest = distance.topk(min(NEIGHBOURS, len(codes) - 1), largest=False).indices
    return (labels[nearest] == labels[:, None]).float().mean().item()


def trained_share(codes: Tensor, std: Tensor, points: Tensor) -> float:
    """Share of points [M, c] that lie within two deviations [N, c] of some code: where the decoder has been trained."""
    offsets = (points[:, None] - codes) / std
    return (offsets.square().mean(2).sqrt().amin(1) < REACH).float().mean().item()


def image_distance(pictures: Tensor, data: Tensor) -> Tensor:
    """[M, C, H, W] -> [M]: the distance in pixels to the nearest of the images `data`."""
    return torch.cdist(pictures.flatten(1), data.flatten(1)).amin(1)


def precision(pictures: Tensor, data: Tensor, neighbours: int = 3) -> float:
    """Share of pictures that lie where data lie: within the distance from some image to its third neighbour.

    Kynkaanniemi et al. 2019, arXiv:1904.06991, in pixels instead of features, which small grey images allow.
    """
    flat = data.flatten(1)
    distance = torch.cdist(flat, flat)
    radius = distance.topk(neighbours + 1, largest=False).values[:, -1]
    return (torch.cdist(pictures.flatten(1), flat) <= radius).any(1).float().mean().item()


def radial_power(x: Tensor) -> Tensor:
    """[N, C, H, W] -> mean power by distance from frequency 0, one number a cycle an image, up to half the side."""
    side = x.shape[-1]
    power = torch.fft.fft2(x - x.mean((2, 3), keepdim=True)).abs().square().mean((0, 1))
    frequency = torch.fft.fftfreq(side) * side
    ring = torch.hypot(frequency[:, None], frequency).round().long()
    total = torch.zeros(int(ring.max()) + 1).index_add_(0, ring.flatten(), power.flatten())
    return (total / torch.bincount(ring.flatten()))[1 : side // 2 + 1]


def sharpness(y: Tensor, x: Tensor) -> float:
    """Energy of y above half the band over that of x: 1 as sharp as the images, 0 all blurred."""
    ours, theirs = radial_power(y), radial_power(x)
    half = len(ours) // 2
    return (ours[half:].sum() / theirs[half:].sum()).item()


def largest_step(path: Tensor) -> float:
    """The largest change between neighbours of [M, C, H, W] over the mean one: 1 for an even walk."""
    steps = (path[1:] - path[:-1]).flatten(1).norm(dim=1)
    return (steps.max() / steps.mean().clamp(min=1e-9)).item()


def class_means(codes: Tensor, std: Tensor, labels: Tensor) -> dict[str, Any]:
    """Mean and spread of each class of codes, and the moments of all draws together: a mixture near N(0, I)."""
    classes = [k for k in labels.unique().tolist() if k >= 0]
    variance = (codes.var(0, unbiased=False) + std.square().mean(0)).tolist()
    return {
        "classes": classes,
        "means": [codes[labels == k].mean(0).tolist() for k in classes],
        "stds": [codes[labels == k].std(0, unbiased=False).tolist() for k in classes],
        "mixture_mean": codes.mean(0).tolist(),
        "mixture_variance": variance,
    }


@torch.no_grad()
def importance_bounds(codec: RawCodec, x: Tensor, counts: tuple[int, ...], scale: float) -> dict[int, float]:
    """Nats an image: the bound of k draws from the posterior, for each k; more draws come nearer to ln p(x).

    Burda et al. 2016, arXiv:1509.00519: the mean over the images of ln mean_k p(x | z) p(z) / q(z | x), z from q. With
    one draw it is the evidence lower bound.
    """
    mean, std = codec.posterior(x)
    generator = torch.Generator().manual_seed(3)
    rows = []
    for _ in range(max(counts)):
        noise = torch.randn(mean.shape, generator=generator)
        z = mean + std * noise
        error = (codec.decode(z) - x).flatten(1)
        constant = error.shape[1] * (math.log(scale) + math.log(2 * math.pi) / 2)
        likelihood = -(error / scale).square().sum(1) / 2 - constant
        rows.append(likelihood + (noise.square() / 2 + std.log() - z.square() / 2).sum(1))
    logs = torch.stack(rows).double()  # [K, N]
    return {k: (_blocks(logs, k)).mean().item() for k in counts}


def _blocks(logs: Tensor, k: int) -> Tensor:
    """log mean exp over blocks of k of the K rows."""
    whole = len(logs) // k * k
    return logs[:whole].unflatten(0, (-1, k)).logsumexp(1) - math.log(k)


def monotone(values: Mapping[float, float], rising: bool, tolerance: float = 0.0) -> bool:
    """Whether values by rising key go one way, up to `tolerance`."""
    ordered = [values[key] for key in sorted(values)]
    sign = 1 if rising else -1
    return all(sign * (b - a) >= -tolerance for a, b in itertools.pairwise(ordered))
