"""diffusers' own model and ours with the same weights, in every public configuration, and the strips of ours."""

import copy

import torch
from diffusers import AutoencoderKL

from latentcodec.adopt import adopt
from latentcodec.engine.strips import StripPass
from latentcodec.ops.pointwise import REFERENCE_KERNELS


def config(channels=(16, 32), layers=1, latent=4, groups=8, down=None, up=None, **others):
    """An AutoencoderKL configuration of as many stages as there are widths."""
    down = down or ["DownEncoderBlock2D"] * len(channels)
    up = up or ["UpDecoderBlock2D"] * len(channels)
    return dict(
        down_block_types=down,
        up_block_types=up,
        block_out_channels=channels,
        layers_per_block=layers,
        latent_channels=latent,
        norm_num_groups=groups,
        **others,
    )


ALL_MAPS = 1 << 62  # bytes that a pass may hold of maps, where it shall make none again
X, Z = (2, 3, 48, 32), (2, 4, 6, 4)  # shapes of an image batch and of its latents, for CONFIGS["sd"]

FLUX = dict(
    latent=16, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.1159, scaling_factor=0.3611
)
CONFIGS = {
    "sd": config(channels=(16, 32, 32, 32), layers=2),
    "sdxl": config(channels=(16, 32, 32, 32), layers=2, scaling_factor=0.13025),
    "sd3": config(channels=(16, 32, 32, 32), layers=2, **FLUX),
    "flux": config(channels=(16, 32, 32, 32), layers=2, **FLUX),
    "photo-f8c16": config(channels=(32, 64, 96, 128), **FLUX, mid_block_add_attention=False),
    "one image channel": config(in_channels=1, out_channels=1),
    "five image channels": config(in_channels=5, out_channels=5),
    "unequal image channels": config(in_channels=4, out_channels=3),
    "three layers": config(layers=3),
    "f4": config(channels=(16, 16, 32)),
    "f16": config(channels=(8, 16, 16, 16, 32), latent=32),
    "f32": config(channels=(8, 8, 16, 16, 16, 16), latent=64),
    "attention in the stages": config(
        channels=(16, 32),
        down=["DownEncoderBlock2D", "AttnDownEncoderBlock2D"],
        up=["AttnUpDecoderBlock2D", "UpDecoderBlock2D"],
    ),
    "gelu": config(act_fn="gelu"),
    "f1": config(channels=(16,)),
}


def pair(configuration):
    """diffusers' own model and ours, with equal random weights, biases and norm weights included."""
    reference = AutoencoderKL(**configuration).eval()
    for parameter in reference.parameters():
        torch.nn.init.normal_(parameter, std=0.2 if parameter.ndim == 1 else parameter[0].numel() ** -0.5)
    return reference, adopt(copy.deepcopy(reference))


def whole_and_strips(configuration, batch=1, height=40, width=24, **settings):
    """(diffusers' moments and image, ours) of one random image and one random latent."""
    reference, ours = pair(configuration)
    f = 2 ** (len(configuration["block_out_channels"]) - 1)
    x = torch.rand(batch, ours.config.in_channels, height, width) * 2 - 1
    z = torch.randn(batch, ours.config.latent_channels, max(2, height // f), max(2, width // f))
    run = StripPass(
        **{
            "dtype": torch.float32,
            "kernels": REFERENCE_KERNELS,
            "strip_bytes": 1,
            "map_bytes": ALL_MAPS,
            "score_bytes": 1 << 20,
            "scratch": torch.empty(0),
        }
        | settings
    )
    with torch.inference_mode():
        expected = reference.encoder(x), reference.decoder(z)
        actual = run.encode(ours.encoder, x), run.decode(ours.decoder, z)
    return expected, [torch.cat(parts, 1).permute(0, 3, 1, 2) for parts in actual]


def differences(expected, actual):
    """Largest difference in units of the range; infinite for another shape."""
    return [
        ((a - e).abs().max() / (e.max() - e.min())).item() if a.shape == e.shape else float("inf")
        for e, a in zip(expected, actual, strict=True)
    ]


def close(ours, theirs):
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= 1e-4 * (theirs.max() - theirs.min())
