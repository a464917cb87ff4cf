"""LatentStore: the pictures of a finished store by number, in batches, as a stream for training, and for `datasets`.

    store = LatentStore("latents")
    store[7].latent                       # [c, h, w]
    for batch in store.dataset(batch_size=64): ...

Shapes: B batch, c latent channels, h w latent cells, H W pixels.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from latentcodec.store.format import CODEC, Index, Shape, StoreError
from latentcodec.store.shard import RowBatch, Shard, as_datasets
from latentcodec.store.stream import LatentBatches

if TYPE_CHECKING:
    from latentcodec.codec import LatentCodec

OTHERS = ("std", "mirrored", "mirrored_std")  # latent columns that an item may have, in its order
OPEN_SHARDS = 16384  # a process may have 65,530 mappings


class Item(NamedTuple):
    """One picture of a store."""

    id: str
    """Its path within its source."""
    latent: Tensor
    """[c, h, w]: normalised, as `codec.encode` gives it; float32 where int8 or float8 is stored."""
    size: tuple[int, int]
    """H, W in pixels, for `codec.decode(latent[None], size=size)`."""
    caption: str | None
    label: int | None
    source: str
    """The folder, tar or data set that it came from."""
    original_size: tuple[int, int]
    """H, W of the picture before it was resized."""
    crop: tuple[int, int]
    """Top and left of what was cut out of the resized picture."""
    std: Tensor | None = None
    """[c, h, w]: the posterior's deviation, where the store holds it; `latent` is its mean."""
    mirrored: Tensor | None = None
    """[c, h, w]: the latent of the mirrored picture, where the store holds it."""
    mirrored_std: Tensor | None = None


class LatentStore:
    """The pictures of a store. It is a map-style torch Dataset of `Item`s itself."""

    def __init__(
        self, folder: str | Path, codec: LatentCodec | str | None = None, check: bool = False
    ) -> None:
        """Opens a finished store.

        `codec`: the codec (or its fingerprint) that the latents must have been made with; another is refused. With
        `check` each row is compared with its checksum as it is read. Raises StoreError (a ValueError) naming what is
        missing or damaged.
        """
        self.folder = Path(folder).expanduser()
        if not self.folder.is_dir():
            raise StoreError(f"{self.folder}: there is no such store")
        self.index = Index.load(self.folder)
        self.check = check
        self._ends = list(accumulate(entry.items for entry in self.index.shards))
        self._open: OrderedDict[int, Shard] = OrderedDict()
        if codec is not None:
            self._require(codec if isinstance(codec, str) else codec.fingerprint)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}  # what it maps, another process maps itself

    def _require(self, given: str) -> None:
        if given != self.fingerprint:
            raise StoreError(
                f"{self.folder}: these latents were made by the codec {self.fingerprint}, the codec given is {given}"
            )

    @property
    def fingerprint(self) -> str:
        """Of the codec that made the latents."""
        return self.index.settings.codec

    @property
    def shapes(self) -> dict[Shape, int]:
        """The shapes (c, h, w) that occur, and how many pictures have each."""
        counts: dict[Shape, int] = {}
        for entry in self.index.shards:
            counts[entry.shape] = counts.get(entry.shape, 0) + entry.items
        return {shape: count for shape, count in counts.items() if count}

    def codec(
        self, device: str | torch.device | None = None, dtype: torch.dtype | None = None
    ) -> LatentCodec:
        """The codec that made the latents, from its copy in the store.

        Raises StoreError where the store was made without a copy, or the copy has changed.
        """
        from latentcodec.codec import LatentCodec

        if not (self.folder / CODEC).is_dir():
            raise StoreError(f"{self.folder}: holds no copy of its codec; give the codec {self.fingerprint}")
        codec = LatentCodec.from_pretrained(self.folder / CODEC, device=device, dtype=dtype)
        self._require(codec.fingerprint)
        return codec

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __iter__(self) -> Iterator[Item]:
        return (self[i] for i in range(len(self)))

    def place(self, index: int) -> tuple[int, int]:
        """Number in the index's list of shards, and row, of a picture. Raises IndexError."""
        length = len(self)
        if not 0 <= index < length:
            if not -length <= index < 0:
                raise IndexError(f"{self.folder}: picture {index} of {length}")
            index += length
        number = bisect_right(self._ends, index)
        return number, index - (self._ends[number - 1] if number else 0)

    def shard(self, number: int) -> Shard:
        """A shard, by its number in the index's list; it stays open."""
        shard = self._open.get(number)
        if shard is None:
            entry = self.index.shards[number]
            shard = Shard(self.folder / entry.file, self.index.settings, entry.shape, entry.items)
            if len(self._open) >= OPEN_SHARDS:
                self._open.popitem(last=False)
            self._open[number] = shard
        return shard

    def __getitem__(self, index: int) -> Item:
        number, row = self.place(index)
        shard = self.shard(number)
        if self.check:
            _require_intact(shard, [row])
        height, width, original_height, original_width, top, left = shard.numbers(row)
        return Item(
            shard.text(row, "id"), shard.latent(row), (height, width), shard.text(row, "caption"),
            shard.text(row, "label"), shard.text(row, "source"), (original_height, original_width), (top, left),
            *(shard.latent(row, name) if name in shard.names else None for name in OTHERS),
        )  # fmt: skip

    def __getitems__(self, indices: Sequence[int]) -> list[Item]:  # what a DataLoader asks for a batch
        return [self[index] for index in indices]

    def batch(self, indices: Sequence[int]) -> dict[str, Any]:
        """Some pictures of one latent shape, stacked.

        `latent` [B, c, h, w] (and `std`, `mirrored`, `mirrored_std` where stored); `size`, `original_size` and `crop`
        [B, 2] int64; `id`, `source`, `caption`, `label`: lists. Raises ValueError where the shapes differ.
        """
        groups: dict[int, tuple[list[int], list[int]]] = {}  # shard -> positions in the batch, rows
        for position, index in enumerate(indices):
            number, row = self.place(index)
            positions, rows = groups.setdefault(number, ([], []))
            positions.append(position)
            rows.append(row)
        shards = {number: self.shard(number) for number in groups}
        if len(shapes := {shard.shape for shard in shards.values()}) != 1:
            raise ValueError(f"the pictures of a batch have one latent shape, not {sorted(shapes)}")
        rows_of_batch = RowBatch(next(iter(shards.values())), len(indices))
        for number, (positions, rows) in groups.items():
            if self.check:
                _require_intact(shards[number], rows)
            rows_of_batch.put(shards[number], positions, rows)
        return rows_of_batch.as_dict()

    def dataset(self, batch_size: int, **options: Any) -> LatentBatches:
        """A torch IterableDataset of batches, see `LatentBatches` for the options.

        Shuffled by (seed, epoch), divided among ranks and workers, drawn from mean and std where they are stored.
        """
        return LatentBatches(self, batch_size, **options)

    def to_datasets(self) -> Any:
        """The store for the `datasets` library, without a copy: a Dataset, or a DatasetDict with one for each shape.

        The latents are flat lists of c h w numbers; the scales of int8 and bytes of bfloat16 and float8 are as stored.
        """
        filled = (number for number, entry in enumerate(self.index.shards) if entry.items)
        return as_datasets(self.shard(number) for number in filled)


def _require_intact(shard: Shard, rows: Sequence[int]) -> None:
    for row in rows:
        if not shard.is_intact(row):
            raise StoreError(f"{shard.path}: item {row} is damaged; `latentcodec verify` lists all that are")
