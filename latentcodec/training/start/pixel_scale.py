"""A standard deviation for every pixel, learned beside the decoder while it trains, and left out of what is saved.

The likelihood's scale is usually one number. A VAE may learn one for each pixel instead, from the features that the
decoder makes its picture of: a second last convolution. It then calls hard pixels noise rather than drawing them, which
lowers the likelihood's loss and the picture's quality alike; `experiments/classic_vae` shows how.

Shapes: B batch, C image channels, C' channels of the decoder's last features, H W pixels.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentcodec.training.losses.terms import PIXEL_STEP
from latentcodec.vae.families import family_of


class PixelScale(nn.Module):
    """log sigma [B, C, H, W] from the decoder's last features [B, C', H, W]; it begins at sigma = 1 everywhere.

    Never below one 8-bit level: on pixels that are the same in every image the likelihood would grow without end.
    """

    def __init__(self, vae: Any) -> None:
        """Raises ValueError for a class whose decoder ends otherwise."""
        super().__init__()
        if family_of(vae).has_frames:
            raise ValueError(
                f"loss.scale per_pixel: the decoder of a {family_of(vae).name} has no place for it"
            )
        last: nn.Conv2d = vae.decoder.conv_out
        self.conv = nn.Conv2d(last.in_channels, last.out_channels, 3, padding=1)
        nn.init.zeros_(self.conv.weight)
        assert self.conv.bias is not None
        nn.init.constant_(self.conv.bias, math.log(math.expm1(-math.log(PIXEL_STEP))))

    def forward(self, features: Tensor) -> Tensor:
        with torch.autocast(features.device.type, enabled=False):
            return math.log(PIXEL_STEP) + F.softplus(self.conv(features.float()))


class Features:
    """Context manager: keeps what `layer` was last given."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        self.last: Tensor | None = None

    def __enter__(self) -> Features:
        self._handle = self.layer.register_forward_pre_hook(self._keep)
        return self

    def __exit__(self, *error: object) -> None:
        self._handle.remove()

    def _keep(self, layer: nn.Module, given: tuple[Tensor]) -> None:
        self.last = given[0]
