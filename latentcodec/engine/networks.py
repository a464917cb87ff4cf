"""Encoder and Decoder that run on the engine: in strips without gradients, with fused functions with them.

The parameters, their names and the numbers are those of `vae/networks.py`. `adopt.py` builds these networks.

Shapes: B batch, C image channels, c latent channels, H W pixels, h w latent cells.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Self

from torch import Tensor, nn

from latentcodec.engine.checks import forms_within
from latentcodec.engine.layers import FAST_LAYERS, norm_act
from latentcodec.engine.plan import Engine, forget
from latentcodec.vae.networks import Decoder, Encoder


class _OnEngine(nn.Module):
    """What both networks have in common."""

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        """All that moves parameters comes by here: recordings and prepared weights would stay, of no use to anybody."""
        before = next(self.parameters())
        device, dtype = before.device, before.dtype
        super()._apply(fn, recurse)
        after = next(self.parameters())
        if (after.device, after.dtype) != (device, dtype):
            forget(self)
        return self


class EngineEncoder(_OnEngine, Encoder):
    """Image to posterior moments: [B, C, H, W] in [-1, 1] -> [B, 2c, h, w] (mean, log-variance)."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config, FAST_LAYERS)
        self.engine = Engine()
        self.built_as = forms_within(self)

    def forward(self, sample: Tensor) -> Tensor:
        if self.engine.applies(self, sample):
            return self.engine.encode(self, sample)
        return super().forward(sample)

    def norm_out(self, x: Tensor) -> Tensor:
        return norm_act(x, self.conv_norm_out, self.conv_act)


class EngineDecoder(_OnEngine, Decoder):
    """Latents to image: [B, c, h, w] -> [B, C, H, W], in [-1, 1] up to the reconstruction error."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config, FAST_LAYERS)
        self.engine = Engine()
        self.built_as = forms_within(self)

    def forward(self, sample: Tensor, latent_embeds: Tensor | None = None) -> Tensor:
        if latent_embeds is None and self.engine.applies(self, sample):
            return self.engine.decode(self, sample)
        return super().forward(sample, latent_embeds)

    def norm_out(self, x: Tensor) -> Tensor:
        return norm_act(x, self.conv_norm_out, self.conv_act)


def is_on_engine(network: nn.Module) -> bool:
    """Whether it is one of these networks, or wraps one."""
    return any(isinstance(module, _OnEngine) for module in network.modules())
