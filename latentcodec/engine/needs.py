"""How many bytes a pass of a network in strips takes: its weights, what is prepared of them, maps, and what is in hand.

Shapes: B batch, C channels, H W rows and columns of a map.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from latentcodec.ops.convolutions import prepared_bytes
from latentcodec.ops.native.winograd import spare_bytes
from latentcodec.vae.layers import Stage

STRIPS_AT_ONCE = 12  # that a block holds at most: windows, results and neighbours
TRANSFORMED_STRIPS = 5  # and Winograd's tiles and products of one: 36 values for 16 of each
ATTENTION_MAPS = (
    7  # of the input's size that attention holds: x, norm(x), q, k, v, the weighted sum, its projection
)


@dataclass(frozen=True)
class Needs:
    """Bytes that a pass takes, by what they are for."""

    weights: int
    """Of the network's weights and of all that is prepared of them."""
    stages: tuple[tuple[int, int], ...]
    """Of the feature maps of each stage: where its inner maps are kept, and where they are made a second time."""
    other_maps: int
    """Of the largest of these: what attention holds, the first map beside the input, the last beside the result."""
    strips_at_once: int
    smallest_strip: int
    """Of two rows of the widest map."""
    query: int
    """Of the attention scores of one query in float32; 0 without attention."""

    @property
    def least(self) -> int:
        """The smallest bound with which a pass runs."""
        return self.weights + self.maps(0) + self.in_hand

    @property
    def in_hand(self) -> int:
        """Of the smallest strips, or of the scores of one query beside their softmax: the larger of the two."""
        return max(self.strips_at_once * self.smallest_strip, 2 * self.query)

    def maps(self, map_bytes: int) -> int:
        """Of feature maps, where a stage keeps its inner maps if that takes at most `map_bytes`."""
        held = (kept if kept <= map_bytes else remade for kept, remade in self.stages)
        return max(self.other_maps, *held)

    def map_bytes(self, bound: int) -> int:
        """What the feature maps of a stage may take under `bound`."""
        return max(0, bound - self.weights - self.in_hand)

    def room(self, bound: int) -> int:
        """What `bound` leaves beside the weights and the maps."""
        return bound - self.weights - self.maps(self.map_bytes(bound))

    def strip_bytes(self, bound: int, largest: int) -> int:
        """Of a strip: as large as it should be, or as `bound` leaves room for."""
        wanted = min(largest, bound // (4 * self.strips_at_once), self.room(bound) // self.strips_at_once)
        return max(self.smallest_strip, wanted)

    def score_bytes(self, bound: int, queries: int) -> int:
        """Of the scores of as many queries, or of as many as `bound` leaves room for."""
        wanted = min(self.query * queries, bound // 8, self.room(bound) // 2)
        return max(self.query if queries else 0, wanted)


def needs_of(
    network: Any,
    x: Tensor,
    dtype: torch.dtype,
    stages: list[tuple[int, int, Stage]],
    is_native: bool,
    keep_packed: bool,
) -> Needs:
    """Of a pass over x [B, C, H, W] in `dtype`, given the stages with the heights and widths of their maps."""
    middle, item = network.mid_block, len(x) * dtype.itemsize
    first, last = x.shape[1], network.conv_out.out_channels
    lowest = min(h * w for h, w, _ in stages)
    attended = lowest * middle.resnets[0].conv1.out_channels * ATTENTION_MAPS if middle.attentions else 0
    # The input as rows of pixels beside the first map, and the last one beside the result, which is then joined.
    ends = max(
        _pixels(stages[0]) * (first + network.conv_in.out_channels),
        _result_pixels(stages) * max(network.conv_out.in_channels + last, 3 * last),
    )
    held = (
        tuple(item * _pixels(stage) * channels_at_once(stage[2], keeps) for keeps in (True, False))
        for stage in stages
    )
    widest = max(w * max(stage.in_channels, stage.out_channels, first, last) for _, w, stage in stages)
    return Needs(
        weights=_weight_bytes(network, dtype, is_native, keep_packed),
        stages=tuple((kept, remade) for kept, remade in held),
        other_maps=item * max(attended, ends),
        strips_at_once=STRIPS_AT_ONCE + (TRANSFORMED_STRIPS if is_native else 0),
        smallest_strip=2 * item * widest,
        query=4 * lowest if middle.attentions else 0,
    )


def channels_at_once(stage: Stage, keeps: bool) -> int:
    """Channels of all maps that a block of a stage holds at most, its input being freed as it is read."""
    if stage.attentions:
        return ATTENTION_MAPS * stage.out_channels
    return max(stage.in_channels, 2 * stage.out_channels) if keeps else stage.out_channels


def _pixels(stage: tuple[int, int, Stage]) -> int:
    return stage[0] * stage[1]


def _result_pixels(stages: list[tuple[int, int, Stage]]) -> int:
    """Of the network's result: an encoder ends in the smallest map, a decoder in the largest."""
    return _pixels(stages[-1])


def _weight_bytes(network: nn.Module, dtype: torch.dtype, is_native: bool, keep_packed: bool) -> int:
    """Of the network's parameters, what is prepared of them, and the most that two convolutions need while they run."""
    weights = list(network.parameters())
    convolved = [weight for weight in weights if weight.ndim > 2]
    prepared = [prepared_bytes(weight, dtype, is_native, keep_packed) for weight in convolved]
    running = sorted(passes for _, passes in prepared)[-2:]
    spare = max((spare_bytes(weight) for weight in convolved), default=0) if is_native else 0
    own = sum(weight.numel() * weight.itemsize for weight in weights)
    return own + sum(stays for stays, _ in prepared) + sum(running) + spare
