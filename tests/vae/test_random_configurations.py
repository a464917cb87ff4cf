"""Random configurations of every covered class, on random sizes and batches: optimised, each gives diffusers' numbers.

    python tests/vae/test_random_configurations.py 50

tries as many of each class, and ends with the largest error.
"""

import random
import sys
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    AutoencoderKLQwenImage21,
    AutoencoderKLWan,
)
from small_vaes import relative_error

from latentcodec import LatentCodec, optimize_vae, restore_vae
from latentcodec.vae.families import family_of

CLASSES = (
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    AutoencoderKLQwenImage21,
)
CASES = 3


def flat(dice: random.Random, flux2: bool) -> dict[str, Any]:
    """Of AutoencoderKL, or of FLUX.2's class, which packs its latents."""
    stages, groups = dice.randint(1, 4), dice.choice([1, 2, 4])
    widths = [groups * dice.choice([2, 3, 4, 6]) for _ in range(stages)]
    config = dict(
        block_out_channels=widths,
        down_block_types=["DownEncoderBlock2D"] * stages,
        up_block_types=["UpDecoderBlock2D"] * stages,
        layers_per_block=dice.randint(1, 3),
        latent_channels=dice.choice([1, 3, 4, 8]),
        norm_num_groups=groups,
        act_fn=dice.choice(["silu", "gelu", "mish", "relu"]),
        mid_block_add_attention=dice.random() < 0.6,
        use_quant_conv=dice.random() < 0.5,
        use_post_quant_conv=dice.random() < 0.5,
        in_channels=(channels := dice.choice([1, 3, 4])),
        out_channels=channels,
    )
    if flux2 and dice.random() < 0.5:
        config["decoder_block_out_channels"] = [groups * dice.choice([2, 3, 5]) for _ in range(stages)]
    return config


def causal(dice: random.Random, kind: type) -> dict[str, Any]:
    """Of Qwen-Image's and Wan's classes."""
    steps, z = dice.randint(1, 3), dice.choice([2, 4, 6])
    config = dict(
        base_dim=dice.choice([4, 6, 8]),
        z_dim=z,
        dim_mult=[1, *(dice.choice([1, 2, 4]) for _ in range(steps))],
        num_res_blocks=dice.randint(1, 2),
        temperal_downsample=[dice.random() < 0.5 for _ in range(steps)],
        latents_mean=[dice.uniform(-1, 1) for _ in range(z)],
        latents_std=[dice.uniform(0.5, 3) for _ in range(z)],
    )
    if kind is AutoencoderKLQwenImage:
        return config | dict(input_channels=dice.choice([3, 4]))
    patch = dice.choice([None, 2]) if kind is AutoencoderKLWan else None
    residual = dice.random() < 0.5 or kind is AutoencoderKLQwenImage21
    if residual:  # whose shortcuts multiply channels by powers of two, and not in the lowest stage
        config |= dict(base_dim=8, dim_mult=[*(multiples := [1, 2, 4][:steps]), multiples[-1]])
    channels = 3 * (patch or 1) ** 2 if kind is AutoencoderKLWan else 4
    config |= dict(is_residual=residual, in_channels=channels, out_channels=channels, patch_size=patch)
    return config | dict(decoder_base_dim=dice.choice([None, 8, 16]))


def worst_error(kind: type, seed: int) -> float:
    """In units of the range, of encoding, decoding, and of both after `restore_vae`, for one configuration."""
    dice = random.Random(f"{kind.__name__} {seed}")
    torch.manual_seed(seed)
    is_flat = kind in (AutoencoderKL, AutoencoderKLFlux2)
    config = flat(dice, kind is AutoencoderKLFlux2) if is_flat else causal(dice, kind)
    vae = kind(**config).eval()
    family = family_of(vae)
    f, batch = family.downsampling_factor(vae.config), dice.randint(1, 3)
    high, wide = dice.randint(1, 4), dice.randint(1, 4)
    x = torch.rand(batch, family.image_channels(vae.config), high * f, wide * f) * 2 - 1
    z = torch.randn(batch, family.raw_channels(vae.config), high * family.packing(vae.config), wide * 2)
    if family.has_frames:
        x, z = x[:, :, None], z[:, :, None]

    def run() -> list[torch.Tensor]:
        with torch.no_grad():
            return [vae.encode(x).latent_dist.parameters, vae.decode(z).sample]

    expected = run()
    optimize_vae(vae)
    errors = [relative_error(ours, theirs) for ours, theirs in zip(run(), expected, strict=True)]
    codec = LatentCodec(vae)
    image = x[:, :, 0] if family.has_frames else x
    assert codec.encode(image).shape == (batch, codec.latent_channels, high, wide), config
    restore_vae(vae)
    assert all(map(torch.equal, run(), expected)), config
    return max(errors)


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("seed", range(CASES))
def test_a_random_configuration_gives_the_numbers_of_its_class(kind, seed):
    assert worst_error(kind, seed) <= 1e-5


if __name__ == "__main__":
    for kind in CLASSES:
        errors = [worst_error(kind, seed) for seed in range(int(sys.argv[1]))]
        print(kind.__name__, len(errors), f"{max(errors):.1e}", errors.index(max(errors)), flush=True)
