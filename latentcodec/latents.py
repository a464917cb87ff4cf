"""What the latents are over the training data, and how that is written into the codec: numbers or a whitening.

Diffusion models want latents of zero mean and unit variance. `normalise` writes the measured mean and deviation
into the configuration, which pipelines read, but not all of them completely; `whiten` folds them, and a rotation,
into the 1x1 convolutions around the latent, where every pipeline meets them.

Shapes: B batch, C image channels, c latent channels, H W pixels, h w latent cells, f downsampling factor. A cell's
block are the C f f numbers of the f x f pixels that lie over it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL
from einops import rearrange
from torch import Tensor, nn

from latentcodec.vae.networks import downsampling_factor
from latentcodec.vae.posterior import mean_and_logvar

SMALLEST_VARIANCE = (
    1e-6  # of the largest: a direction that the encoder does not use is not blown up to unit variance
)


@dataclass(frozen=True)
class LatentStatistics:
    """Means over the cells of a set of images, float64."""

    mean: Tensor
    """[c] of the posterior's mean."""
    covariance: Tensor
    """[c, c] of the posterior's mean."""
    logvar: Tensor
    """[c] of the posterior's log-variance."""
    pixels: Tensor
    """[C f f, c]: covariance of the numbers of a cell's block with the posterior's mean."""

    @property
    def std(self) -> Tensor:
        """[c] standard deviation of the posterior's mean; no less than 1e-6, so that one may divide by it."""
        return self.covariance.diagonal().clamp(min=1e-12).sqrt()


@torch.no_grad()
def latent_statistics(
    vae: AutoencoderKL, batches: Iterable[Tensor], total: Callable[[Tensor], Tensor] | None = None
) -> LatentStatistics:
    """The statistics of the latents of `batches`, each [B, C, H, W] with sides that are multiples of f.

    One pass, one matrix of sums; `total` adds it up over the processes, so N processes measure what one would. The
    sums are not centred: in float64 that keeps nine digits of a variance whose mean is a thousand deviations away.
    """
    c, f = int(vae.config.latent_channels), downsampling_factor(vae.config)
    sums: Tensor | None = None
    for x in batches:
        mean, logvar = mean_and_logvar(vae.encode(x).latent_dist.parameters)
        cells = rearrange(torch.cat([mean, logvar], 1), "b n h w -> n (b h w)").double()
        blocks = rearrange(x, "b C (h i) (w j) -> (C i j) (b h w)", i=f, j=f).double()
        one = torch.ones_like(cells[:1])
        product = torch.cat([one, cells[:c]]) @ torch.cat([one, cells, blocks]).T  # [1 + c, 1 + 2c + C f f]
        sums = product if sums is None else sums + product
    assert sums is not None, "there is no batch to measure the latents of"
    if total is not None:
        sums = total(sums)
    sums = sums.cpu() / sums[0, 0].item()
    mean = sums[1:, 0]
    return LatentStatistics(
        mean=mean,
        covariance=sums[1:, 1 : 1 + c] - torch.outer(mean, mean),
        logvar=sums[0, 1 + c : 1 + 2 * c],
        pixels=(sums[1:, 1 + 2 * c :] - torch.outer(mean, sums[0, 1 + 2 * c :])).T,
    )


def normalise(vae: AutoencoderKL, statistics: LatentStatistics) -> None:
    """Write mean and deviation into the configuration of `vae`: per channel, and as one shift and one scale.

    SD3's and FLUX's pipelines take z = (raw - shift_factor) * scaling_factor, which has unit variance over all
    channels together; Stable Diffusion's do not shift. Only SDXL's look at the numbers per channel, for exactly four,
    and multiply by the scale as well, so there only `whiten` gives unit variance. LatentCodec takes those per channel.
    """
    mean, std = statistics.mean, statistics.std
    shift = mean.mean()
    scale = 1 / (std.square() + (mean - shift).square()).mean().sqrt()
    vae.register_to_config(
        latents_mean=[_short(value) for value in mean.tolist()],
        latents_std=[_short(value) for value in std.tolist()],
        shift_factor=_short(shift.item()),
        scaling_factor=_short(scale.item()),
    )


@dataclass(frozen=True)
class Whitening:
    """The affine map raw -> `matrix` (raw - `mean`) to latents of zero mean, unit variance and no correlation."""

    matrix: Tensor
    """[c, c] float64."""
    inverse: Tensor
    """[c, c] float64: raw = `inverse` z + `mean`."""
    mean: Tensor
    """[c] float64."""
    logvar: Tensor
    """[c] float64: the posterior's mean log-variance, of the raw latents."""


def whitening(statistics: LatentStatistics) -> Whitening:
    """The whitening whose channels are ordered by the pixels they explain, the first one most.

    White latents stay white under any rotation. This one takes the principal directions of the best linear
    prediction of a cell's block from its latent: the first channel explains the most pixel variance that one
    number can, and so on. (The principal directions of the raw latents would depend on gains that the decoder
    undoes, and are arbitrary where the raw latents already are white.) Signs: the number of the block that
    moves most with a channel moves upwards. A direction with less than 1e-6 of the largest variance is scaled as if
    it had that much.
    """
    variance, axes = torch.linalg.eigh(statistics.covariance)  # rising
    std = variance.clamp(min=max(1e-12, SMALLEST_VARIANCE * variance[-1].item())).sqrt()
    white = axes.T / std[:, None]  # [c, c]
    response = statistics.pixels @ white.T  # [C f f, c]: how the block moves with each white direction
    turn = torch.linalg.eigh(response.T @ response).eigenvectors.T.flip(0)  # [c, c]
    patterns = response @ turn.T
    signs = patterns.gather(0, patterns.abs().argmax(0, keepdim=True)).squeeze(0).sign()
    turn = turn * torch.where(signs == 0, 1.0, signs)[:, None]
    return Whitening(turn @ white, (axes * std) @ turn.T, statistics.mean, statistics.logvar)


@torch.no_grad()
def whiten(vae: AutoencoderKL, change: Whitening) -> None:
    """Fold `change` into `quant_conv` and `post_quant_conv` of `vae`, in place; where there are none, they are made.

    The posterior's mode is transformed and transformed back exactly, at the borders too, since 1x1 convolutions do
    not pad. Its spread cannot be: a rotated diagonal gaussian is not diagonal, and the log-variances only pass
    through a linear map. Each new log-variance is the tangent of the true marginal one, log sum_j W_kj^2 e^l_j, at
    the mean log-variances: a weighted mean of the old ones, the weights being their shares in the new variance. It
    equals the true one where the log-variances are at their means or the map only scales, and is below it elsewhere.
    """
    c = int(vae.config.latent_channels)
    weight, bias = _linear(vae.quant_conv, 2 * c)
    power = change.matrix.square() * change.logvar.exp()  # [c, c]: what each old channel adds to each new one
    share = power / power.sum(1, keepdim=True)
    weight = torch.cat([change.matrix @ weight[:c], share @ weight[c:]])
    bias = torch.cat(
        [
            change.matrix @ (bias[:c] - change.mean),
            share @ (bias[c:] - change.logvar) + power.sum(1).log(),
        ]
    )
    after, shift = _linear(vae.post_quant_conv, c)
    vae.quant_conv = _conv(vae, weight, bias)
    vae.post_quant_conv = _conv(vae, after @ change.inverse, after @ change.mean + shift)
    vae.register_to_config(
        use_quant_conv=True,
        use_post_quant_conv=True,
        latents_mean=None,
        latents_std=None,
        shift_factor=0.0,  # not None: SD3's and FLUX's pipelines add it
        scaling_factor=1.0,
    )


def _linear(conv: nn.Conv2d | None, channels: int) -> tuple[Tensor, Tensor]:
    """Matrix and bias of a 1x1 convolution, float64 on the CPU; those of the identity where there is none."""
    if conv is None:
        return torch.eye(channels, dtype=torch.float64), torch.zeros(channels, dtype=torch.float64)
    assert conv.bias is not None  # every convolution of an AutoencoderKL has one
    return conv.weight[:, :, 0, 0].double().cpu(), conv.bias.double().cpu()


def _conv(vae: AutoencoderKL, weight: Tensor, bias: Tensor) -> nn.Conv2d:
    conv = nn.Conv2d(weight.shape[1], weight.shape[0], 1)
    conv.load_state_dict({"weight": weight[:, :, None, None], "bias": bias})
    return conv.to(vae.device, vae.dtype)


def _short(value: float) -> float:
    """Seven digits: more than the measurement has, and what people can read in a config.json."""
    return float(f"{value:.7g}")
