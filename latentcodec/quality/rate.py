"""How many bits a latent takes at a precision, and what that costs: the points of a rate-distortion curve.

Shapes: N images, c latent channels, h w latent cells.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from latentcodec.quality.decoder_measures import int8, int8_in_blocks

Rounding = Callable[[Tensor], tuple[Tensor, float]]
"""z [1, c, h, w] -> what comes back, and the bits of one value."""


def cast(z: Tensor, dtype: torch.dtype) -> tuple[Tensor, float]:
    """Through a floating point type."""
    return z.to(dtype).to(z), 8.0 * dtype.itemsize


def levels(z: Tensor, step: float) -> tuple[Tensor, float]:
    """Rounded to multiples of `step` deviations; bits: the entropy of each channel's values, what an ideal coder takes.

    The coder would know each channel's histogram over this image, which is not counted: small images look too cheap.
    """
    whole = (z / step).round()
    bits = 0.0
    for channel in whole[0]:
        counts = torch.unique(channel, return_counts=True)[1].double()
        share = counts / counts.sum()
        bits += -(share * share.log2()).sum().item()
    return whole * step, bits / z.shape[1]


ROUNDINGS: dict[str, Rounding] = {
    "float32": partial(cast, dtype=torch.float32),
    "float16": partial(cast, dtype=torch.float16),
    "bfloat16": partial(cast, dtype=torch.bfloat16),
    "int8": lambda z: (int8(z), 8.0),
    "int8 in blocks": lambda z: (int8_in_blocks(z), 8.125),
    "steps of 1/8": partial(levels, step=0.125),
    "steps of 1/4": partial(levels, step=0.25),
    "steps of 1/2": partial(levels, step=0.5),
    "steps of 1": partial(levels, step=1.0),
}
"""By what a page calls them; steps are in deviations of the latents, their bits an entropy."""
