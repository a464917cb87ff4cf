"""What a new model is built from: its class and the arguments of the class's constructor, out of `model.*`.

A new model is an AutoencoderKL; one that learns a teacher's latents is of the teacher's class, since only pipelines for
that class can use them: FLUX.2's numbers are of packed latents, Qwen-Image's and Wan's pipelines want frames.

Shapes: C image channels, s raw latent channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import gcd
from typing import Any, Protocol

from latentcodec.vae.families import FLUX2, KL, QWEN_IMAGE, Family


class Sizes(Protocol):
    """What is read of the `model` section."""

    image_channels: int
    latent_channels: int
    block_out_channels: list[int]
    layers_per_block: int
    norm_num_groups: int
    mid_block_add_attention: bool
    use_quant_conv: bool


def architecture(config: Sizes, family: Family, teacher: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments; `teacher` is the configuration of a teacher of that class, empty without one."""
    if family.has_frames:
        return _with_frames(config, family, teacher)
    stages = len(config.block_out_channels)
    arguments: dict[str, Any] = {
        "in_channels": config.image_channels,
        "out_channels": config.image_channels,
        "latent_channels": config.latent_channels,
        "block_out_channels": list(config.block_out_channels),
        "down_block_types": ["DownEncoderBlock2D"] * stages,
        "up_block_types": ["UpDecoderBlock2D"] * stages,
        "layers_per_block": config.layers_per_block,
        "norm_num_groups": config.norm_num_groups,
        "mid_block_add_attention": config.mid_block_add_attention,
        "use_quant_conv": config.use_quant_conv,
        "use_post_quant_conv": config.use_quant_conv,
        "sample_size": 2 ** (stages - 1) * 32,
    }
    if family == KL:
        arguments["force_upcast"] = False
    if family == FLUX2:
        arguments |= {key: teacher[key] for key in ("batch_norm_eps", "batch_norm_momentum", "patch_size")}
    return arguments


def _with_frames(config: Sizes, family: Family, teacher: Mapping[str, Any]) -> dict[str, Any]:
    """For Qwen-Image's and Wan's classes, whose widths are multiples of one, and which have no group norm."""
    base = gcd(*config.block_out_channels)
    steps = len(config.block_out_channels) - 1
    halved = list(teacher["temperal_downsample"])  # what happens in time is the teacher's, where it can be
    channels = config.image_channels * family.patch(teacher) ** 2
    arguments: dict[str, Any] = {
        "base_dim": base,
        "z_dim": config.latent_channels,
        "dim_mult": [width // base for width in config.block_out_channels],
        "num_res_blocks": config.layers_per_block,
        "temperal_downsample": halved if len(halved) == steps else [False] * steps,
        "latents_mean": list(teacher["latents_mean"]),
        "latents_std": list(teacher["latents_std"]),
        family.input_key: channels,
        family.output_key: channels,
    }
    if family != QWEN_IMAGE:
        shared = ("is_residual", "patch_size", "scale_factor_temporal", "scale_factor_spatial")
        arguments |= {key: teacher[key] for key in shared}
        arguments["decoder_base_dim"] = None
    return arguments
