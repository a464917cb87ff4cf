"""What a latent space is like and what it is fit for: every telling measure of a codec on some images, with verdicts.

`measure_health` runs the codec on windows of the images; `posterior_health` judges a posterior alone, cheaply enough
for every validation of a training. The measures are defined in `latent_measures.py` and `decoder_measures.py`, the
rules and the three headlines in `verdicts.py`. Pages are made in `report/`.

Shapes: N images, C channels, H W pixels, c latent channels, h w latent cells, f downsampling factor.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from latentcodec.pixels import crop_middle
from latentcodec.quality import decoder_measures as decoding
from latentcodec.quality import latent_measures as latents
from latentcodec.quality.decoder_measures import Inspectable, Progress, no_progress
from latentcodec.quality.precision import certify
from latentcodec.quality.verdicts import verdicts, why_dead

WINDOW = 256  # pixels a side of what is looked at of each image
DISTURBED = 16  # windows that are decoded with draws, noise and 8 bits
DROPPED = 8  # windows that are decoded without each of the channels
CERTIFIED = 2  # windows for the half-precision certificate
POINTS = 4000  # codes of 1 x 1 latents whose distances are taken


@dataclass(frozen=True)
class Health:
    """The measures of a codec on some images, and what they mean."""

    measures: dict[str, Any]
    """By name; None where a measure does not apply or was not taken. Units are in the names, or they are shares."""
    channels: list[dict[str, Any]]
    """Per channel: name, mean, mean_error, std, noise, signal_share, rate_bits, kl_nats, sec, drop_db, dead, tails."""
    curves: dict[str, Any] = field(default_factory=dict)
    """noise [(deviations, dB)], spectrum [(frequency, power)], histograms [c][bins], correlations [c][c]."""

    @property
    def verdicts(self) -> dict[str, dict[str, Any]]:
        """By headline (diffusion, sampling, storage): level, reasons, notes."""
        return verdicts(self.measures, self.channels)

    def summary(self) -> dict[str, Any]:
        """What `latentcodec inspect --json` prints: verdicts, measures and channels, without the curves."""
        return {"verdicts": self.verdicts, "measures": self.measures, "channels": self.channels}


@dataclass(frozen=True)
class Windows:
    """What was looked at, for the pages: all on the CPU, in the order of the images."""

    x: Tensor
    """[N, C, H, W] in [-1, 1]."""
    mean: Tensor
    """[N, c, h, w]: the posterior's mean."""
    std: Tensor
    """[N, c, h, w]: its deviation."""
    y: Tensor
    """[N, C, H, W]: the decoded means, clamped and in 8 bits."""


def cut_windows(
    images: Sequence[Tensor], f: int, largest: int = WINDOW, sides: Sequence[int] | None = None
) -> tuple[Tensor, list[int]]:
    """The middle of each image [C, H, W] -> [N, C, S, S], and the numbers of the images that were large enough.

    S is `largest` or, where half of the images are smaller, the median of their shorter sides, cut to a multiple of f.
    `sides`: the shorter sides in pixels of whole pictures, where the images are their middles of `largest` pixels; else
    those of the images. Raises ValueError where there is no image, or none with a whole latent cell.
    """
    if not images:
        raise ValueError("there is no image to look at")
    shorter = [min(image.shape[-2:]) for image in images] if sides is None else sides
    side = min(largest, int(median(shorter))) // f * f
    if side == 0:
        raise ValueError(f"the images are smaller than one latent cell of {f} x {f} pixels")
    kept = [number for number, image in enumerate(images) if min(image.shape[-2:]) >= side]
    return torch.stack([crop_middle(images[number], side) for number in kept]), kept


def measure_health(
    codec: Inspectable,
    x: Tensor,
    labels: Sequence[int] | None = None,
    masks: Tensor | None = None,
    progress: Progress = no_progress,
) -> tuple[Health, Windows]:
    """Look at `codec` on windows x [N, C, H, W] in [-1, 1]; sides are multiples of f.

    labels: one class for each window, for LNC and VIV per class; masks [N, h, w] in {0, 1}: the foreground, for SRSS.
    `progress` is told of every image that was encoded or decoded, `passes` of them in all.
    """
    mean, std = decoding.posteriors(codec, x, progress)
    size = (x.shape[-2], x.shape[-1])
    y = decoding.decoded(codec, mean, size, progress)
    health = posterior_health(mean, std, codec.downsampling_factor, labels, masks)
    health.measures["psnr_db"] = decoding.decibels(x, y).mean().item()
    health.measures["decoder_spread"] = decoding.decoder_spread(x, y)
    windows = Windows(x, mean, std, y)
    scale = torch.tensor([channel["std"] for channel in health.channels])
    centre = torch.tensor([channel["mean"] for channel in health.channels])
    _disturb(codec, windows, scale, health, progress)
    drops = decoding.channel_drops(codec, x[:DROPPED], mean[:DROPPED], centre, progress)
    for channel, drop in zip(health.channels, drops, strict=True):
        channel["drop_db"] = drop
    health.measures["equivariance_error"] = decoding.equivariance_errors(codec, x[:DISTURBED], progress)
    _certificate(codec, x[:CERTIFIED], health)
    _note_dead_channels(health)
    return health, windows


def passes(images: int, latent_channels: int) -> int:
    """How many images `measure_health` encodes and decodes, for a progress bar."""
    disturbed, dropped = min(images, DISTURBED), min(images, DROPPED)
    return (
        2 * images + disturbed * (3 + len(decoding.NOISES)) + dropped * (1 + latent_channels) + 4 * disturbed
    )


def posterior_health(
    mean: Tensor,
    std: Tensor,
    f: int,
    labels: Sequence[int] | None = None,
    masks: Tensor | None = None,
) -> Health:
    """What the posterior alone says: mean, std [N, c, h, w] of it, f pixels a cell. Decodes nothing.

    Raises ValueError where the posterior is not finite.
    """
    if not (mean.isfinite().all() and std.isfinite().all()):
        raise ValueError("the codec's latents of these images are not finite")
    moments = latents.channel_moments(mean, std)
    draws = latents.standardised_draws(mean, std, moments)
    tails = latents.tails(draws)
    sec, of_channels = latents.high_frequency_share(mean)
    columns: dict[str, list[Any]] = {
        "name": [str(k) for k in range(mean.shape[1])],
        **{
            key: getattr(moments, key).tolist()
            for key in ("mean", "mean_error", "std", "noise", "signal_share")
        },
        "rate_bits": moments.rate.tolist(),
        "kl_nats": moments.kl.tolist(),
        "sec": of_channels,
        **tails,
    }
    channels = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    health = Health(_measures(channels, mean, std, f), channels, _curves(mean, draws))
    health.measures["sec"] = sec
    if labels is not None and len({*labels}) > 1:
        health.measures["lnc"] = latents.label_agreement(mean, labels, masks)
        health.measures["viv_by_class"] = latents.viv(mean, labels)
    if masks is not None:
        health.measures["srss"] = latents.foreground_similarity(mean, masks)
    _note_dead_channels(health)
    return health


def _measures(channels: list[dict[str, Any]], mean: Tensor, std: Tensor, f: int) -> dict[str, Any]:
    """Over all channels; medians and means over those that live, or over all where none does."""
    count, c, height, width = mean.shape
    live = [channel for channel in channels if why_dead(channel, channels) is None] or channels

    def over(key: str) -> list[float]:
        return [channel[key] for channel in live]

    measures: dict[str, Any] = {
        "images": count,
        "cells": count * height * width,
        "latent": f"f{f}c{c}",
        "cells_a_side": [height, width],
        "rate_bits": median(over("rate_bits")),
        "kl_nats": sum(channel["kl_nats"] for channel in channels) / c,
        "signal_share": max(channel["signal_share"] for channel in channels),
        "noise": median(over("noise")),
        **{f"within_{k}": sum(over(f"within_{k}")) / len(live) for k in (1, 2, 3)},
        "kurtosis": median(over("kurtosis")),
        "largest_draw": max(over("largest")),
        "lds": latents.local_similarity(mean, f),
        "viv": latents.viv(mean),
        "effective_rank": latents.effective_rank(mean),
    }
    if height == width == 1:
        codes = mean + std * torch.randn(mean.shape, generator=torch.Generator().manual_seed(2)).to(mean)
        shares = latents.hole_shares(codes[:POINTS, :, 0, 0])
        measures |= dict(zip(("hole_share", "hole_share_ideal"), shares, strict=True))
    return measures


def _curves(mean: Tensor, draws: Tensor) -> dict[str, Any]:
    return {
        "spectrum": latents.radial_spectrum(mean),
        "histograms": latents.histograms(draws),
        "correlations": latents.correlations(mean).tolist(),
    }


def _disturb(codec: Inspectable, windows: Windows, scale: Tensor, health: Health, progress: Progress) -> None:
    """Draws, noise and 8 bits, on the first windows."""
    x, mean, std, y = (t[:DISTURBED] for t in (windows.x, windows.mean, windows.std, windows.y))
    size = (x.shape[-2], x.shape[-1])
    whole = decoding.decibels(x, y).mean().item()

    def score(z: Tensor) -> float:
        return decoding.decibels(x, decoding.decoded(codec, z, size, progress)).mean().item()

    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(3)).to(mean)
    curve = decoding.noise_curve(codec, x, mean, scale, whole, progress)
    levels = dict(curve)
    health.curves["noise"] = curve
    health.measures.update(
        {
            "draw_cost_db": whole - score(mean + std * noise),
            "noise_1db": decoding.noise_of_one_decibel(curve),
            "psnr_at_noise_0.05_db": levels[0.05],
            "psnr_at_noise_0.1_db": levels[0.1],
            "int8_loss_db": whole - score(decoding.int8(mean)),
            "int8_in_blocks_loss_db": whole - score(decoding.int8_in_blocks(mean)),
            "disturbed_images": len(x),
        }
    )


def _certificate(codec: Inspectable, x: Tensor, health: Health) -> None:
    """float16, where the codec is an AutoencoderKL, the class whose plain layers the certificate runs on."""
    vae = getattr(codec, "vae", None)
    if not isinstance(vae, AutoencoderKL):
        health.measures.update({"fp16_safe": None, "largest_activation": None})
        return
    certificate = certify(vae, list(x))
    health.measures.update(
        {
            "fp16_safe": certificate.float16_is_safe,
            "fp16_psnr_db": certificate.float16.psnr,
            "largest_activation": certificate.largest,
        }
    )


def _note_dead_channels(health: Health) -> None:
    for channel in health.channels:
        channel["dead"] = why_dead(channel, health.channels)
    dead = sum(channel["dead"] is not None for channel in health.channels)
    health.measures["dead_share"] = dead / len(health.channels)
