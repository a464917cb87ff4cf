"""Encoder and Decoder of the VAE, put together from the layers of `layers.py`.

Both take the configuration of a `diffusers.AutoencoderKL` and have its state-dict keys, so that weights move both ways.
They are plain modules; `engine/networks.py` has subclasses that run faster, and `adopt.py` puts those into a genuine
AutoencoderKL.

Shapes: B batch, C image channels, c latent channels, H W pixels, h w latent cells, f = H / h downsampling factor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from latentcodec.vae.layers import (
    ACTIVATIONS,
    DownStage,
    LayerTypes,
    Shape,
    UNetMidBlock2D,
    UpStage,
    group_norm,
)

# Whether the stages of a block type carry attention; the only types that an AutoencoderKL can be built from.
DOWN_BLOCKS = {"DownEncoderBlock2D": False, "AttnDownEncoderBlock2D": True}
UP_BLOCKS = {"UpDecoderBlock2D": False, "AttnUpDecoderBlock2D": True}


def downsampling_factor(config: Mapping[str, Any]) -> int:
    """f: pixels of image per latent cell, along each side."""
    return int(2 ** (len(config["block_out_channels"]) - 1))


class Encoder(nn.Module):
    """Image to the posterior: [B, C, H, W] in [-1, 1] -> [B, 2c, H / f, W / f] (mean, log-variance).

    `config` is that of an AutoencoderKL. Raises ValueError naming the key that no AutoencoderKL could have.
    """

    def __init__(self, config: Mapping[str, Any], types: LayerTypes = LayerTypes()) -> None:  # noqa: B008
        super().__init__()
        channels, groups, activation = _widths(config)
        attention = _attention_per_stage(config, "down_block_types", DOWN_BLOCKS)
        shapes = _shapes(config, channels, config["layers_per_block"], attention, types)
        self.conv_in = nn.Conv2d(config["in_channels"], channels[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            DownStage(shape, downsample=i < len(channels) - 1) for i, shape in enumerate(shapes)
        )
        self.mid_block = UNetMidBlock2D(
            channels[-1], groups, activation, config["mid_block_add_attention"], types
        )
        self.conv_norm_out = group_norm(channels[-1], groups)
        self.conv_act = nn.SiLU()
        self.conv_out = nn.Conv2d(channels[-1], 2 * config["latent_channels"], 3, padding=1)
        self.gradient_checkpointing = False  # diffusers' enable_gradient_checkpointing() sets it

    def forward(self, sample: Tensor) -> Tensor:
        x = self.conv_in(sample)  # [B, C0, H, W]
        for stage in self.down_blocks:
            x = _run(self, stage, x)  # [B, Ci, H / 2^i, W / 2^i]
        x = _run(self, self.mid_block, x)
        return self.conv_out(self.norm_out(x))  # [B, 2c, h, w]

    def norm_out(self, x: Tensor) -> Tensor:
        """The last norm and its activation: [B, C, h, w] -> [B, C, h, w]."""
        return self.conv_act(self.conv_norm_out(x))


class Decoder(nn.Module):
    """Latents to image: [B, c, h, w] -> [B, C, h * f, w * f], in [-1, 1] up to the reconstruction error.

    `config` is that of an AutoencoderKL. Raises ValueError naming the key that no AutoencoderKL could have.
    """

    def __init__(self, config: Mapping[str, Any], types: LayerTypes = LayerTypes()) -> None:  # noqa: B008
        super().__init__()
        channels, groups, activation = _widths(config)
        channels = channels[::-1]
        attention = _attention_per_stage(config, "up_block_types", UP_BLOCKS)
        # The decoder is one block a stage deeper than the encoder.
        shapes = _shapes(config, channels, config["layers_per_block"] + 1, attention, types)
        self.conv_in = nn.Conv2d(config["latent_channels"], channels[0], 3, padding=1)
        self.up_blocks = nn.ModuleList(
            UpStage(shape, upsample=i < len(channels) - 1) for i, shape in enumerate(shapes)
        )
        self.mid_block = UNetMidBlock2D(
            channels[0], groups, activation, config["mid_block_add_attention"], types
        )
        self.conv_norm_out = group_norm(channels[-1], groups)
        self.conv_act = nn.SiLU()
        self.conv_out = nn.Conv2d(channels[-1], config["out_channels"], 3, padding=1)
        self.gradient_checkpointing = False  # diffusers' enable_gradient_checkpointing() sets it

    def forward(self, sample: Tensor, latent_embeds: Tensor | None = None) -> Tensor:
        if latent_embeds is not None:
            raise ValueError("latent_embeds: the decoder of an AutoencoderKL takes none")
        x = self.conv_in(sample)  # [B, C0, h, w]
        x = _run(self, self.mid_block, x)
        for stage in self.up_blocks:
            x = _run(self, stage, x)  # [B, Ci, h * 2^(i+1), w * 2^(i+1)]
        return self.conv_out(self.norm_out(x))  # [B, C, H, W]

    def norm_out(self, x: Tensor) -> Tensor:
        """The last norm and its activation: [B, C0, H, W] -> [B, C0, H, W]."""
        return self.conv_act(self.conv_norm_out(x))


def _run(network: nn.Module, layer: nn.Module, x: Tensor) -> Tensor:
    """layer(x); with gradient checkpointing only x is kept for the backward pass, which runs the layer again."""
    if network.gradient_checkpointing and torch.is_grad_enabled():
        return cast(Callable[..., Tensor], network._gradient_checkpointing_func)(layer, x)
    return layer(x)


def _attention_per_stage(config: Mapping[str, Any], key: str, known: Mapping[str, bool]) -> list[bool]:
    for block_type in config[key]:
        if block_type not in known:
            raise ValueError(
                f"{key}: {block_type!r} is not a block of AutoencoderKL; it has {', '.join(known)}"
            )
    if len(config[key]) != len(config["block_out_channels"]):
        raise ValueError(
            f"{key} has {len(config[key])} entries, block_out_channels has {len(config['block_out_channels'])}: "
            "each width needs one block type"
        )
    return [known[block_type] for block_type in config[key]]


def _shapes(
    config: Mapping[str, Any], channels: list[int], layers: int, attention: list[bool], types: LayerTypes
) -> list[Shape]:
    """Of the stages in the order in which they run, `channels` being their widths."""
    _, groups, activation = _widths(config)
    return [
        Shape(before, after, layers, groups, activation, attends, types)
        for before, after, attends in zip([channels[0], *channels], channels, attention, strict=False)
    ]


def _widths(config: Mapping[str, Any]) -> tuple[list[int], int, str]:
    return list(config["block_out_channels"]), config["norm_num_groups"], config["act_fn"]


def check_widths(config: Mapping[str, Any]) -> None:
    """Raise ValueError naming the key that torch would refuse later, with a message about a layer deep inside."""
    groups = config.get("norm_num_groups", 32)
    for key in ("block_out_channels", "decoder_block_out_channels"):
        for width in config.get(key) or ():
            if width % groups:
                raise ValueError(f"{key}: {width} is not divisible by norm_num_groups ({groups})")
    if config.get("attn_scales"):
        raise ValueError("attn_scales: the class itself cannot encode with attention between its stages")
    activation = config.get("act_fn", "silu")
    if activation not in ACTIVATIONS:
        raise ValueError(f"act_fn: {activation!r} is unknown; choose one of {', '.join(ACTIVATIONS)}")
