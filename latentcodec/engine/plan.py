"""When a network runs in strips, in which dtype, and how much memory that may take.

The strips themselves are in `strips.py`. Shapes: B batch, C channels, H W rows and columns of the input.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from latentcodec.engine import cuda_graphs, recordings
from latentcodec.engine.checks import (
    forms_within,
    has_hooks,
    is_plain,
    modules_within,
    torch_layers_are_replaced,
)
from latentcodec.engine.cuda_graphs import is_replayable, replayed
from latentcodec.engine.layers import ResnetBlock2D, Upsample
from latentcodec.engine.memory import free_memory
from latentcodec.engine.needs import channels_at_once, needs_of
from latentcodec.engine.strips import StripPass
from latentcodec.machine import is_fast
from latentcodec.ops.convolutions import forget_prepared
from latentcodec.ops.functional import fastest_kernels, is_ordinary
from latentcodec.ops.native.build import library_if_built
from latentcodec.ops.native.convolution import Workspace
from latentcodec.ops.native.pointwise import NativeKernels
from latentcodec.ops.native.winograd import KEPT_VALUES
from latentcodec.ops.pointwise import REFERENCE_KERNELS, Kernels
from latentcodec.vae.layers import Attention, Downsample, DownStage, Stage, UNetMidBlock2D, UpStage

STRIP_BYTES = {"cpu": 4 << 20, "cuda": 96 << 20}  # of a strip: fits into a CPU's cache, keeps a GPU busy
QUERIES_AT_ONCE = {"cpu": 0, "cuda": 4096}  # of attention, whose scores are kept
SHARE_OF_FREE_MEMORY = 0.5  # the bound of a pass where the user gave none
# What strips can run: the layers of `checks.py`, put together by these blocks.
BLOCKS: set[type[nn.Module]] = {
    nn.ModuleList,
    DownStage,
    UpStage,
    UNetMidBlock2D,
    ResnetBlock2D,
    Attention,
    Downsample,
    Upsample,
}


@dataclass
class Engine:
    """How an Encoder or a Decoder runs when no gradient is asked for; `optimize_vae` sets it."""

    max_memory: int | None = None
    """Bytes of a network's weights, of what is prepared of them, and of feature maps. None: what is prepared and the
    maps may take half of the free memory."""
    keep_packed: bool = True
    """Whether weights that were made ready for the convolutions stay in memory between calls."""
    compiled: bool | None = None
    """Whether functions that are compiled at their first use run, and small images are replayed; None: on CPUs, where
    the compiler takes two seconds beside the first pass."""

    def applies(self, network: Any, x: Tensor) -> bool:
        """Whether strips may compute in place of the modules.

        Gradients, autocast, whatever is not ordinary, hooks on inner layers, adapters, and layers of another form than
        the network was built with get the plain modules.
        """
        return (
            type(network.conv_in) is nn.Conv2d  # what took its place may have no weight
            and self.allows(x, network.conv_in.weight)
            and not has_hooks(network)
            and all(
                is_plain(module, BLOCKS) for child in network.children() for module in modules_within(child)
            )
            and forms_within(network) == network.built_as
            and not _pads_one_cell_with_itself(network, x)
        )

    def allows(self, x: Tensor, first: Tensor) -> bool:
        """Whether strips may compute on such an input, here and now; `first` is the weight that it meets first."""
        return (
            is_ordinary(x)
            and x.dtype == first.dtype  # else torch's own error
            and x.is_floating_point()
            and x.ndim == 4
            and x.shape[1]
            == first.shape[1]  # else torch's own error: native functions read what they are told of
            and x.numel() > 0
            and x.device == first.device  # likewise: they would read a GPU's addresses as the CPU's
            and not torch.is_grad_enabled()
            and x.device.type in STRIP_BYTES
            and not torch.is_autocast_enabled(x.device.type)
            and x.dtype != torch.float64  # strips add up in float32
            and not torch_layers_are_replaced()
        )

    def dtype(self, x: Tensor) -> torch.dtype:
        """In which a pass over x is computed."""
        return x.dtype if x.device.type != "cpu" or is_fast(x.dtype) else torch.float32

    def bound(self, device: torch.device) -> int:
        """Bytes that a pass may take."""
        return self.max_memory or int(free_memory(device) * SHARE_OF_FREE_MEMORY)

    def compiles(self, x: Tensor) -> bool:
        """Whether compiled functions run in a pass over x."""
        return x.device.type == "cpu" if self.compiled is None else self.compiled

    def kernels(self, x: Tensor) -> Kernels:
        """Of the pointwise work; torch's functions as long as native ones are being compiled."""
        device = x.device.type
        if not self.compiles(x) or (device == "cpu" and library_if_built() is None):
            return REFERENCE_KERNELS
        return fastest_kernels(device)

    def encode(self, encoder: Any, x: Tensor) -> Tensor:
        """[B, C, H, W] -> posterior moments [B, 2c, H // f, W // f]."""
        stages = [(x.shape[2] >> i, x.shape[3] >> i, stage) for i, stage in enumerate(encoder.down_blocks)]
        if not min(stages[-1][:2]):
            raise ValueError(
                f"an image of {x.shape[2]} x {x.shape[3]} pixels is smaller than one latent cell"
            )
        return self._run(encoder, x, stages, StripPass.encode)

    def decode(self, decoder: Any, z: Tensor) -> Tensor:
        """[B, c, h, w] -> [B, C, h f, w f]."""
        stages = [(z.shape[2] << i, z.shape[3] << i, stage) for i, stage in enumerate(decoder.up_blocks)]
        return self._run(decoder, z, stages, StripPass.decode)

    def _run(self, network: Any, x: Tensor, stages: list[tuple[int, int, Stage]], direction: Any) -> Tensor:
        def plan() -> partial[list[Tensor]]:
            return partial(direction, self._plan(x, stages, network), network)

        widest = max(h * w * channels_at_once(stage, True) for h, w, stage in stages)
        # Triton and CUDA graphs take the current GPU, whichever the tensors are on.
        with torch.cuda.device_of(x):
            if self.compiles(x) and is_replayable(x, len(x) * widest * x.dtype.itemsize):
                return replayed(network, x, plan, partial(joined, dtype=x.dtype))
            if self._is_recordable(network, x, stages):
                return recordings.replayed(network, x, plan, partial(joined, dtype=x.dtype))
            # In inference mode a view is a tensor like any other, and one compiled function fits them all.
            with torch.inference_mode():
                strips = plan()(x)
            return joined(strips, x.dtype)

    def _is_recordable(self, network: nn.Module, x: Tensor, stages: list[tuple[int, int, Stage]]) -> bool:
        """Whether what a pass would hold between calls is little: maps that are single strips, and small weights."""
        largest = max(h * w * stage.widest for h, w, stage in stages)
        return (
            self.compiles(x)
            and self.keep_packed
            and self.max_memory is None
            and x.dtype == torch.float32
            and all(p.dtype == torch.float32 for p in network.parameters())  # what a checksum reads
            and len(x) * largest * x.dtype.itemsize <= STRIP_BYTES["cpu"]
            and isinstance(self.kernels(x), NativeKernels)
            and all(weight.numel() <= KEPT_VALUES for weight in network.parameters())
        )

    def _plan(self, x: Tensor, stages: list[tuple[int, int, Stage]], network: Any) -> StripPass:
        """Keep inner maps where they fit, else make them again. Raises ValueError where that is too much as well."""
        device, dtype, bound = x.device.type, self.dtype(x), self.bound(x.device)
        kernels = self.kernels(x)
        is_native = isinstance(kernels, NativeKernels)
        needs = needs_of(network, x, dtype, stages, is_native, self.keep_packed)
        if self.max_memory is None:
            bound += needs.weights  # which are there, or are to be prepared
        elif needs.least > bound:
            raise ValueError(
                f"max_memory {bound:,} bytes is too little for {tuple(x.shape)} in {dtype}: it needs {needs.least:,}, "
                f"of which weights take {needs.weights:,}"
            )
        strip_bytes = needs.strip_bytes(bound, STRIP_BYTES[device])
        score_bytes = needs.score_bytes(bound, QUERIES_AT_ONCE[device])
        scratch = torch.empty(0, dtype=dtype, device=x.device)
        workspace = Workspace(self._is_recordable(network, x, stages)) if is_native else None
        return StripPass(
            dtype,
            kernels,
            strip_bytes,
            score_bytes,
            needs.map_bytes(bound),
            scratch,
            workspace,
            keeps_packed=self.keep_packed,
        )


def _pads_one_cell_with_itself(network: Any, x: Tensor) -> bool:
    """Whether the smallest map is a single cell, and convolutions repeat it around itself instead of adding zeros.

    Such a map is constant. A group norm divides by its deviation, which is nothing but rounding, so only the same
    functions in the same order give the same numbers.
    """
    shift = 0 if hasattr(network, "up_blocks") else len(network.down_blocks) - 1
    if max(x.shape[2] >> shift, x.shape[3] >> shift) > 1:
        return False
    return any(isinstance(layer, nn.Conv2d) and layer.padding_mode != "zeros" for layer in network.modules())


def forget(network: nn.Module) -> None:
    """Let what is recorded of a network's passes and prepared of its weights go, and the memory with it."""
    recordings.forget(network)
    cuda_graphs.forget(network)
    for layer in network.modules():
        forget_prepared(layer)


def joined(strips: list[Tensor], dtype: torch.dtype) -> Tensor:
    """Strips [B, r, W, C] -> [B, C, H, W] contiguous, and fit for autograd wherever the caller is."""
    rows = [strip.to(dtype).permute(0, 3, 1, 2) for strip in strips]
    return torch.cat(rows, 2).contiguous(memory_format=torch.contiguous_format)
