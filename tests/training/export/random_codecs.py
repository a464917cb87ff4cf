"""Codecs of random weights whose channels differ, pictures for them, and their latents as rows of cells."""

import torch
from torch.nn import functional as F

from latentcodec.adopt import build

F_, C_ = 4, 6


def pictures(count, side=32, seed=0, channels=3):
    """Smooth drawn noise with colours that go together, as photographs have."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, channels, side // 8, side // 8, generator=generator)
    fine = torch.randn(count, 1, side, side, generator=generator)
    x = F.interpolate(coarse, size=(side, side), mode="bicubic") + coarse.mean((1, 2, 3), keepdim=True)
    return (0.5 * x + 0.1 * fine).clamp(-1, 1)


def random_vae(quant=False, **settings):
    """Random weights, biases and norms, and a posterior whose spread differs from channel to channel."""
    settings = {"latent_channels": C_, "block_out_channels": [8, 16, 16], "layers_per_block": 1, **settings}
    stages = len(settings["block_out_channels"])
    vae = build(
        {
            "down_block_types": ["DownEncoderBlock2D"] * stages,
            "up_block_types": ["UpDecoderBlock2D"] * stages,
            "norm_num_groups": settings.pop("norm_num_groups", 4),
            "use_quant_conv": quant,
            "use_post_quant_conv": quant,
            **settings,
        }
    ).eval()
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
        c = vae.config.latent_channels
        vae.encoder.conv_out.bias[c:] = torch.linspace(-6, -1, c)
        vae.encoder.conv_out.bias[:c] = torch.linspace(-2, 3, c)
        vae.encoder.conv_out.weight *= 3
    return vae.requires_grad_(False)


def copy_of(vae):
    other = build({k: v for k, v in vae.config.items() if not k.startswith("_")}).eval()
    other.load_state_dict(vae.state_dict())
    return other.requires_grad_(False)


def raw(vae, x):
    return vae.encode(x).latent_dist.mode()


def cells(z):
    return z.transpose(0, 1).flatten(1).double()
