"""Tiny codecs of random weights, crops for them, and runs that start from them."""

import json
from dataclasses import replace

import torch
from small_runs import small
from torch import nn

from latentcodec.adopt import build
from latentcodec.codec import LatentCodec
from latentcodec.training.config import Config


def tiny(quant=False, **settings):
    """An f4 codec with 4 latents of random weights, whose latents have other means and deviations each."""
    settings = {"latent_channels": 4, "block_out_channels": [8, 8, 16], **settings}
    stages = len(settings["block_out_channels"])
    vae = build(
        {
            "down_block_types": ["DownEncoderBlock2D"] * stages,
            "up_block_types": ["UpDecoderBlock2D"] * stages,
            "norm_num_groups": 2,
            "mid_block_add_attention": False,
            "use_quant_conv": quant,
            "use_post_quant_conv": quant,
            **settings,
        }
    ).eval()
    c = vae.config.latent_channels
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
        vae.encoder.conv_out.bias[:c] = torch.linspace(-1, 2, c)
        vae.encoder.conv_out.bias[c:] = torch.linspace(-4, -6, c)
    vae.register_to_config(scaling_factor=0.5, shift_factor=0.25)
    return vae.requires_grad_(False)


def saved(vae, folder):
    LatentCodec(vae).save_pretrained(folder)
    return str(folder)


def copy_of(vae):
    other = build({key: value for key, value in vae.config.items() if not key.startswith("_")}).eval()
    other.load_state_dict(vae.state_dict())
    return other.requires_grad_(False)


def reconstruction(vae, x):
    return vae.decode(vae.encode(x).latent_dist.mode()).sample


def crops(count=8, channels=3, side=32):
    coarse = torch.randn(count, channels, side // 4, side // 4)
    return list(nn.functional.interpolate(coarse, size=(side, side), mode="bicubic").clamp(-1, 1))


def no_crops():
    raise AssertionError("nothing of this start depends on images")


def run_of(output, images, model, **settings) -> Config:
    return replace(small(output, images, **settings), model=model)


def reported(output, key):
    """All values of a key of metrics.jsonl."""
    lines = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    return [line[key] for line in lines if key in line]
