"""Encoder and Decoder of the VAE, put together from the layers of `layers.py`.

Both take the configuration of a `diffusers.AutoencoderKL` and have its state-dict keys, so that weights move both ways.
How they get into a genuine AutoencoderKL is in `adopt.py`, how they run without gradients in `engine/`.

Shapes: B batch, C image channels, c latent channels, H W pixels, h w latent cells, f = H / h downsampling factor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from latentcodec.engine.plan import Engine
from latentcodec.ops.functional import normalised
from latentcodec.vae.layers import DownStage, Shape, UNetMidBlock2D, UpStage, group_norm

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

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        channels, groups, activation = _widths(config)
        attention = _attention_per_stage(config, "down_block_types", DOWN_BLOCKS)
        shapes = _shapes(config, channels, config["layers_per_block"], attention)
        self.conv_in = nn.Conv2d(config["in_channels"], channels[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            DownStage(shape, downsample=i < len(channels) - 1) for i, shape in enumerate(shapes)
        )
        self.mid_block = UNetMidBlock2D(channels[-1], groups, activation, config["mid_block_add_attention"])
        self.conv_norm_out = group_norm(channels[-1], groups)
        self.conv_act = nn.SiLU()
        self.conv_out = nn.Conv2d(channels[-1], 2 * config["latent_channels"], 3, padding=1)
        self.gradient_checkpointing = False  # diffusers' enable_gradient_checkpointing() sets it
        self.engine = Engine()

    def forward(self, x: Tensor) -> Tensor:
        if self.engine.applies(self, x):
            return self.engine.encode(self, x)
        x = self.conv_in(x)  # [B, C0, H, W]
        for stage in self.down_blocks:
            x = _run(self, stage, x)  # [B, Ci, H / 2^i, W / 2^i]
        x = _run(self, self.mid_block, x)
        return self.conv_out(normalised(x, self.conv_norm_out, self.conv_act))  # [B, 2c, h, w]


class Decoder(nn.Module):
    """Latents to image: [B, c, h, w] -> [B, C, h * f, w * f], in [-1, 1] up to the reconstruction error.

    `config` is that of an AutoencoderKL. Raises ValueError naming the key that no AutoencoderKL could have.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        channels, groups, activation = _widths(config)
        channels = channels[::-1]
        attention = _attention_per_stage(config, "up_block_types", UP_BLOCKS)
        # The decoder is one block a stage deeper than the encoder.
        shapes = _shapes(config, channels, config["layers_per_block"] + 1, attention)
        self.conv_in = nn.Conv2d(config["latent_channels"], channels[0], 3, padding=1)
        self.up_blocks = nn.ModuleList(
            UpStage(shape, upsample=i < len(channels) - 1) for i, shape in enumerate(shapes)
        )
        self.mid_block = UNetMidBlock2D(channels[0], groups, activation, config["mid_block_add_attention"])
        self.conv_norm_out = group_norm(channels[-1], groups)
        self.conv_act = nn.SiLU()
        self.conv_out = nn.Conv2d(channels[-1], config["out_channels"], 3, padding=1)
        self.gradient_checkpointing = False  # diffusers' enable_gradient_checkpointing() sets it
        self.engine = Engine()

    def forward(self, z: Tensor) -> Tensor:
        if self.engine.applies(self, z):
            return self.engine.decode(self, z)
        x = self.conv_in(z)  # [B, C0, h, w]
        x = _run(self, self.mid_block, x)
        for stage in self.up_blocks:
            x = _run(self, stage, x)  # [B, Ci, h * 2^(i+1), w * 2^(i+1)]
        return self.conv_out(normalised(x, self.conv_norm_out, self.conv_act))  # [B, C, H, W]


def _run(network: nn.Module, layer: nn.Module, x: Tensor) -> Tensor:
    """layer(x), keeping only its input for the backward pass where gradient checkpointing is on."""
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
    config: Mapping[str, Any], channels: list[int], layers: int, attention: list[bool]
) -> list[Shape]:
    """Of the stages in the order in which they run, `channels` being their widths."""
    _, groups, activation = _widths(config)
    return [
        Shape(before, after, layers, groups, activation, attends)
        for before, after, attends in zip([channels[0], *channels], channels, attention, strict=False)
    ]


def _widths(config: Mapping[str, Any]) -> tuple[list[int], int, str]:
    return list(config["block_out_channels"]), config["norm_num_groups"], config["act_fn"]
