"""VAEs as diffusers builds them: what adopted ones are built from, turned back into and compared with.

Shapes: B batch, C image channels, s raw latent channels, H W pixels, h w raw latent cells.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    AutoencoderKLQwenImage21,
    AutoencoderKLWan,
)
from torch import nn

from latentcodec.engine.sharing import share_paddings
from latentcodec.machine import exact_convolutions, is_fast
from latentcodec.ops.convolutions import form_of
from latentcodec.vae.families import FLUX2, KL, QWEN_IMAGE, QWEN_IMAGE_21, WAN, family_of

CLASSES: dict[str, Any] = {
    KL.name: AutoencoderKL,
    FLUX2.name: AutoencoderKLFlux2,
    QWEN_IMAGE.name: AutoencoderKLQwenImage,
    WAN.name: AutoencoderKLWan,
    QWEN_IMAGE_21.name: AutoencoderKLQwenImage21,
}
"""By the names of `vae/families.py`."""


def stock_copy(vae: Any, dtype: torch.dtype) -> Any:
    """The same weights, in `dtype`, in an object of the class as diffusers builds it, in evaluation mode."""
    stock = new_stock(family_of(vae).name, vae.config)
    stock.load_state_dict(vae.state_dict())
    share_paddings(stock, vae)
    nn.Module.to(stock, vae.device, dtype)  # diffusers' own `to` warns about casting
    return stock.eval()


def new_stock(name: str, config: Mapping[str, Any]) -> Any:
    """A new object of the class, which pads with zeros, from those keys of `config` that its constructor takes.

    diffusers would warn of others, and passes over the values of those that were given by position to `config`'s own
    object: its `_use_default_values` names them.
    """
    kind = CLASSES[name]
    known = kind._get_init_keys(kind)
    return kind.from_config({key: value for key, value in config.items() if key in known})


@torch.random.fork_rng(devices=[])  # the caller's random numbers stay: all of these are drawn on the CPU
def print_differences(vae: Any) -> None:
    """How far `vae`, and diffusers' own class in the same dtype, are from that class in float32."""
    family, config = family_of(vae), vae.config
    exact, stock = stock_copy(vae, torch.float32), stock_copy(vae, vae.dtype)
    # diffusers' class may take an hour in an emulated format
    pixels = 256 if is_fast(vae.dtype, vae.device) else 64
    frames, side = (1,) if family.has_frames else (), pixels // family.raw_factor(config)
    x = torch.rand(1, family.image_channels(config), *frames, pixels, pixels) * 2 - 1
    z = torch.randn(1, family.raw_channels(config), *frames, side, side)
    for what, value in (("encode", x), ("decode", z)):
        results = []
        for model in (exact, vae, stock):
            given = value.to(vae.device, model.dtype)
            with torch.no_grad(), exact_convolutions() if model is exact else nullcontext():
                result = model._encode(given) if what == "encode" else model.decode(given).sample
            results.append(result.float())
        expected, ours, theirs = results
        errors = [(y - expected).abs().max() / (expected.max() - expected.min()) for y in (ours, theirs)]
        print(
            f"{what} in {vae.dtype}: {errors[0]:.1e} of the range from diffusers in float32"
            f" (diffusers itself in {vae.dtype}: {errors[1]:.1e})"
        )
    for name, layer in vae.named_modules():
        if (form := form_of(layer)) is not None:
            print(f"  {name}: {form}")
