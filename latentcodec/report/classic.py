"""One run of the classic experiments looked at: numbers, and pictures for the page, all of which JSON can hold.

What the numbers mean is in `quality/one_cell.py`, what the page says of them in `pages/classic.py`.

Shapes: N images, C channels, H W pixels, c numbers of a latent.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from latentcodec.pixels import crop_middle
from latentcodec.quality import one_cell as cells
from latentcodec.quality.decoder_measures import decibels
from latentcodec.quality.one_cell import RawCodec
from latentcodec.report.pictures import tiles, webp

GRID, SPAN = 15, 3.0  # the map of introductions: 15 x 15 decoded points of the square from -3 to 3
ATLAS = 31  # tiles a side under the mouse
DRAWS = 64
POINTS = 400  # codes of a scatter
ELLIPSES = 40
WALK = torch.linspace(-6, 6, 13)
STEPS = 11  # pictures of a strip between two codes
BUBBLES, BUBBLE_DRAWS = 6, 8
SHOWN = 11  # images beside their reconstructions


@dataclass(frozen=True)
class Views:
    """What is drawn of a run beside its numbers."""

    scatter: bool = False
    map: bool = False
    draws: bool = False
    walks: int = 0
    """Numbers of the latent that are moved from -6 to 6, those first that tell the most."""
    strips: int = 0
    """Straight lines between the codes of two images."""
    bubbles: bool = False
    reconstructions: bool = False


@dataclass(frozen=True)
class Shown:
    """The images that runs are looked at with."""

    x: Tensor
    """[N, C, H, W]: held out."""
    labels: Tensor | None
    """[N] int64."""
    train: Tensor
    """[N', C, H, W]: some that were trained on."""


def look(codec: RawCodec, shown: Shown, views: Views) -> dict[str, Any]:
    """Numbers and pictures of one run."""
    x = shown.x
    mean, std = codec.posterior(x)
    y = codec.decode(mean)
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(1))
    found: dict[str, Any] = cells.measure(x, mean, std, y, codec.decode(mean + std * noise))
    trained, _ = codec.posterior(shown.train)
    found["train_psnr_db"] = decibels(shown.train, codec.decode(trained)).mean().item()
    found["sharpness"] = cells.sharpness(y, x)
    found["radial_power"] = cells.radial_power(y).tolist()
    if shown.labels is not None:
        found["label_agreement"] = cells.label_agreement(mean, shown.labels)
        found["classes"] = cells.class_means(mean, std, shown.labels)
    order = sorted(range(mean.shape[1]), key=lambda k: -found["kl_by_number"][k])
    if views.draws:
        found |= _draws(codec, shown)
    if views.scatter:
        found["scatter"] = _scatter(mean, std, shown.labels)
        points = torch.randn(500, mean.shape[1], generator=torch.Generator().manual_seed(6))
        found["trained_share"] = cells.trained_share(mean, std, points)
    if views.map:
        found |= _map(codec)
    if views.walks:
        found["walks"] = [_walk(codec, mean, k, found, shown) for k in order[: views.walks]]
    if views.strips:
        found |= _strips(codec, mean, std, views.strips)
    if views.bubbles:
        found |= _bubbles(codec, x, mean, std)
    if views.reconstructions:
        found["reconstructions"] = webp(tiles(torch.cat([x[:SHOWN], y[:SHOWN]]), SHOWN))
    return found


def _draws(codec: RawCodec, shown: Shown) -> dict[str, Any]:
    """Decoded draws of N(0, I), and how far they are from images: beside held-out images, which are as far as can be
    expected."""
    c = codec.posterior(shown.x[:1])[0].shape[1]
    z = torch.randn(4 * DRAWS, c, generator=torch.Generator().manual_seed(5))
    pictures = codec.decode(z)
    expected = cells.image_distance(shown.x, shown.train).mean()
    return {
        "draws": webp(tiles(crop_middle(pictures[:DRAWS], 24), 8)),
        "draw_distance": (cells.image_distance(pictures, shown.train).mean() / expected).item(),
        "draw_precision": cells.precision(pictures, shown.train),
        "draw_spread": (pictures.var(0).mean() / shown.x.var(0).mean()).item(),
    }


def _scatter(mean: Tensor, std: Tensor, labels: Tensor | None) -> dict[str, Any]:
    """The first two numbers of the codes, with the deviations of some."""
    numbers = [0] * len(mean) if labels is None else labels.tolist()
    points = [[*map(_short, row), k] for row, k in zip(mean[:POINTS, :2].tolist(), numbers, strict=False)]
    ellipses = torch.cat([mean[:ELLIPSES, :2], std[:ELLIPSES, :2]], 1).tolist()
    return {"points": points, "ellipses": [[_short(value) for value in row] for row in ellipses]}


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def plane(side: int) -> Tensor:
    """[side side, 2]: the square from -3 to 3, row by row from the top left."""
    ticks = torch.linspace(-SPAN, SPAN, side)
    return torch.stack([ticks.repeat(side), ticks.flip(0).repeat_interleave(side)], 1)


def _map(codec: RawCodec) -> dict[str, Any]:
    """The decoded square, coarse to look at and fine to point at."""
    fine = codec.decode(plane(ATLAS))
    coarse = codec.decode(plane(GRID))
    rows = coarse.unflatten(0, (GRID, GRID))
    steps = (rows[:, 1:] - rows[:, :-1]).flatten(2).norm(dim=2)
    typical = steps.flatten().median().clamp(min=1e-9)
    return {
        "map": webp(tiles(crop_middle(coarse, 24), GRID)),
        "atlas": webp(tiles(crop_middle(fine, 28), ATLAS)),
        "map_largest_step": (steps.max() / typical).item(),
    }


def _walk(codec: RawCodec, mean: Tensor, k: int, found: dict[str, Any], shown: Shown) -> dict[str, Any]:
    """One number from -6 to 6, the others at their means; how far its pictures are from any image."""
    line = mean.mean(0).repeat(len(WALK), 1)
    line[:, k] = WALK
    pictures = codec.decode(line)
    expected = cells.image_distance(shown.x, shown.train).mean()
    return {
        "number": k,
        "kl": found["kl_by_number"][k],
        "picture": webp(tiles(crop_middle(pictures, 28), len(WALK))),
        "distance": (cells.image_distance(pictures, shown.train) / expected).tolist(),
        "change": (pictures[8] - pictures[4]).flatten().norm().item(),
    }


def _strips(codec: RawCodec, mean: Tensor, std: Tensor, count: int) -> dict[str, Any]:
    """Straight lines between codes, and how even they are."""
    share = torch.linspace(0, 1, STEPS)[:, None]
    paths = [codec.decode(torch.lerp(mean[2 * k], mean[2 * k + 1], share)) for k in range(count)]
    return {
        "strips": webp(torch.cat([tiles(path, STEPS) for path in paths], dim=1)),
        "largest_step": sum(cells.largest_step(path) for path in paths) / count,
    }


def _bubbles(codec: RawCodec, x: Tensor, mean: Tensor, std: Tensor) -> dict[str, Any]:
    """Draws of the same image's posterior: the same image, or not."""
    generator = torch.Generator().manual_seed(7)
    noise = torch.randn(BUBBLES, BUBBLE_DRAWS, mean.shape[1], generator=generator)
    z = mean[:BUBBLES, None] + std[:BUBBLES, None] * noise
    pictures = codec.decode(z.flatten(0, 1)).unflatten(0, (BUBBLES, BUBBLE_DRAWS))
    mode = codec.decode(mean[:BUBBLES])
    rows = torch.cat([x[:BUBBLES, None], mode[:, None], pictures], 1)
    error = (pictures - mode[:, None]).square().mean((2, 3, 4))
    return {
        "bubbles": webp(tiles(rows.flatten(0, 1), BUBBLE_DRAWS + 2)),
        "bubble_psnr_db": 10 * math.log10(4 / max(error.mean().item(), 1e-10)),
    }


def look_at_sigma(x: Tensor, y: Tensor, sigma: Tensor) -> dict[str, Any]:
    """Images, their reconstructions and the deviations that a decoder claims for each pixel, all [N, C, H, W]."""
    error = (y - x).abs()
    shown = slice(SHOWN)
    rows = [
        x[shown],
        y[shown].clamp(-1, 1),
        sigma[shown] / sigma[shown].amax() * 2 - 1,
        error[shown].clamp(max=1) * 2 - 1,
    ]
    varies = x.std(0) > 0.2  # pixels that differ from image to image: those of strokes
    return {
        "picture": webp(tiles(torch.cat(rows), SHOWN)),
        "on_strokes": sigma[:, varies].mean().item(),
        "elsewhere": sigma[:, ~varies].mean().item(),
        "smallest": sigma.min().item(),
        "correlation": torch.corrcoef(torch.stack([sigma.flatten(), error.flatten()]))[0, 1].item(),
    }
