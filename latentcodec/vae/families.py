"""The covered VAE classes of diffusers, one `Family` each: the keys of its configuration, its shapes, its latents.

What differs between the classes stands here alone, and `adopt.py` knows the classes by these names. How a family is
added is in docs/families.md.

Shapes: B batch, C image channels, H W pixels; a raw latent, as the network gives it, has s channels and is g times
smaller than the image; a latent, as denoisers see it, has c channels of h x w cells of f x f pixels. Where pipelines
pack p x p raw cells into one, c = s p p and f = g p; everywhere else they are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

Config = Mapping[str, Any]


@dataclass(frozen=True)
class LatentUnits:
    """The numbers of a class's canonical formula, z = (raw - mean) / std, after packing."""

    mean: Tensor
    """[c] float64."""
    std: Tensor
    """[c] float64."""


def _by_one_scale_or_per_channel(config: Config, buffers: Mapping[str, Tensor]) -> LatentUnits:
    """raw = z std / scaling_factor + mean as SDXL's pipelines have it, else raw = z / scaling_factor + shift_factor."""
    c, scale = int(config["latent_channels"]), float(config["scaling_factor"])
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is None or std is None:  # pipelines look at them only together
        mean, std = [config.get("shift_factor") or 0.0] * c, [1.0] * c
    return LatentUnits(_float64(mean), _float64(std) / scale)


def _by_batch_norm(config: Config, buffers: Mapping[str, Tensor]) -> LatentUnits:
    """The statistics of `bn`, a batch norm that never runs, over 2 x 2-packed latents."""
    mean, variance = (buffers[f"bn.running_{name}"].detach().double().cpu() for name in ("mean", "var"))
    return LatentUnits(mean, (variance + float(config["batch_norm_eps"])).sqrt())


def _per_channel(config: Config, buffers: Mapping[str, Tensor]) -> LatentUnits:
    """raw = z latents_std + latents_mean."""
    return LatentUnits(_float64(config["latents_mean"]), _float64(config["latents_std"]))


def _float64(values: Any) -> Tensor:
    return torch.tensor(list(values), dtype=torch.float64, device="cpu")


def _stage_widths(config: Config) -> list[int]:
    return [int(width) for width in config["block_out_channels"]]


def _multiplied_widths(config: Config) -> list[int]:
    return [int(config["base_dim"]) * int(factor) for factor in config["dim_mult"]]


def _one(config: Config) -> int:
    return 1


def _patch(config: Config) -> int:
    return int(config.get("patch_size") or 1)


def _packed(config: Config) -> int:
    return int(config["patch_size"][0])


@dataclass(frozen=True)
class Family:
    """One class of diffusers, by what differs between classes."""

    name: str
    """Of the class."""
    architecture: tuple[str, ...]
    """Every key that decides which tensors there are and what the network computes with them."""
    normalisation: tuple[str, ...]
    """Every key that decides how latents are normalised, beside buffers."""
    units: Callable[[Config, Mapping[str, Tensor]], LatentUnits]
    """The canonical formula, from the configuration and the VAE's buffers."""
    input_key: str = "in_channels"
    """Of the channels that the encoder's first convolution reads."""
    output_key: str = "out_channels"
    """Of the channels that the decoder's last convolution makes."""
    raw_key: str = "latent_channels"
    """Of s."""
    widths: Callable[[Config], list[int]] = _stage_widths
    """Of the encoder's stages, from the image's resolution down; each after the first halves the resolution."""
    patch: Callable[[Config], int] = _one
    """Pixels, along each side, that are made channels before the first convolution."""
    packing: Callable[[Config], int] = _one
    """p."""
    has_frames: bool = False
    """Whether images are [B, C, frames, H, W] to the class, and what it decodes is clamped to [-1, 1]."""

    def image_channels(self, config: Config) -> int:
        """C, of the images that go in."""
        return int(config[self.input_key]) // self.patch(config) ** 2

    def output_channels(self, config: Config) -> int:
        """C, of the images that come out."""
        return int(config[self.output_key]) // self.patch(config) ** 2

    def raw_channels(self, config: Config) -> int:
        """s."""
        return int(config[self.raw_key])

    def raw_factor(self, config: Config) -> int:
        """g: pixels of image per raw cell, along each side."""
        return int(self.patch(config) * 2 ** (len(self.widths(config)) - 1))

    def downsampling_factor(self, config: Config) -> int:
        """f: pixels of image per latent cell, along each side."""
        return self.raw_factor(config) * self.packing(config)

    def latent_channels(self, config: Config) -> int:
        """c."""
        return self.raw_channels(config) * self.packing(config) ** 2


LAYERS_OF_KL = (
    "in_channels",
    "out_channels",
    "latent_channels",
    "block_out_channels",
    "down_block_types",
    "up_block_types",
    "layers_per_block",
    "act_fn",
    "norm_num_groups",
    "mid_block_add_attention",
    "use_quant_conv",
    "use_post_quant_conv",
)
SAME_UNLESS_GIVEN = {"decoder_block_out_channels": "block_out_channels", "decoder_base_dim": "base_dim"}
"""Keys of the decoder whose None means what another key says."""
LAYERS_OF_CAUSAL = ("base_dim", "z_dim", "dim_mult", "num_res_blocks", "attn_scales", "temperal_downsample")
LAYERS_OF_WAN = (
    *LAYERS_OF_CAUSAL,
    "decoder_base_dim",
    "is_residual",
    "in_channels",
    "out_channels",
    "patch_size",
)

KL = Family(
    name="AutoencoderKL",
    architecture=LAYERS_OF_KL,
    normalisation=("scaling_factor", "shift_factor", "latents_mean", "latents_std"),
    units=_by_one_scale_or_per_channel,
)
FLUX2 = replace(
    KL,
    name="AutoencoderKLFlux2",
    architecture=(*LAYERS_OF_KL, "decoder_block_out_channels", "patch_size"),
    normalisation=("batch_norm_eps",),
    units=_by_batch_norm,
    packing=_packed,
)
WAN = Family(
    name="AutoencoderKLWan",
    raw_key="z_dim",
    architecture=LAYERS_OF_WAN,
    normalisation=("latents_mean", "latents_std"),
    units=_per_channel,
    widths=_multiplied_widths,
    patch=_patch,
    has_frames=True,
)
QWEN_IMAGE = replace(
    WAN,
    name="AutoencoderKLQwenImage",
    input_key="input_channels",
    output_key="input_channels",
    architecture=(*LAYERS_OF_CAUSAL, "input_channels"),
    patch=_one,
)
QWEN_IMAGE_21 = replace(WAN, name="AutoencoderKLQwenImage21")

FAMILIES = {family.name: family for family in (KL, FLUX2, QWEN_IMAGE, WAN, QWEN_IMAGE_21)}


def covered() -> str:
    """The covered classes, for messages."""
    return ", ".join(FAMILIES)


def family_named(name: str) -> Family:
    """The family of a class's name, as config.json has it. Raises ValueError listing those that are covered."""
    if name not in FAMILIES:
        raise ValueError(f"the class {name} is not covered; covered are {covered()}")
    return FAMILIES[name]


def family_of(vae: Any) -> Family:
    """The family of a VAE object, whose class may be derived. Raises TypeError listing those that are covered."""
    for base in type(vae).__mro__:
        if base.__name__ in FAMILIES:
            return FAMILIES[base.__name__]
    raise TypeError(f"{type(vae).__name__} is not covered; covered are {covered()}")


def downsampling_factor(vae: Any) -> int:
    """f of a VAE object: pixels of image per latent cell, along each side."""
    return family_of(vae).downsampling_factor(vae.config)


def units_of(vae: Any) -> LatentUnits:
    """The numbers that normalise the latents of a VAE object, by its class's canonical formula."""
    return family_of(vae).units(vae.config, dict(vae.named_buffers()))
