"""One image through Qwen-Image's or Wan's VAE: when it runs as a stream of strips, and when as plain layers.

Shapes: B batch, C image channels, s raw latent channels, H W pixels, h w raw latent cells.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from latentcodec.engine.checks import form, is_unchanged, modules_within, torch_layers_are_replaced
from latentcodec.engine.cuda_graphs import is_replayable, replayed
from latentcodec.engine.needs import ATTENTION_MAPS, TRANSFORMED_STRIPS
from latentcodec.engine.plan import QUERIES_AT_ONCE, Engine, joined
from latentcodec.engine.streams import StreamPass
from latentcodec.ops.convolutions import prepared_bytes
from latentcodec.ops.functional import is_ordinary
from latentcodec.ops.native.convolution import Workspace
from latentcodec.ops.native.pointwise import NativeKernels
from latentcodec.vae.causal import ImageDecoder, ImageEncoder, Stage, to_channels, to_pixels

STRIP_BYTES = {"cpu": 4 << 20, "cuda": 32 << 20}  # stays in the cache of a CPU, and fills a GPU
STRIPS_A_BLOCK = 6  # that two convolutions have in hand: neighbours, results, and what goes around them


@dataclass
class ImageNetworks:
    """Encoder and decoder of one VAE, for single images; the modules are diffusers' own."""

    encoder: ImageEncoder
    decoder: ImageDecoder
    quant_conv: nn.Module
    post_quant_conv: nn.Module
    patch: int
    """Pixels, along each side, that are made channels before the encoder and pixels again after the decoder."""
    types: frozenset[type[nn.Module]]
    """Of the modules as diffusers builds them."""
    engine: Engine = field(default_factory=Engine)
    built_as: list[tuple[Any, ...]] = field(init=False)
    """The modules and their forms, which are those of the VAE as long as none is replaced."""

    def __post_init__(self) -> None:
        self.built_as = _modules_and_forms(
            self.encoder.source, self.decoder.source, self.quant_conv, self.post_quant_conv
        )

    def are_those_of(self, vae: Any) -> bool:
        """Whether the VAE still has these modules, and has them as they were."""
        parts = vae.encoder, vae.decoder, vae.quant_conv, vae.post_quant_conv
        return _modules_and_forms(*parts) == self.built_as

    def encode(self, x: Tensor) -> Tensor | None:
        """[B, C, H, W] -> the posterior's parameters [B, 2s, h, w]; None as `_run` says."""
        if x.shape[2] % self.patch or x.shape[3] % self.patch:
            return None  # the class's own error
        x = to_channels(x, self.patch)
        stages = [(x.shape[2] >> i, x.shape[3] >> i, stage) for i, stage in enumerate(self.encoder.stages)]
        odd = x.shape[2] % 2 ** (len(stages) - 1) or x.shape[3] % 2 ** (len(stages) - 1)
        if not min(stages[-1][:2]) or (odd and stages[0][2].shortcut is not None):
            return None  # the class's own error
        moments = self._run(self.encoder, x, stages, StreamPass.encode)
        return None if moments is None else self.quant_conv(moments[:, :, None])[:, :, 0]

    def decode(self, z: Tensor) -> Tensor | None:
        """[B, s, h, w] -> [B, C, H, W], not clamped; None as `_run` says."""
        if not self._suits(self.decoder, z):
            return None  # before a hook on `post_quant_conv` is called, since the class will call it
        z = self.post_quant_conv(z[:, :, None])[:, :, 0]
        stages = [(z.shape[2] << i, z.shape[3] << i, stage) for i, stage in enumerate(self.decoder.stages)]
        image = self._run(self.decoder, z, stages, StreamPass.decode)
        return None if image is None else to_pixels(image, self.patch)

    def _run(
        self, network: Any, x: Tensor, stages: list[tuple[int, int, Stage]], direction: Any
    ) -> Tensor | None:
        """None where only the class itself knows what to do: compiling, hooks, adapters, layers that were replaced."""
        if not self._suits(network, x):
            return None
        if not self.engine.allows(x, network.conv_in.weight):
            result: Tensor = network(x)
            return result

        def plan() -> partial[list[Tensor]]:
            return partial(direction, self._plan(x, stages, network), network)

        maps = max(h * w * (stage.in_channels + stage.out_channels) for h, w, stage in stages)
        # Triton and CUDA graphs take the current GPU, whichever the tensors are on.
        with torch.cuda.device_of(x):
            if self.engine.compiles(x) and is_replayable(x, len(x) * maps * x.dtype.itemsize):
                return replayed(network.source, x, plan, partial(joined, dtype=x.dtype))
            with torch.inference_mode():
                strips = plan()(x)
            return joined(strips, x.dtype)

    def _suits(self, network: Any, x: Tensor) -> bool:
        return (
            is_ordinary(x)
            and not torch_layers_are_replaced()
            and all(is_unchanged(module, self.types) for module in modules_within(network.source))
        )

    def _plan(self, x: Tensor, stages: list[tuple[int, int, Stage]], network: Any) -> StreamPass:
        """Strips as large as the bound allows. Raises ValueError where even strips of two rows are too much."""
        device, dtype, bound = x.device.type, self.engine.dtype(x), self.engine.bound(x.device)
        kernels = self.engine.kernels(x)
        is_native = isinstance(kernels, NativeKernels)
        weights = _weight_bytes(network.source, dtype, is_native)
        lowest = min(stages, key=lambda stage: stage[0] * stage[1])
        widest = lowest[2].widest
        attended = ATTENTION_MAPS * lowest[0] * lowest[1] * widest * len(x) * dtype.itemsize
        blocks = sum(len(stage.resnets) for *_, stage in stages) + len(stages)
        row_bytes = max(w * stage.widest for _, w, stage in stages)
        smallest = 2 * row_bytes * len(x) * dtype.itemsize
        in_hand = STRIPS_A_BLOCK * blocks + (TRANSFORMED_STRIPS if is_native else 0)
        least = weights + max(attended, in_hand * smallest)
        if self.engine.max_memory is None:
            bound += weights  # which are there, or are to be prepared
        elif least > bound:
            raise ValueError(
                f"max_memory {bound:,} bytes is too little for {tuple(x.shape)} in {dtype}: it needs {least:,}, of "
                f"which weights take {weights:,}"
            )
        room = bound - weights
        return StreamPass(
            dtype,
            kernels,
            strip_bytes=min(STRIP_BYTES[device], max(smallest, room // in_hand)),
            score_bytes=min(4 * lowest[0] * lowest[1] * QUERIES_AT_ONCE[device], room // 8),
            scratch=torch.empty(0, dtype=dtype, device=x.device),
            workspace=Workspace() if is_native else None,
            keeps_packed=self.engine.keep_packed,
        )


def _modules_and_forms(*parts: nn.Module) -> list[tuple[Any, ...]]:
    return [(module, form(module)) for part in parts for module in modules_within(part)]


def _weight_bytes(source: nn.Module, dtype: torch.dtype, is_native: bool) -> int:
    """Of the parameters, and of all that is prepared of those taps that count; in a stream all layers run at once."""
    own = prepared = 0
    for weight in source.parameters():
        own += weight.numel() * weight.itemsize
        if weight.ndim > 3:
            taps = weight if weight.ndim == 4 else weight[:, :, -1]
            prepared += max(prepared_bytes(taps, dtype, is_native, True))
    return own + prepared
