"""What latents are like, read off the posterior alone: rate, signal, tails, spectrum, neighbours. No network runs.

Every function takes latents in the codec's own normalisation, the one its denoiser gets, and returns numbers. What
needs the decoder is in `decoder_measures.py`, what the numbers mean in `verdicts.py`.

Shapes: N images, c latent channels, h w latent cells, f pixels a cell. mean, std: the posterior's, [N, c, h, w].
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from latentcodec.ops.cosine import cosine_matrix

LARGEST_RATE = 24.0  # bits; a float32 resolves no more, so a posterior without noise has this rate
NEAR, FAR = 24, 96  # pixels: cells up to `NEAR` apart are neighbours, those from `FAR` on are strangers
VIV_SIDE = 8  # cells a side of the windows of VIV
VIV_STEPS = 12  # of the flip-flop; it has converged to three digits after six
SPECTRUM_BINS = 24
HISTOGRAM = (-8.0, 8.0, 96)  # first and last edge in deviations, bins


@dataclass(frozen=True)
class ChannelMoments:
    """Per channel, each [c] float64, over all images and cells."""

    mean: Tensor
    """Mean of the latent."""
    mean_error: Tensor
    """Its standard error, from the spread of the images' own means: cells of one image are not independent."""
    std: Tensor
    """s = sqrt(Var(mu) + E[sigma^2]): the deviation of a draw, signal and noise together."""
    noise: Tensor
    """sqrt(E[sigma^2]) / s: the share of the deviation that is noise of the posterior."""
    signal_share: Tensor
    """Var(mu) / s^2: 0 is a channel that says nothing of the image."""
    rate: Tensor
    """R = -E log2(sigma / s), bits an element. Unlike the KL it does not depend on the scale of the latent."""
    kl: Tensor
    """(mu^2 + sigma^2 - 1 - log sigma^2) / 2, nats an element (Kingma and Welling 2014, appendix B)."""


def channel_moments(mean: Tensor, std: Tensor) -> ChannelMoments:
    """mean, std [N, c, h, w] of the posterior -> what each channel carries."""
    mean, std = mean.double(), std.double()
    over = (0, 2, 3)
    signal, noise = mean.var(over, unbiased=False), std.square().mean(over)
    total = (signal + noise).sqrt()
    safe = total.clamp(min=1e-12)
    ratio = (std / safe[:, None, None]).clamp(min=2.0**-LARGEST_RATE)
    variance = std.square().clamp(min=1e-24)
    of_images = mean.mean((2, 3))  # [N, c]
    spread = of_images.std(0) if len(mean) > 1 else torch.full_like(total, math.inf)
    return ChannelMoments(
        mean=mean.mean(over),
        mean_error=spread / math.sqrt(len(mean)),
        std=total,
        noise=noise.sqrt() / safe,
        signal_share=signal / safe.square(),
        rate=-ratio.log2().mean(over),
        kl=0.5 * (mean.square() + variance - 1 - variance.log()).mean(over),
    )


def standardised_draws(mean: Tensor, std: Tensor, moments: ChannelMoments) -> Tensor:
    """[N, c, h, w]: one draw of each posterior, less the channel's mean, in units of the channel's deviation."""
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(0)).to(mean)
    centre, scale = (t[:, None, None].to(mean) for t in (moments.mean, moments.std.clamp(min=1e-12)))
    return (mean + std * noise - centre) / scale


def tails(draws: Tensor) -> dict[str, list[float]]:
    """How normal standardised draws [N, c, h, w] are, channel by channel.

    within_1, within_2, within_3: shares inside so many deviations, of a normal distribution .683, .954 and .997;
    kurtosis: the fourth moment, 3 for a normal one; largest: the largest magnitude, in deviations.
    """
    magnitude = draws.abs().double()
    over = (0, 2, 3)
    found = {f"within_{k}": (magnitude < k).double().mean(over) for k in (1, 2, 3)}
    found |= {"kurtosis": magnitude.pow(4).mean(over), "largest": magnitude.amax(over)}
    return {name: value.tolist() for name, value in found.items()}


def histograms(draws: Tensor) -> list[list[float]]:
    """[c][bins]: the density of standardised draws per deviation; what lies outside counts in the last bins."""
    low, high, bins = HISTOGRAM
    width = (high - low) / bins
    inside = draws.float().clamp(low + 1e-3, high - 1e-3).cpu()
    counts = [torch.histc(inside[:, k], bins, low, high) for k in range(inside.shape[1])]
    return [(count / count.sum() / width).tolist() for count in counts]


def high_frequency_share(z: Tensor, cutoff: float = 0.25) -> tuple[float | None, list[float | None]]:
    """SEC of z [N, c, h, w]: over all channels together, and of each alone. None below 4 cells a side.

    The share of the energy of the orthonormal DCT-II at u + v > cutoff (h + w - 2), DC included in the whole; the
    energy is averaged over images and channels first (arXiv:2606.03578, equations 7 to 9).
    """
    height, width = z.shape[-2:]
    if min(height, width) < 4:
        return None, [None] * z.shape[1]
    energy = _dct(z).square().mean(0)  # [c, h, w]
    places = torch.arange(height)[:, None] + torch.arange(width)[None]
    high = (places > cutoff * (height + width - 2)).to(energy)
    per_channel = (energy * high).sum((1, 2)) / energy.sum((1, 2)).clamp(min=1e-24)
    return ((energy * high).sum() / energy.sum().clamp(min=1e-24)).item(), per_channel.tolist()


def radial_spectrum(z: Tensor) -> list[tuple[float, float]] | None:
    """(frequency, power) of z [N, c, h, w], a mean over images and channels; None below 8 cells a side.

    Frequency: half cycles a cell, 0 to 1 along an axis, in bins of equal width. Power: of the orthonormal DCT-II, each
    channel scaled to unit variance, so that white noise is 1 everywhere.
    """
    height, width = z.shape[-2:]
    if min(height, width) < 8:
        return None
    deviation = z.std((0, 2, 3), keepdim=True).clamp(min=1e-12)
    power = _dct((z - z.mean((0, 2, 3), keepdim=True)) / deviation).square().mean((0, 1))
    radius = torch.hypot(torch.arange(height)[:, None] / height, torch.arange(width)[None] / width)
    bins = (radius * SPECTRUM_BINS).long().clamp(max=SPECTRUM_BINS - 1).flatten()
    inside = (radius.flatten() < 1) & (radius.flatten() > 0)
    bins, values = bins[inside], power.double().flatten().cpu()[inside]
    count = torch.bincount(bins, minlength=SPECTRUM_BINS)
    total = torch.bincount(bins, values, minlength=SPECTRUM_BINS)
    return [
        ((k + 0.5) / SPECTRUM_BINS, (total[k] / count[k]).item())
        for k in range(SPECTRUM_BINS)
        if count[k] > 0
    ]


def local_similarity(z: Tensor, f: int) -> float | None:
    """LDS: how much more alike neighbouring cells are than distant ones; None where no cells are far enough apart.

    The mean cosine of cells at most 24 pixels apart less that of cells at least 96 pixels apart, each image centred
    on its own mean cell, then the mean over the images.
    """
    height, width = z.shape[-2:]
    grid = torch.cartesian_prod(torch.arange(height), torch.arange(width)).double() * f
    distance = torch.cdist(grid, grid)
    near, far = (distance > 0) & (distance <= NEAR), distance >= FAR
    if not near.any() or not far.any():
        return None
    differences = []
    for image in z:
        cells = image.flatten(1).T  # [h w, c]
        cells = F.normalize(cells - cells.mean(0), dim=1)
        cosine = (cells @ cells.T).cpu()
        differences.append((cosine[near].mean() - cosine[far].mean()).item())
    return sum(differences) / len(differences)


def viv(z: Tensor, labels: Sequence[int] | None = None) -> float | None:
    """Mean pi/2 sqrt(lambda) over the eigenvalues of the covariance of z [N, c, h, w]; pi/2 for white latents.

    Channels are standardised; the covariance is a Kronecker product of channels and cells, fitted by flip-flop, its
    eigenvalues scaled to a mean of 1 (arXiv:2606.03578, equation 5; the scaling is ours). It is taken on windows of
    8 x 8 cells, with labels for each class by itself and then the mean over the images. None where there are fewer
    than 10 windows for each of 64 / c: it would be far too small. Comparable between latents of one shape only.
    """
    if min(z.shape[-2:]) < VIV_SIDE:
        return None
    z = (z - z.mean((0, 2, 3), keepdim=True)) / z.std((0, 2, 3), keepdim=True).clamp(min=1e-12)
    groups = [z] if labels is None else [z[torch.tensor(labels) == label] for label in sorted({*labels})]
    values, weights = [], []
    for group in groups:
        even = group[..., : z.shape[2] // VIV_SIDE * VIV_SIDE, : z.shape[3] // VIV_SIDE * VIV_SIDE]
        windows = rearrange(even, "n c (h i) (w j) -> (n h w) c (i j)", i=VIV_SIDE, j=VIV_SIDE).double()
        if len(windows) * z.shape[1] < 10 * VIV_SIDE**2:
            continue
        values.append(_kronecker_roots(windows) * math.pi / 2)
        weights.append(len(group))
    return sum(v * w for v, w in zip(values, weights, strict=True)) / sum(weights) if values else None


def _kronecker_roots(windows: Tensor) -> float:
    """[N, c, d] -> the mean square root of the eigenvalues of the Kronecker covariance, scaled to a mean of 1."""
    windows = windows - windows.mean(0)
    count, c, d = windows.shape
    cells = torch.eye(d, dtype=windows.dtype)
    for _ in range(VIV_STEPS):
        channels = torch.einsum("nci,ij,nkj->ck", windows, torch.linalg.inv(cells), windows) / (count * d)
        channels += 1e-6 * torch.eye(c, dtype=windows.dtype) * channels.diagonal().mean()
        channels = channels * c / channels.trace()  # the scale is a matter of taste: it goes into `cells`
        cells = torch.einsum("nci,ck,nkj->ij", windows, torch.linalg.inv(channels), windows) / (count * c)
        cells += 1e-6 * torch.eye(d, dtype=windows.dtype) * cells.diagonal().mean()
    values = [torch.linalg.eigvalsh(matrix).clamp(min=0) for matrix in (channels, cells)]
    channel_roots, cell_roots = ((value / value.mean()).sqrt().mean() for value in values)
    return (channel_roots * cell_roots).item()


def label_agreement(z: Tensor, labels: Sequence[int], masks: Tensor | None = None) -> float:
    """LNC: the share of the five nearest neighbours that carry an image's own label, the mean over the images.

    Neighbours by the cosine of the spatial means of z [N, c, h, w], over the foreground where `masks` [N, h, w] in
    {0, 1} are given (arXiv:2606.03578). Chance is the sum of the squared shares of the labels.
    """
    weights = torch.ones_like(z[:, 0]) if masks is None else masks.to(z)
    means = (z * weights[:, None]).sum((2, 3)) / weights.sum((1, 2)).clamp(min=1)[:, None]
    means = F.normalize(means - means.mean(0), dim=1)
    cosine = means @ means.T
    cosine.fill_diagonal_(-2)
    nearest = cosine.topk(min(5, len(z) - 1), dim=1).indices.cpu()
    own = torch.tensor(labels)
    return (own[nearest] == own[:, None]).double().mean().item()


def foreground_similarity(z: Tensor, masks: Tensor) -> float | None:
    """SRSS: the mean cosine of pairs of foreground cells less that of foreground with background cells.

    z [N, c, h, w], masks [N, h, w] in {0, 1}; each image centred, the mean over the images that have both
    (arXiv:2606.03578). None where no image has two foreground cells and one of the background.
    """
    values = []
    for image, mask in zip(z, masks.bool(), strict=True):
        cells = image.flatten(1).T
        cells = F.normalize(cells - cells.mean(0), dim=1)
        front, back = cells[mask.flatten()], cells[~mask.flatten()]
        if len(front) > 1 and len(back):
            n = len(front)
            pairs = ((front @ front.T).sum() - n) / (n * (n - 1))
            values.append((pairs - (front @ back.T).mean()).item())
    return sum(values) / len(values) if values else None


def correlations(z: Tensor) -> Tensor:
    """[c, c] correlation of the channels of z [N, c, h, w] over images and cells; 0 for a constant channel."""
    cells = rearrange(z, "n c h w -> c (n h w)").double()
    cells = cells - cells.mean(1, keepdim=True)
    return (unit := F.normalize(cells, dim=1)) @ unit.T


def effective_rank(z: Tensor) -> float:
    """(sum l)^2 / sum l^2 over the eigenvalues of the channels' covariance: c for white latents, 1 for one mode."""
    cells = rearrange(z, "n c h w -> c (n h w)").double()
    values = torch.linalg.eigvalsh(torch.cov(cells).reshape(len(cells), len(cells)))
    return (values.sum().square() / values.square().sum().clamp(min=1e-24)).item()


def hole_shares(codes: Tensor, draws: int = 500) -> tuple[float, float]:
    """Of 1 x 1 latents: the share of draws of N(0, I) that lie in holes, for `codes` [N, c] and for ideal codes.

    A draw lies in a hole where it is farther from every code than three times the codes' median distance to their
    nearest neighbour. `codes` are draws of the posterior; ideal ones are as many draws of N(0, I), whose thin outside
    counts as holes too, more so in few dimensions.
    """
    generator = torch.Generator().manual_seed(0)
    ideal = torch.randn(codes.shape, generator=generator).to(codes)
    prior = torch.randn(draws, codes.shape[1], generator=generator).to(codes)
    shares = []
    for points in (codes, ideal):
        between = torch.cdist(points, points)
        between.fill_diagonal_(math.inf)
        typical = between.amin(1).median().clamp(min=1e-12)
        shares.append((torch.cdist(prior, points).amin(1) > 3 * typical).double().mean().item())
    return shares[0], shares[1]


def _dct(z: Tensor) -> Tensor:
    """[..., h, w] -> the orthonormal DCT-II of both axes."""
    return cosine_matrix(z.shape[-2]).to(z) @ z @ cosine_matrix(z.shape[-1]).to(z).T
