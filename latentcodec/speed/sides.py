"""What `bench/throughput.py` compares: ours, diffusers' own class in several settings, and other runtimes, by one call.

Every side starts from the same float32 weights, of any covered class.

Shapes: B batch, C image channels, s raw latent channels, H W pixels, h w raw latent cells.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentcodec.adopt import build, optimize_vae
from latentcodec.codec import LatentCodec
from latentcodec.engine.memory import free_memory
from latentcodec.speed import peers
from latentcodec.stock import stock_copy
from latentcodec.vae.families import SAME_UNLESS_GIVEN, Config, Family, family_of
from latentcodec.vae_config import check_config, class_named_in

SIDES = {
    "ours": "optimize_vae(codec.vae); on GPUs with channels_last weights",
    "diffusers": "diffusers' own class as it comes: contiguous weights",
    "diffusers channels_last": "diffusers' own class with channels_last weights",
    "diffusers compiled": "channels_last and torch.compile of encoder and decoder, with freezing",
    "diffusers tiled": "channels_last and enable_tiling(): blended tiles, which give another image",
    **peers.SIDES,
}
NAN = float("nan")
MAPS_AT_ONCE = 3  # of the widest layer, that diffusers holds: input, norm and activation
MAPS_OF_CLIPS = 14  # measured: 8 to 13, with zero frames before an image and what is kept for a next one
NOT_OF_CLIPS = {"diffusers compiled", *peers.SIDES}
"""Sides that Qwen-Image's and Wan's classes do not have: what they keep between frames is no part of a fixed graph."""


@dataclass(frozen=True)
class Case:
    """One thing to be timed: `batch` square images of `size` pixels a side."""

    direction: str
    dtype: str
    size: int
    batch: int

    @property
    def megapixels(self) -> float:
        return self.batch * self.size**2 / 1e6

    def shape(self, family: Family, config: Config) -> tuple[int, int, int, int]:
        """[B, C, H, W] of the images that are encoded, or [B, s, h, w] of the raw latents that are decoded."""
        if self.direction == "encode":
            return self.batch, family.image_channels(config), self.size, self.size
        cells = self.size // family.raw_factor(config)
        return self.batch, family.raw_channels(config), cells, cells


@dataclass
class Measurement:
    """What one side did in one case."""

    seconds: list[float] = field(default_factory=list)
    """One for every round; empty where the device had too little memory."""
    max_error: float = NAN
    """Largest absolute difference to diffusers in float32 with the same weights."""
    rms_error: float = NAN
    """The root mean square of the same differences."""
    peak_bytes: float = NAN
    """Memory above the loaded model."""
    process_bytes: float = NAN
    """The same peak above the process before the model was loaded: weights, packed ones included, and all else."""


@dataclass(frozen=True)
class Setup:
    """What a process needs to load any side; it is sent to the processes that measure memory."""

    source: str
    device: str
    max_memory: int | None
    """Bytes that ours may take; None: as it comes."""

    def codec(self, dtype: str) -> LatentCodec:
        """Raises `ValueError` or `OSError` naming what cannot be loaded."""
        model: Any = self.source
        if self.source.endswith(".json"):
            try:
                config = json.loads(Path(self.source).read_text())
            except ValueError as error:
                raise ValueError(f"{self.source}: not a JSON file ({error})") from error
            arguments = check_config(config, self.source)
            torch.manual_seed(0)  # every process draws the same weights
            model = build(arguments, class_named_in(config, self.source))
        return LatentCodec.from_pretrained(model, device=self.device, dtype=getattr(torch, dtype))

    def vae(self, side: str, dtype: str) -> Any:
        """A model in evaluation, for other runtimes the one that they are exported from."""
        if side == "ours":
            bound = "auto" if self.max_memory is None else self.max_memory
            vae = optimize_vae(self.codec(dtype).vae, bound)
            if self.device == "cuda":  # where weights are read anew at each call, and these need no copy
                _order_channels_last(vae)
            return vae
        vae = stock_copy(self.codec("float32").vae, getattr(torch, dtype))
        if side != "diffusers" and side not in peers.SIDES:
            _order_channels_last(vae)
        if side == "diffusers tiled":
            vae.enable_tiling()
        if side == "diffusers compiled":
            torch._dynamo.config.recompile_limit = 64  # a graph for each shape, however many there are
            for part in ("encoder", "decoder"):
                compiled = torch.compile(getattr(vae, part), dynamic=False, options={"freezing": True})
                setattr(vae, part, compiled)
        return vae


def _order_channels_last(vae: nn.Module) -> None:
    """In memory only. Of modules with two- and three-dimensional weights torch's own `to` refuses this."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    for weight in vae.parameters():
        if weight.ndim in formats:
            weight.data = weight.data.to(memory_format=formats[weight.ndim])


Results = dict[Case, dict[str, Measurement]]
"""By case and side."""


def fits(side: str, vae: Any, case: Case) -> bool:
    """Whether a side's feature maps fit into the free memory; asked first, since Linux ends who asks for too much."""
    if side in ("ours", "diffusers tiled"):
        return True
    if side in peers.SIDES and (case.dtype != "float32" or vae.device.type != "cpu"):
        return False  # they compute in float32 on CPUs
    family = family_of(vae)
    maps = MAPS_OF_CLIPS if family.has_frames else MAPS_AT_ONCE
    pixels = case.batch * (case.size // family.patch(vae.config)) ** 2
    needed = maps * _widest(family, vae.config, case.direction) * pixels * vae.dtype.itemsize
    return needed < free_memory(vae.device)


def _widest(family: Family, config: Config, direction: str) -> int:
    """Channels of the widest map at the resolution that the network's first or last layers have."""
    if direction == "encode":
        return family.widths(config)[0]
    own = {
        same: config[key] for key, same in SAME_UNLESS_GIVEN.items() if config.get(key)
    }  # decoder's widths
    return max(family.widths({**config, **own})[:2])


def runner(side: str, vae: Any, case: Case, value: Tensor) -> Callable[[Tensor], Tensor]:
    """The call of a side in a case, for inputs like `value`."""
    if side in peers.SIDES:
        return peers.runner(side, vae, case.direction, value)
    return partial(call, vae, case.direction)


@torch.no_grad()
def call(vae: Any, direction: str, value: Tensor) -> Tensor:
    """What a pipeline does: images [B, C, H, W] to the posterior's mode [B, s, h, w], or raw latents to images.

    To Qwen-Image's and Wan's classes an image is a clip of one frame.
    """
    has_frames = family_of(vae).has_frames
    given = value[:, :, None] if has_frames else value
    result = vae.encode(given).latent_dist.mode() if direction == "encode" else vae.decode(given).sample
    return result[:, :, 0] if has_frames else result


def example(case: Case, reference: Any) -> Tensor:
    """Soft blots [B, C, H, W] in [-1, 1], or their raw latents [B, s, h, w]: nearer to photographs than noise would be.

    The latents are those of a small picture, resized, because a large one might not fit into memory.
    """
    family, config = family_of(reference), reference.config
    small = min(case.size, 16 * family.raw_factor(config))
    size = case.size if case.direction == "encode" else small
    shape = case.batch, family.image_channels(config), 8, 8
    blots = torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(reference.device)
    x = F.interpolate(blots, size=(size, size), mode="bilinear") * 2 - 1
    if case.direction == "encode":
        return x
    return F.interpolate(call(reference, "encode", x), size=case.shape(family, config)[2:], mode="bilinear")
