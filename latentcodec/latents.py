"""Latents of any covered class: in and out of the network, their statistics, and how these are folded into the network.

Diffusion models want latents of zero mean and unit variance. A codec that is trained here has the map to such latents
inside the 1x1 convolutions around its latent (`fold`), where every pipeline meets it, whatever numbers of the
configuration it reads. Other codecs have numbers, which `LatentSpace` applies by the canonical formula of their class.

Shapes: B batch, C image channels, c latent channels, H W pixels, h w latent cells, f downsampling factor; a raw latent,
as the network gives it, is [B, s, h p, w p] with c = s p p (`vae/families.py`). The block of a cell is the C f f
numbers of the f x f pixels that lie over it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from einops import rearrange
from torch import Tensor, nn

from latentcodec.offloading import computing_device
from latentcodec.vae.families import SAME_UNLESS_GIVEN, family_of, units_of
from latentcodec.vae.padding import padding_modes
from latentcodec.vae.posterior import mean_and_logvar

SMALLEST_VARIANCE = (
    1e-6  # of the largest: a direction that the encoder does not use is not blown up to unit variance
)


# ---- through the network


def posterior_parameters(vae: Any, x: Tensor) -> Tensor:
    """Images [B, C, H, W] -> mean and log-variance [B, 2s, h p, w p] of raw latents, for every covered class."""
    frames = family_of(vae).has_frames
    parameters: Tensor = vae.encode(x[:, :, None] if frames else x).latent_dist.parameters
    return parameters[:, :, 0] if frames else parameters


def decode_raw(vae: Any, raw: Tensor) -> Tensor:
    """Raw latents [B, s, h p, w p] -> images [B, C, H, W]; of an adopted `vae` not clamped: fit for training.

    Qwen-Image's and Wan's `decode` clamps to [-1, 1], where no gradient would pass.
    """
    if not family_of(vae).has_frames:
        plain: Tensor = vae.decode(raw).sample
        return plain
    networks = vae.__dict__.get("image_networks")
    image: Tensor | None = None if networks is None else networks.decode(raw)
    if image is None:  # not adopted, or hooks or adapters on the layers: the class's own code, which clamps
        image = vae.decode(raw[:, :, None]).sample[:, :, 0]
    return image


@dataclass(frozen=True)
class LatentSpace:
    """What lies between raw latents and those that a class's denoisers see."""

    packing: int
    """p: raw cells, along each side, that are made channels."""
    mean: Tensor
    """[c, 1, 1] float32: what is subtracted from a packed latent."""
    std: Tensor
    """[c, 1, 1] float32: what the difference is then divided by."""

    @classmethod
    def of(cls, vae: Any) -> LatentSpace:
        """By the canonical formula of the class of `vae`, on the device that it computes on.

        Raises ValueError where a number is not finite, a deviation not positive, or their count not c.
        """
        family, units = family_of(vae), units_of(vae)
        c = family.latent_channels(vae.config)
        for name, values in (("mean", units.mean), ("std", units.std)):
            if values.shape != (c,):
                raise ValueError(f"the {name} of the latents has {values.numel()} entries for {c} channels")
            if not values.isfinite().all() or (name == "std" and not (values > 0).all()):
                keys = ", ".join(family.normalisation)
                raise ValueError(
                    f"the {name} of the latents cannot be {values.tolist()}: see {keys} of the config"
                )
        mean, std = (
            value.float().to(computing_device(vae))[:, None, None] for value in (units.mean, units.std)
        )
        return cls(family.packing(vae.config), mean, std)

    def pack(self, raw: Tensor) -> Tensor:
        """[B, s, h p, w p] -> [B, c, h, w]: the pixels of a patch become channels, as FLUX.2's pipelines do it."""
        return F.pixel_unshuffle(raw, self.packing)

    def normalise(self, raw: Tensor) -> Tensor:
        """[B, s, h p, w p] -> [B, c, h, w] float32, as denoisers see it."""
        return ((self.pack(raw.float()) - self.mean) / self.std).contiguous()

    def restore(self, z: Tensor) -> Tensor:
        """The inverse of `normalise`."""
        return F.pixel_shuffle(z.float() * self.std + self.mean, self.packing)


# ---- statistics


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
    family = family_of(vae)
    c, f = family.raw_channels(vae.config), family.raw_factor(vae.config)
    sums: Tensor | None = None
    for x in batches:
        mean, logvar = mean_and_logvar(posterior_parameters(vae, x))
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


# ---- folding


@dataclass(frozen=True)
class Normalisation:
    """The affine map raw -> `matrix` (raw - `mean`) to latents of zero mean and unit variance."""

    matrix: Tensor
    """[c, c] float64."""
    inverse: Tensor
    """[c, c] float64: raw = `inverse` z + `mean`."""
    mean: Tensor
    """[c] float64."""
    logvar: Tensor
    """[c] float64: the posterior's mean log-variance, of the raw latents."""


def by_one_scale(statistics: LatentStatistics) -> Normalisation:
    """One shift and one scale for all channels, together of zero mean and unit variance; directions stay."""
    mean, std = statistics.mean, statistics.std
    shift = mean.mean().expand_as(mean)
    scale = (std.square() + (mean - shift).square()).mean().sqrt().expand_as(mean)
    return Normalisation((1 / scale).diag(), scale.diag(), shift, statistics.logvar)


def per_channel(statistics: LatentStatistics) -> Normalisation:
    """Zero mean and unit variance of each channel; a dead one is scaled as if it had 1e-6 of the largest variance."""
    variance = statistics.covariance.diagonal()
    std = variance.clamp(min=max(1e-12, SMALLEST_VARIANCE * variance.max().item())).sqrt()
    return Normalisation((1 / std).diag(), std.diag(), statistics.mean, statistics.logvar)


def whitening(statistics: LatentStatistics) -> Normalisation:
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
    return Normalisation(turn @ white, (axes * std) @ turn.T, statistics.mean, statistics.logvar)


@torch.no_grad()
def fold(vae: AutoencoderKL, change: Normalisation) -> None:
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


# ---- identity


def fingerprint(vae: Any) -> str:
    """sha256, in hexadecimal, of what makes the latents of a VAE of a covered class.

    That is its class, the keys of its configuration that decide what the network computes, the padding of its
    convolutions where it is not zeros, the numbers that normalise, and every weight and statistic by name, shape and
    value as float32.

    Costs 0.19 s for the 84 million weights of Stable Diffusion's VAE (AMD Zen 4, two cores).
    """
    family, units = family_of(vae), units_of(vae)
    architecture: dict[str, Any] = {key: _unless_usual(vae.config, key) for key in family.architecture}
    if modes := padding_modes(vae):
        architecture["padding_modes"] = modes
    numbers = {"mean": units.mean.tolist(), "std": units.std.tolist()}
    digest = hashlib.sha256(json.dumps([family.name, architecture, numbers], sort_keys=True).encode())
    for name, value in sorted(vae.state_dict().items()):
        if not value.is_floating_point():  # counters of a batch norm that never runs
            continue
        digest.update(f"{name} {list(value.shape)}".encode())
        values = value.detach().to("cpu", torch.float32).contiguous()
        digest.update(values.numpy().astype("<f4", copy=False).data)
    return digest.hexdigest()


def _unless_usual(config: Mapping[str, Any], key: str) -> Any:
    """What a configuration says for `key`; None where that is what its class does without the key."""
    value, usual = config.get(key), config.get(SAME_UNLESS_GIVEN.get(key, ""))
    if usual is None:
        return value
    both = [list(v) if isinstance(v, (list, tuple)) else v for v in (value, usual)]
    return None if both[0] == both[1] else value
