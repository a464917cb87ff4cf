"""Convolutions of channels-last windows with weights packed for oneDNN, for exactly the shapes they are called with.

oneDNN chooses the layout of a weight by the shape of the input. Packed without one, or for another, a weight is
reordered in every call: for strips that took a third of the time. A layer sees few shapes (its strips and the last one
of what is left), and most of them want one layout, so few copies are kept.

The operators are those of inductor's frozen graphs and no public interface, and oneDNN has had wrong results for small
bfloat16 kernels (pytorch #163347): so each is tried before it is trusted.

Shapes: B batch, r rows, W columns, C channels, C' output channels; windows are [B, r, W, C].
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

log = logging.getLogger(__name__)

Convolution = Callable[[Tensor, Tensor | None, Tensor | None], Tensor]
"""A window, a bias [C'] and a residual [B, r', W', C'], added where they are given -> [B, r', W', C']."""

SHAPES = 16  # for which a layer keeps its packed weight at once


class _PackedWeight:
    """A weight in the layouts that the shapes seen so far want."""

    def __init__(self, reorder: Callable[..., Tensor], weight: Tensor, settings: tuple[Any, ...]) -> None:
        self.reorder, self.weight, self.settings = reorder, weight, settings
        self.by_shape: dict[torch.Size, Tensor] = {}

    def __getitem__(self, shape: torch.Size) -> Tensor:
        packed = self.by_shape.get(shape)
        if packed is None:
            packed = self.reorder(self.weight, *self.settings, list(shape))
            for other in list(self.by_shape.values()):
                if torch.equal(_layout(other), _layout(packed)):
                    packed = other
            if len(self.by_shape) >= SHAPES:
                self.by_shape.clear()
            self.by_shape[shape] = packed
        return packed


def _layout(packed: Tensor) -> Tensor:
    """oneDNN's description of how the values lie."""
    layout: Tensor = torch.ops.mkldnn._get_mkldnn_serialized_md(packed)
    return layout


def packed_convolution(weight: Tensor, stride: int, columns: int) -> Convolution:
    """[B, r, W, C] with weight [C', C, k, k], `columns` zeros padded left and right -> [B, r', W', C']."""
    settings: Any = [0, columns], [stride, stride], [1, 1], 1  # padding, stride, dilation, groups
    packed = _PackedWeight(torch.ops.mkldnn._reorder_convolution_weight, weight, settings)
    run = torch.ops.mkldnn._convolution_pointwise

    def convolve(window: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
        x = window.permute(0, 3, 1, 2)
        if residual is None:
            y = run(x, packed[x.shape], bias, *settings, "none", [], "")
        else:
            added = residual.permute(0, 3, 1, 2)
            y = run.binary(x, added, packed[x.shape], bias, *settings, "add", 1.0, None, [], None)
        return y.permute(0, 2, 3, 1)

    return convolve


def packed_upsample_convolution(weight: Tensor) -> Convolution:
    """[B, r + 2, W, C] with a folded weight [C, C', 4, 4] (`fold_upsample_weight`) -> [B, 2r, 2W, C']."""
    settings: Any = [3, 1], [0, 0], [2, 2], [1, 1], 1  # padding, output padding, stride, dilation, groups
    packed = _PackedWeight(torch.ops.mkldnn._reorder_convolution_transpose_weight, weight, settings)
    run = torch.ops.mkldnn._convolution_transpose_pointwise

    def convolve(window: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
        x = window.permute(0, 3, 1, 2)
        y = run(x, packed[x.shape], bias, *settings, "none", [], "").permute(0, 2, 3, 1)
        return y if residual is None else y.add_(residual)

    return convolve


@cache
def packs_correctly(device_type: str, dtype: torch.dtype) -> bool:
    """Whether this torch packs weights as we ask it to, and then gives what plain convolutions give."""
    if device_type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    generator = torch.Generator("cpu").manual_seed(0)
    shapes = (1, 6, 7, 32), (48, 32, 3, 3), (32, 48, 4, 4), (48,), (1, 4, 7, 48)
    window, direct, folded, bias, residual = (
        torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(dtype)
        for shape in shapes
    )
    direct, folded = (weight.to(memory_format=torch.channels_last) for weight in (direct, folded))
    x = window.permute(0, 3, 1, 2)
    plain = F.conv2d(x, direct, bias, 1, (0, 1)).permute(0, 2, 3, 1)
    upsampled = F.conv_transpose2d(x, folded, bias, 2, (3, 1)).permute(0, 2, 3, 1)
    try:
        pairs = (
            (packed_convolution(direct, 1, 1)(window, bias, None), plain),
            (packed_convolution(direct, 1, 1)(window, bias, residual), plain + residual),
            (packed_upsample_convolution(folded)(window, bias, None), upsampled),
        )
    except (AttributeError, RuntimeError) as error:
        log.warning("this torch does not pack %s weights, and convolutions are slower: %s", dtype, error)
        return False
    tolerance = 1e-5 + 2 * torch.finfo(dtype).eps  # of the largest value: sums in another order, rounded once
    if all((ours - theirs).abs().max() <= tolerance * theirs.abs().max() for ours, theirs in pairs):
        return True
    log.warning("this torch packs %s weights wrongly, so they are left as they are: slower", dtype)
    return False
