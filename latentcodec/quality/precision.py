"""The half-precision certificate: how large a codec's activations get, and what float16 and bfloat16 cost.

float16 ends at 65504: a VAE with larger activations decodes to black images (SDXL's does), which is why pipelines
cast VAEs up unless their config says `force_upcast: false`. Here that is measured, on diffusers' own layers, since
those are what a pipeline without this package runs.

Shapes: N images, C channels, H W pixels, f downsampling factor.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from latentcodec.latents import decode_raw, posterior_parameters
from latentcodec.machine import exact_convolutions
from latentcodec.quality.metrics import psnr
from latentcodec.stock import stock_copy
from latentcodec.vae.families import downsampling_factor

LARGEST_FLOAT16 = 65504.0
HEADROOM = 8.0  # other images than these may need more
SMALLEST_PSNR = 50.0  # dB against float32: a mean error of 0.8 levels of 8 bits
SIDE, CPU_SIDE = (
    128,
    32,
)  # pixels of the half-precision runs; without units for it, float16 takes 60 times as long
LISTED_LAYERS = 5


@dataclass(frozen=True)
class HalfPrecision:
    """A codec in float16 or bfloat16 against itself in float32."""

    psnr: float
    """dB, of the decoder on the same latents, the lowest of all images; nan where not finite."""
    finite: bool
    """Whether encoder and decoder stayed finite on every image."""


@dataclass(frozen=True)
class Certificate:
    """What was measured on some crops and on the extreme images."""

    activations: dict[str, tuple[float, float]]
    """By layer: the largest magnitude that goes in or comes out, over the crops and over the extreme images."""
    float16: HalfPrecision
    bfloat16: HalfPrecision
    crops: int
    """How many crops."""

    @property
    def largest(self) -> float:
        """The largest magnitude of all."""
        return max(max(pair) for pair in self.activations.values())

    @property
    def float16_is_safe(self) -> bool:
        """Whether a pipeline may run this VAE in float16 as it is."""
        return (
            self.largest < LARGEST_FLOAT16 / HEADROOM
            and self.float16.finite
            and self.float16.psnr >= SMALLEST_PSNR
        )

    def card(self) -> str:
        """Markdown for the model card."""
        verdict = "safe" if self.float16_is_safe else "not safe: run this VAE in bfloat16 or float32"
        rows = "\n".join(
            f"| {name} | {'yes' if half.finite else 'no'} | {half.psnr:.1f} dB |"
            for name, half in (("float16", self.float16), ("bfloat16", self.bfloat16))
        )
        highest = sorted(self.activations.items(), key=lambda item: -max(item[1]))[:LISTED_LAYERS]
        layers = "\n".join(f"| `{name}` | {real:.4g} | {extreme:.4g} |" for name, (real, extreme) in highest)
        return (
            f"## Half precision\n\nfloat16 is {verdict}. Measured on {self.crops} crops and on extreme images "
            "(white, black, saturated noise, checkerboard, lines of one pixel).\n\n"
            "| | finite | lowest PSNR of the decoder against float32 |\n| --- | --- | --- |\n"
            f"{rows}\n\n| layers with the largest activations | crops | extreme images |\n| --- | --- | --- |\n"
            f"{layers}\n\nfloat16 ends at 65504; `force_upcast` is off only if the largest is below an eighth of it."
        )


def extreme_images(channels: int, height: int, width: int) -> Tensor:
    """[6, C, H, W] in {-1, 1}: white, black, saturated noise, checkerboard, lines of one pixel both ways."""
    rows, columns = torch.arange(height)[:, None], torch.arange(width)[None]
    noise = torch.rand(channels, height, width, generator=torch.Generator().manual_seed(0)) < 0.5
    ones = torch.ones(height, width, dtype=torch.bool)
    flat = [ones, ~ones, (rows + columns) % 2 == 0, (rows % 2 == 0) & ones, (columns % 2 == 0) & ones]
    images = torch.stack([noise, *(image.expand(channels, -1, -1) for image in flat)])
    return images * 2.0 - 1.0


@torch.no_grad()
@exact_convolutions()
def certify(vae: Any, crops: Sequence[Tensor]) -> Certificate:
    """Measure `vae`, which stays as it is, on `crops` [C, H, W] in [-1, 1] of one size and on the extreme images.

    Activations are those of whole crops in float32; the half-precision runs see their upper left corners.
    """
    real = torch.stack(list(crops)).to(vae.device, torch.float32)
    extreme = extreme_images(*real.shape[1:]).to(real)
    plain = stock_copy(vae, torch.float32)
    peaks = []
    for x in (real, extreme):
        with _largest_activations(plain) as largest:
            decode_raw(plain, _mode(plain, x))
        peaks.append(largest)
    f, side = downsampling_factor(vae), CPU_SIDE if vae.device.type == "cpu" else SIDE
    side = max(f, side // f * f)
    corners = torch.cat([real, extreme])[:, :, :side, :side]
    return Certificate(
        activations={name: (peaks[0][name].item(), peaks[1][name].item()) for name in peaks[0]},
        float16=_half_precision(plain, stock_copy(vae, torch.float16), corners),
        bfloat16=_half_precision(plain, stock_copy(vae, torch.bfloat16), corners),
        crops=len(crops),
    )


def _half_precision(plain: Any, half: Any, x: Tensor) -> HalfPrecision:
    z = _mode(plain, x)
    y = decode_raw(half, z.to(half.dtype)).float()
    parameters = posterior_parameters(half, x.to(half.dtype))
    finite = bool(y.isfinite().all() and parameters.isfinite().all())
    lowest = psnr(y.clamp(-1, 1), decode_raw(plain, z).clamp(-1, 1)).min().item()
    return HalfPrecision(lowest if finite else float("nan"), finite)


def _mode(vae: Any, x: Tensor) -> Tensor:
    """The posterior's mean of images [N, C, H, W], in the data type of `vae`."""
    return posterior_parameters(vae, x).chunk(2, dim=1)[0]


@contextmanager
def _largest_activations(vae: Any) -> Iterator[dict[str, Tensor]]:
    """By layer, the largest magnitude of what goes in and comes out while the context lasts; inf for nan."""
    largest: dict[str, Tensor] = {}

    def note(name: str, layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        tensors = [value for value in (*inputs, output) if isinstance(value, Tensor)]
        peaks = [value.abs().nan_to_num(nan=torch.inf).amax() for value in tensors]
        largest[name] = torch.stack([*peaks, *([largest[name]] if name in largest else [])]).amax()

    # Layers with weights are enough: what passes an activation or a sum goes in or comes out of one of them.
    layers = [item for item in vae.named_modules() if any(True for _ in item[1].parameters(recurse=False))]
    handles = [layer.register_forward_hook(partial(note, name)) for name, layer in layers]
    try:
        yield largest
    finally:
        for handle in handles:
            handle.remove()
