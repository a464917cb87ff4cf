"""What `bench/throughput.py` compares: ours, diffusers' own class in several settings, and other runtimes, by one call.

Every side starts from the same float32 weights.

Shapes: B batch, C channels, H W pixels, f downsampling factor, c latent channels.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import psutil
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from latentcodec.adopt import build, optimize_vae
from latentcodec.codec import LatentCodec
from latentcodec.speed import peers
from latentcodec.vae.networks import downsampling_factor

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
        model: str | AutoencoderKL = self.source
        if self.source.endswith(".json"):
            try:
                config = json.loads(Path(self.source).read_text())
            except ValueError as error:
                raise ValueError(f"{self.source}: not a JSON file ({error})") from error
            torch.manual_seed(0)  # every process draws the same weights
            model = build(config)
        return LatentCodec.from_pretrained(model, device=self.device, dtype=getattr(torch, dtype))

    def vae(self, side: str, dtype: str) -> AutoencoderKL:
        """A model in evaluation, for other runtimes the one that they are exported from."""
        if side == "ours":
            vae = optimize_vae(self.codec(dtype).vae, self.max_memory or "auto")
            if self.device == "cuda":  # where weights are read anew at each call, and these need no copy
                vae.to(memory_format=torch.channels_last)
            return vae
        ours = self.codec("float32").vae
        vae = AutoencoderKL.from_config(ours.config)
        vae.load_state_dict(ours.state_dict())
        vae.to(self.device).type(getattr(torch, dtype)).eval()  # .to(dtype) warns of modules it does not have
        if side != "diffusers" and side not in peers.SIDES:
            vae.to(memory_format=torch.channels_last)
        if side == "diffusers tiled":
            vae.enable_tiling()
        if side == "diffusers compiled":
            torch._dynamo.config.recompile_limit = 64  # a graph for each shape, however many there are
            for part in ("encoder", "decoder"):
                compiled = torch.compile(getattr(vae, part), dynamic=False, options={"freezing": True})
                setattr(vae, part, compiled)
        return vae


Results = dict[Case, dict[str, Measurement]]
"""By case and side."""


def fits(side: str, vae: AutoencoderKL, case: Case) -> bool:
    """Whether a side's feature maps fit into the free memory; asked first, since Linux ends who asks for too much."""
    if side in ("ours", "diffusers tiled"):
        return True
    if side in peers.SIDES and (case.dtype != "float32" or vae.device.type != "cpu"):
        return False  # they compute in float32 on CPUs
    widths = vae.config.block_out_channels
    channels = widths[0] if case.direction == "encode" else max(widths[:2])
    needed = MAPS_AT_ONCE * channels * case.batch * case.size**2 * vae.dtype.itemsize
    free = torch.cuda.mem_get_info()[0] if vae.device.type == "cuda" else psutil.virtual_memory().available
    return needed < free


def runner(side: str, vae: AutoencoderKL, case: Case, value: Tensor) -> Callable[[Tensor], Tensor]:
    """The call of a side in a case, for inputs like `value`."""
    if side in peers.SIDES:
        return peers.runner(side, vae, case.direction, value)
    return partial(call, vae, case.direction)


@torch.no_grad()
def call(vae: AutoencoderKL, direction: str, value: Tensor) -> Tensor:
    """What a pipeline does: images to the posterior's mode, or latents to images."""
    return vae.encode(value).latent_dist.mode() if direction == "encode" else vae.decode(value).sample


def example(case: Case, reference: AutoencoderKL) -> Tensor:
    """Soft blots [B, C, H, W] in [-1, 1], or their latents: nearer to photographs than noise would be.

    The latents are those of a small picture, resized, because a large one might not fit into memory.
    """
    f = downsampling_factor(reference.config)
    size = case.size if case.direction == "encode" else min(case.size, 16 * f)
    shape = case.batch, reference.config.in_channels, 8, 8
    blots = torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(reference.device)
    x = F.interpolate(blots, size=(size, size), mode="bilinear") * 2 - 1
    if case.direction == "encode":
        return x
    return F.interpolate(call(reference, "encode", x), size=(case.size // f, case.size // f), mode="bilinear")
