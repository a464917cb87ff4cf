"""The model that is trained: an AutoencoderKL, new or fine-tuned, and the one forward pass of training around it.

Shapes: B batch, C image channels, c latent channels, H W pixels, h w latent cells, f downsampling factor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from latentcodec.autoencoder import build, downsampling_factor
from latentcodec.codec import LatentCodec
from latentcodec.training.initialization import linear_start, zero_residuals
from latentcodec.training.losses import sample_posterior, split_moments


@dataclass
class ModelConfig:
    """The architecture, in AutoencoderKL's terms, and where its weights start."""

    image_channels: int = 3
    """Channels of the images, in and out: 1 grey, 3 RGB, 4 RGB with alpha."""
    latent_channels: int = 16
    """Channels of the latents."""
    block_out_channels: list[int] = field(default_factory=lambda: [32, 64, 96, 128])
    """Width of each stage, from the image's resolution down; each stage after the first halves the resolution."""
    layers_per_block: int = 1
    """Residual blocks of each stage of the encoder; the decoder has one more."""
    norm_num_groups: int = 8
    """Groups of every group norm; divides every width. The linear start needs 4 channels a group or more."""
    mid_block_add_attention: bool = False
    """Attention at the lowest resolution, as in Stable Diffusion's VAE."""
    use_quant_conv: bool = False
    """The 1x1 convolutions around the latent that Stable Diffusion 1 and 2 and SDXL have."""
    init: Literal["linear", "default"] = "linear"
    """Start as the linear codec fitted to the data (initialization.py), or with torch's default weights and residual
    branches at zero."""
    from_pretrained: str | None = None
    """Fine-tune this codec instead: folder, hub id, .safetensors file or bundled name. Its architecture counts, the
    keys above do not."""
    subfolder: str | None = None
    """Subfolder of from_pretrained, such as vae."""
    part: Literal["all", "decoder", "encoder"] = "all"
    """What is trained. With decoder, the latents stay exactly as they are."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: a third more time for a fraction of the memory."""

    def __post_init__(self) -> None:
        for width in self.block_out_channels:
            if width % self.norm_num_groups:
                raise ValueError(
                    f"model.block_out_channels: {width} is not divisible by model.norm_num_groups "
                    f"{self.norm_num_groups}"
                )


def new_vae(config: ModelConfig, crops: Callable[[], Sequence[Tensor]]) -> AutoencoderKL:
    """The AutoencoderKL that training starts from, float32 on the CPU.

    `crops` gives training crops [C, H, W] of one size for the linear start; it is called only for that.
    Raises ValueError naming the key that cannot be.
    """
    if config.from_pretrained is not None:
        vae = LatentCodec.from_pretrained(config.from_pretrained, config.subfolder).vae.float()
    else:
        vae = build(_architecture(config))
        zero_residuals(vae)
        if config.init == "linear":
            linear_start(vae, crops())
    if config.gradient_checkpointing:
        vae.enable_gradient_checkpointing()
    vae.encoder.requires_grad_(config.part != "decoder")
    vae.decoder.requires_grad_(config.part != "encoder")
    for conv, part in ((vae.quant_conv, "decoder"), (vae.post_quant_conv, "encoder")):
        if conv is not None:
            conv.requires_grad_(config.part != part)
    return vae


def _architecture(config: ModelConfig) -> dict[str, object]:
    stages = len(config.block_out_channels)
    return {
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
        "force_upcast": False,
    }


class Pass(NamedTuple):
    """What one forward pass of training gives to the losses."""

    mean: Tensor
    """[B, c, h, w] float32 of the posterior."""
    logvar: Tensor
    """[B, c, h, w] float32, clamped."""
    latent: Tensor
    """[B, c, h, w] float32: the posterior's draw, before any transform."""
    reconstruction: Tensor
    """[B, C, H, W] float32: what the decoder made of the (transformed) latent."""
    log_scale: Tensor
    """Scalar: the logarithm of the likelihood's scale."""


class TrainedCodec(nn.Module):
    """Encode, draw, decode in one forward: data parallelism synchronises only what runs inside `forward`.

    diffusers' own trainer calls `unwrap_model(vae).encode`, which skips the synchronisation, so that N processes
    train N different models.
    """

    def __init__(self, vae: AutoencoderKL, scale: float, learn_scale: bool) -> None:
        super().__init__()
        self.vae = vae
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale)), requires_grad=learn_scale)
        self.downsampling_factor = downsampling_factor(vae.config)

    def forward(self, x: Tensor, noise: Tensor, transform: Callable[[Tensor], Tensor]) -> Pass:
        """x [B, C, H, W], noise [B, c, h, w] standard normal, transform: latent -> latent for the decoder."""
        mean, logvar = split_moments(self.vae.encode(x).latent_dist.parameters)
        latent = sample_posterior(mean, logvar, noise)
        reconstruction = self.vae.decode(transform(latent)).sample.float()
        return Pass(mean, logvar, latent, reconstruction, self.log_scale)
