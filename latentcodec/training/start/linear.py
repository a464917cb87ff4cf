"""The linear start: before its first step the codec already is a linear transform codec, fitted in closed form.

The Karhunen-Loeve transform (KLT) of blocks of f x f pixels takes their principal components: no other linear transform
keeps more of the pixels in as many numbers. A new codec starts there instead of at random weights.

Every residual branch starts at zero, so what remains is the linear path of convolutions and shortcuts. The encoder's
path is set to the KLT of the training images, exactly: each down-convolution computes the principal components of
blocks twice as large from those it is given. The decoder's path cannot be the inverse KLT (a nearest-neighbour
up-convolution uses one kernel for all four positions), so each up-convolution is the least-squares prediction of the
finer components from their neighbourhood. Both ends pass a group norm and a SiLU without being changed by them:

* `silu(s) - silu(-s) = s`, so a signal kept as a pair of channels (s, -s) is read back exactly;
* a pair of constants (K, -K) in each group, K far above the signals, pins the group's mean to 0 and its deviation
  to K sqrt(2 / n), so the norm is a multiplication by a known number, undone by its weight.

Nothing here is architecture: it only fills weights that training then moves.

Shapes: B batch, C image channels, H W pixels, f downsampling factor, c latent channels, S signals.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from einops import rearrange
from torch import Tensor, nn

from latentcodec.quality.klt import KLT
from latentcodec.training.start.least_squares import least_squares, least_squares_doubled
from latentcodec.vae.families import family_of
from latentcodec.vae.layers import Attention, DownStage, ResnetBlock2D, Stage, UpStage
from latentcodec.vae.networks import Decoder, Encoder, downsampling_factor

CONSTANT = 64.0  # K: the signals have unit variance, so they move a group's deviation by less than a tenth of a percent
POSTERIOR_STD = 0.01  # of the first posterior, in units of the latents' own deviation


def zero_residuals(vae: AutoencoderKL) -> None:
    """Let every residual block and attention layer start as its shortcut (Goyal et al. 2017, arXiv:1706.02677)."""
    for module in vae.modules():
        if isinstance(module, ResnetBlock2D):
            _zero(module.conv2)
        elif isinstance(module, Attention):
            _zero(cast(nn.Linear, module.to_out[0]))
        elif family_of(vae).has_frames and hasattr(module, "conv_shortcut"):
            _zero(module.conv2)
        elif family_of(vae).has_frames and hasattr(module, "to_qkv"):
            _zero(module.proj)


@torch.no_grad()
def linear_start(vae: AutoencoderKL, images: Sequence[Tensor], latents: Tensor | None = None) -> None:
    """Fill the weights of `vae`, built by us, with the linear codec fitted to `images`, each [C, H, W] in [-1, 1].

    Afterwards `vae` encodes to the KLT's coefficients, with unit variance, and decodes them by the best linear
    decoder its up-convolutions allow stage by stage. Or, given the `latents` [N, c, h, w] that a teacher has for
    these images, it encodes to the best linear prediction of those and decodes those. Images are taken as they are
    and must be of one size, a multiple of f. Raises ValueError naming the configuration keys if the groups are too
    narrow for the signals, or if there is only one stage, which leaves nothing to transform.
    """
    if len(vae.config.block_out_channels) < 2:
        raise ValueError("model.init 'linear' needs two widths or more in model.block_out_channels")
    zero_residuals(vae)
    x = torch.stack(list(images))
    f = downsampling_factor(vae.config)
    stages = len(vae.config.block_out_channels)
    klts = [
        KLT.fit(
            images, 2**i, min(vae.config.block_out_channels[max(i - 1, 0)], vae.config.in_channels * 4**i)
        )
        for i in range(stages)
    ]
    latent = KLT.fit(images, f, vae.config.latent_channels)
    for conv in (vae.quant_conv, vae.post_quant_conv):
        if conv is not None:
            nn.init.dirac_(conv.weight)
            nn.init.zeros_(conv.bias)
    _start_encoder(vae.encoder, klts, vae.config.latent_channels)
    if latents is not None:
        _predict_latents(vae.encoder, latent.encode(x), latents)
    _start_decoder(vae.decoder, klts[:-1], latent.encode(x) if latents is None else latents, x)


def _start_encoder(encoder: Encoder, klts: list[KLT], latent_channels: int) -> None:
    """`klts[i]` has blocks of 2^i pixels; its leading coefficients are the stream after i down-convolutions."""
    colours = klts[0].basis / klts[0].std[:, None, None, None]  # [C, C, 1, 1]
    _write(encoder.conv_in, F.pad(colours, (1, 1, 1, 1)), -(colours * klts[0].mean).sum((1, 2, 3)), None)
    pairs = _paired_channels(encoder.conv_norm_out, latent_channels)
    stages = [cast(DownStage, stage) for stage in encoder.down_blocks]
    last = len(stages) - 1
    for i, stage in enumerate(stages):
        _start_shortcuts(stage, pairs if i == last else None)
        if i < last:
            layout = pairs if i == last - 1 and _keeps_width(stages[last]) else None
            _start_down_convolution(_resampling(stage.downsamplers), klts[i], klts[i + 1], layout)
    _pin_norm(encoder.conv_norm_out, cast(ResnetBlock2D, encoder.mid_block.resnets[1]))
    _zero(encoder.conv_out)
    _bias(encoder.conv_out)[latent_channels:] = 2 * torch.log(torch.tensor(POSTERIOR_STD))
    for signal, (plus, minus) in enumerate(pairs):
        encoder.conv_out.weight[signal, plus, 1, 1] = 1
        encoder.conv_out.weight[signal, minus, 1, 1] = -1


def _predict_latents(encoder: Encoder, signals: Tensor, latents: Tensor) -> None:
    """Let the last convolution predict `latents` from the KLT's coefficients, both [N, c, h, w]."""
    c = latents.shape[1]
    weight, bias = least_squares(signals, latents)
    plus, minus = torch.tensor(_paired_channels(encoder.conv_norm_out, c)).T
    encoder.conv_out.weight[:c, plus], encoder.conv_out.weight[:c, minus] = weight, -weight
    _bias(encoder.conv_out)[:c] = bias
    _bias(encoder.conv_out)[c:] += 2 * latents.std((0, 2, 3)).log()


def _start_down_convolution(
    conv: nn.Conv2d, fine: KLT, coarse: KLT, pairs: list[tuple[int, int]] | None
) -> None:
    """Coefficients of blocks of f pixels -> coefficients of blocks of 2f pixels.

    A coarse direction, cut into its four quarters, has the coordinates `kernel` in the basis of the fine ones.
    """
    n, m = len(fine.basis), len(coarse.basis)
    scale = coarse.std[:, None, None, None]
    quarters = rearrange(coarse.basis, "m C (a i) (b j) -> m C i j a b", a=2, b=2)
    kernel = torch.einsum("mCijab,nCij->mnab", quarters, fine.basis) * fine.std[:, None, None] / scale
    offset = rearrange(coarse.mean, "C (a i) (b j) -> C i j a b", a=2, b=2) - fine.mean[..., None, None]
    bias = -torch.einsum("mCijab,Cijab->m", quarters, offset) / coarse.std
    weight = torch.zeros(m, conv.in_channels, 3, 3)
    weight[:, :n, :2, :2] = (
        kernel  # the padding is on the right and below, so the block is at the taps' corner
    )
    _write(conv, weight, bias, pairs)


def _start_decoder(decoder: Decoder, klts: list[KLT], z: Tensor, x: Tensor) -> None:
    """Run the linear path stage by stage and solve each up-convolution for the coefficients of the next stage."""
    _start_identity(decoder.conv_in)
    norm = decoder.conv_norm_out
    pairs = _paired_channels(norm, (norm.num_channels // norm.num_groups - 2) // 2 * norm.num_groups)
    if len(pairs) < x.shape[1]:
        raise ValueError(_too_narrow(norm, x.shape[1]))
    stages = [cast(UpStage, stage) for stage in decoder.up_blocks]
    last = len(stages) - 1
    h = decoder.conv_in(z)  # the middle block is its shortcut, which changes nothing
    for i, stage in enumerate(stages):
        _start_shortcuts(stage, pairs if i == last else None)
        h = _through_shortcuts(stage, h)
        if i < last:
            weight, bias = least_squares_doubled(h, klts[last - 1 - i].encode(x))
            layout = pairs if i == last - 1 and _keeps_width(stages[last]) else None
            conv = _resampling(stage.upsamplers)
            _write(conv, weight, bias, layout)
            h = conv(F.interpolate(h, scale_factor=2.0, mode="nearest"))
    _pin_norm(norm, cast(ResnetBlock2D, stages[last].resnets[-1]))
    plus = torch.tensor([pair[0] for pair in pairs])
    minus = torch.tensor([pair[1] for pair in pairs])
    weight, bias = least_squares(h[:, plus], x)
    nn.init.zeros_(decoder.conv_out.weight)
    decoder.conv_out.weight[:, plus] = weight
    decoder.conv_out.weight[:, minus] = -weight
    _bias(decoder.conv_out).copy_(bias)


def _paired_channels(norm: nn.GroupNorm, signals: int) -> list[tuple[int, int]]:
    """The channels (plus, minus) of each signal, spread over the groups; two of each group stay for constants."""
    width = norm.num_channels // norm.num_groups
    per_group = -(-signals // norm.num_groups)
    if 2 * per_group + 2 > width:
        raise ValueError(_too_narrow(norm, signals))
    firsts = [(s % norm.num_groups) * width + 2 * (s // norm.num_groups) for s in range(signals)]
    return [(first, first + 1) for first in firsts]


def _too_narrow(norm: nn.GroupNorm, signals: int) -> str:
    return (
        f"model.init 'linear' needs room for {signals} signals: block_out_channels {norm.num_channels} in "
        f"norm_num_groups {norm.num_groups} has too few channels a group; lower norm_num_groups, widen the block, or "
        "choose model.init 'default'"
    )


def _pin_norm(norm: nn.GroupNorm, before: ResnetBlock2D) -> None:
    """Make the last norm a multiplication by 1: constants from the bias of the block before it, weights undo them."""
    width = norm.num_channels // norm.num_groups
    plus = torch.arange(width - 2, norm.num_channels, width)
    _bias(before.conv2)[plus] = CONSTANT
    _bias(before.conv2)[plus + 1] = -CONSTANT
    nn.init.constant_(norm.weight, CONSTANT * (2 / width) ** 0.5)
    norm.weight[plus] = norm.weight[plus + 1] = 0


def _start_shortcuts(stage: Stage, pairs: list[tuple[int, int]] | None) -> None:
    """Shortcuts hand the leading channels on; into the last width they lay the signals out in pairs."""
    conv = cast(ResnetBlock2D, stage.resnets[0]).conv_shortcut
    if conv is not None:
        weight = torch.eye(min(conv.in_channels, conv.out_channels), conv.in_channels)
        _write(conv, weight[:, :, None, None], torch.zeros(len(weight)), pairs)


def _through_shortcuts(stage: Stage, h: Tensor) -> Tensor:
    """The linear path of a stage's residual blocks, whose branches are zero: [B, n, H, W] -> [B, m, H, W]."""
    for block in stage.resnets:
        shortcut = cast(ResnetBlock2D, block).conv_shortcut
        h = h if shortcut is None else shortcut(h)
    return h


def _keeps_width(stage: Stage) -> bool:
    return cast(ResnetBlock2D, stage.resnets[0]).conv_shortcut is None


def _write(conv: nn.Conv2d, weight: Tensor, bias: Tensor, pairs: list[tuple[int, int]] | None) -> None:
    """Give the leading outputs of `conv` these rows, or lay rows out in pairs and the rest in the free channels.

    Outputs without a row keep their random weights, as features for the residual branches to learn from, except
    in the paired layout, where the constants must stand alone and are cleared.
    """
    if pairs is None:
        rows = min(len(weight), conv.out_channels)
        conv.weight[:rows] = weight[:rows]
        _bias(conv)[:rows] = bias[:rows]
        return
    _zero(conv)
    for row, (plus, minus) in zip(range(len(weight)), pairs, strict=False):
        conv.weight[plus], conv.weight[minus] = weight[row], -weight[row]
        _bias(conv)[plus], _bias(conv)[minus] = bias[row], -bias[row]


def _start_identity(conv: nn.Conv2d) -> None:
    """Hand every input on in the leading outputs; the others keep their random weights."""
    conv.weight[: conv.in_channels] = 0
    _bias(conv)[: conv.in_channels] = 0
    for channel in range(conv.in_channels):
        conv.weight[channel, channel, 1, 1] = 1


def _zero(layer: nn.Conv2d | nn.Linear) -> None:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(_bias(layer))


def _bias(layer: nn.Conv2d | nn.Linear) -> Tensor:
    assert layer.bias is not None  # every layer of an AutoencoderKL has one
    return layer.bias


def _resampling(layers: nn.ModuleList | None) -> nn.Conv2d:
    """The convolution of a stage's only down- or upsampler; every stage but the last has one."""
    assert layers is not None
    return cast(nn.Conv2d, layers[0].conv)
