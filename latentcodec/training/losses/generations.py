"""Pictures that have been through the codec before: what makes encoding and decoding many times change little.

A picture loses what the latent cannot hold in its first generation. A codec moves it further in every one after it, in
nearly the same direction each time, since nobody asks of it to know its own pictures again. Here some samples are given
as their K-th generation, and the first is what their reconstruction should be: at K = 1 a picture that comes back as it
is, beyond that one that is led back.

Shapes: B batch, C image channels, H W pixels; pixels in [-1, 1].
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from latentcodec.pixels import from_uint8, to_uint8
from latentcodec.randomness import Purpose, keyed_uniform
from latentcodec.training.losses.regularizers import RegularizerConfig


def draw_generations(config: RegularizerConfig, seed: int, positions: Tensor) -> Tensor:
    """[B] whole numbers, on the CPU, keyed by position: how often each sample has been through the codec before.

    `generations_share` of the samples have a number from 1 to `generations`, each as likely; the others have 0.
    """
    chance, number = keyed_uniform(seed, positions, (2,), Purpose.GENERATIONS).unbind(1)
    chosen = chance < config.generations_share
    return torch.where(chosen, 1 + (number * config.generations).long(), 0)


@torch.no_grad()
def earlier_generations(
    x: Tensor, generations: Tensor, recode: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Images x [B, C, H, W] as those of `generations` [B], and what they should come back as: their first, or x.

    `recode` is the codec's round trip. Between two of them pictures have 8 bits, as in a file. No gradient.
    """
    given, target = x.clone(), x.clone()
    for earlier in range(1, int(generations.max()) + 1):
        samples = (generations >= earlier).nonzero().flatten().to(x.device)
        recoded = recode(given[samples])
        # What is not finite has no level: it stays, so that the step notices it.
        given[samples] = torch.where(recoded.isfinite(), from_uint8(to_uint8(recoded)), recoded)
        if earlier == 1:
            target[samples] = given[samples]
    return given, target
