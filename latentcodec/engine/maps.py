"""A feature map as a sequence of strips, which are kept until they have been read, or made again at each reading.

Shapes: B batch, C channels, H W rows and columns of a map, r rows of a strip. Strips are [B, r, W, C].
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

from latentcodec.engine.rows import Ends, ends_of, seen_ends
from latentcodec.ops.pointwise import Moments

T = TypeVar("T")


@dataclass(frozen=True)
class Map:
    """A feature map [B, H, W, C] as strips."""

    moments: Moments
    strips: Callable[[bool], Iterator[Tensor]]
    """From the top; with True for the last time, so that each is freed once it has been read."""
    ends: Callable[[], Ends]
    """To be asked for before the last time."""


def kept_map(moments: Moments, strips: Iterable[Tensor]) -> Map:
    """The map of strips that are counted in as they are made."""
    kept = deque(strips)
    return Map(
        moments, lambda last: _drained(kept) if last else iter(kept), lambda: ends_of(kept[0], kept[-1])
    )


def kept_or_remade(
    make: Callable[[bool], Iterator[T]], strip_of: Callable[[T], Tensor], keeps: bool
) -> tuple[Iterator[T], Callable[[], Ends]]:
    """All that `make` yields, after it has run to its end once: kept since then, or made again; and its ends."""
    if keeps:
        kept = deque(make(True))
        return _drained(kept), lambda: ends_of(strip_of(kept[0]), strip_of(kept[-1]))
    ends = seen_ends(map(strip_of, make(False)))
    return make(True), lambda: ends


def _drained(items: deque[T]) -> Iterator[T]:
    while items:
        yield items.popleft()
