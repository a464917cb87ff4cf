"""A pretrained codec with another number of image channels or latent channels: what the new weights are.

Image channels. From one channel to several, each gets an equal share of the old one's weights, and all are put out
alike: a grey image is encoded as before. From several to one, the shares add up: a grey image is encoded as its
copies in all channels were, and the mean is put out. Otherwise the leading channels keep their weights; new ones are
not seen at first and put out as the mean of the old ones, dropped ones count as 0 (mid-grey). So in each case
there are images whose reconstruction is that of the parent, number for number.

Latent channels. More: the new ones encode random combinations of the encoder's last features, with mean and deviation
of ordinary latents and a narrow posterior, and the decoder does not look at them yet, so every reconstruction is that
of the parent. (Were both sides zero, neither would ever get a gradient.) Fewer: the latents are whitened, ordered by
the pixels they explain, and the leading ones kept; the others are taken at their mean. The decoder is given these
constants by a bias, so its first convolution is exact but in the outermost cells, where the parent's saw zeros.

Shapes: C image channels, c latent channels, H W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL
from jsonargparse.typing import PositiveInt
from torch import Tensor, nn

from latentcodec.latents import fold, latent_statistics, whitening

POSTERIOR_STD = 0.01  # of new latents, in units of their own deviation, as in the linear start
BATCH = 8  # crops to encode at once


@dataclass
class AdaptConfig:
    """The channels that a pretrained codec is changed to; training/start/adapt.py states what the new weights are."""

    image_channels: PositiveInt | None = None
    """Channels of the images, in and out. None: as pretrained. Grey images (1) from or to several channels: equal
    shares. Else leading channels are kept, new ones begin unseen and are put out as the mean of the old ones."""
    latent_channels: PositiveInt | None = None
    """Channels of the latents. None: as pretrained. More: new ones begin as random features that the decoder does
    not look at. Fewer: those that explain the most pixels are kept, after whitening."""


@torch.no_grad()
def change_image_channels(vae: AutoencoderKL, channels: int) -> None:
    """Give `vae`, running on our layers, another number of image channels, in place, on the CPU."""
    old = int(vae.config.in_channels)
    if channels == old:
        return
    entry, exit_ = vae.encoder.conv_in, vae.decoder.conv_out
    if 1 in (channels, old):
        seen = torch.full((old, channels), 1.0 / channels if old == 1 else 1.0)
    else:
        seen = torch.eye(old, channels)
    weight = torch.einsum("oCij,CD->oDij", entry.weight, seen)
    kept = min(channels, old) if channels > 1 else 0
    put_out = torch.full((channels, old), 1.0 / old)  # the mean, but of the kept ones
    put_out[:kept] = torch.eye(kept, old)
    vae.encoder.conv_in = _convolution(weight, _bias(entry))
    vae.decoder.conv_out = _convolution(
        torch.einsum("DC,Coij->Doij", put_out, exit_.weight), put_out @ _bias(exit_)
    )
    vae.register_to_config(in_channels=channels, out_channels=channels)


@torch.no_grad()
def change_latent_channels(vae: AutoencoderKL, channels: int, crops: Callable[[], Sequence[Tensor]]) -> None:
    """Give `vae`, running on our layers, another number of latent channels, in place, on the CPU.

    `crops` gives images [C, H, W] of one size, multiples of f, that show what the latents are. The numbers
    in the configuration that normalise the latents count no more and are reset.
    """
    old = int(vae.config.latent_channels)
    if channels == old:
        return
    x = torch.stack(list(crops()))
    if channels < old:
        _keep_latents(vae, channels, x)
    else:
        _add_latents(vae, channels, x)
    vae.register_to_config(latents_mean=None, latents_std=None, shift_factor=0.0, scaling_factor=1.0)


def _keep_latents(vae: AutoencoderKL, channels: int, x: Tensor) -> None:
    """Whiten, then merge the 1x1 convolutions into their neighbours and cut."""
    c = int(vae.config.latent_channels)
    had = {key: vae.config[key] for key in ("use_quant_conv", "use_post_quant_conv")}
    fold(vae, whitening(latent_statistics(vae, x.split(BATCH))))
    last, quant = vae.encoder.conv_out, vae.quant_conv
    rows = torch.cat([torch.arange(channels), c + torch.arange(channels)])
    mix = quant.weight[rows, :, 0, 0]  # [2c', 2c]
    weight = torch.einsum("or,rkij->okij", mix, last.weight)
    vae.encoder.conv_out = _convolution(weight, mix @ _bias(last) + _bias(quant)[rows])
    first, post = vae.decoder.conv_in, vae.post_quant_conv
    weight = torch.einsum("ozij,zk->okij", first.weight, post.weight[:, :channels, 0, 0])
    constants = torch.einsum("ozij,z->o", first.weight, _bias(post))
    vae.decoder.conv_in = _convolution(weight, _bias(first) + constants)
    vae.quant_conv = _identity(2 * channels) if had["use_quant_conv"] else None
    vae.post_quant_conv = _identity(channels) if had["use_post_quant_conv"] else None
    vae.register_to_config(latent_channels=channels, **had)


def _add_latents(vae: AutoencoderKL, channels: int, x: Tensor) -> None:
    """New rows of the encoder's last convolution, then the deviation that the parent's latents have on average."""
    c = int(vae.config.latent_channels)
    target = latent_statistics(vae, x.split(BATCH)).std.mean().item()
    last, first = vae.encoder.conv_out, vae.decoder.conv_in
    rows = torch.cat(
        [torch.arange(c), channels + torch.arange(c)]
    )  # where the old means and log-variances go
    new = torch.arange(c, channels)
    fresh = nn.Conv2d(last.in_channels, 2 * channels, 3, padding=1)
    weight, bias = fresh.weight, torch.zeros(2 * channels)
    weight[channels + new] = 0
    bias[channels + new] = 2 * math.log(POSTERIOR_STD * target)
    weight[rows], bias[rows] = last.weight, _bias(last)
    vae.encoder.conv_out = _convolution(weight, bias)
    weight = torch.zeros(first.out_channels, channels, 3, 3)
    weight[:, :c] = first.weight
    vae.decoder.conv_in = _convolution(weight, _bias(first))
    for name, size, kept in (("quant_conv", 2 * channels, rows), ("post_quant_conv", channels, rows[:c])):
        if getattr(vae, name) is not None:
            setattr(vae, name, _widened(getattr(vae, name), size, kept))
    vae.register_to_config(latent_channels=channels)
    found = latent_statistics(vae, x.split(BATCH))
    gain = (target / found.std[new]).float()
    vae.encoder.conv_out.weight[new] *= gain[:, None, None, None]
    _bias(vae.encoder.conv_out)[new] = -gain * found.mean[new].to(gain)


def _widened(conv: nn.Conv2d, size: int, kept: Tensor) -> nn.Conv2d:
    """A 1x1 convolution that treats the channels `kept` as `conv` did, and hands the others on."""
    wide = _identity(size)
    wide.weight[kept[:, None], kept] = conv.weight
    _bias(wide)[kept] = _bias(conv)
    return wide


def _identity(channels: int) -> nn.Conv2d:
    return _convolution(torch.eye(channels)[:, :, None, None], torch.zeros(channels))


def _convolution(weight: Tensor, bias: Tensor) -> nn.Conv2d:
    """A 1x1 or 3x3 convolution with these weights."""
    conv = nn.Conv2d(weight.shape[1], weight.shape[0], weight.shape[-1], padding=weight.shape[-1] // 2)
    conv.load_state_dict({"weight": weight, "bias": bias})
    return conv


def _bias(conv: nn.Conv2d) -> Tensor:
    assert conv.bias is not None  # every convolution of an AutoencoderKL has one
    return conv.bias
