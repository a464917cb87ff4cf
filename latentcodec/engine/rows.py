"""A feature map as a sequence of strips: each with its neighbours, in other heights, and what lies around the map.

Shapes: B batch, C channels, W columns, r rows of a strip. Strips are [B, r, W, C].
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

T = TypeVar("T")

Ends = tuple[Tensor, Tensor]
"""The first and the last row of a map [B, 1, W, C]: what circular padding has beyond the other end."""


def ends_of(first: Tensor, last: Tensor) -> Ends:
    """Of a map with these strips at its ends, in memory of their own, so that the strips can be freed."""
    return first[:, :1].clone(), last[:, -1:].clone()


def seen_ends(strips: Iterable[Tensor]) -> Ends:
    """Of a map that is made, and let go of, strip by strip."""
    iterator = iter(strips)
    last = next(iterator)
    first = last[:, :1].clone()
    for last in iterator:  # noqa: B007
        pass
    return first, last[:, -1:].clone()


def ends_for(layer: nn.Conv2d, ends: Callable[[], Ends]) -> Ends | None:
    """The ends of its map for a layer that pads in a circle; None for others, which do not look at them."""
    return ends() if layer.padding_mode == "circular" else None


def _itself(item: Any) -> Tensor:
    strip: Tensor = item
    return strip


def with_neighbours(
    items: Iterable[T], strip_of: Callable[[T], Tensor] = _itself, ends: Ends | None = None
) -> Iterator[tuple[Tensor | None, T, Tensor | None]]:
    """Each item between the last row before it and the strip after it; with `ends`, in a circle."""
    first, last = ends or (None, None)
    iterator = iter(items)
    above, item = last, next(iterator, None)
    while item is not None:
        below = next(iterator, None)
        yield above, item, first if below is None else strip_of(below)
        if below is not None:
            above = strip_of(item)[:, -1:].clone()  # in memory of its own, so that the strip can be freed
        item = below


def regrouped(strips: Iterable[Tensor], rows: int) -> Iterator[Tensor]:
    """The same rows in strips of `rows`, the last one of what is left."""
    parts: list[Tensor] = []
    missing = rows
    for strip in strips:
        start = 0
        while start < strip.shape[1]:
            part = strip[:, start : start + missing]
            parts.append(part)
            start, missing = start + part.shape[1], missing - part.shape[1]
            if not missing:
                yield parts[0] if len(parts) == 1 else torch.cat(parts, 1)
                parts, missing = [], rows
    if parts:
        yield parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def padded(window: Tensor, top: bool, bottom: bool, mode: str) -> Tensor:
    """[B, r + 2, W, C] -> [B, r + 2, W + 2, C]: columns as a convolution of that padding mode would pad them, and rows
    where the window ends at the top or the bottom of the map."""
    inner = 2 if mode == "reflect" else 1  # how far from the border the row lies that is repeated there
    if window.shape[1] == 3 and top and bottom and mode == "reflect":
        F.pad(window[:, 1:2].permute(0, 3, 1, 2), (0, 0, 1, 1), mode)  # a map of one row: torch's own error
    if top:
        window[:, 0] = window[:, inner]
    if bottom:
        window[:, -1] = window[:, -1 - inner]
    return F.pad(window.permute(0, 3, 1, 2), (1, 1, 0, 0), mode).permute(0, 2, 3, 1).contiguous()
