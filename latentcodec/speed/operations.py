"""The operations of a VAE's convolutions and matrix products: 2 for a multiplication and its addition.

Of every covered class, by its configuration. Nothing is computed: the tensors have shapes only. Single images of
Qwen-Image's and Wan's classes are counted as they run here, in two dimensions (`vae/causal.py`).

Shapes: B batch, C image channels, s raw latent channels, H W pixels, h w raw latent cells.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from latentcodec.adopt import build
from latentcodec.speed.sides import Case
from latentcodec.vae.causal import to_channels, to_pixels
from latentcodec.vae.families import KL, Config, family_of


def fewest_operations(config: Config, case: Case, name: str = KL.name) -> int:
    """The fewest that an image pass of the class of that name can be computed with.

    Of the nine taps of a convolution after nearest-neighbour doubling four are enough (`ops/convolutions.py`).
    """
    vae = shapes_only(config, name)
    value = torch.empty(case.shape(family_of(vae), vae.config), device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        (encoded if case.direction == "encode" else decoded)(vae, value)
    saved = 0
    if case.direction == "decode":
        for power, layer in enumerate(_after_doubling(vae), start=1):
            pixels = value.shape[-2] * value.shape[-1] << 2 * power
            saved += 2 * (9 - 4) * layer.weight.shape[0] * layer.weight.shape[1] * case.batch * pixels
    return int(counter.get_total_flops()) - saved


def training_operations(config: Config, resolution: int, part: str, name: str = KL.name) -> int:
    """Of one square crop, forward and backward. `part` is what is trained: "all", "encoder" or "decoder"."""
    vae = shapes_only(config, name)
    vae.requires_grad_(part == "all")
    if part != "all":
        getattr(vae, part).requires_grad_(True)
    channels = family_of(vae).image_channels(vae.config)
    image = torch.empty(1, channels, resolution, resolution, device="meta")
    with FlopCounterMode(display=False) as counter:
        mean = encoded(vae, image).chunk(2, dim=1)[0]
        decoded(vae, mean).sum().backward()
    return int(counter.get_total_flops())


def shapes_only(config: Config, name: str) -> Any:
    """A VAE of the class of that name on the engine, without values. Raises what `adopt.build` raises."""
    with torch.device("meta"):
        return build({key: value for key, value in config.items() if not key.startswith("_")}, name)


def encoded(vae: Any, x: Tensor) -> Tensor:
    """Images [B, C, H, W] -> the posterior's parameters [B, 2s, h, w], layer by layer."""
    if not family_of(vae).has_frames:
        moments: Tensor = vae.encode(x).latent_dist.parameters
        return moments
    networks = vae.image_networks
    return networks.quant_conv(networks.encoder(to_channels(x, networks.patch))[:, :, None])[:, :, 0]


def decoded(vae: Any, z: Tensor) -> Tensor:
    """Raw latents [B, s, h, w] -> images [B, C, H, W], layer by layer."""
    if not family_of(vae).has_frames:
        image: Tensor = vae.decode(z).sample
        return image
    networks = vae.image_networks
    return to_pixels(networks.decoder(networks.post_quant_conv(z[:, :, None])[:, :, 0]), networks.patch)


def _after_doubling(vae: Any) -> Iterator[nn.Conv2d]:
    """The decoder's convolutions of doubled maps, from the latent's resolution up."""
    if family_of(vae).has_frames:
        yield from (s.resample for s in vae.image_networks.decoder.stages if s.resample is not None)
    else:
        yield from (layer.conv for block in vae.decoder.up_blocks for layer in block.upsamplers or ())
