"""Each published configuration once, at its full widths and with random weights, on a small image."""

from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    AutoencoderKLQwenImage21,
    AutoencoderKLWan,
)
from small_vaes import relative_error

from latentcodec import optimize_vae
from latentcodec.vae.families import family_of

WAN22 = dict(
    base_dim=160,
    decoder_base_dim=256,
    z_dim=48,
    dim_mult=[1, 2, 4, 4],
    temperal_downsample=[False, True, True],
    is_residual=True,
    in_channels=12,
    out_channels=12,
    patch_size=2,
    scale_factor_spatial=16,
    latents_mean=[0.0] * 48,
    latents_std=[1.0] * 48,
)
PUBLISHED: dict[str, tuple[type, dict[str, Any]]] = {
    "FLUX.2": (AutoencoderKLFlux2, {}),
    "FLUX.2 small decoder": (AutoencoderKLFlux2, dict(decoder_block_out_channels=[96, 192, 384, 384])),
    "Qwen-Image": (AutoencoderKLQwenImage, {}),
    "Qwen-Image Layered": (AutoencoderKLQwenImage, dict(input_channels=4)),
    "Wan 2.1": (AutoencoderKLWan, {}),
    "Wan 2.2 5B": (AutoencoderKLWan, WAN22),
    "Qwen-Image 2.1": (AutoencoderKLQwenImage21, {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_configuration_gives_the_numbers_of_its_class(name):
    kind, config = PUBLISHED[name]
    vae = kind(**config).eval()
    family = family_of(vae)
    f, frames = family.raw_factor(vae.config), (1,) if family.has_frames else ()
    x = torch.rand(1, family.image_channels(vae.config), *frames, 4 * f, 3 * f) * 2 - 1
    z = torch.randn(1, family.raw_channels(vae.config), *frames, 4, 3)
    with torch.no_grad():
        expected = vae.encode(x).latent_dist.parameters, vae.decode(z).sample
        optimize_vae(vae)
        assert relative_error(vae.encode(x).latent_dist.parameters, expected[0]) <= 1e-5
        assert relative_error(vae.decode(z).sample, expected[1]) <= 1e-5
