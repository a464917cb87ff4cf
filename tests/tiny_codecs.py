"""A small AutoencoderKL with random weights for tests of codecs, and what codecs and their folders are compared by."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL

from latentcodec.adopt import build

WEIGHTS = "diffusion_pytorch_model.safetensors"


def tiny_vae(**others):
    """An f4 VAE with random weights."""
    config = dict(
        block_out_channels=[8, 8, 16],
        down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3,
        norm_num_groups=4,
    )
    return build(config | others)


def stock(vae):
    """The same weights in diffusers' own encoder and decoder."""
    twin = AutoencoderKL.from_config(vae.config).eval()
    twin.load_state_dict(vae.state_dict())
    return twin


def same_weights(a, b):
    first, second = a.vae.state_dict(), b.vae.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}
