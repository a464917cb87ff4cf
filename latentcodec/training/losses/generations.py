"""Pictures after several round trips through the codec, so that it learns not to move them any further.

A codec loses most in the first round trip. Each further one moves the picture a little more, nearly always in the same
direction, because training never shows the codec its own output. Here some samples are pictures after K round trips,
and the target is the picture after the first. K = 1 teaches to change nothing, K > 1 to go back.

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
    """[B] whole numbers, on the CPU, keyed by position: the round trips of each sample before it is trained on.

    `generations_share` of the samples have a number from 1 to `generations`, each equally likely; the others have 0.
    """
    chance, number = keyed_uniform(seed, positions, (2,), Purpose.GENERATIONS).unbind(1)
    chosen = chance < config.generations_share
    return torch.where(chosen, 1 + (number * config.generations).long(), 0)


@torch.no_grad()
def after_round_trips(
    x: Tensor, numbers: Tensor, recode: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Images x [B, C, H, W] after `numbers` [B] of round trips, and after one; where the number is 0, both are x.

    `recode` is one round trip. Between two of them pictures have 8 bits, as in a file. No gradient.
    """
    given, first = x.clone(), x.clone()
    for trip in range(1, int(numbers.max()) + 1):
        samples = (numbers >= trip).nonzero().flatten().to(x.device)
        recoded = recode(given[samples])
        # What is not finite has no level: it stays, so that the step notices it.
        given[samples] = torch.where(recoded.isfinite(), from_uint8(to_uint8(recoded)), recoded)
        if trip == 1:
            first[samples] = given[samples]
    return given, first
