"""Tiny instances of every covered class, with random weights and configurations that reach every kind of layer."""

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    AutoencoderKLQwenImage21,
    AutoencoderKLWan,
)

from latentcodec.vae.families import family_of

STAGES = 4
KL = dict(
    block_out_channels=[8, 8, 16, 16],
    down_block_types=["DownEncoderBlock2D"] * STAGES,
    up_block_types=["UpDecoderBlock2D"] * STAGES,
    layers_per_block=1,
    norm_num_groups=4,
    sample_size=16,
)
CAUSAL = dict(
    base_dim=8,
    z_dim=4,
    dim_mult=[1, 2, 2, 3],
    num_res_blocks=1,
    temperal_downsample=[False, True, True],
    latents_mean=[0.5, -0.2, 0.1, 2.0],
    latents_std=[1.5, 0.7, 3.0, 1.1],
)
RESIDUAL = CAUSAL | dict(
    is_residual=True, dim_mult=[1, 2, 4, 4], temperal_downsample=[True, True, False], decoder_base_dim=16
)

# By name: the class and its configuration.
SMALL: dict[str, tuple[type, dict[str, Any]]] = {
    "kl": (AutoencoderKL, KL),
    "flux2": (AutoencoderKLFlux2, KL | dict(latent_channels=4)),
    "flux2-small-decoder": (
        AutoencoderKLFlux2,
        KL | dict(latent_channels=4, decoder_block_out_channels=[4, 8, 8, 12]),
    ),
    "qwen": (AutoencoderKLQwenImage, CAUSAL),
    "qwen-deep": (AutoencoderKLQwenImage, CAUSAL | dict(num_res_blocks=2, input_channels=4)),
    "wan21": (AutoencoderKLWan, CAUSAL | dict(decoder_base_dim=12)),
    "wan22": (AutoencoderKLWan, RESIDUAL | dict(in_channels=12, out_channels=12, patch_size=2)),
    "qwen21": (
        AutoencoderKLQwenImage21,
        RESIDUAL | dict(dim_mult=[1, 2, 4, 8, 8], temperal_downsample=[False, True, True, True]),
    ),
}
CAUSAL_NAMES = ("qwen", "qwen-deep", "wan21", "wan22", "qwen21")
FLUX2_NAMES = ("flux2", "flux2-small-decoder")


def small_vae(name: str, **others: Any) -> Any:
    """A genuine instance of diffusers' class, in evaluation mode, whose norms are not the identity."""
    kind, config = SMALL[name]
    vae = kind(**(config | others)).eval()
    with torch.no_grad():
        for key, parameter in vae.named_parameters():
            if key.endswith("gamma") or ("norm" in key and key.endswith("weight")):
                parameter.copy_(1 + 0.3 * torch.randn_like(parameter))
            elif key.endswith("bias"):
                parameter.copy_(0.1 * torch.randn_like(parameter))
        if hasattr(vae, "bn"):
            vae.bn.running_mean.normal_()
            vae.bn.running_var.uniform_(0.5, 2)
    return vae


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference in units of the range; infinite for another shape."""
    if actual.shape != expected.shape:
        return float("inf")
    return ((actual - expected).abs().max() / (expected.max() - expected.min())).item()


def images_for(vae, batch=2, height=3, width=2, frames=1):
    """Random pictures and latents of so many latent cells, as the class takes them."""
    family, config = family_of(vae), vae.config
    f = family.raw_factor(config)
    middle = (frames,) if family.has_frames else ()
    x = torch.rand(batch, family.image_channels(config), *middle, height * f, width * f) * 2 - 1
    z = torch.randn(batch, family.raw_channels(config), *middle, height, width)
    return x, z


def results(vae, x, z):
    with torch.no_grad():
        return vae.encode(x).latent_dist.parameters, vae.decode(z).sample
