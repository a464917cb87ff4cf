"""Which codec made a latent, and how: fingerprint, normalisation and posterior, as a store needs them of a codec.

Shapes: B batch, C image channels, c latent channels, H W pixels, h w latent cells.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from latentcodec.pixels import pad_to_multiple

if TYPE_CHECKING:
    from latentcodec.codec import LatentCodec


def fingerprint_of(codec: LatentCodec) -> str:
    """sha256 over architecture, normalisation and weights (their values as float32)."""
    known = getattr(codec, "fingerprint", None)
    if isinstance(known, str):
        return known
    digest = hashlib.sha256()
    config = {name: value for name, value in dict(codec.vae.config).items() if not name.startswith("_")}
    digest.update(json.dumps([type(codec.vae).__name__, config], sort_keys=True, default=str).encode())
    for name, tensor in sorted(codec.vae.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def normalisation_of(codec: LatentCodec) -> dict[str, Any]:
    """`mean` and `std` per channel: z = (raw - mean) / std."""
    return {
        "mean": codec.latents_mean.flatten().tolist(),
        "std": codec.latents_std.flatten().tolist(),
    }


@torch.no_grad()
def posterior_of(codec: LatentCodec, x: Tensor) -> tuple[Tensor, Tensor]:
    """[B, C, H, W] in [-1, 1] -> mean and deviation, both [B, c, h, w] float32, normalised as `encode`'s."""
    if hasattr(codec, "posterior"):
        return codec.posterior(x)
    x = pad_to_multiple(x.to(codec.device, codec.dtype), codec.downsampling_factor)
    latent = codec.vae.encode(x).latent_dist
    return (
        latent.mean.float() - codec.latents_mean
    ) / codec.latents_std, latent.std.float() / codec.latents_std
